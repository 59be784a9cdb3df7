"""What a form costs a token, and whether answers have it; beside mlx-vlm.

    python benchmarks/structured.py M [--small S] [--peer PYTHON [--preload LIBRARY]] [--ranks FILE] [--rounds 7]

M and S are checkpoint folders, see workloads.py. Of M: seconds a token, without a form, in one that leaves nearly all
tokens (a string), and in one with much that can only follow (a receipt); the least of the rounds, which take turns, and
how long the masks take, as a share of a step. Of S: answers to the same prompts about one picture, sampled at
temperature 1, ten for each of the twenty schemas of tests/support/schemas.py, and how many of them are valid.
`--ranks` is a file of a vocabulary in tiktoken's form, such as Qwen's qwen.tiktoken: what a mask takes with so many
tokens. The peer's masks need Metal; where there is none, its kernel is replaced by operations that do the same.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()  # before anything imports mlx

import jsonschema
import numpy as np
from schemas import SCHEMAS, record

from mlx_vlm_mini import load, stream_generate
from mlx_vlm_mini.generation import constraints, decode
from mlx_vlm_mini.text.formats.ranks import read_tiktoken
from mlx_vlm_mini.text.forms import make_form
from mlx_vlm_mini.text.tokenizer import Tokenizer

LINE = record(name={"type": "string", "maxLength": 12}, price={"type": "integer", "minimum": 0, "maximum": 9999})
RECEIPT = record(
    shop={"type": "string", "maxLength": 12}, items={"type": "array", "minItems": 8, "maxItems": 8, "items": LINE}
)
FORMS: dict[str, Any] = {
    "without": None,
    "a string": {"type": "string", "minLength": 1000},
    "receipt": RECEIPT,
}
TOKENS, MOST = 96, 160
QUESTIONS = (
    "What is it?", "Read it.", "What does it say?", "Which colours?", "How many?", "Where?", "Describe it.",
    "And this?", "What is in this picture?", "Say it as JSON.",
)  # fmt: skip


def measure(folder: str, picture: str, rounds: int) -> dict[str, Any]:
    """Seconds a token of each form, the shares of the masks, and tokens that were not sampled."""
    model, processor = load(folder)
    spent, sampled = [0.0], [0]
    find, choose = constraints.Constraint._find, decode.Chooser.__call__

    def timed(self: Any) -> None:
        begin = time.perf_counter()
        find(self)
        spent[0] += time.perf_counter() - begin

    def counted(self: Any, *given: Any) -> Any:
        sampled[0] += 1
        return choose(self, *given)

    constraints.Constraint._find, decode.Chooser.__call__ = timed, counted  # type: ignore[method-assign]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in FORMS}
    for _ in range(rounds + 1):
        for name, schema in FORMS.items():
            spent[0], sampled[0] = 0.0, 0
            options = {} if schema is None else {"schema": schema}
            chunks = list(
                stream_generate(model, processor, QUESTIONS[0], images=[picture], max_tokens=TOKENS, **options)
            )
            count = len(chunks) - 1
            seconds = chunks[-1].stats.decode_s / count
            found[name].append((seconds, spent[0] / (count + 1), 1 - sampled[0] / (count + 1)))
    return {
        name: {
            "token_s": min(row[0] for row in rows[1:]),
            "mask_s": min(row[1] for row in rows[1:]),
            "unsampled": rows[-1][2],
        }
        for name, rows in found.items()
    }


def answer(folder: str, picture: str, prompts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each prompt's text and finish reason."""
    model, processor = load(folder)
    said = []
    for number, (question, key) in enumerate(prompts):
        chunks = list(
            stream_generate(
                model,
                processor,
                question,
                images=[picture],
                schema=SCHEMAS[key],
                max_tokens=MOST,
                temperature=1.0,
                seed=number,
            )
        )
        said.append(("".join(chunk.text for chunk in chunks), str(chunks[-1].finish_reason)))
    return said


