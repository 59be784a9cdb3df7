"""The training loop: AdamW or Muon with warm-up and cosine decay, and checkpoints from which a killed run goes on as
if nothing had happened.

Stages follow LLaVA (arXiv:2304.08485): first the projector alone, then more.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from itertools import cycle, repeat
from pathlib import Path
from typing import Any, Literal, cast

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_vlm_mini.data.examples import Batch, Encoded, Example, collate, encode
from mlx_vlm_mini.decoder.reading import Reading
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.files import write_text
from mlx_vlm_mini.layers.cpu.blas import one_thread
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor

from .lora import add_adapters
from .save import write_arrays

Stage = Literal["projector", "full", "lora"]
OptimizerName = Literal["adamw", "muon"]

MUON_RATE = 20.0
"""Muon's learning rate in AdamW's, whose updates have numbers near 1; those of an orthogonal matrix are smaller."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train. Two runs with equal settings and data take the same trajectory.

    Attributes:
        stage: what learns: the projector alone, everything, or adapters on the decoder.
        steps: optimizer steps; the learning rate reaches its end there.
        batch_size: examples a step; `accumulate` such batches make one step.
        learning_rate: at its highest, after `warmup` steps; falls to a tenth along a cosine.
        weight_decay: on matrices and kernels only.
        max_grad_norm: gradients are scaled down to this norm.
        seed: of the order of the examples, and of fresh adapters.
        checkpoint_every: steps between checkpoints, and between validations.
        rank, scale: of the adapters.
        in_order: examples come as they stand in the data, which then is a curriculum; else in passes shuffled anew.
        optimizer: `adamw`, or `muon` for the matrices between hidden states and AdamW for the rest.
    """

    stage: Stage = "full"
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 200
    rank: int = 8
    scale: float = 20.0
    optimizer: OptimizerName = "adamw"
    in_order: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "checkpoint_every", "rank"):
            if getattr(self, name) < 1:
                raise PromptError(f"{name} must be 1 or more, not {getattr(self, name)}")


@dataclass(frozen=True)
class Progress:
    """One step of training, as it is logged.

    Attributes:
        loss: mean negative log-likelihood of the assistant's tokens in this step.
        valid_loss: the same on the validation examples, where they were just measured.
        valid_right: share of their answers of which every token is the likeliest one behind those before it.
        tokens_per_s: tokens read since the run began or went on, images' included, padding not.
        left_s: seconds to the end at this rate.
    """

    step: int
    steps: int
    loss: float
    valid_loss: float | None
    valid_right: float | None
    tokens_per_s: float
    left_s: float


def batch_logits(model: VLM, input_ids: mx.array, features_at: mx.array, pixel_values: mx.array) -> mx.array:
    """float32[B, L, vocabulary]: what the model expects behind each token of a batch; see `Batch`."""
    embeddings = model.decoder.embed(input_ids)
    if pixel_values.shape[0]:
        features = model.projector(model.vision.encode(pixel_values))
        features = features.reshape(-1, features.shape[-1])
        embeddings = mx.where((features_at >= 0)[..., None], features[mx.maximum(features_at, 0)], embeddings)
    return model.decoder.logits(model.decoder(Reading(embeddings))).astype(mx.float32)


def batch_loss(
    model: VLM, input_ids: mx.array, targets: mx.array, features_at: mx.array, pixel_values: mx.array
) -> tuple[mx.array, mx.array]:
    """Negative log-likelihood of a batch's targets, summed, and their number; see `Batch`."""
    return _targets_loss(batch_logits(model, input_ids, features_at, pixel_values), targets)


