"""Questions about pictures to measure a model with, and the model run on them with one layer in memory at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_vlm_mini.checkpoints.load import Plan
from mlx_vlm_mini.checkpoints.weights import load_weights
from mlx_vlm_mini.data.examples import read_examples
from mlx_vlm_mini.data.questions import Asker, dialogue, user
from mlx_vlm_mini.data.scenes import draw, random_scene
from mlx_vlm_mini.decoder.reading import Pass
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.inputs import Inputs
from mlx_vlm_mini.layers.kernels import kernels
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.text.messages import Message

QUESTION = "Describe the picture."
SAMPLES = 64  # to calibrate with, at most
SEED = 10_000
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Sample:
    """A question about pictures and its answer, as the model reads them."""

    inputs: Inputs

    @property
    def start(self) -> int:
        """Tokens of the question."""
        return self.inputs.prompt_length


def make_sample(processor: Processor, messages: Sequence[Message], answer: str = "") -> Sample:
    """A sample of messages that end with a question, and of what is to be said then; without pictures where the model
    takes none."""
    if processor.config.text_alone:
        messages = [{**message, "content": _texts(message["content"])} for message in messages]
    inputs = processor(messages)
    ids = processor.tokenizer.encode(answer, add_special_tokens=False) if answer else []
    return Sample(inputs.followed_by(ids))


def _texts(content: Any) -> Any:
    return content if isinstance(content, str) else [part for part in content if part["type"] == "text"]


def scene_samples(processor: Processor, count: int, *, seed: int) -> list[Sample]:
    """Pictures of simple objects (`train.scenes`), each with up to two questions answered and a third one's answer.

    Each is made from `seed` and its number alone.
    """
    samples = []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        scene = random_scene(rng)
        picture: Any = {"image": draw(scene, rng)}
        asked = [question for _, exchange in Asker(rng).about(scene) for question in exchange[:1]]
        chosen = [asked[index] for index in rng.permutation(len(asked))[:3]]
        if number % 2:
            chosen[-1] = asked[0]  # the description, which is the longest answer
        messages = dialogue(chosen, partial(user, picture))
        samples.append(make_sample(processor, messages[:-1], chosen[-1][1]))
    return samples


def read_samples(processor: Processor, path: Path, count: int) -> list[Sample]:
    """The first samples of a JSONL file of conversations, as for training, or of a folder's pictures.

    Raises:
        CheckpointError: there is nothing of the kind.
        PromptError, ImageError: a line or a picture is at fault.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in PICTURES)[:count]
        if not files:
            raise CheckpointError(f"{path} has no pictures ({', '.join(PICTURES)}) to calibrate with")
        return [make_sample(processor, [user({"image": file}, QUESTION)]) for file in files]
    samples = []
    for example in read_examples(path)[:count]:
        last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        content = example.messages[last]["content"]
        answer = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        samples.append(make_sample(processor, example.messages[:last], answer))
    return samples


def find_samples(processor: Processor, calibration: str | None) -> list[Sample]:
    """Samples to calibrate with: the user's, or scenes."""
    if calibration is None:
        return scene_samples(processor, SAMPLES, seed=SEED)
    return read_samples(processor, Path(calibration), SAMPLES)


def load_part(plan: Plan, *prefixes: str, dtype: mx.Dtype) -> None:
    """Read the model's tensors whose names begin like this."""
    load_weights(plan.model, plan.ours, plan.checkpoint, dtype, plan.family.WEIGHTS, prefixes=prefixes)


def release(module: nn.Module) -> None:
    """Give back a module's memory; what it computes afterwards means nothing."""
    module.update(tree_map(lambda array: mx.zeros(array.shape, array.dtype), module.parameters()))
    mx.clear_cache()


