"""The commands that `faults.py` disturbs, what each makes, and what must be true of what a disturbed one left."""

import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from abc import ABC, abstractmethod
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


def run(
    work: Callable[[], object],
    place: Path,
    before: Callable[[], object] = lambda: None,
    after: float | None = None,
    stdin: Path | None = None,
) -> Ended:
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


class Case(ABC):
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

    def begin(self, folder: Path) -> None:  # noqa: B027 - most commands need nothing
        """What is there before the command runs."""

    @abstractmethod
    def work(self, folder: Path) -> Callable[[], object]:
        """The command, to be called in a process of its own."""

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
