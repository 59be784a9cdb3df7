"""What MLX needs of a Linux system to compute fast on its CPU.

- OpenBLAS: the wheel's own matrix products are some forty times slower.
- Its threads asleep soon after a product. By default they ask for the next one for 26 ms, on the core on which MLX
  computes all that is no product.
- Memory that is kept: MLX asks malloc for each array anew, and glibc gives those above 128 kB back to the system, which
  fills the next with zeros again, page by page.
"""

import atexit
import contextlib
import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

CHOICE = "MLX_VLM_MINI_OPENBLAS"
TIMEOUT = "OPENBLAS_THREAD_TIMEOUT"
_library: ctypes.CDLL | None = None
LEAST_SPACE = 4 * 2**30  # bytes of address space (ulimit -v), below which OpenBLAS is left out
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h


def use_openblas() -> bool:
    """Load the system's OpenBLAS where it is installed, so that MLX's float32 products on a CPU run in it.

    Its symbols come before those of MLX's bundled BLAS only if they are global before `mlx.core` is imported; so this
    does nothing afterwards, nothing on other systems than Linux, nothing where the environment variable
    MLX_VLM_MINI_OPENBLAS is 0 and nothing where the address space is limited to less than 4 GB.

    Returns:
        Whether it was loaded.
    """
    global _library
    if sys.platform != "linux" or "mlx.core" in sys.modules or os.environ.get(CHOICE) == "0":
        return False
    if 0 <= resource.getrlimit(resource.RLIMIT_AS)[0] < LEAST_SPACE:
        return False  # it waits for ever for memory that it cannot have
    _keep_memory()
    chosen = os.environ.get(TIMEOUT)
    try:
        os.environ[TIMEOUT] = chosen or "18"  # 2^18 cycles, 0.1 ms: as long as a token's gaps are; read while it loads
        _library = ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    finally:
        if chosen is None:
            del os.environ[TIMEOUT]
    atexit.register(_finish)
    return True


def _finish() -> None:
    """Let MLX's threads end what they compute, such as the token behind an answer's last: OpenBLAS waits forever for a
    thread of its own that a product is given to while the process ends."""
    mlx = sys.modules.get("mlx.core")
    if mlx is not None:
        mlx.synchronize()


def _keep_memory() -> None:
    """Have malloc keep up to 64 MB of freed memory for the next arrays; those above 16 MB it gives back still."""
    malloc_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's
    if malloc_option is not None:
        malloc_option(_MMAP_THRESHOLD, 2**24)
        malloc_option(_TRIM_THRESHOLD, 2**26)


def core_name() -> str:
    """What OpenBLAS calls this processor, such as "Zen" or "SkylakeX"; empty where it was not loaded."""
    if _library is None:
        return ""
    _library.openblas_get_corename.restype = ctypes.c_char_p
    return str(_library.openblas_get_corename().decode())


def describe_device() -> str:
    """What MLX computes on in this process, and with whose products, in words."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.gpu:
        return f"GPU, {mx.device_info().get('device_name', 'unnamed')}"
    maps = Path("/proc/self/maps")
    if not maps.is_file():  # no Linux, or one that does not say what is loaded
        return "CPU"
    if "libopenblas" not in maps.read_text():
        return "CPU, MLX's own products: apt install libopenblas0-pthread makes them many times faster"
    library = ctypes.CDLL("libopenblas.so.0")
    library.openblas_get_config.restype = ctypes.c_char_p
    found = " ".join(library.openblas_get_config().decode().split()[:2])
    threads = library.openblas_get_num_threads()
    return f"CPU, {found}, {threads} thread{'' if threads == 1 else 's'}"


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let each product run on the thread that asks for it: for those who compute on several threads themselves."""
    try:
        library = ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL) if sys.platform == "linux" else None
        before = None if library is None else library.openblas_get_num_threads()
    except (OSError, AttributeError):
        library = before = None
    if library is None:
        yield
        return
    library.openblas_set_num_threads(1)
    try:
        yield
    finally:
        library.openblas_set_num_threads(before)
