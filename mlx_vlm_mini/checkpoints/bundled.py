"""The demonstration model that comes with the package, so that all of it works without a download."""

from pathlib import Path

NAME = "demo"
FOLDER = Path(__file__).parents[1] / "assets" / NAME
NOTICE = (
    "This is a small demonstration model: it knows simple shapes, colours and handwritten digits. For photos name a "
    "real one, such as llava-hf/llava-1.5-7b-hf (14 GB to download)."
)


def is_bundled(name: str | Path) -> bool:
    """Whether `name` means the bundled model; a folder of that name here comes first."""
    return name == NAME and not Path(name).exists()
