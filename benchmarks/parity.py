"""How far mlx-vlm-mini and its peer mlx-vlm are from the reference, on the same checkpoints, images and messages.

    pip install -e '.[reference]'
    python3 -m venv peer && peer/bin/pip install mlx-vlm==0.7.10 "mlx[cpu]"
    python benchmarks/parity.py --peer peer/bin/python            prints a table in Markdown, and one of all details
    python benchmarks/parity.py --peer peer/bin/python --write    puts them in README.md and docs/parity.md, too

`--peer` may be repeated: one column a Python. Everything is computed in float32 on the CPU, each side in a process of
its own. The checkpoints are tiny and random, made by transformers: those in the shape that the Hub's have (made here,
in a temporary folder), and the goldens of the tests, which go to the corners of what a config may say. A conversation
is right when its token ids equal the reference's and the whole distributions at the prompt's end and before each of the
nine following tokens lie within 1e-4 of its log-probabilities. To add a family: its goldens come by themselves; a
published shape is an entry in `PUBLISHED`, a file of goldens beside reference.py one in `GOLDENS`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests" / "golden"), str(ROOT / "tests" / "support")]

from checkpoints import with_paths
from llava_original import SPECS as ORIGINALS
from qwen_reference import flatten
from reference import (
    CASES,
    GOLDEN,
    SPECS,
    Reference,
    Spec,
    hub_names,
    old_rope_keys,
    save,
    sparse_gemma3,
    sparse_idefics3,
    sparse_onevision,
)

TOLERANCE = 1e-4
DETAILS = """# Parity, conversation by conversation

Written by `benchmarks/parity.py --write`, which says what is compared. A number is the largest difference of
log-probabilities to the reference, over the whole vocabulary at ten positions. The first checkpoints have the shape of
published ones, the others are the tests' goldens, whose configs say less common things (a head size of its own, shards,
new names). One of the two pictures is transparent in places, which transformers shows white.

"""
GOLDENS: dict[str, Any] = {**SPECS, **ORIGINALS}
MARKS = ("<!-- parity: written by benchmarks/parity.py -->", "<!-- /parity -->")


def published(golden: str, stale_hidden_size: int | None = None, **changes: Any) -> Spec:
    """A golden's spec in the layout and with the keys that the Hub's files have; `text` changes the decoder's sizes."""

    def write(config: dict[str, Any]) -> None:
        old_rope_keys(config)
        if stale_hidden_size is not None:
            config["hidden_size"] = stale_hidden_size

    spec = SPECS[golden]
    text = (spec.text[0], {**spec.text[1], **changes.pop("text", {})})
    vision = (spec.vision[0], {key: value for key, value in spec.vision[1].items() if key != "vision_use_head"})
    if spec.vision[0] == "siglip_vision_model":
        vision[1]["vision_use_head"] = False
    given = {"text": text, "vision": vision, "rename": hub_names, "shards": 1, "config": write}
    return replace(spec, **{**given, **changes})


# As llava-hf's templates of these models: all images of a message first.
_PARTS = (
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
)
IMAGES_FIRST_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}" + _PARTS + "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IMAGES_FIRST_INSTRUCT = (
    "{% for message in messages %}{{ '[INST] ' if message['role'] == 'user' else ' ' }}" + _PARTS + "{{ ' [/INST]' "
    "if message['role'] == 'user' else '</s>' }}{% endfor %}"
)
_NEXT = SPECS["llava-next-clip-mistral"]
_NEXT_PARTS = {"vision": _NEXT.vision, "llava": _NEXT.llava, "image_processor": _NEXT.image_processor}
_QWEN_PIXELS = {"shortest_edge": 56**2, "longest_edge": 3584**2}
_QWEN = {  # a head as the published models have them
    "hidden_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default", "mrope_section": [16, 24, 24]},
}  # fmt: skip
PUBLISHED = {
    "llava-1.5 (Vicuna)": published("llava-clip-llama"),
    "llava-interleave (SigLIP, Qwen2)": published("llava-siglip-qwen2", chat_template=IMAGES_FIRST_CHATML),
    "llava-v1.6-vicuna": published("llava-clip-llama", family="llava_next", **_NEXT_PARTS),
    "llava-v1.6-mistral": published(
        "llava-next-clip-mistral", text={"hidden_size": 48, "head_dim": 8},
        chat_template=IMAGES_FIRST_INSTRUCT,
    ),
    "paligemma": published("paligemma-gemma", stale_hidden_size=48, text={"head_dim": 12}),
    "paligemma2": published(
        "paligemma2-gemma2", stale_hidden_size=50, llava={"projection_dim": 56},
        text={"hidden_size": 56, "query_pre_attn_scalar": 10, "sliding_window": 4096, "attn_logit_softcapping": 50.0,
              "final_logit_softcapping": 30.0},
    ),
    "SmolVLM": published("idefics3-markers", config=sparse_idefics3),
    "gemma-3": published(  # 32 x 32 patches, 256 tokens
        "gemma3-hub", config=sparse_gemma3, llava={"mm_tokens_per_image": 256},
        vision=("siglip_vision_model", {**SPECS["gemma3-hub"].vision[1], "image_size": 128}),
        image_processor=("Gemma3", {"size": {"height": 128, "width": 128}}),
    ),
    "LLaVA-OneVision": published("llava-onevision", config=sparse_onevision),
    "Qwen2-VL": published(
        "qwen2-vl", rename=str, config=flatten, text=_QWEN,
        vision=("qwen2_vl_vision", {**SPECS["qwen2-vl"].vision[1], "hidden_size": 256, "patch_size": 14}),
        image_processor=("Qwen2VL", {"patch_size": 14, "size": _QWEN_PIXELS}),
    ),
    "Qwen2.5-VL": published(
        "qwen2.5-vl", rename=str, config=flatten, text=_QWEN, template_file="chat_template.json",
        llava={"tie_word_embeddings": False},
        vision=(
            "qwen2_5_vl_vision",
            {**SPECS["qwen2.5-vl"].vision[1], "out_hidden_size": 256, "patch_size": 14, "window_size": 112},
        ),
        image_processor=("Qwen2VL", {"patch_size": 14, "size": _QWEN_PIXELS}),
    ),
}  # fmt: skip


