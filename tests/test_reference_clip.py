"""The tiny CLIP golden is what transformers gives today; other texts, too.

pytest -m reference        needs the `reference` extra
"""

import numpy as np
import pytest
from clip_reference import FOLDER, IMAGES, expected
from parity import TOLERANCE
from reference import GOLDEN

from mlx_vlm_mini import load_scorer

pytestmark = pytest.mark.reference


def test_the_golden():
    stored = np.load(FOLDER / "expected.npz")
    for name, array in expected().items():
        np.testing.assert_allclose(array, stored[name], atol=1e-5, err_msg=name)


def test_other_texts_equal_the_reference():
    texts = ("RED  circle!", "two\nshapes & a house's roof, 2024", "красный круг 圆", "a" * 20)
    logits = load_scorer(FOLDER).logits([GOLDEN / name for name in IMAGES], texts)
    np.testing.assert_allclose(logits, expected(FOLDER, texts)["logits"], atol=TOLERANCE)
