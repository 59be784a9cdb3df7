"""Where the golden checkpoints are, and small things that tests do to them."""

import json
from pathlib import Path
from typing import Any

from reference import GOLDEN

PHOTO, SHAPES = GOLDEN / "photo.jpg", GOLDEN / "shapes.png"
PLAIN = GOLDEN / "llava-clip-llama"


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; `...` removes one."""
    content = json.loads(file.read_text())
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    file.write_text(json.dumps(content))


def check_fields(config: Any, expected: dict[str, Any]) -> None:
    """Fields of a config by their dotted names."""
    for path, value in expected.items():
        found = config
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value, path


def with_paths(messages: list[dict[str, Any]], folder: Path = GOLDEN) -> list[dict[str, Any]]:
    """Messages with their images' names as paths."""
    return [
        {**message, "content": [
            {**part, "image": str(folder / part["image"])} if part["type"] == "image" else part
            for part in message["content"]
        ]}
        for message in messages
    ]  # fmt: skip
