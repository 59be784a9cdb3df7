"""Does the result still work? Source and result compared on pictures and questions."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from mlx_vlm_mini.checkpoint import Checkpoint
from mlx_vlm_mini.loading import compute_dtype, load_processor, plan
from mlx_vlm_mini.processor import Processor
from mlx_vlm_mini.train.scenes import draw, questions, random_scene, user

from .calibrate import Observed, Sample, divergence, make_sample, observe

PICTURES = 4
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


def check_samples(processor: Processor) -> tuple[list[Sample], int]:
    """The same questions with the same answers about every picture, so that distributions can be compared across them.

    Returns:
        The samples, a picture's after another's, and the number of questions.
    """
    rngs = [np.random.default_rng([SEED, number]) for number in range(PICTURES)]
    scenes = [random_scene(rng) for rng in rngs]
    pictures = [draw(scene, rng) for scene, rng in zip(scenes, rngs, strict=True)]
    asked = questions(scenes[0], rngs[0])[:2]  # to describe it, and to count
    samples = [
        make_sample(processor, [user({"image": picture}, question)], answer)
        for picture in pictures
        for _, question, answer in asked
    ]
    return samples, len(asked)


def compare(source: Observed, result: Observed, num_questions: int) -> Check:
    """Measure and judge; samples in the order that `check_samples` gives them."""
    reference, other = np.concatenate(source.logprobs), np.concatenate(result.logprobs)
    finite = bool(np.isfinite(other).all()) and all(bool(np.isfinite(each).all()) for each in result.features)
    with np.errstate(all="ignore"):
        kl = divergence(reference, other)
        chance = float(divergence(reference, np.roll(reference, len(reference) // 2 + 3, axis=0)).mean())
        cosine = min(float(_cosines(a, b).mean()) for a, b in zip(source.features, result.features, strict=True))
        influence, source_influence = (_influence(each.logprobs, num_questions) for each in (result, source))
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
        pictures=len(source.logprobs) // num_questions,
        questions=num_questions,
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


def _influence(logprobs: list[np.ndarray], num_questions: int) -> float:
    """Mean KL divergence between the answers to a question about one picture and about the next."""
    found = [
        divergence(one, other)
        for question in range(num_questions)
        for one, other in pairwise(logprobs[question::num_questions])
    ]
    return float(np.concatenate(found).mean())


def check(source: Checkpoint, result: Checkpoint, say: Callable[[str], None] | None = None) -> Check:
    """Run source and result one after the other, each layer by layer, and compare.

    Args:
        say: called with what is being run.

    Raises:
        CheckpointError: one of them cannot be loaded.
    """
    say = say or (lambda _: None)
    observed = []
    count = 0
    for name, checkpoint in (("source", source), ("result", result)):
        planned = plan(checkpoint)
        samples, count = check_samples(load_processor(checkpoint, planned.family, planned.config))

        def tell(what: str, name: str = name) -> None:
            say(f"checking: {name}, {what}")

        observed.append(observe(planned, samples, compute_dtype(planned), tell))
    return compare(observed[0], observed[1], count)
