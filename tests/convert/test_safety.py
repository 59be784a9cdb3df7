"""Nothing half-written, whatever happens: kills, full disks, two processes, and a destination that is there already."""

import ctypes
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from checkpoints import PLAIN, edit_json
from reference import GOLDEN

from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.convert import conversion, convert, write
from mlx_vlm_mini.errors import CheckpointError

SHARD = 60_000  # bytes: some eight files
OPTIONS: dict[str, Any] = {"bits": 4, "group_size": 32, "shard_limit": SHARD}


def hashes(folder: Path) -> dict[str, str]:
    """Every file's content; of the record all but the source's name."""
    found = {}
    for file in folder.iterdir():
        content = file.read_bytes()
        if file.name == "conversion.json":
            record = json.loads(content)
            content = json.dumps([record["identity"], record["files"]], sort_keys=True).encode()
        found[file.name] = hashlib.sha256(content).hexdigest()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, wide: Path) -> dict[str, str]:
    """What an undisturbed conversion of `wide` gives."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    convert(wide, folder, **OPTIONS)
    found = hashes(folder)
    assert len([name for name in found if name.endswith(".safetensors")]) > 5
    return found


class Process:
    """A conversion in a process of its own, which says `ready` when everything is imported."""

    def __init__(self, source: Path, destination: Path, before: str = "", **options: Any) -> None:
        code = (
            "from mlx_vlm_mini.convert import conversion, convert, work, write; from pathlib import Path\n"
            f"import os, shutil, time, signal\n{before}\nprint('ready', flush=True)\n"
            f"convert({str(source)!r}, {str(destination)!r}, **{ {**OPTIONS, **options}!r})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None and self.process.stdout.readline() == "ready\n"
        self.start = time.perf_counter()

    def wait(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.mark.parametrize("force", [False, True])
def test_killed_at_random_moments(tmp_path, wide, whole, force):
    """Six moments onto nothing and six onto an old result: none or a whole one, and a rerun finishes."""
    out, rng = tmp_path / "out", random.Random(force)
    process = Process(wide, out)
    assert process.wait() == (0, "")
    duration = time.perf_counter() - process.start
    old = {**whole, "old.txt": hashlib.sha256(b"old").hexdigest()}

    def begin() -> None:
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)
        if force:
            convert(wide, out, **OPTIONS)
            (out / "old.txt").write_text("old")

    begin()
    interrupted = 0
    for _ in range(6):
        process = Process(wide, out, force=force)
        time.sleep(rng.uniform(0, duration))
        process.process.kill()
        process.wait()
        finished = out.exists() and hashes(out) == whole
        if force:
            assert finished or not out.exists() or hashes(out) == old
        else:
            assert finished or not out.exists()
        if finished:
            begin()
        else:
            interrupted += 1
    assert interrupted
    if not (out.exists() and hashes(out) == whole):
        convert(wide, out, **OPTIONS, force=force)
    assert hashes(out) == whole
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("step", [0, 1, 2, "removing", 3])
def test_killed_between_the_steps_of_a_replacement(tmp_path, wide, whole, step):
    """The old one moves away, the new one takes its place: killed before, between or after, a rerun finishes."""
    out = tmp_path / "out"
    convert(wide, out, bits=8, group_size=32)
    old = hashes(out)
    kill = f"""
rename, count = Path.rename, 0
def dying(path, target):
    global count
    if count == {step!r}: os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    return rename(path, target)
Path.rename = dying
rmtree = shutil.rmtree
def half(path, **options):
    if {step!r} == "removing" and os.path.exists(path / "config.json"):
        os.unlink(path / "config.json")
        os.kill(os.getpid(), signal.SIGKILL)
    rmtree(path, **options)
