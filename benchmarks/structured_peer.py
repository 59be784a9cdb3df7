"""The peer's side of structured.py, run by the peer's own Python, with a job as JSON on stdin.

The last line of its output is JSON.
"""

import json
import sys
import time
from importlib.metadata import version
from typing import Any


def main(job: dict[str, Any]) -> None:
    import mlx.core as mx
    from mlx_vlm import load, structured
    from mlx_vlm.generate import stream_generate
    from mlx_vlm.prompt_utils import apply_chat_template

    def apply_mask(logits: mx.array, mask: mx.array) -> mx.array:
        """What its kernel for Metal does."""
        bits = (mask.view(mx.uint32)[..., None] >> mx.arange(32, dtype=mx.uint32)) & 1
        allowed = bits.reshape(mask.shape[0], -1)[:, : logits.shape[-1]].astype(mx.bool_)
        allowed = mx.pad(allowed, [(0, 0), (0, logits.shape[-1] - allowed.shape[-1])])
        return mx.where(allowed, logits, -mx.inf)

    if not mx.metal.is_available():
        structured._apply_llguidance_mask = apply_mask

    def ask(folder: str) -> Any:
        model, processor = load(folder)
        tokenizer = getattr(processor, "tokenizer", processor)

        def answer(question: str, schema: Any, **options: Any) -> tuple[str, str, float]:
            """Text, finish reason and seconds a token."""
            prompt = apply_chat_template(processor, model.config, question, num_images=1)
            if schema is not None:
                options["logits_processors"] = [structured.build_json_schema_logits_processor(tokenizer, schema)]
            said, times, reason = "", [], ""
            for chunk in stream_generate(model, processor, prompt, image=[job["picture"]], **options):
                times.append(time.perf_counter())
                said += chunk.text
                reason = getattr(chunk, "finish_reason", None) or reason
            count = max(len(times) - 1, 1)
            return (
                said,
                reason or ("length" if len(times) >= options["max_tokens"] else "stop"),
                (times[-1] - times[0]) / count,
            )

        return answer

    answer, found = ask(job["model"]), {name: [] for name in job["forms"]}
    for _ in range(job["rounds"] + 1):
        for name, schema in job["forms"].items():
            found[name].append(answer(job["question"], schema, max_tokens=job["tokens"], temperature=0.0)[2])
    steps = {name: {"token_s": min(rows[1:])} for name, rows in found.items()}
    said = []
    if job["small"]:
        answer = ask(job["small"])
        for number, (question, schema) in enumerate(job["prompts"]):
            mx.random.seed(number)
            try:
                said.append(answer(question, schema, max_tokens=job["most"], temperature=1.0)[:2])
            except ValueError as error:  # of its processor
                said.append((f"error: {error}", "error"))
    print()
    print(json.dumps({"name": f"mlx-vlm {version('mlx-vlm')}", "steps": steps, "said": said}))


if __name__ == "__main__":
    main(json.load(sys.stdin))
