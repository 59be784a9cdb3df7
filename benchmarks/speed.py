"""Speed side by side: this program, mlx-vlm, and transformers on torch, on the same checkpoints and machine.

    python benchmarks/speed.py [--peer PYTHON] [--torch PYTHON] [--large] [--only ROW]... [--rounds 5] [--out FOLDER]

PYTHON is the interpreter of an environment with mlx-vlm 0.7.10 (`pip install mlx-vlm==0.7.10 transformers==5.14.0
'mlx[cpu]'`), or with torch and transformers. mlx-vlm runs twice: as people install it, and with OpenBLAS preloaded.
The sides take turns within each round; a side that has had its seconds in a row (`--limit`) sits out the other rounds.
Shown are medians, and how many times ours the others' are (medians of the rounds' ratios).

OUT gets `speed.json` with every number and `speed.md` with the table.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
FOLDER = Path("/tmp/mlx-vlm-mini-workloads")
OPENBLAS = "libopenblas.so.0"
SIDES = {
    "ours": "mlx-vlm-mini",
    "peer": "mlx-vlm",
    "peer+openblas": "mlx-vlm, OpenBLAS preloaded",
    "torch": "transformers on torch",
}
SIZE = """
import json, sys; from importlib.metadata import distribution, PackageNotFoundError
from packaging.requirements import Requirement
todo, seen = [sys.argv[1]], {}
while todo:
    name = todo.pop().lower().replace("_", "-")
    try: found = distribution(name)
    except PackageNotFoundError: continue
    if name in seen: continue
    paths = {found.locate_file(file) for file in found.files or []}
    seen[name] = sum(path.stat().st_size for path in paths if path.is_file())
    for line in found.requires or []:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate({"extra": sys.argv[2] if name == sys.argv[1] else ""}):
            todo.append(needed.name)
            todo += [f"{needed.name}-{extra}" for extra in needed.extras]