shutil.rmtree = half
"""
    code, _ = Process(wide, out, kill, force=True).wait()
    assert code == (0 if step == 3 else -signal.SIGKILL)
    assert (hashes(out) if out.exists() else None) == {0: old, 1: None}.get(step, whole)
    if step == "removing":  # half of the old one is not put back
        shutil.rmtree(out)
        convert(wide, out, **OPTIONS)
    if step == 1:  # the old one is put back, whatever comes next
        with pytest.raises(CheckpointError, match="exists and is not empty"):
            convert(wide, out, **OPTIONS)
        assert hashes(out) == old
    convert(wide, out, **OPTIONS, force=True)
    assert hashes(out) == whole
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


class Stop(BaseException):
    """As a signal that comes between two tensors."""


def stop_after(share: float) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done > share * total:
            raise Stop

    return progress


@pytest.fixture
def half(tmp_path: Path, wide: Path) -> Path:
    """The destination of a conversion that was stopped half-way."""
    out = tmp_path / "out"
    with pytest.raises(Stop):
        convert(wide, out, **OPTIONS, progress=stop_after(0.5))
    assert not out.exists() and len(list((tmp_path / ".out.partial").glob("*.safetensors"))) > 2
    assert not list((tmp_path / ".out.partial").glob("*.part"))
    return out


def written(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **options: Any) -> list[str]:
    """The files that a conversion writes anew."""
    names, original = [], write._write_file

    def note(part: Path, *others: Any) -> str:
        names.append(part.name.removesuffix(".part"))
        return original(part, *others)

    monkeypatch.setattr(write, "_write_file", note)
    convert(*arguments, **options)
    monkeypatch.setattr(write, "_write_file", original)
    return names


def test_finished_files_are_not_written_again(half, wide, whole, monkeypatch):
    finished = {file.name for file in (half.parent / ".out.partial").glob("*.safetensors")}
    shards = {name for name in whole if name.endswith(".safetensors")}
    calls = []
    again = written(monkeypatch, wide, half, **OPTIONS, progress=lambda *numbers: calls.append(numbers))
    assert set(again) == shards - finished
    assert calls[-1][0] == calls[-1][1] and sorted(calls) == calls
    assert hashes(half) == whole


@pytest.mark.parametrize("damage", ["flipped", "longer", "missing", "a stranger's", "the record"])
def test_a_finished_file_that_changed_is_written_again(half, wide, whole, damage, monkeypatch):
    work = half.parent / ".out.partial"
    first = min(work.glob("*.safetensors"))
    content = bytearray(first.read_bytes())
    if damage == "flipped":
        content[-5] ^= 1
        first.write_bytes(content)
    elif damage == "longer":
        first.write_bytes(content + b"x")
    elif damage == "missing":
        first.unlink()
    elif damage == "a stranger's":
        record = json.loads((work / "conversion.json").read_text())
        record["files"].pop(first.name)
        (work / "conversion.json").write_text(json.dumps(record))
    else:
        (work / "conversion.json").write_text('{"identity": ')
    assert first.name in written(monkeypatch, wide, half, **OPTIONS)
    assert hashes(half) == whole


@pytest.mark.parametrize("change", ["bits", "allow_nan", "source", "config", "version"])
def test_another_conversion_begins_anew(half, wide, whole, change, tmp_path, monkeypatch):
    source, options = tmp_path / "source", dict(OPTIONS)
    shutil.copytree(wide, source, copy_function=shutil.copy2)
    if change == "bits":
        options["bits"] = 5
    elif change == "allow_nan":
        options["allow_nan"] = True
    elif change == "source":
        os.utime(source / "model.safetensors")
    elif change == "config":
        edit_json(source / "config.json", note="another")
    else:
        monkeypatch.setattr(conversion, "__version__", "0.0.0")
    shards = len([name for name in whole if name.endswith(".safetensors")])
    assert len(written(monkeypatch, source, half, **options)) >= shards
    plan(open_checkpoint(half))


def test_a_folder_that_we_did_not_make_is_not_touched(tmp_path, wide):
    work = tmp_path / ".out.partial"
    work.mkdir()
    (work / "diary.txt").write_text("dear diary")
    with pytest.raises(CheckpointError, match="is in the way and was not made here"):
        convert(wide, tmp_path / "out")
    assert (work / "diary.txt").read_text() == "dear diary"


def test_the_second_of_two_processes_is_told(tmp_path, wide, whole):
    slow = (
        "original = write._to_bytes\ndef slow(array): time.sleep(0.05); return original(array)\nwrite._to_bytes = slow"
    )
    first = Process(wide, tmp_path / "out", slow)
    while not (tmp_path / ".out.partial" / "conversion.json").exists():
        time.sleep(0.01)
    for force in (False, True):
        with pytest.raises(CheckpointError, match="another process is converting to .*out right now"):
            convert(wide, tmp_path / "out", **OPTIONS, force=force)
    assert first.wait() == (0, "")
    assert hashes(tmp_path / "out") == whole
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        convert(wide, tmp_path / "out", **OPTIONS)


def test_force_replaces_a_checkpoint_and_keeps_it_until_then(tmp_path, wide, whole):
    out = tmp_path / "out"
    convert(wide, out, bits=8, group_size=32)
    old = hashes(out)
    with pytest.raises(Stop):
        convert(wide, out, **OPTIONS, force=True, progress=stop_after(0.7))
    assert hashes(out) == old
    convert(wide, out, **OPTIONS, force=True)
    assert hashes(out) == whole
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_force_replaces_nothing_but_checkpoints(tmp_path, wide):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"sun")
    (tmp_path / "file").write_text("text")
    with pytest.raises(CheckpointError, match="is no checkpoint folder, so not even --force replaces it"):
        convert(wide, tmp_path / "photos", force=True)
    with pytest.raises(CheckpointError, match="is a file"):
        convert(wide, tmp_path / "file", force=True)
    assert (tmp_path / "photos" / "holiday.jpg").read_bytes() == b"sun"


@pytest.mark.parametrize("place", [".", "sub", "..", "link"])
def test_the_source_is_never_the_destination(tmp_path, wide, place):
    source = tmp_path / "folder" / "source"
    shutil.copytree(wide, source)
    (tmp_path / "folder" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)
    before = hashes(source)
    destination = tmp_path / "link" if place == "link" else source / place
    with pytest.raises(CheckpointError, match="is the source, or lies in it, or holds it"):
        convert(source, destination, force=True)
    assert hashes(source) == before


def test_the_source_is_not_written_to(tmp_path, wide):
    source = tmp_path / "source"
    shutil.copytree(wide, source)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in source.iterdir()}
    convert(source, tmp_path / "out", **OPTIONS)
    assert {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in source.iterdir()} == before


def test_too_little_space_is_known_before_the_work(tmp_path, wide, monkeypatch):
    def little(_: Any) -> Any:
        return shutil._ntuple_diskusage(10**12, 10**12, 1000)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", little)
    with pytest.raises(CheckpointError, match="takes 0.0 GB, .* has 0.0 GB free: make room first"):
        convert(wide, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def limited(bytes_a_file: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_a_file, bytes_a_file))


def run(*arguments: object, preexec: Callable[[], object] | None = None) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("mlx-vlm-mini")
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=preexec)


def test_a_write_that_fails_in_the_middle(tmp_path, wide):
    """A limit on the size of files fails a write as a full disk does, after part of it was written."""
    done = run("convert", wide, tmp_path / "out", "-q", "4", preexec=limited(100_000))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        done.stderr.splitlines()[-1]
        == f"Error: cannot write {tmp_path}/.out.partial/model.safetensors.part: File too large"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system of its own")
def test_a_full_disk(tmp_path, wide, whole, monkeypatch):
    """On a file system too small; what is finished stays, and goes on when there is room."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=450k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this system mounts nothing")
    try:
        monkeypatch.setattr(conversion, "_check_space", lambda *_: None)
        out = tmp_path / "out"
        with pytest.raises(CheckpointError, match="No space left on device; what is finished is kept for the next run"):
            convert(wide, out, **OPTIONS)
        assert not out.exists()
        subprocess.run(["mount", "-o", "remount,size=20m", str(tmp_path)], check=True)
        again = written(monkeypatch, wide, out, **OPTIONS)
        assert 0 < len(again) < len([name for name in whole if name.endswith(".safetensors")])
        assert hashes(out) == whole
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_no_permission_to_write(tmp_path, wide):
    """Root may write anywhere, so it gives that right up (CAP_DAC_OVERRIDE, where there are such things)."""
    libc = ctypes.CDLL(None)
    (tmp_path / "locked").mkdir(mode=0o555)

    def give_up() -> None:
        if hasattr(libc, "prctl"):
            libc.prctl(24, 1)

    done = run("convert", wide, tmp_path / "locked" / "out", preexec=give_up)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"Error: cannot write {tmp_path}/locked/.out.partial: Permission denied\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
