"""Checkpoints from an enemy are refused in one line, soon, and nothing of them runs, is written or is fetched."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest

from mlx_vlm_mini.errors import VLMError

_FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo",
    "os.remove", "os.rename", "os.mkdir", "os.link", "os.symlink", "os.chmod", "shutil.copyfile", "pickle.find_class", "ctypes.dlopen",
)  # fmt: skip
_seen: list[str] | None = None


def _watch(event: str, arguments: tuple[object, ...]) -> None:
    if _seen is None:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in _FORBIDDEN:
        _seen.append(f"{event} {arguments}")


@pytest.fixture(scope="module", autouse=True)
def _watched() -> None:
    from mlx_vlm_mini import load

    load(hostile.PLAIN)[1]("Hi", [hostile.PHOTO])  # what Python imports is imported before anyone watches
    sys.addaudithook(_watch)


@pytest.fixture
def events() -> Iterator[list[str]]:
    """What a program does that nobody who reads a checkpoint may do."""
    global _seen
    _seen = found = []
    yield found
    _seen = None


@pytest.mark.parametrize("name", hostile.CASES)
def test_hostile_files(name, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    folder = hostile.make(name, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    events, begun = request.getfixturevalue("events"), time.process_time()
    with pytest.raises(VLMError) as refused:
        hostile.read(folder)
    assert time.process_time() - begun < 2
    assert not events
    said = str(refused.value)
    assert said.isprintable() and 10 < len(said) <= 1000
    assert sorted(tmp_path.rglob("*")) == before and not Path(hostile.RAN).exists()


def test_the_watch_sees_what_it_is_for(events, tmp_path):
    os.system("true")
    (tmp_path / "x").write_text("x")
    assert any(each.startswith("os.system") for each in events) and events[-1].startswith("open")


def test_there_are_sixty():
    assert len(hostile.CASES) >= 60
