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
import gc
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fault_cases import (
    CASES,
    MODEL,
    Broken,
    Case,
    Convert,
    Ended,
    check,
    count_steps,
    die_at,
    die_in_write,
    jump_clock,
    run,
    tree,
)


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
    from mlx_vlm_mini.layers.cpu.blas import use_openblas

    use_openblas()
    library = ("cli.main", "convert", "stream", "chat", "loading", "train.trainer", "train.compose", "train.questions")
    for name in (*library, *(f"cli.{each}" for each in ("chat", "generate", "train", "scenes", "compose"))):
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
            if (kind in ("full", "readonly") and name == "replace") or (name, kind) == ("json", "readonly"):
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