class Walk:
    """A model run on samples part by part, each read before and given back after.

    Attributes:
        hidden: of each sample, what the next layer reads: float[1, L, C].
        passes: of each sample, what is prepared for all layers.
    """

    def __init__(
        self, plan: Plan, samples: Sequence[Sample], dtype: mx.Dtype, say: Callable[[str], None] | None = None
    ) -> None:
        self.plan = plan
        self.samples = samples
        self.dtype = dtype
        self.hidden: list[mx.array] = []
        self.passes: list[Pass] = []
        self._say = say or (lambda _: None)

    def load_front(self) -> None:
        """Read everything in front of the decoder's layers."""
        self._say("vision")
        others = {name.partition(".")[0] for name in self.plan.ours} - {"decoder"}
        front = ("decoder.embed_tokens.", "decoder.pos_embed", "decoder.per_layer.")
        load_part(self.plan, *front, *sorted(others), dtype=self.dtype)

    def enter(self) -> list[mx.array]:
        """What the first layer reads of each sample; what is prepared for the layers becomes `passes`."""
        model, entered = self.plan.model, []
        self.passes = []
        for sample in self.samples:
            run = model.decoder.begin(model.read(sample.inputs))
            entered.append(model.decoder.enter(run))
            mx.eval(entered[-1], run.beside, run.reading.memory and run.reading.memory.features)
            none = run.reading.embeddings[:, :0]  # they are the first hidden states, which are given up later
            self.passes.append(replace(run, reading=replace(run.reading, embeddings=none)))
        return entered

    def embed(self) -> None:
        """Embed all samples, their pictures among them; keeps the embeddings' table where the head needs it."""
        model = self.plan.model
        for part in (model.vision, model.projector):
            kernels().unpack(part, self.dtype)
        self.hidden = self.enter()
        for part in (model.vision, model.projector):
            release(part)
        if "lm_head" in model.decoder:
            release(model.decoder.embed_tokens)
        if "per_layer" in model.decoder:
            release(model.decoder.per_layer)

    def features(self) -> list[np.ndarray]:
        """Of each sample the embeddings of its pictures, float32[P, C]; between `embed` and the first layer."""
        memories = [run.reading.memory for run in self.passes]
        if any(memory is not None for memory in memories):
            return [np.array(memory.features.astype(mx.float32)) for memory in memories if memory is not None]
        found = []
        for sample, hidden in zip(self.samples, self.hidden, strict=True):
            rows = mx.array(np.flatnonzero(sample.inputs.slots))
            found.append(np.array(hidden[0, rows].astype(mx.float32)))
        return found

    def load_layer(self, number: int) -> nn.Module:
        """Read one of the decoder's layers."""
        layers = self.plan.model.decoder.layers
        self._say(f"layer {number + 1} of {len(layers)}")
        load_part(self.plan, f"decoder.layers.{number}.", dtype=self.dtype)
        return layers[number]

    def run_layer(self, number: int, hidden: Sequence[mx.array]) -> list[mx.array]:
        """What a layer makes of its inputs, one a sample."""
        outputs = []
        for x, run in zip(hidden, self.passes, strict=True):
            outputs.append(self.plan.model.decoder.run_layer(number, x, run))
            mx.eval(outputs[-1])
        return outputs

    def step(self, number: int) -> None:
        """Move all samples through a layer that is loaded, and give it back."""
        layer = self.plan.model.decoder.layers[number]
        kernels().unpack(layer, self.dtype)
        self.hidden = self.run_layer(number, self.hidden)
        release(layer)

    def load_head(self) -> None:
        """Read the last norm and the head, where there is one of its own."""
        self._say("head")
        load_part(self.plan, "decoder.norm.", "decoder.lm_head.", dtype=self.dtype)

    def scored(self) -> list[mx.array]:
        """The last norm's outputs at the question's last token and at the answer's: what predicts the answer."""
        norm = self.plan.model.decoder.norm
        return [norm(x[:, s.start - 1 :]) for x, s in zip(self.hidden, self.samples, strict=True)]

    def logprobs(self) -> list[np.ndarray]:
        """Of each sample the log-probabilities of the next token there: float32[T, vocab_size]."""
        found = []
        for hidden in self.scored():
            found.append(np.array(kernels().log_softmax(self.plan.model.decoder.logits(hidden)[0])))
        return found


@dataclass(frozen=True)
class Observed:
    """What a model makes of samples: features of their pictures and log-probabilities, one array a sample."""

    features: list[np.ndarray]
    logprobs: list[np.ndarray]


def observe(
    plan: Plan, samples: Sequence[Sample], dtype: mx.Dtype, say: Callable[[str], None] | None = None
) -> Observed:
    """Run a checkpoint's model on samples; its largest part, not the whole of it, is in memory at a time.

    Args:
        plan: its model is used up.
        say: called with what is being run.
    """
    walk = Walk(plan, samples, dtype, say)
    walk.load_front()
    walk.embed()
    features = walk.features()
    for number in range(len(plan.model.decoder.layers)):
        walk.load_layer(number)
        walk.step(number)
    walk.load_head()
    kernels().unpack(plan.model.decoder, dtype)
    logprobs = walk.logprobs()
    release(plan.model.decoder)
    return Observed(features, logprobs)


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL divergence of next-token distributions in nats, from log-probabilities float[T, V]: float64[T]."""
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    kl: np.ndarray = (np.exp(reference) * (reference - other)).sum(axis=-1)
    return kl
