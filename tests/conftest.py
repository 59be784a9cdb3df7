"""Checkpoints that several tests use: the goldens, copies of them to break, and one wide enough to quantize."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run beside one another, so each computes on one core
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


if threading.current_thread() is threading.main_thread():
    # A shell's background jobs ignore Ctrl-C, and so would the programs that they start, which tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from mlx_vlm_mini.layers.cpu.blas import use_openblas

use_openblas()  # as the program does; before anything imports mlx

import mlx.core as mx
from checkpoints import PLAIN, make_wide
from hub import run_program, serve
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.generation import step
from mlx_vlm_mini.generation.step import COMPILE
from mlx_vlm_mini.layers import kernels

INTERPRETED = os.environ.get(kernels.CHOICE) == "mlx"  # a Mac's kernels on a CPU, where MLX would call a C++ compiler
if INTERPRETED:
    mx.disable_compile()


def _enable_compile() -> None:
    if not INTERPRETED:
        mx.enable_compile()


def _is_number(host: str) -> bool:
    with suppress(OSError):
        socket.inet_aton(host)
        return True
    return ":" in host


def _no_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Tests talk to this machine alone, whatever library they come through."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo"):
        place = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
        host = place[0] if isinstance(place, tuple) else place if event == "socket.getaddrinfo" else None
        host = host.decode() if isinstance(host, bytes) else host
        if event == "socket.getaddrinfo" and _is_number(str(host)):
            return  # nobody is asked for it
        if host not in (None, "", "localhost", "::1") and not str(host).startswith("127."):
            raise AssertionError(f"a test asks for {host}: tests reach no network ({event})")


sys.addaudithook(_no_network)


@pytest.fixture
def traced_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Decode as on a GPU; what is traced there is interpreted, as on a CPU it would go through a C++ compiler."""
    monkeypatch.setenv(COMPILE, "1")
    monkeypatch.setattr(step, "BUILT_FIRST", 0)
    mx.disable_compile()
    yield
    _enable_compile()


@pytest.fixture
def cpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as on a CPU that is not Apple's, wherever the tests run."""
    monkeypatch.setitem(kernels._chosen, mx.default_device().type, kernels.CPU)


@pytest.fixture
def mac_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute as a Mac does, in plain MLX; what is compiled there is interpreted, as on a CPU it would go through a C++
    compiler."""
    monkeypatch.setitem(kernels._chosen, mx.default_device().type, kernels.MLX)
    mx.disable_compile()
    yield
    _enable_compile()


@pytest.fixture(params=["cpu", "mac"])
def either_kernels(request: pytest.FixtureRequest) -> kernels.Kernels:
    """Both ways to compute, one after the other."""
    request.getfixturevalue(f"{request.param}_kernels")
    return kernels.kernels()


@pytest.fixture(scope="session")
def llava() -> tuple[Any, Any]:
    """A tiny CLIP + Llama model and its processor."""
    return load(PLAIN)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """Copy a golden checkpoint, to be broken."""

    def copy(name: str = PLAIN.name) -> Path:
        folder = tmp_path / name
        shutil.copytree(GOLDEN / name, folder)
        (folder / "expected.npz").unlink()
        return folder

    return copy


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder as on the Hub (torch layout, bfloat16) whose decoder's widths are multiples of 64, one
    excepted: `down_proj` of width 96 divides by 32 only."""
    return make_wide(PLAIN.name, tmp_path_factory.mktemp("wide") / "llava")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Any, Callable[..., subprocess.CompletedProcess[str]]]]:
    """A stand-in for the Hub with two models, and the program run with it as its Hub and an empty cache."""
    folder = tmp_path / "served"
    shutil.copytree(PLAIN, folder)
    (folder / "modeling_evil.py").write_text("1/0")
    (folder / "pytorch_model.bin").write_bytes(b"0" * 1000)
    with serve() as (address, kind):
        kind.folders.update({"tiny/llava": folder, "tiny/llava-in-shards": GOLDEN / "llava-clip-llama-layers"})
        kind.gated.add("meta/secret")

        yield kind, partial(run_program, address, tmp_path)
