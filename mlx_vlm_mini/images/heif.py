"""HEIC's bytes -> a picture, by libheif.

pi-heif's own plugin for Pillow is not used: it shifts grey of more than 8 bits where it lies, by as many bytes as the
file says that there are, and so writes past the end of the plane where the file lies (pi-heif 1.4.0, found by fuzzing).
"""

from typing import Any

import numpy as np
from pi_heif import HeifFile
from PIL import Image

from mlx_vlm_mini.errors import ImageError


class Heif:
    """A file read, not decoded.

    Attributes:
        size: width and height of its first picture as it is shown: turned.
    """

    def __init__(self, data: bytes) -> None:
        """Raises what libheif raises on broken files: ValueError, RuntimeError and others."""
        found: Any = HeifFile(data, hdr_to_16bit=False, remove_stride=False)
        self._shown: Any = found[found.primary_index]
        self.size: tuple[int, int] = self._shown.size

    def decode(self, name: str) -> Image.Image:
        """The picture, upright: libheif turns it, and EXIF's tag says it a second time.

        Raises:
            ImageError: it is not as large as it says.
            Exception: it is broken.
        """
        shown = self._shown
        data, (width, height), bits = shown.data, shown.size, shown.info["bit_depth"]
        if (width, height) != self.size:
            raise ImageError(f"{name} is broken: it says {self.size[0]}x{self.size[1]} pixels and has {width}x{height}")
        if not shown.mode.startswith("I;"):
            return Image.frombytes(shown.mode, (width, height), data, "raw", shown.mode, shown.stride)
        if shown.stride < 2 * width or not 8 < bits <= 16:
            raise ImageError(f"{name} is broken: it says {bits} bits of grey and has others; save it anew")
        rows = np.frombuffer(data, np.uint8).reshape(height, shown.stride)[:, : 2 * width]
        return Image.fromarray((np.ascontiguousarray(rows).view("<u2") >> (bits - 8)).astype(np.uint8))