def _targets_loss(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    counted = targets >= 0
    losses = nn.losses.cross_entropy(logits, mx.maximum(targets, 0))
    return (losses * counted).sum(), counted.sum()


def answers_right(targets: np.ndarray, likeliest: np.ndarray) -> tuple[int, int]:
    """How many answers have every token as the likeliest one, and how many there are.

    Args:
        targets: int32[B, L] of a `Batch`; each run of tokens is an answer.
        likeliest: int32[B, L], the token that the model finds the likeliest there.
    """
    inside = (targets >= 0).ravel()  # the last place of a row is never inside
    answer = np.cumsum(inside & ~np.concatenate([[False], inside[:-1]])) - 1
    wrong = answer[inside & (targets != likeliest).ravel()]
    count = int(answer[-1]) + 1
    return count - len(np.unique(wrong)), count


def order(step: int, count: int, size: int, seed: int | None) -> list[int]:
    """Indices of a step's examples: an endless row of passes over all, cut into steps; without a seed not shuffled."""
    positions = range(step * size, (step + 1) * size)
    if seed is None:
        return [position % count for position in positions]
    passes = {position // count for position in positions}
    shuffled = {number: np.random.default_rng([seed, number]).permutation(count) for number in passes}
    return [int(shuffled[position // count][position % count]) for position in positions]


class Trainer:
    """Trains a model on examples, with everything needed to go on later in `folder`.

    Args:
        folder: holds `checkpoint/`, `log.jsonl` and `settings.json` of the run.

    Raises:
        CheckpointError: the folder holds a run with other settings, or the model is of a family that cannot be trained.
    """

    def __init__(
        self,
        model: VLM,
        processor: Processor,
        examples: Sequence[Example],
        folder: Path,
        settings: Settings,
        *,
        valid: Sequence[Example] = (),
    ) -> None:
        if model.config.text_alone:
            raise CheckpointError(f"family '{model.config.family}' reads no images, and is not trained here")
        if model.config.image_grid_pinpoints is not None:
            raise CheckpointError(f"family '{model.config.family}' cuts images into tiles, which cannot be trained yet")
        if model.config.projector.shuffle is not None:
            raise CheckpointError(f"family '{model.config.family}' joins image features, which cannot be trained yet")
        if model.config.vision.grid is not None:
            name = model.config.family
            raise CheckpointError(f"family '{name}' takes images of any size, which cannot be trained yet")
        if model.config.decoder.cross_attention is not None or model.config.takes_one_image:
            raise CheckpointError(f"family '{model.config.family}' has cross-attention, which cannot be trained yet")
        if model.config.decoder.two_way != "nothing":
            raise CheckpointError(f"family '{model.config.family}' sees later tokens, too, which cannot be trained yet")
        self.model, self.processor, self.settings = model, processor, settings
        self.examples, self.valid = examples, valid
        self.folder = folder
        self.step = 0
        choose_trainable(model, settings)
        self._streams = _core_streams() if mx.default_device().type == mx.DeviceType.cpu else ()
        self.optimizer = _optimizer(settings, self._streams)
        self.optimizer.init(model.trainable_parameters())
        self._tokens = 0
        self._gradients, self._update = self._compile()
        self._resume()

    def _compile(self) -> tuple[Any, Any]:
        model, optimizer, settings = self.model, self.optimizer, self.settings
        value_and_grad = nn.value_and_grad(model, batch_loss)

        def gradients(*arrays: mx.array) -> Any:
            return value_and_grad(model, *arrays)

        def update(sums: Any, count: mx.array) -> None:
            mean = tree_map(lambda gradient: gradient / count, sums)
            mean, _ = optim.clip_grad_norm(mean, settings.max_grad_norm)
            optimizer.update(model, mean)

        state = [model.state, *(part.state for part in optimizer.optimizers)]
        if mx.default_device().type != mx.DeviceType.gpu:
            return gradients, update  # on a CPU compiling takes 9 s a shape and makes a step no faster (2.2 s, 2.0 s)
        # Differentiating puts tracers into the model, so its state is an output, too.
        compiled = mx.compile(gradients, inputs=model.state, outputs=model.state)
        return compiled, mx.compile(update, inputs=state, outputs=state)

    def run(self) -> Iterator[Progress]:
        """Train to the end, from the last checkpoint on; yields after each step."""
        begin, first = time.perf_counter(), self.step
        alone = one_thread() if self._streams else nullcontext()
        with alone, ThreadPoolExecutor(1) as loader:  # the next batches are opened and encoded while this step computes
            waiting = loader.submit(self._batches, self.step)
            while self.step < self.settings.steps:
                batches = waiting.result()
                if self.step + 1 < self.settings.steps:
                    waiting = loader.submit(self._batches, self.step + 1)
                loss = self._train(batches)
                self.step += 1
                due = self.step % self.settings.checkpoint_every == 0 or self.step == self.settings.steps
                valid_loss, valid_right = self.validate() if due and self.valid else (None, None)
                elapsed = time.perf_counter() - begin
                left = elapsed / (self.step - first) * (self.settings.steps - self.step)
                progress = Progress(
                    self.step, self.settings.steps, loss, valid_loss, valid_right, self._tokens / elapsed, left
                )
                line = {"step": self.step, "loss": loss, "valid_loss": valid_loss, "valid_right": valid_right}
                with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(line) + "\n")
                if due:
                    self._save()
                yield progress

    def validate(self) -> tuple[float, float]:
        """On the validation examples `valid_loss` and `valid_right` of `Progress`."""
        size = self.settings.batch_size
        total, count, right, answers = 0.0, 0, 0, 0
        for start in range(0, len(self.valid), size):
            ids, targets, *rest = self._batch(self.valid[start : start + size]).arrays
            logits = batch_logits(self.model, ids, *rest)
            loss, tokens = _targets_loss(logits, targets)
            total += cast(float, loss.item())
            count += cast(int, tokens.item())
            found = answers_right(np.array(targets), np.array(logits.argmax(-1)))
            right, answers = right + found[0], answers + found[1]
        return total / max(count, 1), right / max(answers, 1)

    def _batches(self, step: int) -> list[Batch]:
        settings = self.settings
        seed = None if settings.in_order else settings.seed
        chosen = order(step, len(self.examples), settings.batch_size * settings.accumulate, seed)
        size = -(-settings.batch_size // max(len(self._streams), 1))
        encoded = [encode(self.processor, self.examples[index]) for index in chosen]
        encoded.sort(key=lambda each: len(each.input_ids))  # the sum over a step is the same, the padding shorter
        return [self._collate(encoded[start : start + size]) for start in range(0, len(encoded), size)]

    def _batch(self, examples: Sequence[Example]) -> Batch:
        return self._collate([encode(self.processor, example) for example in examples])

    def _collate(self, encoded: Sequence[Encoded]) -> Batch:
        num_features = self.model.config.vision.num_features
        if self._streams:  # nothing is compiled on a CPU, so each batch may have a shape of its own
            return collate(encoded, num_features)
        return collate(encoded, num_features, pad_length=32, pad_rows=max(len(encoded) // 2, 1))

    def _train(self, batches: Sequence[Batch]) -> float:
        sums, loss, count = None, mx.array(0.0), mx.array(0)
        beside = max(len(self._streams), 1)
        for start in range(0, len(batches), beside):
            for number, batch in enumerate(batches[start : start + beside]):
                with mx.stream(self._streams[number]) if self._streams else nullcontext():
                    (batch_sum, batch_count), gradients = self._gradients(*batch.arrays)
                loss, count = loss + batch_sum, count + batch_count
                sums = gradients if sums is None else tree_map(mx.add, sums, gradients)
                self._tokens += batch.num_tokens
            mx.eval(sums, loss, count)
        self._update(sums, mx.maximum(count, 1))
        mx.eval(self.model.state, self.optimizer.state)
        return cast(float, loss.item()) / max(cast(int, count.item()), 1)

    def _save(self) -> None:
        """Replace the checkpoint by one of now; at no moment is there neither the old nor the new one."""
        new, current, old = (self.folder / name for name in ("checkpoint.new", "checkpoint", "checkpoint.old"))
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        write_arrays(new / "model.safetensors", dict(tree_flatten(self.model.trainable_parameters())), "mlx")
        write_arrays(new / "optimizer.safetensors", dict(tree_flatten(self.optimizer.state)), "mlx")
        (new / "step.json").write_text(json.dumps({"step": self.step}), encoding="utf-8")
        shutil.rmtree(old, ignore_errors=True)
        if current.exists():
            current.rename(old)
        new.rename(current)
        shutil.rmtree(old, ignore_errors=True)

    def _resume(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file, settings = self.folder / "settings.json", {**asdict(self.settings), "examples": len(self.examples)}
        current, old = self.folder / "checkpoint", self.folder / "checkpoint.old"
        if not current.exists() and old.exists():  # killed between the two renames of _save
            old.rename(current)
        if not current.exists():
            write_text(file, json.dumps(settings, indent=1))
            write_text(self.folder / "log.jsonl", "")
            return
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != settings:
            changed = ", ".join(sorted(key for key in settings if before.get(key) != settings[key]))
            raise CheckpointError(f"{self.folder} holds a run with another {changed}: finish it, or train elsewhere")
        self.step = json.loads((current / "step.json").read_text(encoding="utf-8"))["step"]
        self.model.load_weights(str(current / "model.safetensors"), strict=False)
        state = cast(dict[str, mx.array], mx.load(str(current / "optimizer.safetensors")))
        self.optimizer.state = tree_unflatten(list(state.items()))
        self._gradients, self._update = self._compile()
        log = (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()[: self.step]
        write_text(self.folder / "log.jsonl", "".join(line + "\n" for line in log))


@cache
def _core_streams() -> tuple[mx.Stream, ...]:
    """A stream for each core of a CPU: each is a thread (which never ends), and much of a step is no matrix product."""
    return tuple(mx.new_stream(mx.cpu) for _ in range(os.cpu_count() or 1))


def choose_trainable(model: VLM, settings: Settings) -> None:
    """Freeze what does not learn in a stage; add the adapters that do."""
    if settings.stage == "full":
        model.unfreeze()
    elif settings.stage == "lora":
        mx.random.seed(settings.seed)
        add_adapters(model, settings.rank, settings.scale)
    else:
        model.freeze()
        model.projector.unfreeze()


def _optimizer(settings: Settings, streams: Sequence[mx.Stream]) -> Any:
    """AdamW (arXiv:1711.05101), or Muon for the matrices inside the towers and AdamW for the rest.

    Weight decay leaves norms, biases and embeddings of single rows alone.
    """

    def schedule(highest: float) -> Callable[..., Any]:
        rest = max(settings.steps - settings.warmup, 1)
        fall: Callable[..., Any] = optim.cosine_decay(highest, rest, highest / 10)
        if not settings.warmup:
            return fall
        return optim.join_schedules([optim.linear_schedule(0.0, highest, settings.warmup), fall], [settings.warmup])

    def adamw(decay: float) -> optim.Optimizer:
        rate = schedule(settings.learning_rate)
        return optim.AdamW(rate, betas=[0.9, 0.98], weight_decay=decay, bias_correction=True)

    adam = [adamw(settings.weight_decay), adamw(0.0)]
    if settings.optimizer == "adamw":
        return optim.MultiOptimizer(adam, [lambda name, weight: weight.ndim > 1])
    muon = _Muon(schedule(MUON_RATE * settings.learning_rate), settings.weight_decay, streams)
    return optim.MultiOptimizer([muon, *adam], [_is_hidden, lambda name, weight: weight.ndim > 1])


def _is_hidden(name: str, weight: mx.array) -> bool:
    """Whether a weight is a matrix from hidden states to hidden states: not of pixels, tokens or places."""
    return weight.ndim == 2 and ("layers" in name or "blocks" in name or "projector" in name)


class _Muon(optim.Muon):
    """MLX's Muon (https://kellerjordan.github.io/posts/muon/) with weight decay beside the update, its work
    shared by streams.
    """

    def __init__(self, rate: Callable[..., Any], decay: float, streams: Sequence[mx.Stream]) -> None:
        super().__init__(rate, momentum=0.95, weight_decay=0.0)
        self._decay, self._streams = decay, cycle(streams) if streams else repeat(None)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        stream = next(self._streams)
        with mx.stream(stream) if stream else nullcontext():
            kept = parameter * (1 - self._decay * self.learning_rate)
            return super().apply_single(gradient, kept, state)
