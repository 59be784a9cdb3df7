"""How many small faults in attention, masks, tiling, cache and weight maps the default suite finds.

    python benchmarks/mutants.py [MODULE]... [--count 30] [--seed 1] [--log FILE.jsonl]

A mutant is a module with one fault: a comparison, an arithmetic or logical operator, a number, a name in a weight map,
a condition, two arguments, or a statement changed or left out. `--count` of each module's are drawn. Each runs the
tests of the default suite that are named below for its module, until one fails, in a process forked from one that has
imported everything and collected the tests: there functions get their faulty code (of a fault outside of functions the
module is imported anew, and the tests, too). So a mutant takes a second, and no file is changed. A mutant that none of
the tests finds survives and is printed: a gap in the tests, or a change that changes nothing.

Not changed are annotations, docstrings, decorators and what stands in `raise`: messages are other tests' matter.
"""

import argparse
import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import marshal
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from mutations import Mutant, faults

ROOT = Path(__file__).parent.parent
GOLDENS = "test_parity.py"
REAL_STDOUT = os.dup(1)


@dataclass(frozen=True)
class Plan:
    """How a module is tested.

    Attributes:
        files: of tests/.
        goldens: checkpoints of `GOLDENS`.
        first: what stands in the names of tests that come first, being the likeliest to fail.
        within: functions, where not all of the module is meant.
        at_import: whether its functions are called while others are imported, which then have to be imported anew.
    """

    files: tuple[str, ...]
    goldens: tuple[str, ...] = ()
    first: tuple[str, ...] = ()
    within: tuple[str, ...] = ()
    at_import: bool = False


PLAN = {
    "layers.attention": Plan(
        ("test_attention.py", "test_cache.py", "test_qwen_vl.py", "test_mllama.py"),
        ("llava-clip-llama", "paligemma2-gemma2", "qwen-vl-chat", "internvl-rms-qwen3"),
        ("test_attention", "scaled_by_their_place", "blocks", "prompt_logit", "cached"),
    ),
    "decoder.cross_attention": Plan(
        ("test_mllama.py", "test_chat.py"), ("mllama-meta", "mllama-transformers"),
        ("what_tokens_see", "images_is_cut", "decoded", "blocks", "keys_and_values", "attends", "prompt_logit"),
    ),
    "decoder.masks": Plan(
        ("test_attention.py", "test_gemma3.py", "test_paligemma.py", "test_cache.py", "test_chat.py", "test_mllama.py",
         "test_qllama.py", "test_generation.py"),
        ("llava-clip-mistral", "paligemma2-gemma2", "gemma3-hub", "gemma3-crops", "mllama-meta", "qllama"),
        ("mask", "window", "causal", "prefix", "rotating", "block", "pieces", "prompt_logit", "cached_decoding"),
    ),
    "decoder.state": Plan(
        ("test_state.py", "test_cache.py", "test_chat.py", "test_mllama.py", "test_qwen2_vl.py"),
        ("llava-clip-llama", "qwen2.5-vl", "mllama-meta"),
        ("test_state", "images_is_cut", "fork", "undo", "rows_of_a_batch", "cached"),
    ),
    "decoder.positions": Plan(
        ("test_qwen2_vl.py", "test_video.py", "test_state.py"), ("qwen2-vl", "qwen3-vl"),
        ("positions", "the_offset", "rows_of_a_batch", "cached"),
    ),
    "preprocessing.tiles": Plan(
        ("test_internvl.py", "test_places.py"), ("internvl-qwen2", "internvl-chat-phi3"), ("grids", "tile", "bright")
    ),
    "preprocessing.anyres": Plan(
        ("test_anyres.py", "test_llava_onevision.py", "test_llava_original.py", "test_places.py"),
        ("llava-next-clip-mistral", "llava-onevision"), ("test_anyres", "tokens", "shrunk", "longest", "bright"),
    ),
    "preprocessing.splits": Plan(
        ("test_idefics3.py", "test_places.py"), ("idefics3-markers", "smolvlm-whole"),
        ("sizes", "limits", "split", "ribbon", "bright"),
    ),
    "preprocessing.crops": Plan(
        ("test_gemma3.py", "test_places.py"), ("gemma3-crops", "gemma3-hub"), ("crops", "settings")
    ),
    "preprocessing.grid": Plan(
        ("test_qwen2_vl.py", "test_pixtral.py"), ("qwen2-vl", "pixtral"), ("size", "sides", "grid")
    ),
    "generation.cache": Plan(
        ("test_cache.py", "test_chat.py", "test_transcript.py", "test_mllama.py", "test_qwen2_vl.py",
         "test_gemma3.py", "test_qwen_vl.py"), (), ("cache", "saved", "loaded", "fork", "undo", "turn"),
    ),
    "checkpoints.weights": Plan(
        ("test_weights.py", "test_internvl.py", "test_requantize.py", "test_convert.py", "test_mllama.py",
         "test_qwen_vl.py"),
        ("llava-clip-llama", "internvl-chat-internlm2", "internvl-chat-phi3"),
        ("names", "shape", "missing", "unknown", "rows", "fused", "prompt_logit", "layout", "settings_of_its_own"),
    ),
    "families.parts.maps": Plan(
        ("test_internvl.py", "test_mllama.py", "test_qwen_vl.py"),
        ("internvl-qwen2", "internvl-chat-internlm2", "internvl-chat-phi3", "mllama-meta", "qwen-vl-chat",
         "llava-original-internvit"), ("names", "every_tensor", "prompt_logit"), at_import=True,
    ),
}  # fmt: skip
LEFT_OUT = ("training_is_refused", "cannot_be_trained", "test_the_package_is", "info")  # what only costs time


