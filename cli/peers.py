"""`bench --against`: the same checkpoint, picture and question in other programs, each in a process of its own.

    python -m mlx_vlm_mini.cli.peers NAME

A side answers requests on stdin with replies on stdout, one JSON object a line, so that the sides take turns and what
slows the machine slows them all. Seconds are measured inside the side, around what its user waits for.
"""

import importlib
import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import IO, Any, Protocol

OURS = "mlx-vlm-mini"


def _module(name: str) -> Any:
    """A module of another program, whose types are not checked."""
    return importlib.import_module(name)


class Side(Protocol):
    """A program that answers a question about a picture."""

    packages: tuple[str, ...]  # whose versions are reported

    def load(self, folder: str, dtype: Any) -> None: ...

    def answer(self, image: str, question: str, tokens: int) -> dict[str, Any]:
        """`first_token_s`, `decode_s` of the tokens after the first, `prompt_tokens` and the answer's `token_ids`."""
        ...


class Mini:
    packages: tuple[str, ...] = ("mlx-vlm-mini", "mlx")

    def load(self, folder: str, dtype: Any) -> None:
        from mlx_vlm_mini import load

        self.model, self.processor = load(folder, dtype=dtype)

    def answer(self, image: str, question: str, tokens: int) -> dict[str, Any]:
        from mlx_vlm_mini import stream_generate

        chunks = list(stream_generate(self.model, self.processor, [Path(image), question], max_tokens=tokens))
        stats = chunks[-1].stats
        return {
            "first_token_s": stats.first_token_s, "decode_s": stats.decode_s, "prompt_tokens": stats.prompt_tokens,
            "token_ids": [chunk.token for chunk in chunks],
        }  # fmt: skip


class MlxVlm:
    packages: tuple[str, ...] = ("mlx-vlm", "mlx", "transformers")

    def load(self, folder: str, dtype: Any) -> None:
        self.model, self.processor = _module("mlx_vlm").load(folder)
        if dtype is not None:
            import mlx.core as mx

            self.model.set_dtype(getattr(mx, dtype))

    def answer(self, image: str, question: str, tokens: int) -> dict[str, Any]:
        stream_generate = _module("mlx_vlm").stream_generate
        apply_chat_template = _module("mlx_vlm.prompt_utils").apply_chat_template
        begin, first, last = time.perf_counter(), None, None
        ids: list[int] = []
        prompt = apply_chat_template(self.processor, self.model.config, question, num_images=1)
        for chunk in stream_generate(self.model, self.processor, prompt, image=[image], max_tokens=tokens):
            first = first or time.perf_counter()
            if chunk.generation_tokens > len(ids):  # the last token may come twice: with it, and to end the text
                ids.append(int(chunk.token))
            last = chunk
        assert first is not None and last is not None, "no token came"
        return {
            "first_token_s": first - begin, "decode_s": time.perf_counter() - first,
            "prompt_tokens": last.prompt_tokens, "token_ids": ids,
        }  # fmt: skip


class Transformers:
    packages: tuple[str, ...] = ("transformers", "torch")

    def load(self, folder: str, dtype: Any) -> None:
        torch, transformers = _module("torch"), _module("transformers")
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        chosen = dtype or ("float32" if device == "cpu" else "auto")
        kind = chosen if chosen == "auto" else getattr(torch, chosen)
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=kind).eval().to(device)
        self.processor = transformers.AutoProcessor.from_pretrained(folder)

    def answer(self, image: str, question: str, tokens: int) -> dict[str, Any]:
        from PIL import Image

        begin = time.perf_counter()
        content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)  # fmt: skip
        length = inputs["input_ids"].shape[1]
        times: list[float] = []

        class Watch:
            """Takes tokens as `generate` streams them; the first call is the prompt."""

            def put(self, _: Any) -> None:
                times.append(time.perf_counter())

            def end(self) -> None:
                pass

        with _module("torch").inference_mode():
            out = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=Watch())
        return {
            "first_token_s": times[1] - begin, "decode_s": times[-1] - times[1], "prompt_tokens": length,
            "token_ids": out[0, length:].tolist(),
        }  # fmt: skip