@pytest.mark.parametrize(
    "name", ["language_model.model.layers.1.mlp.up_proj.weight", "language_model.model.norm.weight"]
)
def test_weights_that_are_no_numbers(tmp_path, wide, value, dtype, name):
    source = tmp_path / "source"
    shutil.copytree(wide, source)
    tensors = {key: array.astype(dtype) for key, array in mx.load(str(wide / "model.safetensors")).items()}
    flat = tensors[name].reshape(-1)
    flat[37:39] = value
    tensors[name] = flat.reshape(tensors[name].shape)
    mx.save_safetensors(str(source / "model.safetensors"), tensors, {"format": "pt"})
    message = f"{name} holds 2 values that are NaN or infinite: the source is broken; --allow-nan converts it"
    for options in (OPTIONS, {}):
        with pytest.raises(CheckpointError, match=message):
            convert(source, tmp_path / "out", **options)
        assert [file.name for file in tmp_path.iterdir()] == ["source"]
    report = convert(source, tmp_path / "out", **OPTIONS, allow_nan=True)
    assert report.not_finite == {name: 2}


def test_the_largest_numbers_are_numbers(tmp_path, wide):
    from mlx_vlm_mini.convert.read import count_not_finite

    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        largest = mx.finfo(dtype).max
        array = mx.array([largest, -largest, 0.0, -0.0], dtype=dtype)
        assert count_not_finite(array) == 0
        assert count_not_finite(array * 2) == 2
        assert count_not_finite(mx.array(float("nan"), dtype=dtype)) == 1
    assert count_not_finite(mx.array([], dtype=mx.float16)) == 0
    assert count_not_finite(mx.array([0xFFFFFFFF], dtype=mx.uint32)) == 0


