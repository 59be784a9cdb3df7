"""What kills, full disks and other processes do to what is written: nothing finished is lost, nothing half looks whole.

    python benchmarks/faults.py [--rounds 40] [--seed 1] [--kinds kill,full,...] [--cases convert,train,...]

Each round disturbs one command on a tiny checkpoint, looks at what is there, runs the command again undisturbed, and
compares the result with that of a run that was never disturbed, byte by byte where bytes are promised:

    kill      -9 after a random time
    step      -9 just before a random opening for writing, renaming, removing or making of a file or folder
    byte      killed in the middle of a write, at a random byte of a file (RLIMIT_FSIZE with SIGXFSZ's own action)
    full      a file system (tmpfs) with room for a random part of what is written
    readonly  a file system that cannot be written to
    clock     a wall clock that jumps by decades at every look
    two       the same command twice at the same time
    replaced  convert: the source's file is replaced by another at a random time
    cut       convert: answers of a stand-in for the Hub end after random numbers of bytes

Commands run in processes forked from this one, which has imported everything and computed nothing. Mounting needs root;
without it `full` and `readonly` are left out, and say so.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "golden")]
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
MODEL = ROOT / "tests/golden/llava-clip-llama"
SAVING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STEPS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "shutil.copyfile"}


class Broken(Exception):
    """A promise that was not kept."""


def check(true: bool, what: object) -> None:
    if not true:
        raise Broken(str(what)[:2000])


@dataclass
class Ended:
    """How a command ended: its exit code, negative for a signal; seconds; and what it wrote on stderr."""

    code: int
    seconds: float
    errors: str


def run(work: Callable[[], object], place: Path, before: Callable[[], object] = lambda: None, after: float | None = None,
        stdin: Path | None = None) -> Ended:  # fmt: skip
    """Fork and work there; stdout and stderr go to files in `place`; `after` so many seconds it is killed."""
    begin, child = time.monotonic(), os.fork()
    if not child:
        code = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.dup2(os.open(stdin or "/dev/null", os.O_RDONLY), 0)
            before()
            try:
                work()
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 1
            sys.stdout.flush()
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    waited = wait(child, None if after is None else begin + after)
    if waited is None:
        os.kill(child, signal.SIGKILL)
        waited = wait(child, None)
    assert waited is not None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return Ended(os.waitstatus_to_exitcode(waited), time.monotonic() - begin, (place / "stderr").read_text())


def wait(child: int, until: float | None) -> int | None:
    while until is None or time.monotonic() < until:
        done, status = os.waitpid(child, 0 if until is None else os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def die_at(step: int) -> Callable[[], None]:
    """Kill the process just before its `step`th change of the file system."""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in STEPS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & SAVING):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    return lambda: sys.addaudithook(hook)


def count_steps(file: Path) -> Callable[[], None]:
    """Note in a file how many changes there are."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STEPS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & SAVING):
            os.write(descriptor, b".")

    return lambda: sys.addaudithook(hook)