class Loader(importlib.machinery.SourceFileLoader):
    """Loads a module's mutant."""

    code: CodeType

    def get_code(self, fullname: str) -> CodeType:
        return self.code


class Finder(importlib.abc.MetaPathFinder):
    """Finds one module's mutant in place of its file."""

    def __init__(self, name: str, file: Path, code: CodeType) -> None:
        self.name, self.file = name, file
        self.loader = Loader(name, str(file))
        self.loader.code = code

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        found = fullname == self.name
        return importlib.util.spec_from_file_location(fullname, self.file, loader=self.loader) if found else None


def functions_of(holder: Any, module: str) -> Iterator[Any]:
    """The functions of a module and of its classes, whatever is wrapped around them."""
    for value in list(vars(holder).values()):
        value = inspect.unwrap(
            getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
        )
        if inspect.isfunction(value) and value.__module__ == module:
            yield value
        elif inspect.isclass(value) and value.__module__ == module:
            yield from functions_of(value, module)


def codes_of(code: CodeType) -> Iterator[CodeType]:
    """The code of a module's functions, those of classes among them."""
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield const
            yield from codes_of(const)


def put_in(name: str, code: CodeType) -> None:
    """Give a loaded module's functions the code of its mutant."""
    new = {(each.co_qualname, each.co_firstlineno): each for each in codes_of(code)}
    for function in functions_of(sys.modules[name], name):
        if function.__code__.co_filename != code.co_filename:  # a dataclass's own
            continue
        function.__code__ = new[function.__code__.co_qualname, function.__code__.co_firstlineno]


class Tests:
    """A plugin of pytest, which sorts and chooses the tests and runs them in forks, for one mutant after another."""

    def __init__(self, plan: Plan, run: "Callable[[Callable[[Callable[[], None]], str]], None]") -> None:
        self.plan, self.run, self.failed = plan, run, ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        def wanted(item: Any) -> bool:
            if any(word in item.name for word in LEFT_OUT):
                return False
            return item.path.name != GOLDENS or item.callspec.params["golden"] in self.plan.goldens

        items[:] = sorted(
            filter(wanted, items), key=lambda item: not any(word in item.nodeid for word in self.plan.first)
        )

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        self.pytest_runtest_logreport(report)

    def pytest_runtestloop(self, session: Any) -> bool:
        def test(prepare: Callable[[], None]) -> str:
            from _pytest.main import pytest_runtestloop

            try:
                prepare()
            except Exception as error:
                return f"not tested: {error!r}"
            with contextlib.suppress(session.Failed, session.Interrupted):
                pytest_runtestloop(session)
            return self.failed

        self.run(test)
        return True


def collect(plan: Plan, folder: Path, run: Any) -> str:
    """Collect a module's tests in this process and hand `run` what runs them; what failed before that."""
    import pytest

    plugin = Tests(plan, run)
    paths = [str(next((ROOT / "tests").rglob(file))) for file in [*plan.files, *([GOLDENS] if plan.goldens else [])]]
    options = [
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "--hypothesis-seed=0",
        f"--basetemp={folder}/tmp",
    ]
    pytest.main([*options, *paths], plugins=[plugin])
    return plugin.failed


def forked(work: Callable[[], str], folder: Path, limit: float) -> tuple[str, float]:
    """What `work` says in a process of its own, or how else that ended; and seconds."""
    begin, said = time.monotonic(), folder / "said"
    said.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        try:
            ended = work()
        except BaseException as error:
            ended = repr(error)
        said.write_text(ended)
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() - begin > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.02)
    seconds = time.monotonic() - begin
    if said.exists():
        return said.read_text(), seconds
    return ("ran too long" if seconds > limit else "the process died"), seconds