def expected_of(name: str, work: Path) -> tuple[Path, tuple[str, ...], dict[str, np.ndarray]]:
    """A checkpoint's folder, its conversations and the reference's answers, made now where they are not a golden's."""
    if name in GOLDENS:
        with np.load(GOLDEN / name / "expected.npz") as stored:
            return GOLDEN / name, GOLDENS[name].cases, dict(stored)
    folder, spec = work / re.sub(r"\W+", "-", name).strip("-"), PUBLISHED[name]
    save(spec, folder)
    reference = Reference(folder, spec.chat_template)
    answers = {case: reference.answer(CASES[case], GOLDEN) for case in spec.cases}
    return (
        folder,
        spec.cases,
        {f"{case}/{what}": array for case, given in answers.items() for what, array in given.items()},
    )


def ours(file: Path) -> None:
    """Our side, in a process of its own: as parity_peer.py, for our library."""
    import mlx.core as mx

    from mlx_vlm_mini import load
    from mlx_vlm_mini.generation.decode import prefill

    job = json.loads(file.read_text())
    model, processor = load(job["folder"], dtype="float32")
    arrays, report = {}, {}
    for name, case in job["cases"].items():
        inputs = processor(with_paths(case["messages"]))
        report[name] = {"same_ids": np.array(inputs.input_ids[0]).tolist() == case["ids"]}
        state = model.make_state()
        logits, rows = prefill(model.decoder, model.read(inputs), state), []
        for token in case["tokens"]:
            rows.append(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0])
            logits = model.decoder.logits(model.decoder(model.decoder.read(mx.array([[token]])), state))[:, -1]
        arrays[f"{name}/own"] = np.stack(rows)
    np.savez(file.with_suffix(".npz"), **arrays)
    file.with_suffix(".out.json").write_text(json.dumps(report))