def test_a_source_that_is_cut_while_it_is_read(tmp_path, copy_of):
    folder = copy_of()
    file = folder / "model.safetensors"

    def cut(*_: Any) -> None:
        with file.open("r+b") as stream:
            stream.truncate(4000)

    with pytest.raises(CheckpointError, match="cannot read"):
        convert(folder, tmp_path / "out", announce=cut)
    assert [entry.name for entry in tmp_path.iterdir()] == [PLAIN.name]


def test_a_source_that_is_replaced_while_it_is_read(tmp_path, wide):
    """The result would be of two: nothing is left, and the next run reads the new one."""
    source = tmp_path / "source"
    shutil.copytree(wide, source)

    def replace(done: int, total: int) -> None:
        if done > total / 2 and not (tmp_path / "replaced").exists():
            (tmp_path / "replaced").touch()
            shutil.copyfile(wide / "model.safetensors", tmp_path / "new")
            (tmp_path / "new").replace(source / "model.safetensors")

    with pytest.raises(CheckpointError, match="source changed while it was read: run the command again"):
        convert(source, tmp_path / "out", **OPTIONS, progress=replace)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["replaced", "source"]
    convert(source, tmp_path / "out", **OPTIONS)


def rewrite(file: Path, change: Callable[[bytes], bytes], header: bool = True) -> None:
    """Change a safetensors file's header, or its data."""
    content = file.read_bytes()
    split = 8 + int.from_bytes(content[:8], "little")
    own = change(content[8:split] if header else content[split:])
    file.write_bytes(len(own).to_bytes(8, "little") + own + content[split:] if header else content[:split] + own)


