"""Checkpoint in, smaller MLX checkpoint out: read, cast, quantize, check, write."""

from .conversion import Report, Settings, convert, preview
from .parts import Preview

__all__ = ["Preview", "Report", "Settings", "convert", "preview"]
