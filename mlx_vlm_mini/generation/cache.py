"""A conversation's KV cache, and what it holds: mlx-lm's caches chosen, trimmed, shared, written and read."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import NamedTuple, cast

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.borrow import borrow
from mlx_vlm_mini.checkpoints.folder import DTYPES, TensorInfo, read_header
from mlx_vlm_mini.decoder.cross_attention import ImageCache, Span
from mlx_vlm_mini.decoder.decoder import Decoder
from mlx_vlm_mini.decoder.delta import DeltaCache, Memory, Snapshot
from mlx_vlm_mini.decoder.masks import Rotating
from mlx_vlm_mini.decoder.state import SNAPSHOTS, NoCache, State
from mlx_vlm_mini.errors import CheckpointError, PromptError, check_whole
from mlx_vlm_mini.inputs import Inputs
from mlx_vlm_mini.model import VLM

KEEP = 4  # first tokens that a rotating cache never gives up: attention leans on them (arXiv:2309.17453)
_PARTS = ("keys", "values")


def identify(inputs: Inputs) -> np.ndarray:
    """What each position of a prompt is: uint64[L, 5], the token's id and zeros, or at an image's slot the image's
    digest and, from 1 on, which of its slots it is."""
    identity = np.zeros((len(inputs.slots), 5), dtype=np.uint64)
    identity[:, 0] = np.array(inputs.input_ids[0])
    slots = np.flatnonzero(inputs.slots)
    for image in inputs.images:
        own, slots = slots[: image.tokens], slots[image.tokens :]
        identity[own, :4] = np.frombuffer(image.digest, dtype="<u8")
        identity[own, 4] = np.arange(1, len(own) + 1)
    return identity


def shared_length(decoder: Decoder, state: State, held: np.ndarray, wanted: np.ndarray) -> int:
    """How many tokens a state and a prompt share whose keys are the same, all of the prompt's but its last.

    Args:
        held: the identity of what the state holds, see `identify`.
        wanted: the prompt's.
    """
    length = min(len(held), len(wanted) - 1)
    different = np.flatnonzero((held[:length] != wanted[:length]).any(axis=-1))
    length = int(different[0]) if len(different) else length
    kept = decoder.keeps_keys(cast(int | None, state.prompt_length), len(held), len(wanted))
    ahead = decoder.looks_ahead and (held[:, 4].any() or wanted[:, 4].any())
    return length if kept and not ahead else 0


def make_state(model: VLM, *, kv_bits: int | None = None, rotate: int | None = None) -> State:
    """An empty state. What cross-attention layers keep of images is neither quantized nor given up.

    Args:
        kv_bits: 2, 4 or 8 quantizes keys and values, in groups of 64 or 32 along a head (mlx-lm's QuantizedKVCache).
        rotate: each token sees the first `KEEP` tokens and those up to itself that fill `rotate` with them (mlx-lm's
            RotatingKVCache), so that memory stops growing there.

    Raises:
        PromptError: the model cannot be run so.
    """
    if kv_bits is None and rotate is None:
        return model.make_state()
    caches, config = borrow("models.cache"), model.config.decoder
    if kv_bits is not None and rotate is not None:
        raise PromptError("a rotating cache cannot be quantized: choose kv_bits or rotate")
    if rotate is not None:
        check_whole("rotate", rotate, 0)
        if rotate <= 2 * KEEP:
            raise PromptError(f"rotate must be more than {2 * KEEP} tokens, not {rotate}")
        if config.delta is not None:
            raise PromptError(
                f"family '{model.config.family}' keeps states of all tokens, which give none up: leave rotate out"
            )
        both = config.prefix_lm or config.queries is not None
        if both or config.two_way != "nothing" or "sliding_attention" in config.layer_types:
            own = "reads a prompt both ways" if both else "has layers with a window of their own"
            raise PromptError(f"family '{model.config.family}' {own}, which no rotating cache fits: leave rotate out")
        state = model.make_state(lambda: caches.RotatingKVCache(max_size=rotate, keep=KEEP))
        state.visible = Rotating(rotate, KEEP)
        return state
    heads = {config.shape(kind).head_dim for kind in config.layer_types if kind != "linear_attention"}
    group_size = next((size for size in (64, 32) if not any(head % size for head in heads)), None)
    if kv_bits not in (2, 4, 8) or group_size is None:
        why = f"kv_bits must be 2, 4 or 8, not {kv_bits}"
        if kv_bits in (2, 4, 8):
            why = f"heads of {min(heads)} numbers cannot be quantized in groups of 32: leave kv_bits out"
        raise PromptError(why)
    return model.make_state(lambda: caches.QuantizedKVCache(group_size=group_size, bits=kv_bits))


class Found(NamedTuple):
    """What of a prompt is kept: a state, the tokens that it holds, and those that some kept prompt has in common."""

    state: State
    length: int
    shared: int


class Prefixes:
    """States of prompts that were read, for prompts that begin alike.

    So the same photo asked twenty questions, the same system prompt, and the earlier turns of a conversation that comes
    whole each time are read once. It keeps states within a limit of memory; the one used longest ago goes first.

    What is found is exact: positions are compared by token ids and by the SHA-256 of images, and nothing is used where
    keys depend on what comes later.

    Attributes:
        limit: bytes.
        nbytes: bytes that are kept now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[int, tuple[np.ndarray, State, int]] = OrderedDict()
        self._numbers = count()

    def find(self, model: VLM, inputs: Inputs) -> "Found":
        """A state that holds as much of a prompt as any that is kept can go back to."""
        wanted = identify(inputs)
        best, most = None, 0
        for number, (held, state, _) in self._kept.items():
            length = shared_length(model.decoder, state, held, wanted)
            if length > most:
                best, most = number, length
        if best is None:
            return Found(model.make_state(), 0, 0)
        self._kept.move_to_end(best)
        state = self._kept[best][1].fork()
        return Found(state, state.rewind(most), most)

    def add(self, inputs: Inputs, state: State) -> None:
        """Keep the state of a prompt that was read whole; one of its beginning alone is given up for it."""
        held = identify(inputs)
        for number, (other, _, nbytes) in [*self._kept.items()]:
            if len(other) <= len(held) and (other == held[: len(other)]).all():
                del self._kept[number]
                self.nbytes -= nbytes
        nbytes = state.nbytes
        if nbytes > self.limit:
            return
        self._kept[next(self._numbers)] = held, state.fork(), nbytes
        self.nbytes += nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._kept.popitem(last=False)[1][2]


class TurnCache:
    """A state that knows what it holds, position by position.

    Attributes:
        state: of the tokens.
        held: what they are, see `identify`.
    """

    def __init__(self, model: VLM, *, kv_bits: int | None = None, rotate: int | None = None) -> None:
        """Arguments and errors as of `make_state`."""
        self.model, self.kv_bits, self.rotate = model, kv_bits, rotate
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.state = make_state(self.model, kv_bits=self.kv_bits, rotate=self.rotate)
        self.held = np.zeros((0, 5), dtype=np.uint64)

    @property
    def _images(self) -> dict[int, ImageCache]:
        return {number: entry for number, entry in enumerate(self.state.layers) if isinstance(entry, ImageCache)}

    def share(self, wanted: np.ndarray) -> int:
        """Go back to what is shared with a prompt, all but its last token, or as near before that as the state can;
        return its length.

        Args:
            wanted: the prompt's identity, see `identify`.
        """
        length = shared_length(self.model.decoder, self.state, self.held, wanted)
        self._trim(0 if self.kv_bits is not None else length)
        return len(self.held)

    def keep(self, prompt: np.ndarray, tokens: Sequence[int]) -> None:
        """Note what is held after an answer, and trim the token that was computed ahead.

        Args:
            prompt: its identity.
            tokens: of the answer; none where it did not begin, what was shared being all that is known to be whole.
        """
        said = np.zeros((len(tokens), 5), dtype=np.uint64)
        said[:, 0] = tokens
        if tokens:
            self.held = np.concatenate([prompt, said])
        self._trim(len(self.held))
        self.state.snapshot()
        self.state.evaluate()

    def _trim(self, length: int) -> None:
        """Go back to the first tokens and the images among them, or as near before them as the state can."""
        self.held = self.held[: self.state.rewind(length)]

    def fork(self) -> "TurnCache":
        """A cache with the same tokens that goes on by itself, see `State.fork`."""
        twin = TurnCache(self.model, kv_bits=self.kv_bits, rotate=self.rotate)
        twin.state, twin.held = self.state.fork(), self.held
        return twin

    @property
    def digest(self) -> str:
        """SHA-256 of what is held, in hexadecimal."""
        return hashlib.sha256(self.held.tobytes()).hexdigest()

    def check_plain(self) -> None:
        """Raises PromptError where the cache cannot be written: it is quantized or rotating."""
        if self.kv_bits is not None or self.rotate is not None:
            raise PromptError("a quantized or rotating cache is not saved: save the conversation without its cache")

    def write(self, file: Path, model_fingerprint: str) -> None:
        """Write safetensors: `keys` and `values` of each layer, float[1, H, L, D], and `held`, uint64[L, 5]; with
        cross-attention layers and images also `images`, uint64[N, 3], their spans. Of layers with a recurrent state
        that `state`, and their convolution's `inputs`, at N lengths, which are `lengths`, uint64[N, 1]."""
        images, arrays = self._images, {"held": mx.array(self.held)}
        for i, entry in enumerate(self.state.layers):
            if isinstance(entry, DeltaCache):
                arrays["lengths"] = mx.array(np.array([[each.length] for each in entry.kept], dtype=np.uint64))
                for number, (_, memory) in enumerate(entry.kept):
                    arrays |= {f"layers.{i}.{number}.{part}": array for part, array in memory._asdict().items()}
            elif not entry.empty():
                end = None if i in images else len(self.held)
                arrays |= {f"layers.{i}.{part}": mx.contiguous(getattr(entry, part)[..., :end, :]) for part in _PARTS}
        if self.state.spans:
            arrays["images"] = mx.array(np.array(self.state.spans, dtype=np.uint64))
        metadata = {"model": model_fingerprint, "prompt_length": str(self.state.prompt_length)}
        mx.save_safetensors(str(file), arrays, metadata)

    def read(self, file: Path, model_fingerprint: str, digest: str) -> None:
        """Take what `write` wrote of this model.

        Raises:
            CheckpointError: the file is broken, or belongs to another model or conversation.
        """
        tensors, metadata = read_header(file)
        if metadata.get("model") != model_fingerprint:
            raise CheckpointError(f"{file} was computed by another model")
        spans = [Span(*row) for row in _read_rows(file, tensors.get("images"), "images", 3, "images")]
        lengths = [row[0] for row in _read_rows(file, tensors.get("lengths"), "lengths", 1, "states")]
        if not all(0 < span.seen <= span.held < 2**31 for span in spans):
            raise CheckpointError(f"{file} does not say which images it holds")
        info = tensors.get("held")
        count = info.shape[0] if info is not None and info.shape else 0
        if (
            len(lengths) > SNAPSHOTS + 1
            or lengths != sorted({*lengths})
            or (lengths and not lengths[0] > 0)
            or lengths[-1:] not in ([], [count])
        ):
            raise CheckpointError(f"{file} does not say which states it holds")
        layout = self._layout(count, spans, len(lengths))
        lists = ["held", *(["images"] if "images" in tensors else []), *(["lengths"] if lengths else [])]
        if info is None or set(tensors) != {*layout, *lists}:
            raise CheckpointError(f"{file} has not the layers of this model")
        if info.dtype != "U64" or len(info.shape) != 2 or info.shape[1] != 5 or not count:
            raise CheckpointError(f"{file} does not say which tokens it holds")
        for name, (shape, dtype) in layout.items():
            if tensors[name].shape != shape or DTYPES[tensors[name].dtype][0] != dtype:
                found = f"{tensors[name].dtype}{list(tensors[name].shape)}"
                raise CheckpointError(f"{file}: {name} is {found}, and this model's is {dtype}{list(shape)}")
        arrays = cast(dict[str, mx.array], mx.load(str(file), format="safetensors"))
        held = np.array(arrays["held"])
        if hashlib.sha256(held.tobytes()).hexdigest() != digest:
            raise CheckpointError(f"{file} belongs to another conversation")
        if self._images and [span.position for span in spans] != np.flatnonzero(held[:, 4]).tolist():
            raise CheckpointError(f"{file} does not hold the images of its tokens")
        mx.eval(arrays)
        self.state.clear()
        for i, entry in enumerate(self.state.layers):
            if isinstance(entry, DeltaCache):
                parts = [[arrays[f"layers.{i}.{n}.{part}"] for part in Memory._fields] for n in range(len(lengths))]
                entry.kept = [Snapshot(length, Memory(*each)) for length, each in zip(lengths, parts, strict=True)]
            elif f"layers.{i}.keys" in arrays:
                entry.keys, entry.values = (arrays[f"layers.{i}.{part}"] for part in _PARTS)
                if not isinstance(entry, ImageCache):
                    entry.offset = count
        begun = str(metadata.get("prompt_length"))
        self.state.start, self.state.spans, self.held = count, tuple(spans), held
        self.state.prompt_length = int(begun) if begun.isdecimal() else None

    def _layout(self, count: int, spans: Sequence[Span], states: int) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
        """Shape and type of each tensor of the layers, by its name, of so many tokens and states."""
        config, dtype = self.model.config.decoder, self.model.dtype
        found: dict[str, tuple[tuple[int, ...], mx.Dtype]] = {}
        for i, (kind, entry) in enumerate(zip(config.layer_types, self.state.layers, strict=True)):
            if isinstance(entry, DeltaCache) and config.delta is not None:
                delta = config.delta
                for number in range(states):
                    state = 1, delta.num_value_heads, delta.value_head_dim, delta.key_head_dim
                    found[f"layers.{i}.{number}.state"] = state, mx.float32
                    found[f"layers.{i}.{number}.inputs"] = (1, delta.conv_kernel - 1, delta.mixed_size), dtype
            elif isinstance(entry, NoCache):
                continue
            elif spans or not isinstance(entry, ImageCache):
                length = sum(span.held for span in spans) if isinstance(entry, ImageCache) else count
                shape = config.shape(kind)
                for part in _PARTS:
                    found[f"layers.{i}.{part}"] = (1, shape.num_kv_heads, length, shape.head_dim), dtype
        return found


def _read_rows(file: Path, info: TensorInfo | None, name: str, width: int, what: str) -> list[list[int]]:
    """Numbers of a file, uint64[N, width]; none where it has no tensor of that name."""
    if info is None:
        return []
    if info.dtype != "U64" or len(info.shape) != 2 or info.shape[1] != width:
        raise CheckpointError(f"{file} does not say which {what} it holds")
    rows: list[list[int]] = np.array(cast(dict[str, mx.array], mx.load(str(file), format="safetensors"))[name]).tolist()
    return rows