def warm() -> None:
    """Import what tests need, the package excepted."""
    import ctypes

    with contextlib.suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    for module in (
        "mlx.core", "mlx.nn", "mlx.utils", "mlx.optimizers", "numpy", "numpy.random", "PIL.Image", "PIL.ImageDraw",
        "PIL.ImageOps", "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "pytest", "hypothesis", "hypothesis.strategies",
        "hypothesis.extra.numpy", "tokenizers", "jinja2.sandbox", "huggingface_hub", "huggingface_hub.hf_api",
        "huggingface_hub.file_download", "click.testing", "prompt_toolkit", "http.server", "_pytest.assertion.rewrite",
        "hypothesis.internal.conjecture.engine", "xdist", "yaml", "httpx",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):
            importlib.import_module(module)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=", ".join(PLAN))
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, help="a line a mutant; those that it holds are not run again")
    parser.add_argument("--only", type=int, nargs="*", help="mutants by their numbers")
    options = parser.parse_args()
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = tempfile.mkdtemp()
    sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "golden")]
    os.chdir(ROOT)
    warm()
    for name in options.modules or PLAN:
        with tempfile.TemporaryDirectory() as folder:
            test_module(name, Path(folder), options)


def say(text: str) -> None:
    """Print, whatever pytest made of stdout."""
    os.write(REAL_STDOUT, f"{text}\n".encode())


def test_module(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Test one module's mutants, in a process that has imported the package."""
    module, plan = f"mlx_vlm_mini.{name}", PLAN[name]
    file = ROOT / f"{module.replace('.', '/')}.py"
    source, strings = file.read_text(), name in ("checkpoints.weights", "families.parts.maps")

    def parse() -> tuple[ast.Module, list[Mutant]]:
        tree = ast.parse(source)
        return tree, list(faults(tree, plan.within, strings))

    found = len(parse()[1])
    drawn = random.Random(f"{options.seed} {name}").sample(range(found), found)[: options.count]
    numbers = sorted(drawn) if options.only is None else options.only
    logged = options.log.read_text().splitlines() if options.log is not None and options.log.exists() else []
    known = {each["number"]: each for each in map(json.loads, logged) if each["module"] == name}

    def fresh(code: CodeType) -> str:
        sys.meta_path.insert(0, Finder(module, file, code))
        failed: list[str] = []
        before = collect(plan, folder, lambda test: failed.append(test(lambda: None)))
        return "".join(failed) or before

    def run(test: Callable[[Callable[[], None]], str]) -> None:
        failed, seconds = forked(lambda: test(lambda: None), folder, 900)
        if failed:
            say(f"{name}: without a fault, too: {failed}\n{(folder / 'log').read_text()[-3000:]}")
            return
        say(f"{name}: {found} mutants, {len(numbers)} drawn; its tests take {seconds:.0f} s")
        killed = 0
        for number in numbers:
            tree, mutants = parse()
            mutant = mutants[number]
            mutant.change()
            code = compile(ast.fix_missing_locations(tree), str(file), "exec")
            if known.get(number, {}).get("what") == mutant.what:
                ended, took = known[number]["killed_by"], known[number]["seconds"]
            elif mutant.inside and not plan.at_import:
                ended, took = forked(lambda code=code: test(lambda: put_in(module, code)), folder, 60 + 4 * seconds)
            else:
                ended, took = forked_anew(code)
            if ended.startswith("not tested"):
                say(f"  {number}, line {mutant.line}: {ended}")
            killed += ended != ""
            if not ended:
                say(f"  survives: {number}, line {mutant.line}: {mutant.what}")
            if options.log is not None and number not in known:
                line = {"module": name, "number": number, "line": mutant.line, "what": mutant.what, "killed_by": ended}
                with options.log.open("a") as log:
                    log.write(json.dumps({**line, "seconds": round(took, 1)}) + "\n")
        say(f"{name}: {killed} of {len(numbers)} killed, {100 * killed / max(len(numbers), 1):.0f} %")

    # Faults outside of functions need a process that has not imported the package yet: one that waits to be asked.
    asked, answers = multiprocessing.Pipe()
    server = os.fork()
    if not server:
        with contextlib.suppress(EOFError):
            while True:
                code = marshal.loads(answers.recv_bytes())
                answers.send(forked(lambda code=code: fresh(code), folder, 900))
        os._exit(0)

    def forked_anew(code: CodeType) -> tuple[str, float]:
        asked.send_bytes(marshal.dumps(code))
        return asked.recv()

    worker = os.fork()
    if not worker:
        sys.stdout = (folder / "collected").open("w")  # pytest's; the worker itself prints below
        failed = collect(plan, folder, run)
        if failed:
            say(f"{name}: the tests cannot be collected: {failed}")
        os._exit(0)
    os.waitpid(worker, 0)
    os.kill(server, signal.SIGKILL)
    os.waitpid(server, 0)


if __name__ == "__main__":
    main()