print(json.dumps(seen))
"""
Sample = dict[str, Any]


class Side:
    """A process that answers requests (speed_sides.py)."""

    def __init__(self, name: str, python: str, environment: dict[str, str], log: Path) -> None:
        self.name, self.python, self.environment, self.log = name, python, environment, log
        self.process: subprocess.Popen[str] | None = None
        self.folder = ""

    def ask(self, do: str, **arguments: Any) -> Sample:
        if self.process is None:
            kind = self.name.partition("+")[0]
            with self.log.open("a") as log:
                self.process = subprocess.Popen(
                    [self.python, HERE / "speed_sides.py", kind], env=self.environment, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.stop()
            return {"error": f"the process ended: see {self.log}"}
        return json.loads(line)

    def load(self, folder: Path) -> Sample:
        """Have this checkpoint loaded, and no other, in a process of its own."""
        if self.folder == str(folder) and self.process is not None:
            return {}
        self.stop()
        found = self.ask("start", folder=str(folder))
        self.folder = str(folder)
        return found

    def stop(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            self.process.wait()
        self.process, self.folder = None, ""

    def command(self, *arguments: object) -> Sample:
        """A command of its own, from its start to its end; `rss` is the most memory that it held."""
        begin = time.perf_counter()
        with self.log.open("a") as log:
            child = subprocess.Popen(
                [self.python, *map(str, arguments)], env=self.environment, stdout=log, stderr=log, cwd=self.log.parent
            )
            _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        if child.returncode:
            return {"error": f"exit code {child.returncode}: see {self.log}"}
        unit = 1 if sys.platform == "darwin" else 1024
        return {"seconds": seconds, "cpu": used.ru_utime + used.ru_stime, "rss": used.ru_maxrss * unit}


class Row:
    """A line of the table.

    Attributes:
        title: what is measured.
        goal: of the issue, for the table.
        ways: by side how to measure it once.
        rate: shown as 1 / seconds.
        folder: the checkpoint that the sides have loaded before they are measured; None of rows that are commands.
    """

    def __init__(
        self,
        title: str,
        ways: dict[str, Callable[[Side], Sample]],
        goal: str = "",
        *,
        rate: bool = False,
        folder: Path | None = None,
    ) -> None:
        self.title, self.goal, self.ways, self.rate, self.folder = title, goal, ways, rate, folder


def same(names: str, way: Callable[[Side], Sample]) -> dict[str, Callable[[Side], Sample]]:
    return dict.fromkeys(names.split(), way)


def make_rows(found: dict[str, Path], work: Path) -> dict[str, Row]:
    both, everybody = "peer peer+openblas", "ours peer peer+openblas torch"
    quick = "ours peer+openblas torch"  # the peer without takes 20 seconds for each picture
    small = sorted((found["pictures"]).glob("small-*.jpg"))
    picture, photo = str(small[0]), str(found["pictures"] / "12mp.jpg")

    def question(folder: Path, length: int) -> str:
        return json.loads((folder / "questions.json").read_text())[str(length)]

    def asked(do: str, **arguments: Any) -> Callable[[Side], Sample]:
        return lambda side: side.ask(do, **arguments)

    def generate(folder: Path, length: int, tokens: int) -> dict[str, Callable[[Side], Sample]]:
        text = question(folder, length)
        ours = ["-m", "mlx_vlm_mini.cli.main", "generate", folder, "-p", text, "-i", picture, "--max-tokens", tokens]
        peer = ["-m", "mlx_vlm", "generate", "--model", folder, "--prompt", text, "--image", picture]
        peer += ["--max-tokens", tokens, "--temperature", 0]
        return {"ours": lambda side: side.command(*ours), **same(both, lambda side: side.command(*peer))}

    def convert(folder: Path) -> dict[str, Callable[[Side], Sample]]:
        def clean(side: Side, *arguments: object) -> Sample:
            out = work / "converted"
            shutil.rmtree(out, ignore_errors=True)
            return side.command(*(out if argument == "OUT" else argument for argument in arguments))

        ours = ["-m", "mlx_vlm_mini.cli.main", "convert", folder, "OUT", "-q", 4, "--no-check"]
        peer = ["-m", "mlx_vlm", "convert", "--hf-path", folder, "--mlx-path", "OUT", "-q"]
        return {"ours": lambda side: clean(side, *ours), **same(both, lambda side: clean(side, *peer))}

    def size(name: str, extra: str = "") -> Callable[[Side], Sample]:
        def way(side: Side) -> Sample:
            done = subprocess.run([side.python, "-c", SIZE, name, extra], capture_output=True, text=True)
            if done.returncode:
                return {"error": done.stderr.strip().splitlines()[-1]}
            sizes = json.loads(done.stdout)
            return {"megabytes": sum(sizes.values()) / 1e6, "packages": sizes}

        return way

    def photograph(side: Side) -> Sample:
        bare = side.ask("pillow", image=photo)
        return {**side.ask("preprocess", image=photo), "pillow": bare.get("seconds")}

    def decode(context: int, tokens: int = 32) -> Callable[[Side], Sample]:
        return asked("decode", context=context, tokens=tokens)

    def captions(side: Side) -> Sample:
        return side.ask("captions", images=[str(each) for each in small], question=question(m, 589), tokens=8)

    s, m, four = found["S"], found["M"], found["M-4bit"]
    first = {"images": [picture], "question": question(m, 589)}
    program = ["-m", "mlx_vlm_mini.cli.main"]
    rows = {
        "cold-first": Row("cold `generate`, S, 1 token", generate(s, 64, 1), "at most 1/4 of mlx-vlm's, under 1.3 s"),
        "cold-end": Row("cold `generate`, S, 32 tokens", generate(s, 64, 32)),
        "import": Row("import", {
            "ours": lambda side: side.command("-c", "from mlx_vlm_mini import load"),
            **same(both, lambda side: side.command("-c", "from mlx_vlm import load")),
            "torch": lambda side: side.command("-c", "from transformers import LlavaForConditionalGeneration"),
        }),
        "help": Row("`--help`", {
            "ours": lambda side: side.command(*program, "--help"),
            **same(both, lambda side: side.command("-m", "mlx_vlm", "generate", "--help")),
        }, "150 ms"),
        "generate-help": Row(
            "`generate --help`", {"ours": lambda side: side.command(*program, "generate", "--help")}, "150 ms"),
        "version": Row("`--version`", {"ours": lambda side: side.command(*program, "--version")}, "150 ms"),
        "preprocess": Row("12 MP JPEG, opened and preprocessed", {
            "ours": photograph, **same("peer torch", asked("preprocess", image=photo)),
        }, "within 1.15 of bare Pillow", folder=m),
        "encode": Row("encoding a picture, M", same(quick, asked("encode", image=picture)), folder=m),
        "first": Row("first token, warm, M", same(everybody, asked("first", **first)),
                     "1/10 of mlx-vlm's, 1/2 with OpenBLAS", folder=m),
        "follow": Row("follow-up turn, M", same(everybody, asked("follow", image=picture, question=first["question"])),
                      "1/20 of mlx-vlm's", folder=m),
        "decode-600": Row("decoding at 600 tokens, M, float32, tokens/s", same(everybody, decode(600)),
                          "1.5 times mlx-vlm's", rate=True, folder=m),
        "decode-4000": Row("decoding at 4,000 tokens, M, float32, tokens/s", same(everybody, decode(4000)),
                           rate=True, folder=m),
        "captions": Row("a caption of 8 tokens, M, of 16", same(quick, captions), folder=m),
        "python": Row("Python a decoded token, M (main thread)", same("ours peer", decode(64, 128)), folder=m),
        "python-traced": Row("the same with steps traced, as on a GPU", {
            "ours": asked("decode", context=64, tokens=128, traced=True),
            "peer": decode(64, 128),
        }, "at most 1/2 of mlx-vlm's", folder=m),
        "python-stream": Row("the same with text and samplers", same("ours peer", asked("stream", tokens=128)),
                             folder=m),
        "bandwidth": Row("memory bandwidth", {"ours": asked("bandwidth")}, folder=m),
        "decode-4bit-600": Row("decoding at 600 tokens, M, 4-bit, tokens/s", same("ours " + both, decode(600, 16)),
                               "not slower than float32", rate=True, folder=four),
        "decode-4bit-4000": Row("decoding at 4,000 tokens, M, 4-bit, tokens/s",
                                same("ours " + both, decode(4000, 16)), rate=True, folder=four),
        "first-4bit": Row("first token, warm, M, 4-bit", same("ours peer+openblas", asked("first", **first)),
                          folder=four),
        "memory": Row("cold `generate`, M, 8 tokens", generate(m, 589, 8)),
        "convert": Row("`convert -q 4`, M", convert(m)),
        "size": Row("installed, without torch", {"ours": size("mlx-vlm-mini"), "peer": size("mlx-vlm", "cpu")},
                    "1/2 of mlx-vlm's"),
    }  # fmt: skip
    if "L" in found:
        large = found["L"]
        given = {"images": [picture], "question": question(large, 589)}
        rows |= {
            "L-first": Row("first token, warm, L", same("ours torch", asked("first", **given)), folder=large),
            "L-decode": Row("decoding at 600 tokens, L, tokens/s", same("ours torch", decode(600, 8)), rate=True,
                            folder=large),
            "L-convert": Row("`convert -q 4`, L", convert(large)),
        }  # fmt: skip
    return rows


def measure(row: Row, sides: dict[str, Side], rounds: int, limit: float) -> dict[str, list[Sample]]:
    """The rounds of a row, the sides taking turns."""
    taken: dict[str, list[Sample]] = {name: [] for name in row.ways if name in sides}
    spent = dict.fromkeys(taken, 0.0)
    for _ in range(rounds):
        for name, samples in taken.items():
            if spent[name] > limit or (samples and "error" in samples[-1]):
                continue
            begin = time.perf_counter()
            samples.append(row.ways[name](sides[name]))
            spent[name] += time.perf_counter() - begin
    return taken


def summary(row: Row, taken: dict[str, list[Sample]]) -> Sample:
    """Medians, and ratios of the others' to ours (of rates ours to the others'), by side."""
    key = "megabytes" if any("megabytes" in each for each in taken.get("ours", [])) else "seconds"
    found: Sample = {"title": row.title, "goal": row.goal, "sides": {}}
    ours = [each.get(key) for each in taken.get("ours", [])]
    for name, samples in taken.items():
        good = [each for each in samples if "error" not in each]
        if not good:
            found["sides"][name] = {"error": samples[0]["error"] if samples else "not measured"}
            continue
        middle = {
            each: median(sample[each] for sample in good)
            for each, value in good[0].items()
            if isinstance(value, int | float)
        }
        ratios = [their[key] / our for our, their in zip(ours, samples, strict=False) if our and their.get(key)]
        found["sides"][name] = middle | ({"ratio": median(ratios)} if ratios else {}) | {"rounds": len(good)}
    return found


def show(name: str, row: Row, found: Sample) -> str:
    """A line of the Markdown table."""
    cells = []
    for side in SIDES:
        one = found["sides"].get(side)
        if one is None or "error" in one:
            cells.append("-" if one is None else "failed")
            continue
        if "bytes_per_s" in one:
            cells.append(f"{one['bytes_per_s'] / 1e9:.1f} GB/s")
            continue
        if "megabytes" in one:
            text = f"{one['megabytes']:,.0f} MB"
        elif name.startswith("python"):
            text = f"{one['thread'] * 1e3:.2f} ms, graph {one['building'] * 1e3:.2f}"
            ours = found["sides"].get("ours", {})
            one = one | {"ratio": one["building"] / ours["building"]} if "building" in ours else one
        elif row.rate:
            text = f"{1 / one['seconds']:.1f}"
        else:
            text = f"{one['seconds']:.2f} s" if one["seconds"] >= 1 else f"{one['seconds'] * 1e3:.0f} ms"
        if one.get("pillow"):
            text += f" (bare Pillow x {one['seconds'] / one['pillow']:.2f})"
        if side != "ours" and one.get("ratio"):
            text += f" ({one['ratio']:.1f} x)"
        if one.get("rss"):
            text += f", {one['rss'] / 1e6:,.0f} MB"
        cells.append(text)
    return f"| {found['title']} | {' | '.join(cells)} | {found['goal']} |"


def machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"system": platform.platform(), "processor": model, "cores": os.cpu_count(), "load_before": load}


def write(out: Path, results: dict[str, Any], rows: dict[str, Row]) -> None:
    versions = {name: " ".join(f"{key} {value}" for key, value in found.items())
                for name, found in results["versions"].items()}  # fmt: skip
    where, lines = results["machine"], [
        f"| | {' | '.join(SIDES.values())} | goal |", "|---" * (len(SIDES) + 2) + "|",
        *(show(name, rows[name], found) for name, found in results["rows"].items()),
    ]  # fmt: skip
    notes = [
        f"{where['processor']}, {where['cores']} cores, {where['system']}, load before {where['load_before']:.1f}; "
        f"{results['date']}, {results['rounds']} rounds.",
        *(f"- {SIDES[name]}: {text}" for name, text in versions.items()),
    ]
    sides = results["rows"].get("decode-600", {}).get("sides", {}).get("ours", {})
    speed = results["rows"].get("bandwidth", {}).get("sides", {}).get("ours", {})
    if "seconds" in sides and "bytes_per_s" in speed:
        least = speed["bytes_per_token"] / speed["bytes_per_s"]
        notes.append(
            f"- A token of M reads {speed['bytes_per_token'] / 1e6:.1f} MB of weights, {least * 1e3:.1f} ms at this "
            f"bandwidth: decoding takes {sides['seconds'] / least:.2f} times that."
        )
    if "pixels" in results:
        notes.append(f"- Pixels of the 12 MP JPEG differ from transformers' by {results['pixels']:.1e} at most.")
    (out / "speed.json").write_text(json.dumps(results, indent=1))
    (out / "speed.md").write_text("\n".join([*lines, "", *notes]) + "\n")


def compare_pixels(sides: dict[str, Side], photo: Path, work: Path) -> float | None:
    """The largest difference of our pixels to transformers'."""
    files = [str(work / f"{name}.npy") for name in ("ours", "torch")]
    for name, file in zip(("ours", "torch"), files, strict=True):
        if name not in sides or "error" in sides[name].ask("preprocess", image=str(photo), keep=file):
            return None
    return sides["ours"].ask("difference", first=files[0], second=files[1]).get("value")


