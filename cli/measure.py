"""How fast a checkpoint runs on this machine, and how near decoding comes to what its memory allows.

Each token of an answer needs every weight of the decoder once, and the keys and values of all tokens before it. So the
time that reading these bytes takes bounds decoding from below, on a Mac's GPU as on a CPU; the share of that limit says
how much is left to gain.
"""

import io
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlx_vlm_mini.checkpoints.load import load
from mlx_vlm_mini.decoder.cross_attention import ImageCache
from mlx_vlm_mini.decoder.delta import DeltaCache
from mlx_vlm_mini.decoder.rope import longest_context
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.generation.chat import Chat
from mlx_vlm_mini.generation.decode import Chooser, decode, prefill
from mlx_vlm_mini.generation.step import make_step, trace_fault
from mlx_vlm_mini.inputs import InputImage
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.messages import Prompt

QUESTION, FOLLOW_UP = "What is in this picture?", "Which colours?"
ROUNDS = 3
BUILT = 8  # tokens whose graph is built without being computed


def measure_bandwidth(rounds: int = 5, size: int = 1 << 28) -> float:
    """Bytes a second that MLX reads from memory: the best of sums and matrix-vector products, whole and in blocks (see
    rows.py), over `size` bytes, which must be more than a cache holds."""
    width = 8192
    dtype = mx.float16 if mx.default_device().type == mx.DeviceType.gpu else mx.float32
    array = mx.ones((size // width // dtype.size, width), dtype=dtype)
    vector = mx.ones((width,), dtype=dtype)
    mx.eval(array, vector)
    blocks = array.reshape(-1, 64, width)
    ways: tuple[Callable[[], mx.array], ...] = (
        lambda: array.sum(),
        lambda: array @ vector,
        lambda: vector @ blocks.swapaxes(-1, -2),
    )
    least = min(_seconds(way) for _ in range(rounds + 1) for way in ways)
    return array.nbytes / least


def _seconds(way: Callable[[], mx.array]) -> float:
    begin = time.perf_counter()
    mx.eval(way())
    return time.perf_counter() - begin


def weight_bytes(model: VLM) -> dict[str, int]:
    """Bytes of a model's weights: of `all`, and of those that a `token` of an answer reads.

    That is the decoder without its embeddings, unless these are the head, too, and without what only images go
    through: the keys and values of cross-attention, and query tokens' looks; of experts those that a token takes.
    """
    config = model.config.decoder
    token = 0
    for name, array in tree_flatten(model.decoder.parameters()):
        parts = name.split(".")
        if parts[0] in ("embed_tokens", "pos_embed") and not (
            config.tie_word_embeddings and parts[0] == "embed_tokens"
        ):
            continue
        if "cross_attn" in parts:
            kind = config.layer_types[int(parts[1])]
            if kind == "query_attention" or {"k_proj", "v_proj"} & {*parts}:
                continue
        token += round(array.nbytes * config.active_share(name))
    return {"all": sum(array.nbytes for _, array in tree_flatten(model.parameters())), "token": token}


def bench(
    name: str | Path,
    *,
    image: str | Path | None = None,
    contexts: Sequence[int] = (600, 4000),
    prompt_tokens: int | None = None,
    max_tokens: int = 32,
    bandwidth: float | None = None,
    rounds: int = ROUNDS,
    say: Callable[[str], None] = lambda text: None,
    **loading: Any,
) -> dict[str, Any]:
    """Measure a checkpoint: seconds, tokens a second, bytes.

    Args:
        name: a checkpoint folder or a name on the Hub.
        image: the picture; by default one is drawn, 1024 x 768 pixels, as JPEG.
        contexts: tokens behind which decoding is measured; those that the prompt exceeds or that the model does not
            reach are brought to its limits. What the cache holds above the prompt is random.
        prompt_tokens: least length of the first prompt; by default a picture and a short question.
        max_tokens: tokens that are decoded at each context.
        bandwidth: of the memory in bytes a second; by default measured.
        rounds: of which medians are taken.
        say: called with what is being measured.
        loading: see `load`.

    Returns:
        Names to values, JSON-ready; `decoding` is a list, an entry a context; `trace_fault` says why steps are built
        that a GPU would trace. None stands for what the model does not do.

    Raises:
        CheckpointError, ImageError, PromptError: as `load`, and an answer.
    """
    picture: Any = None if image is None else Path(image)
    if picture is not None:
        from mlx_vlm_mini.images.source import open_image

        open_image(picture)  # before loading: a wrong path should not cost that time
    mx.reset_peak_memory()
    say(f"loading {name}")
    begin = time.perf_counter()
    model, processor = load(name, **loading)
    load_s = time.perf_counter() - begin
    found: dict[str, Any] = {
        "model": str(name),
        "family": model.config.family,
        "dtype": str(model.dtype).split(".")[-1],
    }
    sizes, experts = weight_bytes(model), model.config.decoder.experts
    if experts is not None:
        found |= {"experts": experts.num_experts, "experts_per_token": experts.num_experts_per_tok}
    found |= {"weight_bytes": sizes["all"], "bytes_per_token": sizes["token"], "load_s": load_s}
    images = [] if model.config.text_alone else [picture or draw_picture()]
    found |= _measure_images(model, processor, images, rounds, say)
    question = _lengthen(processor, images, prompt_tokens)
    found |= _measure_turns(model, processor, [*images, question], rounds, say)
    found["decoding"] = [
        _measure_decoding(model, processor, [*images, question], context, max_tokens, sizes["token"], say)
        for context in contexts
    ]
    found["trace_fault"] = trace_fault(model.decoder)
    found |= {"peak_memory_bytes": mx.get_peak_memory(), "peak_rss_bytes": _peak_rss()}
    if bandwidth is None:  # last, as it takes memory
        say("measuring memory bandwidth")
        bandwidth = measure_bandwidth()
    for one in found["decoding"]:
        one["bandwidth_share"] = one["bytes_per_token"] * one["tokens_per_s"] / bandwidth
    return found | {
        "bandwidth_bytes_per_s": bandwidth, "machine": describe_machine(),
        "versions": {each: version(each) for each in ("mlx-vlm-mini", "mlx", "mlx-lm")} | {
            "python": platform.python_version()
        },
    }  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Where this runs: what MLX computes on, the system, cores."""
    info = mx.device_info()
    return {
        "device": str(info.get("device_name") or platform.processor() or platform.machine()),
        "kind": "gpu" if mx.default_device().type == mx.DeviceType.gpu else "cpu",
        "system": f"{platform.system()} {platform.release()}", "cores": os.cpu_count(),
    }  # fmt: skip


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def draw_picture() -> bytes:
    """A JPEG of 1024 x 768 pixels, always the same."""
    rng, written = np.random.default_rng(0), io.BytesIO()
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    coarse.resize((1024, 768), Image.Resampling.BICUBIC).save(written, "JPEG", quality=90)
    return written.getvalue()


def _lengthen(processor: Processor, images: list[Any], tokens: int | None) -> str:
    """A question whose prompt with these images has at least so many tokens."""
    if tokens is None:
        return QUESTION
    one = processor([*images, QUESTION]).input_ids.shape[1]
    two = processor([*images, f"{QUESTION} {QUESTION}"]).input_ids.shape[1]
    return " ".join([QUESTION] * (1 + max(0, -(-(tokens - one) // max(two - one, 1)))))


def _measure_images(
    model: VLM, processor: Processor, images: list[Any], rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    if not images:
        return {"open_s": None, "encode_s": None, "image_tokens": 0}
    say("opening and preprocessing the picture")
    opening, encoding = [], []
    for _ in range(rounds):
        begin = time.perf_counter()
        processor.prepare(images[0])
        opening.append(time.perf_counter() - begin)
    say("encoding the picture")
    inputs = processor([*images, QUESTION])
    shown: InputImage = inputs.images[0]
    for _ in range(rounds):
        begin = time.perf_counter()
        model.encode(shown)
        encoding.append(time.perf_counter() - begin)
    return {"open_s": median(opening), "encode_s": median(encoding), "image_tokens": int(inputs.slots.sum())}


def _measure_turns(
    model: VLM, processor: Processor, prompt: list[Any], rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """First tokens: of the first turn, which nothing is known of, and of the next one."""
    first, follow = [], []
    tokens = 0
    for number in range(rounds + 1):  # the first warms up
        say(f"first token and follow-up turn, {number} of {rounds}")
        chat = Chat(model, processor, max_tokens=4)
        stats = _answer(chat, prompt)
        first.append(stats.first_token_s)
        tokens = stats.prompt_tokens
        try:
            follow.append(_answer(chat, FOLLOW_UP).first_token_s)
        except PromptError:  # it answers one question about one image
            follow.append(None)
    turns = [seconds for seconds in follow[1:] if seconds is not None]
    return {
        "prompt_tokens": tokens,
        "first_token_s": median(first[1:]),
        "follow_up_s": median(turns) if turns else None,
    }


def _answer(chat: Chat, prompt: Prompt) -> Any:
    (*_, last) = chat.send(prompt)
    return last.stats


def _measure_decoding(
    model: VLM,
    processor: Processor,
    prompt: list[Any],
    context: int,
    tokens: int,
    weights: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Tokens a second behind `context` tokens, bytes read for each, and how long Python builds its graph."""
    say(f"decoding behind {context} tokens")
    inputs, state = processor(prompt), model.make_state()
    logits = prefill(model.decoder, model.read(inputs), state)
    mx.eval(logits)
    state.evaluate()
    longest = longest_context(model.config.decoder) - tokens - BUILT - 2
    missing = min(context, longest) - len(inputs.slots)
    if missing > 0:
        for entry in state.layers:
            if isinstance(entry, DeltaCache):
                assert entry.memory is not None
                entry.update(entry.memory, missing)
            elif not isinstance(entry, ImageCache):
                entry.update_and_fetch(*(_random_like(each, missing) for each in (entry.keys, entry.values)))
        state.start += missing
    state.evaluate()
    held = state.start
    cached = sum(_held_bytes(entry, held) for entry in state.layers)

    def sampler(logprobs: mx.array) -> mx.array:
        return mx.argmax(logprobs, axis=-1)

    choose = Chooser(inputs.input_ids[0], sampler)
    steps = decode(model.decoder, logits, state, max_tokens=tokens + 2, choose=choose)
    seconds = _time_of(steps, tokens) / tokens
    begin = time.thread_time()  # what follows is built only, and thrown away
    chosen, step = mx.array([0]), make_step(model.decoder, state)
    for _ in range(BUILT):
        chosen = sampler(step(chosen))
    building = (time.thread_time() - begin) / BUILT
    return {
        "context": held, "tokens_per_s": 1 / seconds, "bytes_per_token": weights + cached,
        "python_s": building,
    }  # fmt: skip


def _held_bytes(entry: Any, tokens: int) -> int:
    """Of a layer's keys and values, whose arrays may have room for more; or of its state."""
    if isinstance(entry, DeltaCache):
        return 0 if entry.memory is None else entry.memory.nbytes
    if entry.keys is None:  # of images, of which there are none
        return 0
    length = entry.keys.shape[2]
    total: int = entry.keys.nbytes + entry.values.nbytes
    return total if isinstance(entry, ImageCache) else total // length * tokens


def _random_like(array: mx.array, length: int) -> mx.array:
    """So many tokens' keys, or values, of the size of those of float[B, H, L, D]."""
    scale = float(mx.sqrt((array.astype(mx.float32) ** 2).mean()))
    shape = (*array.shape[:2], length, array.shape[3])
    return (scale * mx.random.normal(shape)).astype(array.dtype)


def _time_of(steps: Iterator[Any], tokens: int) -> float:
    """Seconds for so many steps behind the first."""
    next(steps)
    begin = time.perf_counter()
    for _ in range(tokens):
        next(steps)
    return time.perf_counter() - begin