def twice(header: bytes) -> bytes:
    first = b'"language_model.model.norm.weight":'
    start = header.index(first)
    end = header.index(b"}", start) + 1
    return b"{" + header[start:end] + b"," + header[1:]


@pytest.mark.parametrize(
    ("change", "header", "message"),
    [
        (lambda data: data[:-100], False, "is truncated: [0-9]* of [0-9]* bytes; download it again"),
        (lambda data: b"", False, "is truncated"),
        (lambda data: data + b"1234", False, "has 4 bytes behind its last tensor; download it again"),
        (twice, True, "holds language_model.model.norm.weight twice; download it again"),
        (lambda data: data.replace(b'"F32"', b'"F8_E5M2"', 1), True, "has type F8_E5M2; MLX reads F32, "),
        (lambda data: data.replace(b"[", b"[1e9,", 1), True, "has a broken safetensors header; download it again"),
        (lambda data: data[:-20], True, "has a broken safetensors header; download it again"),
    ],
)
def test_a_broken_file(tmp_path, copy_of, change, header, message):
    folder = copy_of()
    rewrite(folder / "model.safetensors", change, header)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == [PLAIN.name]


def test_no_flipped_bit_of_a_header_is_a_traceback(tmp_path, copy_of):
    """What is noticed is one line; what is not (a bit of the metadata, say) leaves every tensor's place as it was."""
    folder = copy_of("llava-clip-llama-layers")
    file = max(folder.glob("model-*.safetensors"))
    content, rng = file.read_bytes(), random.Random(5)
    places = {name: info.start for name, info in open_checkpoint(folder).tensors.items()}
    noticed = 0
    for _ in range(150):
        changed = bytearray(content)
        place = rng.randrange(8 + int.from_bytes(content[:8], "little"))
        changed[place] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        checkpoint = open_checkpoint(folder)
        try:
            plan(checkpoint)
        except CheckpointError as error:
            noticed += 1
            assert "\n" not in str(error)
        else:
            assert {name: info.start for name, info in checkpoint.tensors.items()} == places
    assert noticed > 100
    for length in (0, 7, 8, 9, 100, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            convert(folder, tmp_path / "out")


def test_a_vision_tower_elsewhere_is_a_source_too(tmp_path, monkeypatch):
    """Of an original LLaVA: protected, hashed, and part of what a conversion is known by."""
    source, tower = tmp_path / "llava-v1.5-tiny", tmp_path / "tower"
    shutil.copytree(GOLDEN / "llava-original-v1.5", source)
    shutil.move(source / "tower", tower)
    for destination in (tower, tower / "sub"):
        with pytest.raises(CheckpointError, match="is the source, or lies in it, or holds it"):
            convert(source, destination, vision_tower=tower, force=True)
    with pytest.raises(Stop):
        convert(source, tmp_path / "out", vision_tower=tower, shard_limit=SHARD, progress=stop_after(0.6))
    (file,) = [each for each in tower.iterdir() if each.suffix in (".safetensors", ".bin")]
    os.utime(file)
    names = written(monkeypatch, source, tmp_path / "out", vision_tower=tower, shard_limit=SHARD)
    assert len(names) == len(list((tmp_path / "out").glob("*.safetensors")))
    digests = json.loads((tmp_path / "out" / "conversion.json").read_text())["source"]["sha256"]
    assert digests[f"tower/{file.name}"] == hashlib.sha256(file.read_bytes()).hexdigest()
