"""Goldens in bfloat16, in which a Mac computes: near the reference, by a loose bound, and finite.

The goldens are tiny random models, whose numbers are no better conditioned than trained ones'; what the bound catches
is a part that computes in the wrong type or order, not a last bit. Gemma's decoders refuse float16, so it is bfloat16.
"""

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import with_paths
from goldens import SPECS, one_case
from reference import CASES, GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.generation.decode import prefill

BOUND, MEAN = 1.5, 0.5  # of log-probabilities, which spread by 4 to 6; measured are at most 0.69 and 0.33


@pytest.mark.parametrize("name", sorted(SPECS))
def test_bfloat16_is_near_the_reference(name):
    """Prefill and three cached tokens."""
    model, processor = load(GOLDEN / name, dtype="bfloat16")
    case = one_case[name][1]
    with np.load(GOLDEN / name / "expected.npz") as stored:
        tokens, expected = stored[f"{case}/token_ids"].tolist(), stored[f"{case}/logprobs"]
    state = model.make_state()
    logits = prefill(model.decoder, model.read(processor(with_paths(CASES[case]))), state)
    for token, reference in zip(tokens[:3], expected, strict=False):
        assert logits.dtype == mx.bfloat16 or model.config.decoder.scales.final_logit_softcapping
        own = logits.astype(mx.float32)[0]
        own = np.array(own - mx.logsumexp(own))
        far = np.abs(own - reference)
        assert np.isfinite(own).all() and far.max() < BOUND and far.mean() < MEAN, (far.max(), far.mean())
        logits = model.decoder.logits(model.decoder(model.decoder.read(mx.array([[token]])), state))[:, -1]
