"""What a conversation knows of its pictures: pixels and features, by digest, within a limit of memory."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import mlx.core as mx

from mlx_vlm_mini.errors import check_whole
from mlx_vlm_mini.images.source import ImageSource, Picture, read_image
from mlx_vlm_mini.images.video import Video
from mlx_vlm_mini.inputs import InputImage
from mlx_vlm_mini.processor import PreparedImage, Processor, without_data

FEATURE_MEMORY = 2**29  # bytes
Kept = TypeVar("Kept")


class Features:
    """Keeps what pictures became, the least recently used being given up first.

    A picture is known by the SHA-256 of its file's bytes, so that the same file is decoded once, whatever its path; and
    its features by the digest of its prepared pixels, so that they serve whatever file the pixels came from. Several
    threads may use it.

    Attributes:
        limit: bytes of pixels and features that are kept; 0 keeps none. What is larger alone is not kept.
        nbytes: bytes that are kept now.
    """

    def __init__(self, limit: int = FEATURE_MEMORY) -> None:
        check_whole("feature_memory", limit, 0)
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[Any, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def prepare(
        self,
        processor: Processor,
        source: ImageSource | Picture | PreparedImage | Video,
        tokens: int | None = None,
    ) -> PreparedImage:
        """`processor.prepare`, which opens no picture twice.

        Raises:
            ImageError, CheckpointError, PromptError: as `processor.prepare`.
        """
        if isinstance(source, PreparedImage | Video):
            return processor.prepare(source, tokens)
        picture = source if isinstance(source, Picture) else read_image(source, processor.access)
        key = picture.sha256, repr(processor.settings_of(tokens)), tokens
        found = self._find(key, lambda: processor.prepare(picture, tokens), lambda image: image.nbytes)
        return found if found.origin.path == picture.path else replace(found, origin=without_data(picture))

    def prepare_part(self, processor: Processor, part: Any, tokens: int | None = None) -> Any:
        """A part of a message, its image or video prepared; `tokens`: of an image whose part does not say it."""
        if part["type"] not in ("image", "video"):
            return part
        own = part.get("tokens", tokens) if part["type"] == "image" else None
        return {**part, "image": self.prepare(processor, part["image"], own)}

    def encode(self, image: InputImage, encode: Callable[[InputImage], mx.array]) -> mx.array:
        """`encode(image)`, which encodes no picture twice: float[tokens, C]."""
        return self._find(image.digest, lambda: encode(image), lambda features: features.nbytes)

    def _find(self, key: Any, make: Callable[[], Kept], size: Callable[[Kept], int]) -> Kept:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                found: Kept = self._kept[key][0]
                return found
        made = make()
        nbytes = size(made)
        with self._lock:
            if nbytes <= self.limit and key not in self._kept:  # another thread may have made it, too
                self._kept[key] = made, nbytes
                self.nbytes += nbytes
            while self.nbytes > self.limit:
                self.nbytes -= self._kept.popitem(last=False)[1][1]
        return made
