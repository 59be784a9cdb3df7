"""The peer's side of parity.py, run by the peer's own Python: one checkpoint, several conversations.

    python parity_peer.py JOB.json

The job holds the checkpoint's `folder` and its `cases`: messages, images, the reference's `ids` and `tokens`, its
pixels. JOB.npz gets the answers, JOB.out.json what went wrong.

Each conversation goes the peer's own way first: its `load`, `apply_chat_template`, `prepare_inputs` and
`generate_step`, as its command goes. Then its model is given the reference's ids and pixels, so that it can be judged
apart from prompt and preprocessing. The tokens of the answer are the reference's: a sampler says them.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def first_line(error: Exception) -> str:
    """Its type and first line, and the second one where the first is only its head."""
    lines = str(error).strip().splitlines() or [""]
    more = f" {lines[1].strip()[:80]}" if lines[0].rstrip().endswith(":") and len(lines) > 1 else ""
    return f"{type(error).__name__}: {lines[0].strip()}{more}"


def answer(model: Any, tokens: list[int], inputs: dict[str, Any]) -> np.ndarray:
    """The log-probabilities before each of `tokens`, float32[len(tokens), vocab_size]."""
    import mlx.core as mx
    from mlx_vlm.generate import generate_step

    said = iter(tokens)
    inputs = dict(inputs)
    steps = generate_step(
        inputs.pop("input_ids"), model, inputs.pop("pixel_values", None), inputs.pop("attention_mask", None),
        max_tokens=len(tokens), sampler=lambda _: mx.array([next(said, tokens[-1])]), **inputs,
    )  # fmt: skip
    return np.stack([np.array(mx.array(row).astype(mx.float32)).reshape(-1) for _, row in steps])


def own_inputs(model: Any, processor: Any, case: dict[str, Any]) -> dict[str, Any]:
    """Messages and paths of images -> what its model takes."""
    from mlx_vlm.prompt_utils import apply_chat_template
    from mlx_vlm.utils import prepare_inputs, should_add_special_tokens

    prompt: Any = [
        {"role": message["role"], "content": [
            {"type": "image"} if part["type"] == "image" else part for part in message["content"]
        ]}
        for message in case["messages"]
    ]  # fmt: skip
    if len(prompt) == 1:  # as its command line gives it
        prompt = "".join(part["text"] for part in prompt[0]["content"] if part["type"] == "text")
    prompt = apply_chat_template(processor, model.config, prompt, num_images=len(case["images"]))
    inputs = prepare_inputs(
        processor,
        images=case["images"] or None,
        prompts=prompt["content"] if isinstance(prompt, dict) else prompt,
        image_token_index=getattr(model.config, "image_token_index", None),
        add_special_tokens=should_add_special_tokens(model.config.model_type, processor),
    )
    return {name: value for name, value in inputs.items() if value is not None}


def given_inputs(case: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The reference's ids and pixels, in the layout that its image processors give."""
    import mlx.core as mx

    ids = mx.array([case["ids"]])
    inputs = {"input_ids": ids, "attention_mask": mx.ones_like(ids)}
    if case["pixels"] is not None and case["grids"]:
        inputs["pixel_values"] = mx.array(np.load(case["pixels"]))
        inputs["image_grid_thw"] = mx.array(case["grids"])
    elif case["pixels"] is not None:
        pixels = np.load(case["pixels"]).transpose(0, 3, 1, 2)
        if case["tiles"]:
            ends = np.cumsum(case["tiles"])
            images = [pixels[end - count : end] for end, count in zip(ends, case["tiles"], strict=True)]
            most = max(case["tiles"])
            pixels = np.stack([np.pad(each, ((0, most - len(each)), (0, 0), (0, 0), (0, 0))) for each in images])
            inputs["image_sizes"] = mx.array(case["sizes"])
        inputs["pixel_values"] = mx.array(pixels[None] if model_type in ("idefics3", "smolvlm") else pixels)
    return inputs


def main(file: Path) -> None:
    job = json.loads(file.read_text())
    model_type = json.loads((Path(job["folder"]) / "config.json").read_text())["model_type"]
    report: dict[str, Any] = {"versions": {name: version(name) for name in ("mlx-vlm", "transformers", "mlx")}}
    arrays = {}
    try:
        from mlx_vlm import load

        model, processor = load(job["folder"])
    except Exception as error:
        report["load"] = first_line(error)
        job["cases"] = {}
    for name, case in job["cases"].items():
        outcome = report[name] = {}
        try:
            inputs = own_inputs(model, processor, case)
            outcome["same_ids"] = np.array(inputs["input_ids"]).reshape(-1).tolist() == case["ids"]
            arrays[f"{name}/own"] = answer(model, case["tokens"], inputs)
        except Exception as error:
            outcome["own"] = first_line(error)
        try:
            arrays[f"{name}/given"] = answer(model, case["tokens"], given_inputs(case, model_type))
        except Exception as error:
            outcome["given"] = first_line(error)
    np.savez(file.with_suffix(".npz"), **arrays)
    file.with_suffix(".out.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