def judge(prompts: list[tuple[str, str]], said: list[tuple[str, str]]) -> str:
    """How many answers are valid, how many were cut, how many are neither."""
    valid = cut = 0
    for (_, key), (text, reason) in zip(prompts, said, strict=True):
        try:
            jsonschema.validate(json.loads(text), SCHEMAS[key])
            valid += 1
        except (ValueError, jsonschema.ValidationError):
            cut += reason == "length"
    return f"{valid} of {len(prompts)} valid, {cut} cut at {MOST} tokens, {len(prompts) - valid - cut} invalid"


def measure_masks(file: Path) -> None:
    """What a mask takes with a real vocabulary, token by token of answers drawn at random."""
    begin = time.process_time()
    tokenizer = Tokenizer(read_tiktoken(file), {})
    count = tokenizer.backend.get_vocab_size(with_added_tokens=True)
    read = time.process_time()
    vocabulary = constraints.Vocabulary(tokenizer, count, {tokenizer.token_to_id("<|im_end|>") or 0}, ())
    made = time.process_time()
    print(f"\n{count:,} tokens: reading them {read - begin:.1f} s, a vocabulary for forms {made - read:.2f} s, once")
    draw, seconds = np.random.default_rng(0), []
    for schema in [*SCHEMAS.values(), RECEIPT]:
        for _ in range(5):
            form = constraints.Constraint(make_form(schema=schema), lambda: vocabulary)  # type: ignore[arg-type]
            form.begin()
            for _ in range(MOST):
                token = int(draw.choice(np.flatnonzero(np.array(form.allowed()))))
                begin = time.perf_counter()
                form.add(token)
                seconds.append(time.perf_counter() - begin)
                if form.done:
                    break
    mean, most = np.mean(seconds) * 1e3, np.quantile(seconds, 0.99) * 1e3
    print(f"{len(seconds):,} masks: {mean:.2f} ms on average, 99 of 100 below {most:.2f} ms")


def report(name: str, steps: dict[str, Any]) -> None:
    base = steps["without"]["token_s"]
    print(f"\n{name}\n\n| form | ms a token | against without | ms a mask | of a step | not sampled |")
    print("| --- | --- | --- | --- | --- | --- |")
    for form, row in steps.items():
        mask, unsampled = row.get("mask_s"), row.get("unsampled")
        shown = (
            ["", "", ""]
            if not mask
            else [f"{1000 * mask:.2f}", f"{100 * mask / base:.1f} %", f"{100 * unsampled:.0f} %"]
        )
        print(f"| {form} | {1000 * row['token_s']:.1f} | {row['token_s'] / base:.2f} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--small")
    parser.add_argument("--picture", default=str(ROOT / "tests/golden/photo.jpg"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--peer", metavar="PYTHON")
    parser.add_argument("--preload", metavar="LIBRARY", help="of OpenBLAS, for the peer, which does not find it itself")
    parser.add_argument("--ranks", type=Path)
    options = parser.parse_args()
    if options.ranks:
        measure_masks(options.ranks)
    prompts = [(question, key) for question in QUESTIONS for key in SCHEMAS][: options.prompts]
    report("mlx-vlm-mini", measure(options.model, options.picture, options.rounds))
    if options.small:
        print("\nmlx-vlm-mini:", judge(prompts, answer(options.small, options.picture, prompts)))
    if options.peer:
        job = {
            "model": options.model, "small": options.small, "picture": options.picture, "rounds": options.rounds,
            "forms": FORMS, "question": QUESTIONS[0], "tokens": TOKENS, "most": MOST,
            "prompts": [(question, SCHEMAS[key]) for question, key in prompts],
        }  # fmt: skip
        command = [options.peer, str(Path(__file__).with_name("structured_peer.py"))]
        environment = {**os.environ, **({"LD_PRELOAD": options.preload} if options.preload else {})}
        done = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            sys.exit(f"the peer failed with exit code {done.returncode}")
        found = json.loads(done.stdout.splitlines()[-1])
        report(found["name"], found["steps"])
        if options.small:
            print(f"\n{found['name']}:", judge(prompts, found["said"]))


if __name__ == "__main__":
    main()
