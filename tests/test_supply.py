"""What is installed with this package: bounds that are tested (`.ci/supply`), and no network at import or in tests."""

import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BOUNDS = re.compile(r"(?P<name>[\w-]+)(\[\w+\])?>=(?P<lowest>[\d.]+),<(?P<next>[\d.]+)(;.*)?")


def test_every_dependency_has_both_bounds_and_the_lower_one_is_tested():
    lowest = dict(line.split("==") for line in (ROOT / ".ci/lowest.txt").read_text().split())
    found = {}
    for line in PROJECT["dependencies"]:
        bounds = BOUNDS.fullmatch(line)
        assert bounds, f"{line} needs a lower and an upper bound"
        found[bounds["name"]] = bounds["lowest"]
    assert lowest.pop("transformers")  # which mlx-lm brings, and nothing here imports
    assert found == lowest


IMPORTS = """
import pkgutil, importlib, sys
def watch(event, arguments):
    if event.startswith(("socket.connect", "socket.getaddrinfo", "socket.send", "subprocess", "os.system", "urllib")):
        raise AssertionError(event)
sys.addaudithook(watch)
import mlx_vlm_mini
for room in pkgutil.walk_packages(mlx_vlm_mini.__path__, "mlx_vlm_mini."):
    importlib.import_module(room.name)
import mlx_vlm_mini.cli.main, mlx_vlm_mini.convert, mlx_vlm_mini.train
for command in mlx_vlm_mini.cli.main.COMMANDS:
    importlib.import_module("mlx_vlm_mini.cli." + command)
print(len([name for name in sys.modules if name.startswith("mlx_vlm_mini")]))
"""


def test_imports_reach_no_network_and_start_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


@pytest.mark.parametrize("host", ["192.0.2.1", "huggingface.co"])
def test_tests_reach_no_network(host):
    with pytest.raises(AssertionError, match=f"a test asks for {host}"):
        socket.create_connection((host, 80), timeout=1)
