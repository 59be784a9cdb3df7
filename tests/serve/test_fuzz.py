"""Broken bodies: benchmarks/fuzz_server.py throws 100,000 of them, a few hundred here."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "fuzz_server.py"


@pytest.mark.parametrize("count", [250, pytest.param(2_000, marks=pytest.mark.reference)])
def test_broken_bodies_are_answered_or_refused_in_json(count):
    done = subprocess.run(
        [sys.executable, PROGRAM, "--count", str(count), "--seed", "7"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{count} bodies" in done.stdout and "failures: 0" in done.stdout
