"""Checkpoint in, smaller MLX checkpoint out: read, cast, quantize, check, write."""

from .conversion import Report, convert

__all__ = ["Report", "convert"]
