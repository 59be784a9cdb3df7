"""mlx-lm's modules, without the rest of mlx-lm.

`import mlx_lm` runs its package file, which imports transformers and, where it is installed, torch: 0.7 to 2 seconds
for the three small modules used here (KV caches, samplers, rope scalings), none of which needs them. So their files are
loaded under a package of our own, unless mlx-lm is already imported: then its modules are the ones to share.
"""

import sys
import threading
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_PACKAGE, _UNCOMPILED = "mlx_vlm_mini._mlx_lm", "mlx_vlm_mini._mlx_lm_uncompiled"
_lock = threading.Lock()


@cache
def borrow(module: str) -> Any:
    """The module `mlx_lm.<module>`, e.g. `borrow("models.cache")`.

    Raises:
        ModuleNotFoundError: mlx-lm is not installed, or has no such module.
    """
    if "mlx_lm" in sys.modules:
        return import_module(f"mlx_lm.{module}")
    return _load(_PACKAGE, module)


@cache
def borrow_uncompiled(module: str) -> Any:
    """The same, none of whose functions are compiled where MLX would call the system's C++ compiler for it: on a CPU.

    What that compiler makes is loaded from a folder that other users may write to. Errors as of `borrow`.
    """
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.gpu:
        return borrow(module)
    with _lock:
        before = mx.compile
        setattr(mx, "compile", _leave)  # noqa: B010 - another type than the function's
        try:
            return _load(_UNCOMPILED, module)
        finally:
            setattr(mx, "compile", before)  # noqa: B010


def _leave(function: Any = None, *_: Any, **__: Any) -> Any:
    """In place of `mx.compile`: the function itself."""
    return function


def _load(package: str, module: str) -> Any:
    if package not in sys.modules:
        spec = find_spec("mlx_lm")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("mlx-lm is not installed: pip install mlx-lm", name="mlx_lm")
        made = ModuleType(package)
        made.__path__ = list(spec.submodule_search_locations)
        sys.modules[package] = made
    return import_module(f"{package}.{module}")
