"""PaliGemma's mask decoder: sixteen codes -> 64x64 pixels.

The decoder of a VQ-VAE (arXiv:1711.00937), after arXiv:2301.02229, trained on masks of Open Images. Its weights are
no part of a checkpoint: big_vision publishes them as vae-oid.npz, in torch's layout and by torch's names.
"""

import zipfile
import zlib
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_vlm_mini.checkpoints.hub import find_file
from mlx_vlm_mini.errors import CheckpointError

from .detections import MASK_CODES

FILE = "vae-oid.npz"
_LARGEST = 256 * 2**20  # bytes of all its arrays, twenty times what they have
ADDRESS = f"https://huggingface.co/spaces/big-vision/paligemma-hf/resolve/main/{FILE}"

_NAMES = {  # torch's module -> ours
    "decoder.0": "first", "decoder.12": "last",
    **{f"decoder.{2 + i}.net.{2 * j}": f"blocks.{i}.layers.{j}" for i in range(2) for j in range(3)},
    **{f"decoder.{4 + 2 * i}": f"ups.{i}" for i in range(4)},
}  # fmt: skip


class ResidualBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(channels, channels, size, padding=size // 2) for size in (3, 3, 1)]

    def __call__(self, x: mx.array) -> mx.array:
        first, second, third = self.layers
        return x + third(nn.relu(second(nn.relu(first(x)))))


class MaskDecoder(nn.Module):
    def __init__(self, codes: int = 128, width: int = 512) -> None:
        super().__init__()
        self.codebook = mx.zeros((codes, width))
        self.first = nn.Conv2d(width, 128, 1)
        self.blocks = [ResidualBlock(128), ResidualBlock(128)]
        sizes = pairwise((128, 128, 64, 32, 16))
        self.ups = [nn.ConvTranspose2d(size, half, kernel_size=4, stride=2, padding=1) for size, half in sizes]
        self.last = nn.Conv2d(16, 1, 1)

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """int[N, 16] codes, row by row of a 4x4 grid -> float32[N, 64, 64], above 0 inside the mask."""
        x = self.codebook[mx.array(codes.reshape(-1, MASK_CODES))].reshape(len(codes), 4, 4, -1)
        x = nn.relu(self.first(x))
        for block in self.blocks:
            x = block(x)
        for up in self.ups:
            x = nn.relu(up(x))
        return np.array(self.last(x)[..., 0])


def load_mask_decoder(name: str | Path) -> MaskDecoder:
    """Read vae-oid.npz; of its tensors only the decoder's and the codebook, and nothing pickled.

    Args:
        name: a path, or the file's address on the Hub.

    Raises:
        CheckpointError: the file is missing, or is not that one.
    """
    file = find_file(name)
    if not file.is_file():
        raise CheckpointError(f"mask decoder not found: {file}; it is {FILE}, from {ADDRESS}")
    try:
        with zipfile.ZipFile(file) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _LARGEST:
                raise CheckpointError(f"{file} is not {FILE}, PaliGemma's mask decoder: it unpacks to over 256 MB")
        with np.load(file, allow_pickle=False) as arrays:
            codebook = arrays["_vq_vae._embedding"]
            decoder = MaskDecoder(*codebook.shape)
            tensors = {"codebook": codebook}
            for theirs, ours in _NAMES.items():
                weight = arrays[f"{theirs}.weight"]  # (out, in, h, w), of transposed convolutions (in, out, h, w)
                order = (1, 2, 3, 0) if ours.startswith("ups.") else (0, 2, 3, 1)
                tensors |= {f"{ours}.weight": weight.transpose(order), f"{ours}.bias": arrays[f"{theirs}.bias"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, MemoryError, RuntimeError) as error:
        raise CheckpointError(f"{file} is not {FILE}, PaliGemma's mask decoder: {error}") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{file} is not {FILE}, PaliGemma's mask decoder: {error}") from None
    expected = {name: array.shape for name, array in tree_flatten(decoder.parameters())}
    wrong = [name for name, array in tensors.items() if array.shape != expected[name] or array.dtype.kind != "f"]
    if wrong:
        raise CheckpointError(f"{file} is not {FILE}, PaliGemma's mask decoder: it has another {wrong[0]}")
    decoder.load_weights([(name, mx.array(array.astype(np.float32))) for name, array in tensors.items()])
    return decoder
