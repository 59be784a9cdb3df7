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
FOLDERS = ("mlx_vlm_mini", "convert", "train", "serve", "cli")
# The rooms of the library, in the order in which data goes through them: a room imports from those above it alone.
ROOMS = (
    "errors", "borrow", "files", "config", "layers", "images", "preprocessing", "vision", "projectors", "decoder", "drawing/parts", "inputs", "fusion", "model",
    "text", "families/parts", "families", "processor", "checkpoints", "data", "generation", "drawing", "grounding", "scoring",
)  # fmt: skip
AT_THE_ROOT = {"__init__", "borrow", "errors", "files", "fusion", "inputs", "model", "processor"}
PROGRAMS = {"convert", "train", "serve", "cli"}
MOST_MODULES = 12  # of a room; families is a registry


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


def module_of(file: Path) -> str:
    """A file's module, without `mlx_vlm_mini.`; of a package its name, of the library's own the empty text."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "mlx_vlm_mini" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def uses(file: Path) -> set[str]:
    """The modules of this repository that a file imports, wherever in it."""
    found = {name.removeprefix("mlx_vlm_mini.") for name in imports(file) if name.startswith("mlx_vlm_mini.")}
    own = module_of(file)
    return {name for name in found if name in MODULES and name != own and not own.startswith(f"{name}.")}


def room_of(module: str) -> str:
    """The room of a module of the library: a folder, or a module at its root."""
    parts = module.split(".")
    return "/".join(parts[:2]) if "/".join(parts[:2]) in ROOMS else parts[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file):
    names, module = set(imports(file)), module_of(file)
    forbidden = {"cli", "convert", "serve", "train", "torch", "torchvision", "transformers", "cv2"}
    assert not {name for name in names if name.partition(".")[0] in forbidden}
    programs = {name.split(".")[0] for name in uses(file)} & PROGRAMS
    if file.is_relative_to(ROOT / "mlx_vlm_mini"):
        assert not programs and not {name for name in names if name.split(".")[0] == "click"}
        if module:
            later = {name for name in uses(file) if name and ROOMS.index(room_of(name)) > ROOMS.index(room_of(module))}
            assert not later, f"{module} imports {later}"
    else:
        own = file.relative_to(ROOT).parts[0]
        assert programs <= ({own} if own != "cli" else PROGRAMS)


def test_no_two_modules_need_one_another():
    """No cycle of imports, those inside functions included."""
    waiting = {name: {used for used in uses(file) if used} for name, file in MODULES.items() if name}
    while ready := {name for name, needs in waiting.items() if not needs & waiting.keys()}:
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}
    assert not waiting


def test_every_module_has_a_room():
    package = ROOT / "mlx_vlm_mini"
    assert {file.stem for file in package.glob("*.py")} <= AT_THE_ROOT, "a new module belongs into a room"
    rooms = [folder for folder in package.rglob("*") if folder.is_dir() and [*folder.glob("*.py")]]
    for folder in rooms:
        name = str(folder.relative_to(package))
        assert name.split("/")[0] in ROOMS
        assert folder.joinpath("__init__.py").read_text().startswith('"""'), f"{name} says what it is for"
        assert name == "families" or len([*folder.glob("*.py")]) <= MOST_MODULES + 1, name


def test_names_of_files_and_lengths_of_what_is_in_them():
    for file in FILES:
        assert file.stem not in ("utils", "common", "helpers", "base")
        for node in ast.walk(ast.parse(file.read_text())):
            length = (getattr(node, "end_lineno", 0) or 0) - getattr(node, "lineno", 0)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert length <= 100, f"{file}: {node.name} has {length} lines"
            elif isinstance(node, ast.ClassDef):
                assert length <= 400, f"{file}: {node.name} has {length} lines"


TREE = re.compile(r"(?<=```text\n).*?(?=```)", re.DOTALL)
QUESTION = re.compile(r"^\| (?P<question>[^|]+\?) \| (?P<answer>[^|]+) \|", re.MULTILINE)


def test_the_readmes_tree_is_the_real_one():
    """Each path exists, and every room is there."""
    tree = TREE.search((ROOT / "README.md").read_text())
    assert tree is not None
    folder, named = "", set()
    for line in tree[0].splitlines():
        name = line.split()[0]
        path = f"{folder}/{name}" if line.startswith("  ") else name
        folder = folder if line.startswith("  ") else name.rstrip("/")
        assert (ROOT / path).exists(), line
        named.add(path.rstrip("/").removeprefix("mlx_vlm_mini/"))
    rooms = {str(file.parent.relative_to(ROOT / "mlx_vlm_mini")) for file in (ROOT / "mlx_vlm_mini").glob("*/*.py")}
    assert rooms <= named and {*FOLDERS} <= named


def test_the_map_of_questions_names_files_that_are_there():
    rows = QUESTION.findall((ROOT / "docs" / "architecture.md").read_text())
    assert len(rows) >= 12
    for question, answer in rows:
        named = re.findall(r"`([a-z_/0-9]+(?:\.py|/))(?:: ?([A-Za-z_.]+))?`", answer)
        assert named, question
        for path, symbol in named:
            place = ROOT / path
            assert place.exists(), f"{question}: {path}"
            if symbol:
                assert re.search(rf"\b{symbol.rpartition('.')[2]}\b", place.read_text()), f"{question}: {symbol}"


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
