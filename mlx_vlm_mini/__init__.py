"""Vision-language models on Apple MLX: convert them, chat with them, import them.

The public names are `load`, `generate`, `stream_generate` and `Chat`; for many prompts at once `batch_generate` and
`Engine`; for how probable answers are `score`; for answers that name places `find_detections`
and `draw_detections`; for pictures from words `imagine`; for what the model looked at `attend`, `attend_drawn`,
`draw_attention` and `attention_page`; for CLIP and QLLaMA `load_scorer`, for ViLT `load_answerer`. They are imported
when first used, so that `import mlx_vlm_mini` costs nothing. No module may have one of these names: importing it would
put it in the place of the function.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_vlm_mini.checkpoints.load import load
    from mlx_vlm_mini.drawing.imagine import imagine
    from mlx_vlm_mini.generation.chat import Chat
    from mlx_vlm_mini.generation.engine import Engine, batch_generate
    from mlx_vlm_mini.generation.stream import generate, stream_generate
    from mlx_vlm_mini.grounding.attend import attend
    from mlx_vlm_mini.grounding.detections import find_detections
    from mlx_vlm_mini.grounding.draw import draw_detections
    from mlx_vlm_mini.grounding.heat import draw_attention
    from mlx_vlm_mini.grounding.page import attention_page
    from mlx_vlm_mini.grounding.words import attend_drawn
    from mlx_vlm_mini.scoring.choices import score
    from mlx_vlm_mini.scoring.matching import load_scorer
    from mlx_vlm_mini.scoring.vilt import load_answerer

__version__ = "0.1.0"
__all__ = [
    "Chat", "Engine", "__version__", "attend", "attend_drawn", "attention_page", "batch_generate", "draw_attention",
    "draw_detections", "find_detections", "generate", "imagine", "load", "load_answerer", "load_scorer", "score",
    "stream_generate",
]  # fmt: skip

_HOME = {
    "Chat": ".generation.chat",
    "Engine": ".generation.engine",
    "batch_generate": ".generation.engine",
    "attend": ".grounding.attend",
    "attend_drawn": ".grounding.words",
    "attention_page": ".grounding.page",
    "draw_attention": ".grounding.heat",
    "draw_detections": ".grounding.draw",
    "find_detections": ".grounding.detections",
    "generate": ".generation.stream",
    "imagine": ".drawing.imagine",
    "load": ".checkpoints.load",
    "load_answerer": ".scoring.vilt",
    "load_scorer": ".scoring.matching",
    "score": ".scoring.choices",
    "stream_generate": ".generation.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if "mlx.core" not in sys.modules:
        import_module(".layers.cpu.blas", __name__).use_openblas()  # works only before anything imports mlx.core
    value = globals()[name] = getattr(import_module(_HOME[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
