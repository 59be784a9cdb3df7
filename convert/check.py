"""Does the result still work? Source and result compared on pictures and questions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, cast

import numpy as np

from mlx_vlm_mini.checkpoints.folder import Checkpoint
from mlx_vlm_mini.checkpoints.load import compute_dtype, load_processor, plan
from mlx_vlm_mini.data.questions import Asker, user
from mlx_vlm_mini.data.scenes import draw, random_scene
from mlx_vlm_mini.processor import Processor

from .calibrate import Observed, Sample, divergence, make_sample, observe

PICTURES = 4
QUESTIONS = 2
SEED = 20_000
LEAST_COSINE = 0.8  # of a picture's features, source to result
MOST_DIVERGENCE = 0.5  # of what the source's distribution of another place would give
LEAST_INFLUENCE = 0.2  # of the source's, where the source has any
SOME_INFLUENCE = 1e-3  # nats


@dataclass(frozen=True)
class Check:
    """How far a result is from its source. KL divergences are nats, of next-token distributions.

    Attributes:
        pictures, questions: each picture is asked each question.
        positions: distributions compared in all.
        mean_kl, largest_kl: source to result.
        chance_kl: source to the source's own distributions at other places, as of a result that knows nothing.
        top1: share of positions where both find the same token the likeliest.
        cosine: of the pictures' features, the least of all pictures' means over patches.
        influence, source_influence: mean KL between the answers to one question about two pictures.
        problems: why the result is broken; empty where it works.
    """

    pictures: int
    questions: int
    positions: int
    mean_kl: float
    largest_kl: float
    chance_kl: float
    top1: float
    cosine: float
    influence: float
    source_influence: float
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        # What is not finite has no JSON.
        return {
            key: None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in asdict(self).items()
        } | {"verdict": "broken" if self.problems else "works"}

    def rows(self) -> list[tuple[str, str]]:
        """The check as a table: what was measured, and the value."""
        return [
            ("KL divergence, mean", f"{self.mean_kl:.4f} nats (chance {self.chance_kl:.2f})"),
            ("KL divergence, largest", f"{self.largest_kl:.4f} nats"),
            ("same likeliest token", f"{100 * self.top1:.1f} % of {self.positions}"),
            ("image features, cosine", f"{self.cosine:.4f}"),
            ("a picture's influence", f"{self.influence:.4f} nats (source {self.source_influence:.4f})"),
            ("verdict", "broken: " + "; ".join(self.problems) if self.problems else "works"),
        ]


def check_samples(processor: Processor) -> list[Sample]:
    """The same questions with the same answers about every picture, so that distributions can be compared across them.

    Returns:
        A picture's samples after another's, `QUESTIONS` each.
    """
    rngs = [np.random.default_rng([SEED, number]) for number in range(PICTURES)]
    scenes = [random_scene(rng) for rng in rngs]
    pictures = [draw(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]
    asked = [exchange[0] for _, exchange in Asker(rngs[0]).about(scenes[0])[:QUESTIONS]]  # to describe it, to count
    return [
        make_sample(processor, [user(cast(Any, {"image": picture}), question)], answer)
        for picture in pictures
        for question, answer in asked
    ]


def compare(source: Observed, result: Observed) -> Check:
    """Measure and judge what `look` found."""
    reference, other = np.concatenate(source.logprobs), np.concatenate(result.logprobs)
    finite = bool(np.isfinite(other).all()) and all(bool(np.isfinite(each).all()) for each in result.features)
    with np.errstate(all="ignore"):
        kl = divergence(reference, other)
        chance = float(divergence(reference, np.roll(reference, len(reference) // 2 + 3, axis=0)).mean())
        pairs = [(a, b) for a, b in zip(source.features, result.features, strict=True) if len(a)]
        cosine = min((float(_cosines(a, b).mean()) for a, b in pairs), default=1.0)
        influence, source_influence = (_influence(each.logprobs) for each in (result, source))
    problems = []
    if not finite:
        problems.append("it gives values that are not finite")
    else:
        if kl.mean() > MOST_DIVERGENCE * chance:
            problems.append(
                f"its answers are {kl.mean():.2f} nats from the source's, where {chance:.2f} would be chance"
            )
        if cosine < LEAST_COSINE:
            problems.append(f"its image features' cosine to the source's is {cosine:.2f}, below {LEAST_COSINE}")
        if source_influence > SOME_INFLUENCE and influence < LEAST_INFLUENCE * source_influence:
            problems.append("another picture does not change its answers")
    return Check(
        pictures=len(source.logprobs) // QUESTIONS,
        questions=QUESTIONS,
        positions=len(reference),
        mean_kl=float(kl.mean()),
        largest_kl=float(kl.max()),
        chance_kl=chance,
        top1=float((reference.argmax(axis=-1) == other.argmax(axis=-1)).mean()),
        cosine=cosine,
        influence=influence,
        source_influence=source_influence,
        problems=tuple(problems),
    )


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    cosines: np.ndarray = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return cosines


def _influence(logprobs: list[np.ndarray]) -> float:
    """Mean KL divergence between the answers to a question about one picture and about the next."""
    found = [
        divergence(one, other)
        for question in range(QUESTIONS)
        for one, other in pairwise(logprobs[question::QUESTIONS])
    ]
    return float(np.concatenate(found).mean())


def look(checkpoint: Checkpoint, name: str, say: Callable[[str], None] | None = None) -> Observed:
    """Run a checkpoint on the check's samples, layer by layer.

    Args:
        name: what it is called while `say` is told what is being run.

    Raises:
        VLMError: it cannot be loaded, or does not take pictures and questions.
    """
    planned = plan(checkpoint)
    samples = check_samples(load_processor(checkpoint, planned.family, planned.config))
    return observe(planned, samples, compute_dtype(planned), lambda what: say and say(f"checking: {name}, {what}"))
