"""What training, composing and drawing scenes write: a folder is whole or not there, and one process writes it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from checkpoints import PLAIN
from click.testing import CliRunner

from mlx_vlm_mini import files
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.files import one_process, write_text, written_whole
from mlx_vlm_mini.train.save import save_tensors


def killed(work: Callable[[], object]) -> None:
    """Do it in a process of its own, which computes nothing and is killed after it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_a_folder_is_whole_or_not_there(tmp_path):
    folder = tmp_path / "model"

    def half() -> None:
        with written_whole(folder) as work:
            (work / "left").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    killed(half)
    assert [file.name for file in tmp_path.iterdir()] == [".model.partial"]
    with pytest.raises(ZeroDivisionError), written_whole(folder) as work:
        (work / "x").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []
    with written_whole(folder) as work:
        (work / "config.json").write_text("1")
        (work / "weights").write_text("1")
        assert not folder.exists()
    assert content(folder) == {"config.json": "1", "weights": "1"}
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_what_is_there_is_replaced_file_by_file_and_strangers_stay(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "notes.txt", "weights"):
        (folder / name).write_text("old")
    order, replace = [], Path.replace

    def note(path: Path, target: Path) -> Path:
        order.append(path.name)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", note)
    with written_whole(folder) as work:
        for name in ("a", "config.json", "weights"):
            (work / name).write_text("new")
        assert content(folder) == dict.fromkeys(("config.json", "notes.txt", "weights"), "old")
    assert content(folder) == {"a": "new", "config.json": "new", "notes.txt": "old", "weights": "new"}
    assert sorted(order) == ["a", "config.json", "weights"] and order[-1] == "config.json"
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_one_process_at_a_time(tmp_path, monkeypatch):
    naps: list[float] = []
    monkeypatch.setattr(files.time, "sleep", naps.append)
    with one_process(tmp_path / "run"):
        with (
            pytest.raises(CheckpointError, match="another process is writing to .*run right now"),
            one_process(tmp_path / "run"),
        ):
            pass
        result = CliRunner().invoke(main, ["train", str(PLAIN), "--data", "x", "--output", str(tmp_path / "run")])
        assert (result.exit_code, result.stderr.splitlines()[-1]) == (
            1, f"Error: another process is writing to {tmp_path}/run right now"
        )  # fmt: skip
    assert naps == [0.1] * 18  # nine times each: a killed one may take a moment to let go
    killed(lambda: one_process(tmp_path / "run").__enter__())
    with one_process(tmp_path / "run"):
        pass


def test_a_text_is_replaced_in_one_step(tmp_path, monkeypatch):
    file = tmp_path / "log.jsonl"
    file.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_text(file, "new")
    monkeypatch.undo()
    assert file.read_text() == "old"
    write_text(file, "new")
    assert content(tmp_path) == {"log.jsonl": "new"}


def test_weights_that_cannot_be_written_are_one_line(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*nowhere/model.safetensors: .*; is the disk full\?"):
        save_tensors(tmp_path / "nowhere" / "model.safetensors", {"x": mx.ones(3)}, None)


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="mounts a file system of its own")
def test_a_full_disk_while_training(tmp_path):
    """One line, and the run goes on where it was when there is room."""
    data = tmp_path / "data"
    run = CliRunner()
    assert run.invoke(main, ["scenes", str(data), "--count", "4"]).exit_code == 0
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this system mounts nothing")
    arguments = ["train", PLAIN, "--data", data / "scenes.jsonl", "--output", disk / "run", "--stage", "projector",
                 "--steps", 2, "--batch-size", 2, "--warmup", 1, "--checkpoint-every", 1]  # fmt: skip
    try:
        (disk / "stuffing").write_bytes(bytes(2_500_000))
        full = run.invoke(main, [str(each) for each in arguments])
        assert full.exit_code == 1 and "Traceback" not in full.stderr
        assert full.stderr.splitlines()[-1].startswith(
            f"Error: cannot write {disk}/run/.model.partial/model.safetensors: "
        )
        assert not (disk / "run" / "model").exists()
        (disk / "stuffing").unlink()
        again = run.invoke(main, [str(each) for each in arguments])
        assert again.exit_code == 0 and "going on at step 2 of 2" in again.stderr
        assert (disk / "run" / "model" / "config.json").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_scenes_and_compositions_that_end_early_leave_nothing(tmp_path, monkeypatch):
    for kind in ("vision_config", "text_config"):
        config = json.loads((PLAIN / "config.json").read_text())
        (tmp_path / f"{kind}.json").write_text(json.dumps(config[kind]))
    seen = []

    def stop(*_: object, **__: object) -> None:
        seen.append(sorted(file.name for file in tmp_path.iterdir() if file.is_dir()))
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_vlm_mini.data.questions._line", stop)
    monkeypatch.setattr("mlx_vlm_mini.train.compose.save_tensors", stop)
    parts = ["--vision", f"{tmp_path}/vision_config.json", "--decoder", f"{tmp_path}/text_config.json"]
    for command in (["scenes", f"{tmp_path}/out"], ["compose", f"{tmp_path}/out", *parts, "--tokenizer", str(PLAIN)]):
        assert CliRunner().invoke(main, command).exit_code == 130
        assert not [file for file in tmp_path.iterdir() if file.is_dir()]
    assert seen == [[".out.partial"]] * 2
