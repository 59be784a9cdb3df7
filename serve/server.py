"""One server: its models, limits and counters, which every route is given."""

from collections.abc import Mapping
from dataclasses import dataclass

from mlx_vlm_mini.checkpoints.describe import describe
from mlx_vlm_mini.checkpoints.hub import find_folder
from mlx_vlm_mini.errors import CheckpointError
from mlx_vlm_mini.text.template import find_chat_template
from mlx_vlm_mini.text.thinking import SWITCH
from mlx_vlm_mini.text.tools import takes_tools

from .answers import Desk
from .bodies import Bodies
from .limits import Limits
from .metrics import Metrics
from .models import Model, Models


@dataclass(frozen=True, kw_only=True)
class About:
    """What a model is, by its files' headers.

    Attributes:
        size: weights as people write them, "8.3B".
        quantization: "4bit", or the type of its weights.
        context: tokens that prompt and answer may have.
    """

    family: str
    format: str
    weights: int
    bytes: int
    size: str
    quantization: str
    context: int
    hidden_size: int
    layers: int
    vision: bool
    thinking: bool
    tools: bool


@dataclass(frozen=True, kw_only=True)
class Server:
    """What routes work with."""

    models: Models
    descriptions: Mapping[str, About]
    limits: Limits
    metrics: Metrics
    bodies: Bodies
    desk: Desk

    def about(self, model: Model) -> About:
        """What a model is."""
        return self.descriptions[model.name]


def about(source: str) -> About:
    """What a model is; its files must be on this machine.

    Raises:
        CheckpointError: it cannot be served.
    """
    found = describe(source)
    decoder, quantization = found["decoder"], found["quantization"]
    if not found["weights"]:
        raise CheckpointError(f"{source} has no weights")
    template = find_chat_template(find_folder(source)) or ""
    bits = None if quantization is None else quantization.get("bits")
    return About(
        family=found["family"],
        format=found["format"],
        weights=found["weights"],
        bytes=found["bytes"],
        size=in_words(found["weights"]),
        quantization=found["types"] if bits is None else f"{bits}bit",
        context=decoder["context"],
        hidden_size=decoder["hidden_size"],
        layers=decoder["layers"],
        vision="vision" in found,
        thinking=SWITCH in template,
        tools=takes_tools(template),
    )


def in_words(weights: int) -> str:
    """A number of weights: 3.7M, 256M, 8.3B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if weights >= size:
            return f"{weights / size:.3g}{unit}"
    return str(weights)


def make_server(models: Models, descriptions: Mapping[str, About], limits: Limits, *, at_once: int) -> Server:
    """A server of some models; `at_once` is the batch size of their engines."""
    metrics = Metrics()
    desk = Desk(models, limits, metrics, at_once=at_once)
    return Server(
        models=models, descriptions=descriptions, limits=limits, metrics=metrics, bodies=Bodies(limits), desk=desk
    )
