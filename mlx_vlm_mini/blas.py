"""OpenBLAS for MLX on Linux, where the CPU wheel's own matrix products are some forty times slower."""

import contextlib
import ctypes
import sys


def use_openblas() -> bool:
    """Load the system's OpenBLAS where it is installed, so that MLX's float32 products on a CPU run in it.

    Its symbols come before those of MLX's bundled BLAS only if they are global before `mlx.core` is imported; so this
    does nothing afterwards, and nothing on other systems than Linux.

    Returns:
        Whether it was loaded.
    """
    if sys.platform != "linux" or "mlx.core" in sys.modules:
        return False
    try:
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def use_one_thread() -> None:
    """Let each product run on the thread that asks for it: for those who compute on several threads themselves."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL).openblas_set_num_threads(1)