def as_patches(pixels: np.ndarray, patch: int, merge: int = 2) -> np.ndarray:
    """An image float32[height, width, 3] as Qwen2-VL's image processor lays it out: two equal frames of it, the patches
    of a merged square one after another, float32[patches, 6 * patch**2]."""
    rows, columns = (side // patch // merge for side in pixels.shape[:2])
    cells = pixels.reshape(rows, merge, patch, columns, merge, patch, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    return np.repeat(cells[..., None, :, :], 2, axis=-3).reshape(rows * columns * merge**2, -1)


def write_job(
    name: str, folder: Path, names: tuple[str, ...], expected: dict[str, np.ndarray], work: Path
) -> tuple[Path, str]:
    """A file that says what both sides shall answer, and the checkpoint's family."""
    from mlx_vlm_mini import load

    _, processor = load(folder)
    cases = {}
    for case in names:
        parts = [part for message in CASES[case] for part in message["content"]]
        images = [GOLDEN / part["image"] for part in parts if part["type"] == "image"]
        prepared = [processor.prepare(image) for image in images]
        tiled = processor.config.image_grid_pinpoints is not None and bool(images)
        pixels = work / f"{folder.name}-{case}.npy" if images else None
        patch = processor.config.vision.patch_size if processor.config.vision.grid is not None else None
        if pixels is not None and patch is not None:  # goldens have a part of them; ours are equal to it
            np.save(pixels, np.concatenate([as_patches(each.pixel_values[0], patch) for each in prepared]))
        elif pixels is not None:
            np.save(pixels, expected[f"{case}/pixel_values"])
        cases[case] = {
            "messages": CASES[case],
            "images": [str(image) for image in images],
            "ids": expected[f"{case}/prompt_ids"].tolist(),
            "tokens": expected[f"{case}/token_ids"].tolist(),
            "pixels": None if pixels is None else str(pixels),
            "tiles": [len(each.pixel_values) for each in prepared] if tiled else None,
            "sizes": [each.size for each in prepared] if tiled else None,
            "grids": [[1, *(side // patch for side in each.pixel_values.shape[1:3])] for each in prepared]
            if patch
            else None,
        }
    file = work / f"{folder.name}.json"
    file.write_text(json.dumps({"name": name, "folder": str(folder), "cases": cases}))
    return file, processor.config.family


def run(command: list[str], file: Path, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """One side's outcome: of each case `difference`, `given` and what went wrong."""
    answers, report = file.with_suffix(".npz"), file.with_suffix(".out.json")
    for old in (answers, report):
        old.unlink(missing_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, env=environment)
    if not report.is_file():
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"load": f"the process died: {lines[-1]}"}
    outcome: dict[str, Any] = json.loads(report.read_text())
    with np.load(answers) as arrays:
        for key, array in arrays.items():
            case, _, way = key.partition("/")
            want = expected[f"{case}/logprobs"]
            if array.shape != want.shape:
                outcome[case][way] = f"gives {list(array.shape)} log-probabilities instead of {list(want.shape)}"
            else:
                outcome[case]["difference" if way == "own" else "model"] = float(np.abs(array - want).max())
    return outcome


def is_right(outcome: dict[str, Any]) -> bool:
    return outcome.get("same_ids", False) and outcome.get("difference", 1.0) <= TOLERANCE


def shown(difference: float) -> str:
    return f"{difference:.0e}" if difference < 1e-3 else f"{difference:.2g}"


def cell(outcome: dict[str, Any], cases: tuple[str, ...]) -> str:
    """A side's result with one checkpoint, short: conversations that are right, and its model's largest difference."""
    if "load" in outcome:
        return "does not load"
    given = [outcome[case] for case in cases]
    right = sum(is_right(each) for each in given)
    taken = [each for each in given if "does not support" not in each.get("own", "")]
    judged = [each["difference"] if is_right(each) else each.get("model", each.get("difference")) for each in taken]
    worst = max((each for each in judged if each is not None), default=None)
    refused = f"; refuses {len(given) - len(taken)}" if len(taken) < len(given) else ""
    return f"{right} of {len(given)}" + ("" if worst is None else f", {shown(worst)}") + refused


def detail(outcome: dict[str, Any], case: str, first: bool) -> str:
    """What became of one conversation, in full; why a checkpoint does not load is said with its `first` one."""
    if "load" in outcome:
        return f"does not load: `{outcome['load']}`" if first else "does not load"
    each = outcome[case]
    if is_right(each):
        return f"right, {shown(each['difference'])}"
    if "difference" not in each:
        text = f"fails: `{each['own']}`"
    else:
        text = f"**wrong**, {shown(each['difference'])}" if each["same_ids"] else "its prompt has other token ids"
    if "model" in each:
        return f"{text}; on the reference's ids and pixels {shown(each['model'])}"
    return text + (f"; on the reference's ids and pixels `{each['given']}`" if "given" in each else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="mlx-vlm-mini and its peer against the reference, in Markdown.")
    parser.add_argument("--peer", action="append", default=[], metavar="PYTHON", help="a Python that has mlx-vlm")
    parser.add_argument("--only", metavar="TEXT", default="", help="checkpoints whose names have this in them")
    parser.add_argument("--write", action="store_true", help="put the results in README.md and docs/parity.md")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        return ours(options.ours)

    sides = [[sys.executable, __file__, "--ours"]]
    sides += [[python, str(Path(__file__).with_name("parity_peer.py"))] for python in options.peer]
    rows, details = [], []
    names = ["mlx-vlm-mini"] + ["mlx-vlm"] * len(options.peer)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for name in [each for each in (*PUBLISHED, *GOLDENS) if options.only in each]:
            print(name, file=sys.stderr)
            folder, cases, expected = expected_of(name, work)
            file, family = write_job(name, folder, cases, expected, work)
            outcomes = [run(side, file, expected) for side in sides]
            for i, outcome in enumerate(outcomes):
                if versions := outcome.get("versions"):
                    names[i] = f"mlx-vlm {versions['mlx-vlm']} with transformers {versions['transformers']}"
            shape = f"as `{name}`" if name in PUBLISHED else f"golden `{name}`"
            rows.append([f"`{family}`", shape, *(cell(outcome, cases) for outcome in outcomes)])
            for i, case in enumerate(cases):
                said = [
                    detail(outcome, case, i == 0).replace(str(work), "…").replace(str(ROOT), ".").replace("|", "\\|")
                    for outcome in outcomes
                ]
                details.append([f"`{name}`", case, *said])
    table = markdown(["family", "checkpoint", *names], rows)
    whole = markdown(["checkpoint", "conversation", *names], details)
    print(table, whole, sep="\n")
    if options.write:
        write(table, whole)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(table: str, whole: str) -> None:
    readme = ROOT / "README.md"
    before, start, rest = readme.read_text().partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise SystemExit(f"README.md lacks the marks {MARKS[0]} and {MARKS[1]}")
    readme.write_text(f"{before}{start}\n{table}{end}{after}")
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "parity.md").write_text(DETAILS + whole)


if __name__ == "__main__":
    main()
