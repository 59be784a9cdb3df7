"""generate on several machines: parts of the work, their files taken in, what is left, and long lists."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import PHOTO, PLAIN, SHAPES
from click.testing import CliRunner, Result

from mlx_vlm_mini.cli import awake as awake_module
from mlx_vlm_mini.cli import progress, questions
from mlx_vlm_mini.cli.answers import Keys, Output
from mlx_vlm_mini.cli.awake import awake
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.cli.part import Part, find_part, part_files
from mlx_vlm_mini.cli.progress import Progress, Tally, duration
from mlx_vlm_mini.errors import PromptError

PROGRAM = Path(sys.executable).with_name("mlx-vlm-mini")


def run(*arguments: object, **options: object) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def generate(*arguments: object, **options: object) -> Result:
    return run("generate", PLAIN, "--max-tokens", 3, *arguments, **options)


def entries(file: Path) -> dict[str, dict]:
    """Lines by key; each key stands once."""
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({entry["key"] for entry in found}) == len(found)
    return {entry["key"]: entry for entry in found}


def said(file: Path) -> dict[str, tuple]:
    """What of a file does not depend on when it was written."""
    return {
        key: (entry.get("text"), entry.get("token_ids"), entry["images"], entry["prompt"])
        for key, entry in entries(file).items()
    }


@pytest.fixture
def asked(tmp_path):
    """Ten prompts, one of them twice, and the answers to them in one run."""
    (tmp_path / "prompts.txt").write_text("".join(f"Question {n}?\n" for n in range(9)) + "Question 0?\n")
    whole = tmp_path / "whole.jsonl"
    command = ("--prompt-file", tmp_path / "prompts.txt", "--output")
    assert generate(*command, whole).exit_code == 0
    assert len(entries(whole)) == 10
    return command, whole


def test_parts_of_any_number_make_the_whole(asked, tmp_path):
    command, whole = asked
    out = tmp_path / "out.jsonl"
    for number in (1, 3):
        assert generate(*command, out, "--part", f"{number}/3").exit_code == 0
    assert not out.exists()
    counts = [len(entries(file)) for _, file in part_files(out)]
    assert counts == [4, 3] and [file.name for _, file in part_files(out)] == [
        "out.jsonl.part-1-of-3",
        "out.jsonl.part-3-of-3",
    ]
    again = generate(*command, out, "--part", "2/2")  # another number of machines: what others answered is left out
    assert "out.jsonl.part-2-of-2 holds 3 of 5 answers already" in again.stderr
    last = generate(*command, out)
    assert last.exit_code == 0 and f"{out} holds 9 of 10 answers already" in last.stderr
    assert said(out) == said(whole)
    assert {file.name for file in tmp_path.iterdir()} == {"out.jsonl", "whole.jsonl", "prompts.txt"}
    for part in ("1/2", "7/7"):
        nothing = generate(*command, out, "--part", part)
        assert nothing.exit_code == 0 and "answers already" in nothing.stderr
    empty = generate(*command, tmp_path / "other.jsonl", "--part", "11/12")  # no question is left for it
    assert empty.exit_code == 0 and empty.stderr == ""


def test_questions_about_a_picture_are_of_one_part(tmp_path):
    (tmp_path / "prompts.txt").write_text("What is it?\nHello\n")
    (tmp_path / "list.txt").write_text(f"{PHOTO}\n{SHAPES}\n\n{PHOTO}[2]\n")
    out = tmp_path / "out.jsonl"
    result = generate(
        "--prompt-file",
        tmp_path / "prompts.txt",
        "--images-from",
        tmp_path / "list.txt",
        "--output",
        out,
        "--part",
        "2/2",
    )
    assert result.exit_code == 0
    (file,) = (file for _, file in part_files(out))
    assert [entry["images"] for entry in entries(file).values()] == [[str(SHAPES)]] * 2


def test_what_parts_have_twice_is_taken_in_once(asked, tmp_path):
    command, whole = asked
    out = tmp_path / "out.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    error = json.dumps({"key": json.loads(lines[4])["key"], "error": "broken"}) + "\n"
    other = '{"key": "0123", "images": [], "prompt": "of another run", "text": "\\"error\\": not"}\n'
    out.write_text(lines[0] + lines[1])
    Part(1, 2).file(out).write_text(lines[1] + lines[2] + error + lines[3][:50])  # killed while it wrote
    Part(2, 3).file(out).write_text(error + lines[2] + lines[4] + other)
    with Output(out) as output:
        assert len(output.done) == 5
    assert out.read_text() == lines[0] + lines[1] + lines[2] + error + lines[4] + other
    assert not part_files(out)
    assert json.loads(run("status", out, "--json").stdout)["failed"] == 0
    assert generate(*command, out).exit_code == 0
    found = [json.loads(line) for line in out.read_text().splitlines() if '"error": "' not in line]
    assert {entry["key"] for entry in found} == {"0123", *entries(whole)} and len(found) == 11


def test_a_part_that_runs_is_not_taken_in(tmp_path):
    out = tmp_path / "out.jsonl"
    with Output(out, Part(1, 2)):
        with pytest.raises(PromptError, match=r"another run is writing .*out\.jsonl\.part-1-of-2"):
            Output(out, Part(1, 2))
        with pytest.raises(PromptError, match="another run is writing"):
            Output(out)
        Output(out, Part(2, 2)).__exit__(None, None, None)
    Output(out).__exit__(None, None, None)
    with pytest.raises(PromptError, match="name a file"):
        Output(Path("/dev/null"), Part(1, 2))


def test_a_file_that_was_taken_in_while_it_was_opened_is_opened_anew(tmp_path, monkeypatch):
    """Else its answers would be written into a file that no folder names any more."""
    from mlx_vlm_mini.cli import answers

    out, lock = tmp_path / "out.jsonl", answers.fcntl.flock
    removed: list[Path] = []

    def slow(file, how):
        if not removed:
            removed.append(Part(1, 2).file(out))
            removed[0].unlink()
        lock(file, how)

    monkeypatch.setattr(answers.fcntl, "flock", slow)
    with Output(out, Part(1, 2)) as output:
        output.write("a", {"text": ""})
    assert removed and Part(1, 2).file(out).read_text() == '{"key": "a", "text": ""}\n'


def test_disks_without_locks(tmp_path, monkeypatch):
    from mlx_vlm_mini.cli import answers

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(answers.fcntl, "flock", refuse)
    with Output(tmp_path / "out.jsonl") as output:
        output.write("a", {})


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"MLX_RANK": "1", "MLX_WORLD_SIZE": "4"}, (2, 4)),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (1, 2)),
        ({"PMI_RANK": "2", "PMI_SIZE": "3"}, (3, 3)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "4"}, (4, 4)),
        ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}, (4, 8)),
        ({"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "3"}, (3, 3)),
        ({"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3"}, (5, 6)),
    ],
)  # fmt: skip
def test_what_launchers_say(environment, part):
    assert find_part(environment) == Part(*part)


def test_what_mlx_launch_says(tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[["127.0.0.1:41001"], ["127.0.0.1:41002"], ["127.0.0.1:41003"]]')
    assert find_part({"MLX_RANK": "2", "MLX_HOSTFILE": str(hosts)}) == Part(3, 3)
    for bad in ({}, {"MLX_RANK": "1"}, {"MLX_RANK": "1", "MLX_HOSTFILE": "none"}, {"MLX_RANK": "x", "MLX_WORLD_SIZE": "2"}, {"PMI_RANK": "2", "PMI_SIZE": "2"},
                {"SLURM_ARRAY_TASK_ID": "9", "SLURM_ARRAY_TASK_COUNT": "3"}):  # fmt: skip
        with pytest.raises(ValueError, match="give --part K/N"):
            find_part(bad)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "-1/2", "auto"])
def test_parts_that_are_none(part, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "PMI_", "OMPI_", "MLX_RANK"))]:
        monkeypatch.delenv(name)
    result = generate("-p", "x", "--output", tmp_path / "o.jsonl", f"--part={part}")
    assert result.exit_code == 2 and "Invalid value for '--part'" in result.stderr
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    assert generate("-p", "x", "--output", tmp_path / "o.jsonl", "--part", "auto").exit_code == 0


def test_what_goes_with_a_part(tmp_path):
    assert generate("-p", "x", "--part", "1/2").exit_code == 2
    assert generate("-p", "x", "-i", PHOTO, "--images-from", "list").exit_code == 2
    assert generate("--prompt-file", "-", "--images-from", "-").exit_code == 2


def test_a_killed_run_is_continued(asked, tmp_path):
    """SIGKILL at random moments, with changing numbers of parts: the same answers, none twice."""
    command, whole = asked
    out, draw = tmp_path / "out.jsonl", random.Random(5)
    for count in (1, 2, 3):
        parts = [("--part", f"{number}/{count}") if count > 1 else () for number in range(1, count + 1)]
        line = [PROGRAM, "generate", PLAIN, "--max-tokens", "3", *command, out]
        running = [subprocess.Popen([*map(str, (*line, *part))], stderr=subprocess.DEVNULL) for part in parts]
        time.sleep(draw.uniform(0.3, 1.2))
        for each in running:
            each.send_signal(signal.SIGKILL)
            each.wait()
    assert generate(*command, out).exit_code == 0
    assert said(out) == said(whole) and not part_files(out)


def test_a_list_is_read_while_it_is_written(tmp_path):
    """An answer is there before the next name is."""
    out = tmp_path / "out.jsonl"
    command = [PROGRAM, "generate", PLAIN, "-p", "What?", "--images-from", "-", "--output", out, "--max-tokens", "2"]
    with subprocess.Popen([*map(str, command)], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdin is not None
        for count, name in enumerate([PHOTO, SHAPES, "none.png"], 1):
            running.stdin.write(f"{name}\n")
            running.stdin.flush()
            end = time.monotonic() + 60
            while not out.exists() or len(out.read_text().splitlines()) < count:
                assert time.monotonic() < end, "no answer while the pipe is open"
                time.sleep(0.05)
        _, notes = running.communicate()
    assert running.returncode == 1 and "1 of 3 could not be answered" in notes
    assert [entry.get("error", "") != "" for entry in entries(out).values()] == [False, False, True]


def test_lists_of_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text(f"{PHOTO}\r\n \nreport.pdf\n{SHAPES}\n")
    found = generate("-p", "What?", "--images-from", "list.txt")
    assert found.exit_code == 1
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    assert [entry["images"] for entry in lines] == [[str(PHOTO)], ["report.pdf"], [str(SHAPES)]]
    assert "report.pdf" in lines[1]["error"] and "text" in lines[0]
    piped = generate("-p", "What?", "--images-from", "-", input=f"{PHOTO}\n")
    assert json.loads(piped.stdout)["key"] == lines[0]["key"]
    (tmp_path / "empty.txt").write_text("\n")
    for name, message in (("none.txt", "cannot read none.txt"), ("empty.txt", "there are no pictures in empty.txt")):
        result = generate("-p", "What?", "--images-from", name)
        assert result.exit_code == 1 and message in result.stderr


def test_a_broken_line_far_down_is_written_with_its_error(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "CHECKED", 1)
    good = json.dumps({"messages": [{"role": "user", "content": "Hi"}]})
    (tmp_path / "q.jsonl").write_bytes(f"{good}\n{{\n".encode() + b"\xff\n" + f"{good}\n".encode())
    result = generate("--prompt-file", tmp_path / "q.jsonl")
    assert result.exit_code == 1 and "q.jsonl:2: not a line" in result.stderr and "2 of 4 could not" in result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert ["error" in line for line in lines] == [False, True, True, False]
    assert "line 3 is not UTF-8" in lines[2]["error"]
    monkeypatch.undo()
    assert "q.jsonl:2" in generate("--prompt-file", tmp_path / "q.jsonl").stderr


def test_status_counts_over_all_parts(asked, tmp_path):
    command, _ = asked
    out = tmp_path / "out.jsonl"
    missing = run("status", out)
    assert missing.exit_code == 1 and "no such file" in missing.stderr
    assert generate(*command, out, "--part", "1/3").exit_code == 0
    Part(2, 3).file(out).write_text(
        '{"key": "a-2", "error": "broken"}\n{"key": "a", "error": "x"}\n{"key": "a", "text": ""}\n{"ke'
    )
    said = run("status", out)
    assert said.exit_code == 0
    assert said.stdout.splitlines()[0] == f"{out}: 5 done, 1 failed, 4 left of 10"
    assert said.stdout.splitlines()[1].startswith("  part 1 of 3: 4 of 4, ") and "ended" in said.stdout
    found = json.loads(run("status", out, "--json").stdout)
    assert {name: found[name] for name in ("done", "failed", "left", "total")} == {"done": 5, "failed": 1, "left": 4, "total": 10}  # fmt: skip
    assert generate(*command, out).exit_code == 0
    assert run("status", out).stdout == f"{out}: 11 done, 1 failed, 0 left\n"
    (tmp_path / "notes.txt").write_text("notes\n")
    assert "is no answer of generate" in run("status", tmp_path / "notes.txt").stderr


def test_progress_in_a_log_and_in_a_file(tmp_path, monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    tally = Tally(total=40, share=20, held=2)
    shown = Progress(tally, tmp_path / "out.jsonl", Part(1, 2))
    shown.start()
    now[0] += 60
    tally.answered, tally.failed = 5, 1
    shown.update("a.png")
    assert capsys.readouterr().err == "answering: 8/20, 1 failed, 6.0 pictures/min, 2 min left\n"
    note = progress.read_note(tmp_path / "out.jsonl")
    assert note is not None and note["part"] == [1, 2] and note["running"] and note["per_minute"] == 6.0
    shown.remove(tmp_path / "out.jsonl")
    assert progress.read_note(tmp_path / "out.jsonl") is None and not [*tmp_path.iterdir()]
    assert [duration(s) for s in (5, 600, 3600 * 3 + 300, 3600 * 24 * 4)] == ["5 s", "10 min", "3 h 05 min", "4 days"]


def test_keys_are_a_set(monkeypatch):
    monkeypatch.setattr(Keys, "_FEW", 100)
    draw, keys, plain = random.Random(3), Keys(), set()
    for _ in range(5000):
        key = str(draw.randrange(3000))
        assert (key in keys) == (key in plain) and keys.add(key) == (key not in plain)
        plain.add(key)
    assert len(keys) == len(plain)


def test_a_mac_stays_awake(tmp_path, monkeypatch):
    """A stand-in for caffeinate notes how it was called and waits, as the real one does."""
    stand_in = tmp_path / "caffeinate"
    stand_in.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/called\nexec sleep 600\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with awake():
        assert not (tmp_path / "called").exists()  # not on Linux
    monkeypatch.setattr(awake_module.sys, "platform", "darwin")
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen
    monkeypatch.setattr(awake_module.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with awake():
        end = time.monotonic() + 10
        while not (tmp_path / "called").exists() or not (tmp_path / "called").read_text():
            assert time.monotonic() < end
            time.sleep(0.01)
        assert started[0].poll() is None
    assert (tmp_path / "called").read_text() == f"-i -s -m -w {os.getpid()}\n"
    assert started[0].poll() == -signal.SIGTERM
    stand_in.unlink()
    with awake():
        assert len(started) == 1  # a Mac without it


@pytest.mark.parametrize(("memory", "message"), [("1kB", "the weights alone take"), ("150%", "at most 1 or 100%")])
def test_memory_that_does_not_do(memory, message):
    result = generate("-p", "x", "-p", "y", "--output", "/dev/null", "--memory", memory)
    assert result.exit_code == 1 and message in result.stderr


def test_memory_that_does():
    assert generate("-p", "x", "--output", "/dev/null", "--memory", "0.2").exit_code == 0
    result = generate("-p", "x", "--output", "/dev/null", "--memory", "much")
    assert result.exit_code == 2 and "give a size like 12GB" in result.stderr
