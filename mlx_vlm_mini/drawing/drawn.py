"""What `imagine` gives: a picture, the image tokens that it is made of, and what it was drawn of."""

import io
import json
from dataclasses import dataclass, field
from typing import Any

from PIL import Image, PngImagePlugin

from mlx_vlm_mini.errors import ImageError

MADE_BY = "mlx-vlm-mini imagine"


@dataclass
class DrawStats:
    """What a picture cost.

    Attributes:
        prompt_tokens: tokens of the prompt, the marks around it included.
        generated_tokens: image tokens.
        together: pictures that were drawn at once, this one among them; the seconds but the last are theirs.
        prefill_s: seconds to read the prompt.
        decode_s: seconds to choose the image tokens.
        pixels_s: seconds to make pixels of them.
        peak_memory_bytes: MLX's peak, of the process.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    together: int = 1
    prefill_s: float = 0.0
    decode_s: float = 0.0
    pixels_s: float = 0.0
    peak_memory_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A picture.

    Attributes:
        image: RGB.
        token_ids: its image tokens, row by row.
        prompt: what it was to show.
        guidance, temperature, seed: what it was drawn with; the seed is that of this picture.
        stats: what it cost.
    """

    image: Image.Image
    token_ids: tuple[int, ...]
    prompt: str
    guidance: float
    temperature: float
    seed: int
    stats: DrawStats = field(default_factory=DrawStats, compare=False)

    def to_png(self, model: str = "") -> bytes:
        """The picture as a PNG file, whose text says what it was drawn of, and by which model where that is given."""
        text = PngImagePlugin.PngInfo()
        values = {
            "Software": MADE_BY, "Model": model, "Prompt": self.prompt, "Seed": str(self.seed),
            "Guidance": f"{self.guidance:g}", "Temperature": f"{self.temperature:g}",
            "Tokens": json.dumps(self.token_ids),
        }  # fmt: skip
        for key, value in values.items():
            if value:
                text.add_itxt(key, value)
        out = io.BytesIO()
        self.image.save(out, "PNG", pnginfo=text)
        return out.getvalue()


def read_drawn(data: bytes, name: str) -> Drawn:
    """A picture that `to_png` wrote.

    Args:
        data: of the file.
        name: for errors.

    Raises:
        ImageError: it is no such file.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as opened:
            opened.load()
            said: dict[str, Any] = dict(opened.text)  # type: ignore[attr-defined]
            image = opened.convert("RGB")
        if said.get("Software") != MADE_BY:
            raise ValueError("made by another program")
        tokens = json.loads(said["Tokens"])
        if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
            raise ValueError("no tokens")
        return Drawn(
            image=image, token_ids=tuple(tokens), prompt=str(said["Prompt"]), guidance=float(said["Guidance"]),
            temperature=float(said["Temperature"]), seed=int(said["Seed"]),
        )  # fmt: skip
    except Exception:  # whatever a broken file makes Pillow raise
        raise ImageError(f"{name} is no picture that mlx-vlm-mini imagine drew, or its text is gone") from None
