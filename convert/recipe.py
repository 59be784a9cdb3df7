"""Recipes: which layer gets how many bits.

`mixed` is a fixed pattern after llama.cpp's Q4_K_M, which mlx-lm's mixed recipes follow, too. `auto` measures what each
layer's rounding does to the model's answers and spends a budget of bits where they matter. mlx-lm's
quant/dynamic_quant.py, which serves that end, does not fit: it knows two widths, estimates by gradients instead of
measuring, and runs models of token batches, which know no pictures.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from mlx_vlm_mini.checkpoints.folder import DTYPES
from mlx_vlm_mini.checkpoints.load import Plan, compute_dtype
from mlx_vlm_mini.checkpoints.weights import load_weights
from mlx_vlm_mini.errors import CheckpointError

from .calibrate import Sample, Walk, divergence
from .compensate import watch
from .quantize import BITS, Output, Quantization

Recipe = Literal["uniform", "mixed", "auto"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
Method = Literal["round", "gptq"]
METHODS: tuple[Method, ...] = get_args(Method)
MORE = {2: 4, 3: 5, 4: 6, 5: 8, 6: 8, 8: 8}
"""Bits of what a mixed recipe spends more on."""
Losses = Mapping[str, Mapping[int, float]]
"""What a model loses where one layer is quantized: by the name of its weight in the checkpoint and by bits."""
PROBE = 3  # bits at which a layer's loss is measured; those at others follow from the errors of its weights
MEASURED = 8  # samples to measure losses with
UNITS = 100_000  # that a budget is counted in


def mixed(plan: Plan, chosen: Mapping[str, Quantization]) -> dict[str, Quantization]:
    """More bits for head and embeddings, and for the decoder's `v_proj` and `down_proj` in its first and last eighth
    and in every third layer between them.

    Args:
        chosen: weights by their names in the checkpoint, to how they are quantized uniformly.
    """
    depth = plan.config.decoder.num_hidden_layers
    eighth = depth // 8

    def has_more(path: str) -> bool:
        if path in ("decoder.embed_tokens.weight", "decoder.lm_head.weight"):
            return True
        if not path.startswith("decoder.layers.") or not path.endswith(("v_proj.weight", "down_proj.weight")):
            return False
        number = int(path.split(".")[2])
        return number < eighth or number >= 7 * depth // 8 or (number - eighth) % 3 == 2

    names = {theirs: ours for ours, theirs in plan.ours.items()}
    return {
        name: Quantization(MORE[each.bits], each.group_size)
        if each.mode == "affine" and has_more(names[name])
        else each
        for name, each in chosen.items()
    }


def spend(losses: Sequence[Mapping[int, float]], sizes: Sequence[Mapping[int, int]], budget: int) -> list[int]:
    """Choose a width for each layer: the least sum of losses whose sum of sizes is within the budget.

    Exact but for sizes being counted in whole units, rounded up; so more budget never gives a larger sum.

    Args:
        losses, sizes: of each layer, by bits.

        budget: not below the sum of the smallest sizes.
    """
    base = sum(min(each.values()) for each in sizes)
    unit = max(1, (sum(max(each.values()) for each in sizes) - base) // UNITS)
    costs = [{bits: -(-(size - min(each.values())) // unit) for bits, size in each.items()} for each in sizes]
    room = min((budget - base) // unit, sum(max(each.values()) for each in costs))
    best = np.zeros(room + 1)  # the least loss of the layers so far, by the units that they may take
    picks = []
    for loss, cost in zip(losses, costs, strict=True):
        found, pick = np.full(room + 1, np.inf), np.zeros(room + 1, np.int8)
        for bits in cost:
            with_it = np.full(room + 1, np.inf)
            if cost[bits] <= room:
                with_it[cost[bits] :] = best[: room + 1 - cost[bits]] + loss[bits]
            better = with_it < found
            found, pick = np.where(better, with_it, found), np.where(better, bits, pick)
        best = found
        picks.append(pick)
    chosen = []
    for pick, cost in zip(reversed(picks), reversed(costs), strict=True):
        chosen.append(int(pick[room]))
        room -= cost[chosen[-1]]
    return chosen[::-1]


def guess(outputs: Sequence[Output]) -> Losses:
    """What stands for losses before anything is measured: that of a layer grows with its size and with its step."""
    return {output.entries[0][0]: {bits: output.weights * 4.0**-bits for bits in BITS} for output in outputs}


def allocate(outputs: Sequence[Output], losses: Losses, budget: float, group_size: int) -> dict[str, Quantization]:
    """Spend a budget on layers.

    Args:
        outputs: everything that is written, the layers in question in floating point.
        losses: what the model loses, by the name of a layer's weight and by bits.
        budget: bits per weight of the whole model.

    Returns:
        How each of the layers is quantized.

    Raises:
        CheckpointError: the budget is too small.
    """
    layers = [output for output in outputs if output.entries[0][0] in losses]
    rest = 8 * sum(output.nbytes for output in outputs if output.entries[0][0] not in losses)
    total = sum(output.weights for output in outputs)
    sizes = []
    for output in layers:
        scales = 2 * 8 * DTYPES[output.entries[0][1]][1] / group_size  # a scale and a bias, as bits for each weight
        sizes.append({bits: int(output.weights * (bits + scales)) for bits in BITS})
    least = (rest + sum(min(each.values()) for each in sizes)) / total
    if int(budget * total) - rest < sum(min(each.values()) for each in sizes):
        raise CheckpointError(
            f"{budget:g} bits per weight are too few: with the fewest bits everywhere it takes {least:.2f}"
        )
    names = [output.entries[0][0] for output in layers]
    bits = spend([losses[name] for name in names], sizes, int(budget * total) - rest)
    return {name: Quantization(each, group_size) for name, each in zip(names, bits, strict=True)}


def measure(
    plan: Plan,
    names: Sequence[str],
    group_size: int,
    samples: Sequence[Sample],
    say: Callable[[str], None] | None = None,
) -> Losses:
    """What the model's answers lose when one layer alone is rounded, for each layer and width.

    Each layer is rounded to 3 bits, and the KL divergence of the next-token distributions at the answers measured, in
    nats; at other widths it is taken to grow and shrink as the errors of the weights, weighed by their inputs' energy.
    The whole model is in memory, and the samples' hidden states before every layer of the decoder.

    Args:
        plan: its model is used up.
        names: weights by their names in the checkpoint.

    Returns:
        By name and bits the mean KL divergence.
    """
    say = say or (lambda _: None)
    model, decoder = plan.model, plan.model.decoder
    say("loading")
    dtype = compute_dtype(plan)
    load_weights(model, plan.ours, plan.checkpoint, dtype, plan.family.WEIGHTS)
    walk = Walk(plan, samples, dtype)
    layers = dict(model.named_modules())
    held: defaultdict[str, list[str]] = defaultdict(list)  # one layer of ours, or those of a fused tensor
    for path, layer in layers.items():
        if isinstance(layer, nn.Linear | nn.Embedding):
            held[plan.ours[f"{path}.weight"]].append(path)
    energies: dict[str, mx.array] = {}
    shared: list[dict[str, tuple[mx.array, mx.array]]] = []  # of each sample, keys and values of exact layers

    def record(path: str, x: mx.array) -> None:
        energy = mx.square(x.astype(mx.float32)).reshape(-1, x.shape[-1]).sum(axis=0)
        energies[path] = energies[path] + energy if path in energies else energy
        mx.eval(energies[path])

    def answers(states: list[mx.array], start: int) -> np.ndarray:
        for run, exact in zip(walk.passes, shared, strict=False):
            run.shared = dict(exact)
        for number in range(start, len(decoder.layers)):
            states = walk.run_layer(number, states)
        walk.hidden = states
        return np.concatenate(walk.logprobs())

    with watch(model, {path for path, each in layers.items() if isinstance(each, nn.Linear)}, record):
        states = [walk.enter()]
        for number in range(len(decoder.layers)):
            states.append(walk.run_layer(number, states[-1]))
        shared = [dict(run.shared) for run in walk.passes]
        reference = answers(states[-1], len(decoder.layers))

    losses: dict[str, Mapping[int, float]] = {}
    for count, name in enumerate(names, start=1):
        paths, errors = held[name], dict.fromkeys(BITS, 0.0)
        exact = [layers[path].weight for path in paths]
        for path, weight in zip(paths, exact, strict=True):
            energy = energies.get(path, mx.ones(weight.shape[-1]))
            for bits in BITS:
                settings = Quantization(bits, group_size).as_config()
                values = mx.dequantize(*mx.quantize(weight, **settings), **settings)
                errors[bits] += cast(float, (mx.square((values - weight).astype(mx.float32)) * energy).sum().item())
                if bits == PROBE:
                    layers[path].weight = values
        if paths == ["decoder.lm_head"]:
            other = answers(states[-1], len(decoder.layers))
        elif paths[0].startswith("decoder.layers."):
            start = int(paths[0].split(".")[2])
            other = answers(states[start], start)
        else:
            passes = walk.passes
            other = answers(walk.enter(), 0)
            walk.passes = passes
        for path, weight in zip(paths, exact, strict=True):
            layers[path].weight = weight
        kl = max(float(divergence(reference, other).mean()), 0.0)
        losses[name] = {bits: kl * errors[bits] / errors[PROBE] if errors[PROBE] else 0.0 for bits in BITS}
        say(f"measured {count} of {len(names)} layers")
    model.update(tree_map(lambda array: mx.zeros(array.shape, array.dtype), model.parameters()))
    return losses
