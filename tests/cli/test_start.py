"""How the program begins and ends: closed streams, Ctrl-C while it starts, marks and line ends of what is piped in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import PHOTO, PLAIN
from click.testing import CliRunner

from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.data.examples import read_examples
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.text.messages import images_of

PROGRAM = Path(sys.executable).with_name("mlx-vlm-mini")
MARK = b"\xef\xbb\xbf"


def tokens(*words: object, stdin: bytes | None = None) -> int:
    asked = ["generate", str(PLAIN), "--max-tokens", "2", "--json", *map(str, words)]
    return json.loads(CliRunner().invoke(main, asked, input=stdin).stdout)["prompt_tokens"]


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_dev_null(closed, tmp_path):
    command = f"{PROGRAM} generate {PLAIN} -p What? -i {PHOTO} --max-tokens 2"
    expected = subprocess.run(["sh", "-c", command], capture_output=True, cwd=tmp_path)
    done = subprocess.run(["sh", "-c", f"{command} {closed}"], capture_output=True, cwd=tmp_path)
    assert done.returncode == 0
    assert (done.stdout, done.stderr) == (b"" if ">&-" in closed.split() else expected.stdout, b"")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("module", ["click", "numpy"])
def test_ctrl_c_while_modules_are_imported(module):
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from mlx_vlm_mini.cli.start import start

class Impatient:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Impatient())
sys.argv = ["mlx-vlm-mini", "info"]
start()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 130
    assert done.stderr.strip() == b""


@pytest.mark.parametrize(
    ("typed", "code"), [("@none.png what\n", 1), ("hi\n@none.png what\n", 0), ("/nothing\n", 0), ("", 0)]
)
def test_a_piped_chat_that_answered_nothing_failed(typed, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["chat", str(PLAIN), "--max-tokens", "2"], input=typed).exit_code == code


def test_line_ends_and_marks_of_a_piped_prompt_are_none_of_it():
    plain = tokens("-p", "What is it?")
    for given in (b"What is it?", b"What is it?\n", b"What is it?\r\n\n", MARK + b"What is it?\n"):
        assert tokens("-p", "-", stdin=given) == plain
    assert tokens("-p", "-", stdin=b"\nWhat is it? \n") > plain  # what stands before and between is


@pytest.mark.parametrize("mark", [b"", MARK])
def test_marks_of_prompt_files(mark, tmp_path):
    said = json.dumps({"messages": [{"role": "user", "content": "What is it?\u2028And where?"}]}, ensure_ascii=False)
    for name, text in (("q.jsonl", said), ("q.txt", "What is it?")):
        (tmp_path / name).write_bytes(mark + text.encode() + b"\r\n")
    for name in ("q.jsonl", "q.txt"):
        found = CliRunner().invoke(
            main, ["generate", str(PLAIN), "--max-tokens", "2", "--prompt-file", str(tmp_path / name)]
        )
        (line,) = found.stdout.splitlines() if name == "q.txt" else [found.stdout]
        assert json.loads(line).get("prompt", "What is it?") == "What is it?"


def test_a_separator_in_a_text_ends_no_line_of_a_data_file(tmp_path):
    said = [{"role": "user", "content": "one\u2028two"}, {"role": "assistant", "content": "yes\x85no"}]
    file = tmp_path / "d.jsonl"
    file.write_bytes(MARK + (json.dumps({"messages": said}, ensure_ascii=False) + "\r\n").encode() * 2)
    assert [example.messages[0]["content"] for example in read_examples(file)] == ["one\u2028two"] * 2


def test_images_beside_the_messages_of_a_line_are_taken(tmp_path):
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A house."}]
    file, other = tmp_path / "d.jsonl", Path(shutil.copy(PHOTO, tmp_path / "b.jpg"))
    shutil.copy(PHOTO, tmp_path / "a.jpg")
    parts = [{"type": "text", "text": "Of"}, {"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    lines = [
        {"messages": said, "images": ["a.jpg", "b.jpg"]},
        {"messages": said, "image": "b.jpg"},
        {"messages": [{"role": "user", "content": parts}, said[1]], "images": ["a.jpg", "b.jpg"]},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = [[part["image"].name for part in images_of(example.messages)] for example in read_examples(file)]
    assert found == [["a.jpg", "b.jpg"], ["b.jpg"], ["a.jpg", "b.jpg"]] and other.exists()
    for line, message in (
        ({**lines[2], "images": ["a.jpg"]}, "2 places for an image, and 1 images stand beside them"),
        ({"messages": said, "videos": ["a.mp4"]}, "its 'videos' stand beside the messages"),
    ):
        file.write_text(json.dumps(line))
        with pytest.raises(PromptError, match=message):
            read_examples(file)


def test_draw_replaces_no_picture_that_came_by_stdin(tmp_path):
    file = Path(shutil.copy(PHOTO, tmp_path / "photo.png"))
    asked = ["generate", str(PLAIN), "-p", "detect cat", "-i", "-", "--draw", str(file), "--max-tokens", "2"]
    result = CliRunner().invoke(main, asked, input=PHOTO.read_bytes())
    assert result.exit_code == 2 and "--draw would overwrite the image itself" in result.stderr
    assert file.read_bytes() == PHOTO.read_bytes()