def find_workloads(folder: Path, large: bool) -> dict[str, Path]:
    """Make what is missing of them, in another process: a child's peak memory is at least that of its parent."""
    command = [sys.executable, HERE / "workloads.py", folder, *(["--large"] if large else [])]
    lines = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    return {name: Path(path) for name, path in (line.split(": ") for line in lines)}


def own_environment() -> dict[str, str]:
    """The environment without what would change a side's: without bytecode, a clone is compiled at every start."""
    others = "LD_PRELOAD", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE"
    return {name: value for name, value in os.environ.items() if name not in others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--torch", metavar="PYTHON")
    parser.add_argument("--only", metavar="ROW", action="append", default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=12, help="seconds a side may take in a row")
    parser.add_argument("--large", action="store_true", help="the rows of L, too")
    parser.add_argument("--out", type=Path, default=FOLDER / "results")
    parser.add_argument("--workloads", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    found = find_workloads(options.workloads, options.large)
    plain = own_environment()
    sides = {"ours": Side("ours", sys.executable, plain, options.out / "ours.log")}
    if options.peer:
        preloaded = plain | {"LD_PRELOAD": OPENBLAS}
        sides["peer"] = Side("peer", options.peer, plain, options.out / "peer.log")
        if sys.platform == "linux":
            sides["peer+openblas"] = Side("peer+openblas", options.peer, preloaded, options.out / "peer+openblas.log")
    if options.torch:
        sides["torch"] = Side("torch", options.torch, plain, options.out / "torch.log")
    with tempfile.TemporaryDirectory(dir=options.out) as work:
        rows = make_rows(found, Path(work))
        unknown = set(options.only) - rows.keys()
        if unknown:
            sys.exit(f"no row {', '.join(sorted(unknown))}: there are {', '.join(rows)}")
        chosen = {name: row for name, row in rows.items() if not options.only or name in options.only}
        results: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"), "machine": machine(), "rounds": options.rounds, "versions": {},
            "rows": {}, "samples": {},
        }  # fmt: skip
        begin = time.perf_counter()
        try:
            for name, row in chosen.items():
                for side in (sides[each] for each in row.ways if each in sides and row.folder is not None):
                    if "versions" in (started := side.load(row.folder)):
                        results["versions"][side.name] = started["versions"]
                        results["samples"].setdefault(f"load {row.folder.name}", {})[side.name] = [started]
                taken = measure(row, sides, options.rounds, options.limit)
                results["samples"][name], results["rows"][name] = taken, summary(row, taken)
                if name == "preprocess":
                    difference = compare_pixels(sides, found["pictures"] / "12mp.jpg", Path(work))
                    results |= {} if difference is None else {"pixels": difference}
                print(f"{time.perf_counter() - begin:5.0f} s {show(name, row, results['rows'][name])}", file=sys.stderr)
                write(options.out, results, rows)
        finally:
            for side in sides.values():
                side.stop()
    print((options.out / "speed.md").read_text())


if __name__ == "__main__":
    main()
