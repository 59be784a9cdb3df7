"""What parity is, wherever it is asked for."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import with_paths

from mlx_vlm_mini.generation.decode import prefill

TOLERANCE = 1e-4


def check_golden(folder: Path, live: dict[str, np.ndarray]) -> None:
    """What a reference gives today against what is stored beside a golden checkpoint."""
    with np.load(folder / "expected.npz") as stored:
        assert set(stored) == set(live)
        for key, array in live.items():
            np.testing.assert_allclose(
                stored[key], array, atol=2e-5, rtol=1e-5, err_msg=key
            )  # threads move the last bit


def check_answer(model: Any, processor: Any, messages: list[dict[str, Any]], expected: Any, *, step: int = 8) -> None:
    """Our prompt, prefill in chunks of `step` and cached decoding against a reference's, distribution by distribution."""
    inputs = processor(with_paths(messages))
    np.testing.assert_array_equal(np.array(inputs.input_ids[0]), expected["prompt_ids"])
    cache = model.make_state()
    logits = prefill(model.decoder, model.read(inputs), cache, step=step)
    for token, logprobs in zip(expected["token_ids"].tolist(), expected["logprobs"], strict=True):
        own = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[0]
        np.testing.assert_allclose(own, logprobs, atol=TOLERANCE)
        logits = model.decoder.logits(model.decoder(model.decoder.read(mx.array([[token]])), cache))[:, -1]
