"""OpenBLAS for MLX on Linux, where the CPU wheel's own matrix products are some forty times slower."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator


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