def die_in_write(size: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def jump_clock(rng: random.Random) -> Callable[[], None]:
    def patch() -> None:
        time.time = lambda: rng.uniform(0, 2**32)
        time.time_ns = lambda: int(rng.uniform(0, 2**62))

    return patch


def command(*arguments: object) -> Callable[[], object]:
    """The program, in this process."""
    main = importlib.import_module("mlx_vlm_mini.cli.main").main
    return lambda: main([str(each) for each in arguments], prog_name="mlx-vlm-mini")


def tree(folder: Path) -> dict[str, str]:
    """Every file's content, by its name; of conversion.json what it promises."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            content = file.read_bytes()
            if file.name == "conversion.json":
                record = json.loads(content)
                content = json.dumps([record["identity"], record["files"]], sort_keys=True).encode()
            found[str(file.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


class Case:
    """A command and what it makes in `folder`.

    Attributes:
        whole: what an undisturbed run makes.
        seconds, steps, largest: how long that took, its changes of the file system, and bytes of its largest file.
    """

    out = "out"

    def __init__(self, inputs: Path) -> None:
        self.inputs = inputs
        self.seconds, self.steps, self.largest = 1.0, 10, 10_000
        self.whole: Any = None

    def begin(self, folder: Path) -> None:
        """What is there before the command runs."""

    def work(self, folder: Path) -> Callable[[], object]:
        raise NotImplementedError

    def run(self, folder: Path, **options: Any) -> Ended:
        return run(self.work(folder), self.inputs, **options)

    def result(self, folder: Path) -> Any:
        return tree(folder / self.out)

    def look(self, folder: Path) -> Any:
        """Check what a disturbed run left; return what must survive."""
        if (folder / self.out).exists():
            check(self.result(folder) == self.whole, f"half a result looks whole: {list_of(folder)}")

    def finish(self, folder: Path, kept: Any) -> None:
        """Check what the run after that gave."""
        check(self.result(folder) == self.whole, f"another result: {list_of(folder)}")

    def again(self, folder: Path, kept: Any) -> None:
        if not self.is_done(folder):
            ended = self.run(folder)
            check(ended.code == 0, f"the run after that fails: {ended.errors}")
        self.finish(folder, kept)

    def is_done(self, folder: Path) -> bool:
        """Whether the command would refuse, because its result is there."""
        return (folder / self.out).exists()


def list_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


class Convert(Case):
    """Onto nothing; twenty small files."""

    force = False
    source = MODEL

    def work(self, folder: Path) -> Callable[[], object]:
        from mlx_vlm_mini.convert import convert

        options: dict[str, Any] = {"dtype": "float16", "shard_limit": 20_000, "check": False, "force": self.force}
        return as_command(lambda: convert(self.source, folder / "out", **options))

    def look(self, folder: Path) -> Any:
        super().look(folder)
        record = folder / ".out.partial" / "conversion.json"
        if not record.exists():
            return {}
        files = json.loads(record.read_text()).get("files", {})
        return {name: (record.parent / name).stat().st_ino for name in files}

    def finish(self, folder: Path, kept: Any) -> None:
        super().finish(folder, kept)
        for name, number in kept.items():
            check((folder / "out" / name).stat().st_ino == number, f"{name} was finished and written again")
        check(list_of(folder)[0] == "out", f"something is left: {list_of(folder)}")


class Replace(Convert):
    """Onto an older result, with --force."""

    force = True

    def begin(self, folder: Path) -> None:
        if not (self.inputs / "old").exists():
            from mlx_vlm_mini.convert import convert

            ended = run(lambda: convert(MODEL, self.inputs / "old", dtype="bfloat16", check=False), self.inputs)
            check(ended.code == 0, ended.errors)
        shutil.copytree(self.inputs / "old", folder / "out")

    def look(self, folder: Path) -> Any:
        old = tree(self.inputs / "old")
        there = folder / "out" if (folder / "out").exists() else folder / ".out.replaced"
        check(there.exists() and tree(there) in (old, self.whole), f"neither old nor new: {list_of(folder)}")
        return {}

    def is_done(self, folder: Path) -> bool:
        return False


class Train(Case):
    """Six steps, a checkpoint every two."""

    out = "run/model"

    def begin(self, folder: Path) -> None:
        if not (self.inputs / "scenes").exists():
            ended = run(command("scenes", self.inputs / "scenes", "--count", 8), self.inputs)
            check(ended.code == 0, ended.errors)

    def work(self, folder: Path) -> Callable[[], object]:
        return command(
            "train", MODEL, "--data", self.inputs / "scenes/scenes.jsonl", "--output", folder / "run", "--steps", 6,
            "--batch-size", 2, "--warmup", 1, "--checkpoint-every", 2,
        )  # fmt: skip

    def result(self, folder: Path) -> Any:
        lines = (folder / "run/log.jsonl").read_text().splitlines()
        return tree(folder / "run/model"), [json.loads(line) for line in lines]

    def look(self, folder: Path) -> Any:
        super().look(folder)
        places = [folder / "run" / name / "step.json" for name in ("checkpoint", "checkpoint.old")]
        step = next((json.loads(file.read_text())["step"] for file in places if file.exists()), 0)
        log = folder / "run/log.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()[:step]] if log.exists() else []
        check(step % 2 == 0 and len(lines) == step, f"at step {step} the log has {len(lines)} lines")
        return step

    def again(self, folder: Path, kept: Any) -> None:
        ended = self.run(folder)
        check(ended.code == 0, f"the run after that fails: {ended.errors}")
        check(not kept or f"going on at step {kept} of 6" in ended.errors, f"step {kept} was lost: {ended.errors}")
        self.finish(folder, kept)
        check(not (folder / "run/.model.partial").exists(), "something is left")


class Batch(Case):
    """Six pictures, a line of JSON each."""

    out = "answers.jsonl"

    def begin(self, folder: Path) -> None:
        pictures = self.inputs / "pictures"
        if not pictures.exists():
            from PIL import Image

            pictures.mkdir()
            for number in range(6):
                Image.new("RGB", (20 + number, 30), (40 * number, 90, 200)).save(pictures / f"{number}.png")

    def work(self, folder: Path) -> Callable[[], object]:
        return command(
            "generate", MODEL, "-p", "What is it?", "-i", self.inputs / "pictures", "--max-tokens", 3, "--output",
            folder / self.out,
        )  # fmt: skip

    def result(self, folder: Path) -> Any:
        return [without_times(line) for line in (folder / self.out).read_bytes().splitlines()]

    def look(self, folder: Path) -> Any:
        file = folder / self.out
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        kept = [line for line in lines if line.endswith(b"\n")]
        check([without_times(line) for line in kept] == self.whole[: len(kept)], "a whole line says something else")
        return kept

    def finish(self, folder: Path, kept: Any) -> None:
        super().finish(folder, kept)
        check((folder / self.out).read_bytes().startswith(b"".join(kept)), "a finished line is lost")

    def is_done(self, folder: Path) -> bool:
        return False


class Json(Case):
    """`generate --json > file`: what a shell wrote half does not parse."""

    out = "answer.json"

    def work(self, folder: Path) -> Callable[[], object]:
        own = command(
            "generate", MODEL, "-p", "What is it?", "-i", ROOT / "tests/golden/photo.jpg", "--max-tokens", 60, "--json"
        )

        def redirected() -> object:
            os.dup2(os.open(folder / self.out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            return own()

        return redirected

    def result(self, folder: Path) -> Any:
        return without_times((folder / self.out).read_bytes())

    def look(self, folder: Path) -> Any:
        with contextlib.suppress(ValueError, OSError):
            check(self.result(folder) == self.whole, "half an answer looks whole")

    def is_done(self, folder: Path) -> bool:
        return False


class Save(Case):
    """chat's /save with its cache, onto an older conversation."""

    out = "talk"
    lines = (f"What is it? @{ROOT}/tests/golden/shapes.png", "And what else?", "/save --cache talk")

    def begin(self, folder: Path) -> None:
        if self.whole is not None:
            shutil.copytree(self.inputs / "older", folder / "talk")

    def work(self, folder: Path) -> Callable[[], object]:
        own = command("chat", MODEL, "--plain", "--max-tokens", 4)

        def inside() -> object:
            os.chdir(folder)
            return own()

        return inside

    def run(self, folder: Path, **options: Any) -> Ended:
        script = self.inputs / "script"
        if self.whole is None:  # once: the older conversation
            script.write_text("\n".join((self.lines[0], self.lines[2])) + "\n")
            ended = run(self.work(folder), self.inputs, stdin=script)
            check(ended.code == 0 and (folder / "talk/conversation.json").exists(), ended.errors)
            (folder / "talk").rename(self.inputs / "older")
        script.write_text("\n".join(self.lines) + "\n")
        return run(self.work(folder), self.inputs, stdin=script, **options)

    def result(self, folder: Path) -> Any:
        return {name: digest for name, digest in tree(folder / "talk").items() if not name.startswith(".")}

    def look(self, folder: Path) -> Any:
        """The conversation is the old or the new one; loaded it is that one, whatever the cache beside it is."""
        names = ("conversation.json", "conversation.safetensors")
        old = tree(self.inputs / "older")
        now = self.result(folder)
        check(now[names[0]] in (old[names[0]], self.whole[names[0]]), "the conversation is neither old nor new")
        check(now[names[1]] in (old[names[1]], self.whole[names[1]]), "the cache is neither old nor new")
        said = run(lambda: self._load(folder), self.inputs)
        check(said.code == 0, said.errors)
        turns = 4 if now[names[0]] == self.whole[names[0]] else 2
        check((self.inputs / "stdout").read_text().split()[-1] == str(turns), "another conversation was loaded")

    def _load(self, folder: Path) -> None:
        from mlx_vlm_mini import Chat, load

        print(len(Chat.load(folder / "talk", *load(MODEL)).messages))

    def is_done(self, folder: Path) -> bool:
        return False


class Scenes(Case):
    """Data to train on."""

    def work(self, folder: Path) -> Callable[[], object]:
        return command("scenes", folder / "out", "--count", 6)


class Compose(Case):
    """A checkpoint of two parts."""

    def begin(self, folder: Path) -> None:
        config = json.loads((MODEL / "config.json").read_text())
        for name in ("vision_config", "text_config"):
            (self.inputs / f"{name}.json").write_text(json.dumps(config[name]))

    def work(self, folder: Path) -> Callable[[], object]:
        parts = ("--vision", self.inputs / "vision_config.json", "--decoder", self.inputs / "text_config.json")
        return command("compose", folder / "out", *parts, "--tokenizer", MODEL)


CASES: dict[str, type[Case]] = {
    "convert": Convert, "replace": Replace, "train": Train, "batch": Batch, "save": Save, "json": Json,
    "scenes": Scenes, "compose": Compose,
}  # fmt: skip


def as_command(work: Callable[[], object]) -> Callable[[], object]:
    """Errors as the program tells them."""

    def told() -> None:
        from mlx_vlm_mini.errors import VLMError

        try:
            work()
        except (VLMError, OSError) as error:
            print(f"Error: {error}", file=sys.stderr)
            sys.exit(1)

    return told


def without_times(line: bytes) -> Any:
    """What is promised of an answer: not what it cost, nor the last digits of its log-probabilities, since a run that
    goes on has nothing cached."""
    entry = json.loads(line)
    entry["logprobs"] = len(entry["logprobs"])
    return {name: entry[name] for name in entry if name not in ("timings", "peak_memory_bytes", "cached_tokens")}


# Rounds


def refused(ended: Ended) -> bool:
    """Whether a command ended with one clear line; raises where it ended in another way than well."""
    if ended.code == 0:
        return False
    last = ended.errors.strip().splitlines()[-1:] or [""]
    check(ended.code == 1 and last[0].startswith("Error: ") and "Traceback" not in ended.errors, f"{ended}")
    return True


def disturb(case: Case, kind: str, folder: Path, rng: random.Random) -> str:
    """One round; what happened, for the table."""
    if kind in ("full", "readonly"):
        return on_disk(case, kind, folder, rng)
    case.begin(folder)
    if kind == "two":
        return two_at_once(case, folder, rng)
    if kind == "clock":
        ended = case.run(folder, before=jump_clock(rng))
        check(ended.code == 0, ended.errors)
        case.finish(folder, case.look(folder))
        return "finished"
    if kind == "kill":
        ended = case.run(folder, after=rng.uniform(0, case.seconds))
    elif kind == "step":
        ended = case.run(folder, before=die_at(rng.randint(1, case.steps)))
    else:
        ended = case.run(folder, before=die_in_write(int(case.largest ** rng.uniform(0.2, 1))))
    check(ended.code in (0, -signal.SIGKILL, -signal.SIGXFSZ), ended)
    case.again(folder, case.look(folder))
    return "killed" if ended.code else "finished first"


def on_disk(case: Case, kind: str, folder: Path, rng: random.Random) -> str:
    size = rng.randint(4, max(case.largest * 3 // 1024, 8))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
    try:
        case.begin(folder)
        used = sum(file.stat().st_blocks for file in folder.rglob("*")) // 2
        change = f"remount,size={used + size}k" if kind == "full" else "remount,ro"
        subprocess.run(["mount", "-o", change, folder], check=True)
        ended = case.run(folder)
        failed = refused(ended) or ("cannot" in ended.errors)  # chat goes on after a failed /save
        check(kind == "full" or failed, f"written to a file system that cannot be written: {ended}")
        kept = case.look(folder) if case.whole is not None else None
        subprocess.run(["mount", "-o", "remount,rw,size=64m", folder], check=True)
        case.again(folder, kept)
        return "refused in one line" if failed else "there was room"
    finally:
        gc.collect()
        subprocess.run(["umount", folder], check=True)


def two_at_once(case: Case, folder: Path, rng: random.Random) -> str:
    """A second process begins while the first one works."""
    first = os.fork()
    if not first:
        os._exit(0 if case.run(folder).code == 0 else 1)
    time.sleep(rng.uniform(0, case.seconds))
    (case.inputs / "second").mkdir(exist_ok=True)
    ended = run(case.work(folder), case.inputs / "second")
    _, status = os.waitpid(first, 0)
    second_refused = refused(ended)
    check(second_refused or case.is_done(folder) or not isinstance(case, Convert), f"{ended}")
    check(not (second_refused and status), "both failed")
    case.again(folder, case.look(folder))
    return "one was refused" if second_refused or status else "one after the other"


def replace_source(inputs: Path, folder: Path, rng: random.Random) -> str:
    """While a conversion reads a file, another one takes its place: the result is of one of them, or there is none."""
    results = []
    import numpy as np

    for name, flip in (("one", 0), ("other", 255)):
        copied = inputs / name
        if not copied.exists():
            shutil.copytree(MODEL, copied)
            file = copied / "model.safetensors"
            content = bytearray(file.read_bytes())
            start = 8 + int.from_bytes(content[:8], "little")
            low = np.frombuffer(content, np.uint8, offset=start)
            content[start:] = np.where(np.arange(len(low)) % 4 == 0, low ^ flip, low).astype(np.uint8).tobytes()
            file.write_bytes(content)
        case = Convert(inputs)
        case.source = copied
        place = inputs / f"{name}-out"
        if not place.exists():
            place.mkdir()
            check(case.run(place).code == 0, "the undisturbed conversion fails")
        results.append({key: value for key, value in tree(place / "out").items() if key.endswith(".safetensors")})
    check(results[0] != results[1], "the two sources are one")
    source = folder / "source"
    shutil.copytree(inputs / "one", source)
    (folder / "result").mkdir()
    case = Convert(inputs)
    case.source = source
    child = os.fork()
    if not child:
        ended = case.run(folder / "result")
        (folder / "ended").write_text(json.dumps([ended.code, ended.errors]))
        os._exit(0)
    time.sleep(rng.uniform(0, 0.6))
    shutil.copyfile(inputs / "other" / "model.safetensors", folder / "new")
    (folder / "new").rename(source / "model.safetensors")
    os.waitpid(child, 0)
    code, errors = json.loads((folder / "ended").read_text())
    if refused(Ended(code, 0, errors)):
        check(not (folder / "result/out").exists(), "refused, and there all the same")
        return "refused in one line"
    found = {key: value for key, value in tree(folder / "result/out").items() if key.endswith(".safetensors")}
    check(found in results, "the result is made of two sources")
    return "of the old one" if found == results[0] else "of the new one"


def cut_hub(folder: Path, rng: random.Random) -> str:
    """Downloads that end early: refused or gone on with, and in the end whole."""
    from hub import run_program, serve

    size = (MODEL / "model.safetensors").stat().st_size
    child_in, child_out = os.pipe()
    server = os.fork()
    if not server:
        with serve() as (address, kind):
            kind.folders["tiny/llava"] = MODEL
            for name in ("model.safetensors", "tokenizer.json", "config.json"):
                kind.cuts[name] = [
                    rng.randint(0, size if name.startswith("model") else 2000) for _ in range(rng.randint(0, 2))
                ]
            os.write(child_out, address.encode())
            time.sleep(600)
        os._exit(0)
    try:
        address = os.read(child_in, 100).decode()
        times = 0
        while True:
            times += 1
            done = run_program(address, folder, "convert", "tiny/llava", "out", "--dtype", "float16", "--no-check")
            if not refused(Ended(done.returncode, 0, done.stderr)):
                break
            check(not (folder / "out").exists(), "refused, and there all the same")
            check(times < 12, f"it never ends: {done.stderr}")
        whole = tree(folder / "out")
        local = run_program(address, folder, "convert", MODEL, "local", "--dtype", "float16", "--no-check")
        check(local.returncode == 0, local.stderr)
        same = {name: value for name, value in tree(folder / "local").items() if name != "conversion.json"}
        check({name: value for name, value in whole.items() if name != "conversion.json"} == same, "another result")
        return f"whole after {times} runs"
    finally:
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        os.close(child_in), os.close(child_out)


def measure(case: Case, folder: Path) -> None:
    """An undisturbed run: what it makes, how long it takes and how many steps it has."""
    case.begin(folder)
    file = folder.parent / "steps"
    file.unlink(missing_ok=True)
    ended = case.run(folder, before=count_steps(file))
    check(ended.code == 0, ended.errors)
    case.whole, case.seconds, case.steps = case.result(folder), ended.seconds, max(file.stat().st_size, 1)
    case.largest = max(each.stat().st_size for each in folder.rglob("*") if each.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = ["kill", "step", "byte", "full", "readonly", "clock", "two", "replaced", "cut"]
    parser.add_argument("--rounds", type=int, default=40, help="of each kill and case; a quarter of what else there is")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kinds", default=",".join(kinds))
    parser.add_argument("--cases", default=",".join(CASES))
    options = parser.parse_args()
    from mlx_vlm_mini.blas import use_openblas

    use_openblas()
    for name in ("cli.main", "convert", "stream", "chat", "loading", "train.trainer", "train.save", "train.compose", "train.questions",
                 *(f"cli.{each}" for each in ("chat", "generate", "train", "scenes", "compose"))):  # fmt: skip
        importlib.import_module(f"mlx_vlm_mini.{name}")
    failures, total = 0, 0
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        chosen = [kind for kind in kinds if kind in options.kinds.split(",")]
        if os.geteuid() != 0 and {"full", "readonly"} & set(chosen):
            print("full and readonly are left out: mounting needs root")
            chosen = [kind for kind in chosen if kind not in ("full", "readonly")]
        jobs: list[tuple[str, str]] = []
        for name in options.cases.split(","):
            jobs += [(name, kind) for kind in chosen if kind not in ("replaced", "cut")]
        jobs += [("convert", kind) for kind in chosen if kind in ("replaced", "cut")]
        cases: dict[str, Case] = {}
        for name, kind in jobs:
            inputs = Path(temporary) / f"inputs-{name}"
            if name not in cases:
                inputs.mkdir()
                cases[name] = CASES[name](inputs)
                with tempfile.TemporaryDirectory(dir=temporary) as folder:
                    measure(cases[name], Path(folder))
            if kind == "two" and name in ("save", "json", "scenes", "compose"):
                continue  # nothing is promised: each writes its own, the last one stays
            if kind in ("full", "readonly") and name == "replace" or (name, kind) == ("json", "readonly"):
                continue  # as convert; and what the shell opens is the shell's
            rounds = options.rounds if kind in ("kill", "step", "byte") else max(options.rounds // 4, 1)
            happened: Counter[str] = Counter()
            begin = time.monotonic()
            for number in range(rounds):
                rng = random.Random(f"{options.seed} {name} {kind} {number}")
                with tempfile.TemporaryDirectory(dir=temporary) as folder:
                    total += 1
                    try:
                        if kind == "replaced":
                            happened[replace_source(inputs, Path(folder), rng)] += 1
                        elif kind == "cut":
                            happened[cut_hub(Path(folder), rng)] += 1
                        else:
                            happened[disturb(cases[name], kind, Path(folder), rng)] += 1
                    except Broken as error:
                        failures += 1
                        happened["BROKEN"] += 1
                        print(f"{name} {kind} round {number}: {error}", flush=True)
            said = ", ".join(f"{count} {what}" for what, count in happened.most_common())
            print(f"{name:8} {kind:9} {rounds:4} rounds, {time.monotonic() - begin:5.0f} s: {said}", flush=True)
        os.chdir("/")
    print(f"{total} faults, {failures} promises broken")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
