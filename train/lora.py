"""Low-rank adapters (LoRA, arXiv:2106.09685) on the decoder's linear layers, kept in mlx-lm's adapter format.

mlx-lm's own class is not used: its package imports transformers, and torch with it.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.files import read_json, written_whole
from mlx_vlm_mini.model import VLM

from .save import write_arrays

KEYS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


class LoRALinear(nn.Module):
    """y = Wx + scale * B A x, of which A and B learn; `linear` may be quantized."""

    def __init__(self, linear: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        columns = columns * 32 // linear.bits if isinstance(linear, nn.QuantizedLinear) else columns
        self.linear = linear
        self.scale = scale
        self.lora_a = mx.random.uniform(-(columns**-0.5), columns**-0.5, (columns, rank))
        self.lora_b = mx.zeros((rank, rows))

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + (self.scale * (x @ self.lora_a @ self.lora_b)).astype(x.dtype)

    def fuse(self) -> nn.Module:
        """The linear layer with the adapter added to its weights.

        Raises:
            CheckpointError: the layer is quantized.
        """
        if isinstance(self.linear, nn.QuantizedLinear):
            raise CheckpointError("an adapter of a quantized layer cannot be fused without losing bits: keep it apart")
        update = (self.scale * (self.lora_a @ self.lora_b)).T
        self.linear.weight = self.linear.weight + update.astype(self.linear.weight.dtype)
        return self.linear


def add_adapters(model: VLM, rank: int, scale: float) -> None:
    """Put an adapter on every linear layer of the decoder's layers, in place; all else is frozen."""
    model.freeze()
    for layer in model.decoder.layers:
        layer.update_modules(_tree({key: LoRALinear(_at(layer, key), rank, scale) for key in KEYS}))
        for key in KEYS:
            _at(layer, key).unfreeze(keys=["lora_a", "lora_b"], recurse=False)


def fuse_adapters(model: VLM) -> None:
    """Add every adapter to the weights under it, in place."""
    for layer in model.decoder.layers:
        layer.update_modules(_tree({key: _at(layer, key).fuse() for key in KEYS}))


def _at(layer: nn.Module, key: str) -> nn.Module:
    part, name = key.split(".")
    return layer[part][name]


def _tree(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, nn.Module]]:
    tree: dict[str, dict[str, nn.Module]] = {}
    for key, module in modules.items():
        part, name = key.split(".")
        tree.setdefault(part, {})[name] = module
    return tree


def save_adapters(model: VLM, folder: Path, rank: int, scale: float) -> None:
    """Write adapters.safetensors and adapter_config.json; names are those of LLaVA's layers on the Hub."""
    adapters = {
        "language_model.model." + name.removeprefix("decoder."): array
        for name, array in tree_flatten(model.parameters())
        if name.endswith((".lora_a", ".lora_b"))
    }
    config = {
        "fine_tune_type": "lora",
        "num_layers": len(model.decoder.layers),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(KEYS)},
    }
    with written_whole(folder) as work:
        write_arrays(work / "adapters.safetensors", adapters, "mlx")
        (work / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def load_adapters(model: VLM, folder: Path) -> None:
    """Put the adapters of a folder on a model, in place.

    Raises:
        CheckpointError: the folder does not hold adapters for this model.
    """
    config = read_json(folder / "adapter_config.json")
    try:
        rank, scale = config["lora_parameters"]["rank"], config["lora_parameters"]["scale"]
        add_adapters(model, rank, scale)
        arrays = mx.load(str(folder / "adapters.safetensors"))
        assert isinstance(arrays, dict)
        names = {name.replace("language_model.model.", "decoder.", 1): array for name, array in arrays.items()}
        expected = {name: array.shape for name, array in tree_flatten(model.trainable_parameters())}
        if {name: array.shape for name, array in names.items()} != expected:
            raise CheckpointError(f"{folder} holds adapters for another model")
        model.load_weights(list(names.items()), strict=False)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder} is not a folder of adapters: {error!r}") from None
