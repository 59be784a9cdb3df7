"""Videos: frames chosen, resized together, and joined as the vision tower takes them.

Source: video_processing_qwen2_vl.py, video_processing_qwen3_vl.py and processing_qwen3_vl.py of
huggingface/transformers. Its `cap_pixels_per_frame`, the limit of qwen-vl-utils, is on here unless a file turns it off.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any, Literal

import numpy as np

from mlx_vlm_mini.config.vision import GridConfig
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.images.video import FPS, Video, _is_number, _Pictures, open_video

from .grid import FramesGrid, Grid
from .pixels import preprocess
from .settings import ImageSettings, image_settings

VideoKind = Literal["Qwen2VL", "Qwen3VL"]
"""The video processor's class, without `VideoProcessor`."""

_LEAST_CAP = 1.05  # times the least number of pixels: the lowest limit that a long video gets
_SHARE = 0.9  # of the tokens that a whole video may have
_DEFAULTS: dict[VideoKind, dict[str, Any]] = {
    "Qwen2VL": {
        "size": {"shortest_edge": 128 * 28**2, "longest_edge": 768 * 28**2}, "patch_size": 14, "merge_size": 2,
        "max_video_tokens": 128000,
    },
    "Qwen3VL": {
        "size": {"shortest_edge": 128 * 32**2, "longest_edge": 768 * 32**2}, "patch_size": 16, "merge_size": 2,
        "max_video_tokens": 768, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5),
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class VideoSettings:
    """How a checkpoint takes videos, from video_preprocessor_config.json or another file with its settings."""

    kind: VideoKind
    images: ImageSettings
    """Of a frame; its tiling is a `Grid`, whose limits are a frame's (Qwen2VL) or all frames' (Qwen3VL)."""
    frames: int
    """That become one step of time."""
    fps: float
    min_frames: int
    max_frames: int
    cap: bool
    """Whether a frame's pixels are bounded by its share of the whole, too."""
    max_video_tokens: int
    """Of a whole video (Qwen2VL) or of a frame (Qwen3VL), where there is a cap."""
    frame_pixels: int | None = None
    """Of a frame at most, as a caller chose."""

    def __post_init__(self) -> None:
        for name in ("frames", "min_frames", "max_frames", "max_video_tokens"):
            if type(getattr(self, name)) is not int or not 1 <= getattr(self, name) < 1 << 31:
                raise CheckpointError(f"videos need a whole number above 0 as {name}, not {getattr(self, name)!r}")
        if not _is_number(self.fps) or not 0 < self.fps <= 1000:
            raise CheckpointError(f"videos need a number above 0 as fps, not {self.fps!r}")

    @property
    def grid(self) -> Grid:
        assert isinstance(self.images.tiling, Grid)
        return self.images.tiling

    def choose(self, total: int, rate: float, video: Video) -> np.ndarray:
        """Numbers of the frames that the model sees, of `total` at `rate` a second: int[n], ascending."""
        most = min(self.max_frames if video.max_frames is None else video.max_frames, total)
        wanted = total / rate * (self.fps if video.fps is None else video.fps)
        if self.kind == "Qwen3VL":
            count = max(min(max(int(wanted), self.min_frames), most), 1)
            return np.linspace(0, total - 1, count).round().astype(int)
        most = floor(most / self.frames) * self.frames
        count = floor(min(max(wanted, self.min_frames), most) / self.frames) * self.frames
        if count < 1:  # of one frame, say, which the reference refuses
            return np.arange(min(total, self.frames))
        return (np.arange(count) * (total / count)).astype(np.float32).astype(int)

    def fit(self, size: tuple[int, int], count: int) -> tuple[int, int]:
        """Height and width in pixels of what `count` frames of `size`, height and width, become.

        Raises:
            ImageError: they are too long and narrow.
        """
        grid = self.grid
        unit = grid.factor**2
        if self.kind == "Qwen2VL":
            most = grid.max_pixels
            if self.cap:
                share = int(self.max_video_tokens * unit * _SHARE) * self.frames // count
                most = max(min(most, share), int(grid.min_pixels * _LEAST_CAP))
            most = most if self.frame_pixels is None else min(most, self.frame_pixels)
            return replace(grid, min_pixels=min(grid.min_pixels, most), max_pixels=most).fit(size)
        count, most = max(count, self.frames), grid.max_pixels
        if self.cap:
            share = min(self.max_video_tokens * unit, most // count)
            most = max(share, int(grid.min_pixels * _LEAST_CAP)) * count
        most = most if self.frame_pixels is None else min(most, self.frame_pixels * count)
        limits = {"min_pixels": min(grid.min_pixels, most), "max_pixels": most}
        patches = {"patch_size": grid.patch_size, "merge": grid.merge}
        return FramesGrid(**patches, **limits, frames=count, step=self.frames).fit(size)


def video_settings(hf: Mapping[str, Any], kind: VideoKind) -> VideoSettings:
    """Read the settings of a video processor, completed with its class's defaults.

    Args:
        hf: video_preprocessor_config.json, `video_processor` of processor_config.json, or an image processor's part.

    Raises:
        CheckpointError: a value is not usable.
    """
    given = {key: value for key, value in hf.items() if value is not None and not key.endswith("_type")}
    values = {**_DEFAULTS[kind], "fps": FPS, "min_frames": 4, "max_frames": 768, "cap_pixels_per_frame": True, **given}
    return VideoSettings(
        kind=kind,
        images=image_settings({**values, "image_processor_type": "Qwen2VLImageProcessor"}, "Qwen2VL"),
        frames=values.get("temporal_patch_size", 2),
        fps=values["fps"],
        min_frames=values["min_frames"],
        max_frames=values["max_frames"],
        cap=bool(values["cap_pixels_per_frame"]),
        max_video_tokens=values["max_video_tokens"],
    )


@dataclass(frozen=True, eq=False)
class Clip:
    """A video's frames as the vision tower takes them.

    Attributes:
        pixel_values: float32[T, height, width, 3 * frames], normalised: each step's frames one behind another; the last
            frame is repeated where one is missing.
        size: height and width in pixels of a frame, as it was opened.
        seconds: when each step is: the mean of its first and its last frame.
        interval: seconds from one step to the next, on average.
    """

    pixel_values: np.ndarray
    size: tuple[int, int]
    seconds: tuple[float, ...]
    interval: float


@dataclass(frozen=True)
class VideoLayout:
    """How a video stands in a prompt.

    Attributes:
        text: what stands for it, an image token an embedding.
        times: where its steps stand on the decoder's axis of time, from 0 on.
        around: what the chat template may write in front of it and behind it, and the text takes the place of.
    """

    text: str
    times: tuple[int, ...]
    around: tuple[str, str] = ("", "")


def read_clip(video: Video, settings: VideoSettings) -> Clip:
    """Choose a video's frames, and make them ready one by one.

    Raises:
        ImageError: it cannot be read, or its frames are too long and narrow.
    """
    reader = open_video(video, settings.fps)
    most = settings.max_frames if video.max_frames is None else video.max_frames
    given = isinstance(reader, _Pictures) and reader.total <= most  # pictures were chosen already
    numbers = np.arange(reader.total) if given else settings.choose(reader.total, reader.rate, video)
    count, step = len(numbers), settings.frames
    pixels, size = np.zeros((0, 0, 0, 0), np.float32), (0, 0)
    for place, image in enumerate(reader.frames(numbers.tolist())):
        if not place:
            size = image.height, image.width
            height, width = settings.fit(size, count)
            frame = replace(settings.images, tiling=None, size={"height": height, "width": width})
            pixels = np.empty((ceil(count / step), height, width, 3 * step), np.float32)
        first = place % step * 3
        values = preprocess(image, frame)
        pixels[place // step, ..., first : first + 3] = values
        if place == count - 1:
            for missing in range(first + 3, 3 * step, 3):
                pixels[-1, ..., missing : missing + 3] = values
    seconds = [number / reader.rate for number in numbers.tolist()]
    seconds += seconds[-1:] * (-count % step)
    middles = [(seconds[first] + seconds[first + step - 1]) / 2 for first in range(0, len(seconds), step)]
    return Clip(pixels, size, tuple(middles), step / (count / reader.total * reader.rate))


def step_times(clip: Clip, grid: GridConfig) -> tuple[int, ...]:
    """Where steps stand on the decoder's axis of time: one place each, or `tokens_per_second` a second.

    Fractions are cut off, in float32 as the reference's.
    """
    pace = 1 if grid.tokens_per_second is None else grid.tokens_per_second * np.float32(clip.interval)
    times = np.arange(len(clip.pixel_values), dtype=np.float32) * np.float32(pace)
    return tuple(times.astype(int).tolist())