SIDES: dict[str, tuple[type[Side], str]] = {  # name: class, module that must be installed
    OURS: (Mini, "mlx_vlm_mini"),
    "mlx-vlm": (MlxVlm, "mlx_vlm"),
    "transformers": (Transformers, "transformers"),
}


def missing(name: str) -> bool:
    """Whether a side is not installed here."""
    return importlib.util.find_spec(SIDES[name][1]) is None


class _Process:
    """A side in a process of its own."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, "-m", "mlx_vlm_mini.cli.peers", name]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Its reply; `error` where it failed or died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        reply: dict[str, Any] = json.loads(line) if line else {"error": "its process died"}
        return reply

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def compare(
    folder: str,
    image: str,
    question: str,
    names: Sequence[str],
    *,
    tokens: int,
    rounds: int,
    dtype: str | None,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Have each side answer the same question, in turns.

    Args:
        folder: a checkpoint folder.
        names: keys of `SIDES`.
        tokens: of an answer at most.
        rounds: turns, after one that warms up.

    Returns:
        A row a side: `side`, and `load_s`, `first_token_s`, `tokens_per_s` (medians; None where the answer has one
        token), `prompt_tokens`, `peak_rss_bytes`, `versions`, `same_tokens` (leading tokens of its answer that equal
        those of the first side), or `error`.
    """
    processes: dict[str, _Process] = {}
    rows: dict[str, dict[str, Any]] = {name: {"side": name} for name in names}
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    try:
        for name in names:
            say(f"{name}: loading")
            processes[name] = _Process(name)
            rows[name] |= processes[name].ask(do="load", folder=folder, dtype=dtype)
        for number in range(rounds + 1):
            for name in names:
                if "error" in rows[name]:
                    continue
                say(f"{name}: answering, {number} of {rounds}")
                reply = processes[name].ask(do="answer", image=image, question=question, tokens=tokens)
                rows[name]["peak_rss_bytes"] = reply.pop("peak_rss_bytes", None)
                if "error" in reply:
                    rows[name]["error"] = reply["error"]
                elif number:
                    answers[name].append(reply)
    finally:
        for process in processes.values():
            process.end()
    first: list[int] = next((answers[name][0]["token_ids"] for name in names if answers[name]), [])
    for name, given in answers.items():
        if "error" not in rows[name]:
            rows[name] |= _summarize(given, first)
    return list(rows.values())


def _summarize(answers: Sequence[dict[str, Any]], first: Sequence[int]) -> dict[str, Any]:
    ids = answers[0]["token_ids"]
    rates = [(len(ids) - 1) / each["decode_s"] for each in answers if each["decode_s"] > 0 and len(ids) > 1]
    pairs = enumerate(zip(ids, first, strict=False))
    return {
        "first_token_s": median(each["first_token_s"] for each in answers),
        "tokens_per_s": median(rates) if rates else None,
        "prompt_tokens": answers[0]["prompt_tokens"],
        "same_tokens": next((number for number, (a, b) in pairs if a != b), min(len(ids), len(first))),
    }


def peak_rss() -> int:
    """Bytes of memory that this process had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(name: str, requests: IO[str], replies: IO[str]) -> None:
    """Answer requests until they end."""
    side = SIDES[name][0]()
    for line in requests:
        request = json.loads(line)
        try:
            begin = time.perf_counter()
            if request.pop("do") == "load":
                side.load(**request)
                versions = {each: version(each) for each in side.packages}
                reply: dict[str, Any] = {"load_s": time.perf_counter() - begin, "versions": versions}
            else:
                reply = side.answer(**request)
        except Exception as error:  # whatever another program raises belongs into its row
            reply = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}
        print(json.dumps({"peak_rss_bytes": peak_rss(), **reply}), file=replies, flush=True)


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a side prints does not belong among the replies
    main(sys.argv[1], sys.stdin, own)
