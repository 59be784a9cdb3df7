"""The plan of a conversion, before the work: what each part becomes."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from .quantize import Output, Part


@dataclass(frozen=True)
class PartPlan:
    """What a part of the model becomes: `kinds` names how its weights are stored, the commonest first."""

    part: str
    weights: int
    kinds: tuple[str, ...]
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Preview:
    """What a conversion is going to do.

    Attributes:
        parts: of the model, and "unused" where the source holds more than the model reads.
        source_bytes: size of all tensors of the source.
        skipped: layers that stay in floating point although quantization was asked for, with the reason.
        notes: what else there is to know before the work.
    """

    parts: tuple[PartPlan, ...]
    source_bytes: int
    skipped: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights if self.weights else 0.0


def plan_parts(outputs: Sequence[Output]) -> tuple[PartPlan, ...]:
    """Sum up outputs by part."""
    weights: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for output in outputs:
        weights[output.part] += output.weights
        sizes[output.part] += output.nbytes
        kinds[output.part][output.kind] += output.weights
    return tuple(
        PartPlan(part, weights[part], tuple(kind for kind, count in kinds[part].most_common() if count), sizes[part])
        for part in (*get_args(Part), "unused")
        if sizes[part]
    )
