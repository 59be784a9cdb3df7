"""A video as frames: of a file, of a folder of pictures, or of a list of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from mlx_vlm_mini.errors import ImageError

from .names import find_file, natural, unreadable
from .source import ImageSource, open_image
from .video_file import VideoFile

FPS = 2.0  # frames a second that a model sees, where neither a caller nor the checkpoint says it


@dataclass(frozen=True, eq=False)
class Video:
    """A video as it was given.

    Attributes:
        source: a video file, a folder of pictures, which are taken by name, or the pictures themselves.
        fps: frames a second that the model sees; of pictures, how many of them are a second.
        max_frames: that it sees at most.
    """

    source: str | Path | Sequence[ImageSource]
    fps: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        """Raises ImageError where it is none, or its numbers make no sense."""
        if not isinstance(self.source, str | Path | list | tuple):
            kind = type(self.source).__name__
            raise ImageError(f"a video is a file, a folder of pictures or a list of pictures, not {kind}")
        if isinstance(self.source, str) and "://" in self.source[:12] and self.source[:7].lower() != "file://":
            raise ImageError(f"{self.source} is an address: download the video and give its path")
        if self.fps is not None and not (_is_number(self.fps) and 0 < self.fps <= 1000):
            raise ImageError(f"fps of a video must be between 0 and 1000, not {self.fps!r}")
        if self.max_frames is not None and not (type(self.max_frames) is int and self.max_frames >= 1):
            raise ImageError(f"max_frames of a video must be 1 or more, not {self.max_frames!r}")

    @property
    def name(self) -> str:
        return str(self.source) if isinstance(self.source, str | Path) else "the video"


class _Frames(Protocol):
    name: str
    total: int
    rate: float

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]: ...


class _Pictures:
    def __init__(self, pictures: Sequence[ImageSource], name: str, rate: float) -> None:
        self.name, self.total, self.rate, self._pictures = name, len(pictures), rate, pictures
        if not pictures:
            raise ImageError(f"{name} holds no pictures")

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        first = None
        for number in numbers:
            image = open_image(self._pictures[number])
            first = first or image.size
            if image.size != first:
                raise ImageError(
                    f"frames of a video have one size: the first of {self.name} has {first[0]}x{first[1]} pixels, "
                    f"number {number + 1} {image.width}x{image.height}"
                )
            yield image


def list_pictures(folder: Path) -> list[ImageSource]:
    """The pictures of a folder by name, frame2 before frame12, hidden files left out."""
    known = {*Image.registered_extensions(), ".heic", ".heif", ".hif"}
    try:
        files = [file for file in folder.iterdir() if file.suffix.lower() in known and file.name[0] != "."]
    except OSError as error:
        raise ImageError(f"cannot read folder {unreadable(folder, error)}") from None
    return [*sorted(files, key=natural)]


def open_video(video: Video, fps: float = FPS) -> _Frames:
    """A video's frames, not yet decoded.

    Args:
        fps: of pictures, where the video does not say it.

    Raises:
        ImageError: nothing is there, or it cannot be read.
    """
    if not isinstance(video.source, str | Path):
        return _Pictures(video.source, video.name, video.fps or fps)
    path = find_file(video.source)
    try:
        folder, regular = path.is_dir(), path.is_file()
    except (OSError, ValueError):
        folder = regular = False
    if folder:
        return _Pictures(list_pictures(path), f"folder {path}", video.fps or fps)
    if not regular:  # a device might never end
        raise ImageError(f"video not found: {path}")
    return VideoFile(path)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
