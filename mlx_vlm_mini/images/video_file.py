"""Video files, decoded frame by frame by PyAV, which the extra `video` installs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_vlm_mini.errors import ImageError

MOST_PIXELS = 50_000_000  # of a frame, above every camera's
_FORMATS = "asf,avi,flv,gif,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mpeg,mpegts,ogg"
"""Formats that hold their pictures themselves: a playlist would make FFmpeg open what it names."""


class VideoFile:
    """A file with pictures that move.

    Attributes:
        name: what messages call it.
        total: its frames.
        rate: of them a second.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            ImageError: PyAV is not installed, or the file is missing, broken, or holds no pictures.
        """
        try:
            import av  # noqa: F401
        except ImportError:
            raise ImageError(
                f"{path} is read by PyAV, which is not installed: pip install 'mlx-vlm-mini[video]', or give a folder "
                "of its frames as pictures"
            ) from None
        self.name, self._path = str(path), path
        with _Opened(path) as (_, stream):
            rate = stream.average_rate or stream.guessed_rate
            self.total, self.rate = int(stream.frames), float(rate or 0)
        if not 0 < self.rate < 1e6:
            raise ImageError(f"{path} does not say how many frames a second it has: give its frames as pictures")
        if self.total < 1:  # Matroska does not say it
            self.total = self._count()

    def _count(self) -> int:
        with _Opened(self._path) as (container, stream):
            count = sum(packet.size > 0 for packet in container.demux(stream))
        if not count:
            raise ImageError(f"{self.name} has no frames")
        return count

    def frames(self, numbers: Sequence[int]) -> Iterator[Image.Image]:
        """Frames of these numbers, which ascend, as RGB: one lies in memory at a time. Where the file ends before, the
        last that it has stands for the others.

        Raises:
            ImageError: the file is broken, or its frames are too large.
        """
        wanted, last = list(numbers), None
        with _Opened(self._path) as (container, stream):
            for number, frame in enumerate(container.decode(stream)):
                _check_size(self.name, frame.width, frame.height)
                last = frame
                while wanted and wanted[0] <= number:
                    wanted.pop(0)
                    yield _upright(frame)
                if not wanted:
                    return
            if last is None:
                raise ImageError(f"{self.name} has no frames")
            for _ in wanted:
                yield _upright(last)


class _Opened:
    """A file opened: its container and the stream of its pictures. What goes wrong meanwhile is one ImageError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> tuple[Any, Any]:
        import av

        try:
            self._file = self._path.open("rb")  # not by its name, which FFmpeg might take for an address
        except OSError as error:
            raise ImageError(f"cannot read video {self._path}: {error.strerror or error}") from None
        try:
            self._container = av.open(self._file, options={"format_whitelist": _FORMATS, "protocol_whitelist": "none"})
            streams = self._container.streams.video
            if not streams:
                raise ImageError(f"{self._path} holds no pictures that move")
            stream = streams[0]
            _check_size(str(self._path), stream.width, stream.height)
        except BaseException as error:
            self._file.close()
            raise self._as_ours(error) from None
        return self._container, stream

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._container.close()
        self._file.close()
        if isinstance(error, Exception):
            raise self._as_ours(error) from None

    def _as_ours(self, error: BaseException) -> BaseException:
        if isinstance(error, ImageError) or not isinstance(error, Exception):
            return error
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ImageError(f"{self._path} is not a video that can be read: {text}")


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise ImageError(
            f"{name} has frames of {width}x{height} pixels, and the limit is {MOST_PIXELS / 1e6:.0f} million"
        )


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    turned = getattr(frame, "rotation", 0) % 360  # as a phone was held
    return image.rotate(turned, expand=True) if turned else image
