"""What the repository promises about itself: imports go one way, the README's tree is true, the wheel is whole."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("mlx_vlm_mini", "convert", "train", "cli")
# What a module of the library may import, from the first room to the last (design.md).
ORDER = (
    "errors", "bundled", "blas", "borrow", "config", "exponential", "rows", "activation", "attention", "cross_attention", "query_attention", "contrast", "image_blocks", "rope", "axes", "vision", "grid_vision", "places", "canvas", "tiled_vision", "projector", "resampler", "merger", "qformer", "decoder", "opt", "step", "pooling", "anyres", "model",
    "pickled", "checkpoint", "web", "decode", "image", "tiles", "splits", "crops", "grid", "bars", "preprocess", "video_file", "video", "patterns", "bytelevel", "sentencepiece", "ranks", "wordpieces", "tokenizer", "families", "weights", "unpack", "hub", "assembly", "sandbox", "prompt", "processor", "loading", "generation",
    "features", "stream", "fingerprint", "cache", "transcript", "chat", "measure", "describe", "detections", "draw", "mask_decoder", "clip", "vilt", "matching",
    "attended", "inspection", "heat", "page",
)  # fmt: skip


def package_files() -> list[str]:
    """Every file of the package's folders, by its path in the repository."""
    files = (file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.is_file())
    return sorted(str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts)


def imports(file: Path) -> Iterator[str]:
    """Absolute names of what a file imports, `TYPE_CHECKING` blocks included."""
    package = {folder: f"mlx_vlm_mini.{folder}" for folder in FOLDERS} | {"mlx_vlm_mini": "mlx_vlm_mini"}
    parts = file.relative_to(ROOT).parent.parts
    here = ".".join((package[parts[0]], *parts[1:]))
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{file}: one-dot imports only"
            base = f"{here}.{node.module or ''}".rstrip(".") if node.level else node.module or ""
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


FILES = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    found = set(imports(file))
    forbidden = {"cli", "convert", "train", "torch", "torchvision", "transformers", "cv2"}
    assert not {name for name in found if name.partition(".")[0] in forbidden}
    folder = file.relative_to(ROOT).parts[0]
    if folder != "cli":
        assert not {name for name in found if name.split(".")[:2] == ["mlx_vlm_mini", "cli"]}
    if folder == "mlx_vlm_mini":
        assert not {name for name in found if name.startswith("mlx_vlm_mini.train")}
    if folder == "train":  # which conversion measures with
        assert not {name for name in found if name.startswith("mlx_vlm_mini.convert")}
    if folder == "mlx_vlm_mini":
        assert not {name for name in found if name.split(".")[0] == "click" or name.startswith("mlx_vlm_mini.convert")}
        room = file.relative_to(ROOT / "mlx_vlm_mini").with_suffix("").parts[0]
        if room != "__init__":
            rooms = {name.split(".")[1] for name in found if name.startswith("mlx_vlm_mini.")}
            later = {name for name in rooms if name in ORDER and ORDER.index(name) > ORDER.index(room)}
            assert not later, f"{room} imports {later}"


def test_every_room_has_its_place():
    rooms = {file.stem for file in (ROOT / "mlx_vlm_mini").glob("*.py")} - {"__init__"} | {"config", "families"}
    assert rooms == set(ORDER)


def test_names_and_sizes_of_files():
    for file in FILES:
        assert file.stem not in ("utils", "common", "helpers", "base")
        assert len(file.read_text().splitlines()) <= 400, file


TREE = re.compile(r"(?<=```text\n).*?(?=```)", re.DOTALL)
LINE = re.compile(r"(?P<indent>  )?(?P<name>\S+?)(?P<folder>/?)(?P<gap> +)(?P<lines>\d+)?(?P<rest> *\S.*)")


def true_tree(tree: str) -> tuple[str, list[str]]:
    """The tree with the real numbers of lines, and the files whose lines it counts."""
    folder, corrected, counted = "", [], []
    for line in tree.splitlines():
        match = LINE.fullmatch(line)
        assert match, line
        path = f"{folder}/{match['name']}" if match["indent"] else match["name"]
        folder = path if match["folder"] and not match["indent"] else folder
        assert (ROOT / path).exists(), line
        if match["lines"]:
            counted.append(path)
            width = len(match["gap"] + match["lines"])
            number = len((ROOT / path).read_text().splitlines())
            line = f"{match['indent'] or ''}{match['name']}{number:>{width}}{match['rest']}"
        corrected.append(line)
    return "\n".join(corrected) + "\n", counted


def test_the_readmes_tree_is_the_real_one():
    """Each path exists, each number of lines is right (`python tests/test_repository.py` corrects them), none is left out."""
    tree = TREE.search((ROOT / "README.md").read_text())
    assert tree is not None
    corrected, counted = true_tree(tree[0])
    assert sorted(counted) == [name for name in package_files() if name.endswith(".py")]
    assert tree[0] == corrected


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path):
    source = tmp_path / "source"
    for name in (*package_files(), "pyproject.toml", "README.md", "LICENSE"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    moved = {folder: f"mlx_vlm_mini/{folder}" for folder in FOLDERS} | {"mlx_vlm_mini": "mlx_vlm_mini"}
    package = [name.split("/", 1) for name in package_files()]
    assert names == {f"{moved[folder]}/{rest}" for folder, rest in package}


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(TREE.sub(lambda match: true_tree(match[0])[0], readme.read_text(), count=1))
