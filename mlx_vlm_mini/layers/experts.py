"""Mixture of experts: of many feed-forwards a router chooses a few for each token.

Source: Switch Transformers (arXiv:2101.03961) and their kin; models/qwen3_5_moe, qwen3_vl_moe and gemma4 of
huggingface/transformers. Experts lie stacked, as mlx-lm's layers take them.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_vlm_mini.borrow import borrow_uncompiled
from mlx_vlm_mini.config import Activation, ExpertConfig

from .kernels import activation
from .mlp import GatedMLP, Narrow
from .norms import BareRMSNorm


class _Gated(nn.Module):
    """In the form in which mlx-lm's experts call it."""

    def __init__(self, act: Activation) -> None:
        super().__init__()
        self._act = activation(act)

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return self._act(gate) * x


def is_stack(module: nn.Module) -> bool:
    """Whether a module is a linear layer of all experts, as it is or quantized."""
    layers = borrow_uncompiled("models.switch_layers")
    return isinstance(module, layers.SwitchLinear | layers.QuantizedSwitchLinear)


class MoE(nn.Module):
    """Gated MLPs of which each token has a few, weighed by a softmax; and one of all tokens where the config says so.

    `switch_mlp` holds the experts: its layers' weights are float[experts, out, in], as they are or quantized.
    """

    def __init__(self, size: int, config: ExpertConfig, act: Activation) -> None:
        super().__init__()
        self.count, self.normed = config.num_experts_per_tok, config.norm_topk_prob
        self.gate = Narrow(size, config.num_experts, bias=False)
        experts = borrow_uncompiled("models.switch_layers").SwitchGLU
        self.switch_mlp = experts(size, config.moe_intermediate_size, config.num_experts, activation=_Gated(act))
        if config.shared_expert_intermediate_size is not None:
            self.shared_expert = GatedMLP(size, config.shared_expert_intermediate_size, act)
            self.shared_expert_gate = Narrow(size, 1, bias=False)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """float[..., C] -> which experts, uint32[..., k], in any order, and their shares, float32[..., k]."""
        shares = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)
        chosen = mx.argpartition(-shares, self.count - 1, axis=-1)[..., : self.count]
        shares = mx.take_along_axis(shares, chosen, axis=-1)
        return chosen, shares / shares.sum(axis=-1, keepdims=True) if self.normed else shares

    def _run(self, x: mx.array, chosen: mx.array) -> mx.array:
        """What the chosen experts make of each token: float[..., k, C]."""
        half = x.dtype != mx.float32 and "scales" not in self.switch_mlp.gate_proj
        if not half or mx.default_device().type == mx.DeviceType.gpu:
            found: mx.array = self.switch_mlp(x, chosen)
            return found
        # MLX's products by chosen matrices take float32 alone on a CPU, so those that are used are made that.
        used, places = np.unique(np.array(chosen), return_inverse=True)
        rows, mlp = mx.array(places.reshape(chosen.shape)), self.switch_mlp

        def product(layer: nn.Module, x: mx.array) -> mx.array:
            weights = layer.weight[mx.array(used)].astype(mx.float32)
            return mx.gather_mm(x, weights.swapaxes(-1, -2), rhs_indices=rows)

        inner = x.astype(mx.float32)[..., None, None, :]
        inner = mlp.activation(product(mlp.up_proj, inner), product(mlp.gate_proj, inner))
        return product(mlp.down_proj, inner).squeeze(-2).astype(x.dtype)

    def __call__(self, x: mx.array, routed: mx.array | None = None) -> mx.array:
        """float[..., C] -> float[..., C]; `routed`: what chooses the experts, where it is not what they read."""
        chosen, shares = self.route(x if routed is None else routed)
        y: mx.array = (self._run(x, chosen) * shares[..., None].astype(x.dtype)).sum(axis=-2)
        if "shared_expert" not in self:
            return y
        return y + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


class ScaledMoE(MoE):
    """Gemma 4's: what routes is normed first, and each expert's share is multiplied by a number of its own."""

    def __init__(self, size: int, config: ExpertConfig, act: Activation, *, eps: float) -> None:
        super().__init__(size, config, act)
        self.norm = BareRMSNorm(eps=eps)
        self.scale, self.per_expert_scale = mx.ones(size), mx.ones(config.num_experts)

    def route(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """As `MoE.route`; the shares need not add up to 1."""
        chosen, shares = super().route(self.norm(x) * self.scale * x.shape[-1] ** -0.5)
        return chosen, shares * self.per_expert_scale[chosen].astype(mx.float32)
