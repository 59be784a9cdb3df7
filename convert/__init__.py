"""Checkpoint in, smaller MLX checkpoint out: read, cast, quantize, check, write."""

from .check import Check
from .conversion import Report, convert, preview
from .parts import Preview
from .settings import Settings

__all__ = ["Check", "Preview", "Report", "Settings", "convert", "preview"]
