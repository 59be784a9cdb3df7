"""mlx-lm's modules, without the rest of mlx-lm.

`import mlx_lm` runs its package file, which imports transformers and, where it is installed, torch: 0.7 to 2 seconds
for the three small modules used here (KV caches, samplers, rope scalings), none of which needs them. So their files are
loaded under a package of our own, unless mlx-lm is already imported: then its modules are the ones to share.
"""

import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_PACKAGE = "mlx_vlm_mini._mlx_lm"


@cache
def borrow(module: str) -> Any:
    """The module `mlx_lm.<module>`, e.g. `borrow("models.cache")`.

    Raises:
        ModuleNotFoundError: mlx-lm is not installed, or has no such module.
    """
    if "mlx_lm" in sys.modules:
        return import_module(f"mlx_lm.{module}")
    if _PACKAGE not in sys.modules:
        spec = find_spec("mlx_lm")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError("mlx-lm is not installed: pip install mlx-lm", name="mlx_lm")
        package = ModuleType(_PACKAGE)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[_PACKAGE] = package
    return import_module(f"{_PACKAGE}.{module}")
