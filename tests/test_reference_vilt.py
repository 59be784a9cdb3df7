"""The tiny ViLT golden is what transformers gives today; pictures of other sizes, too.

pytest -m reference        needs the `reference` extra
"""

import numpy as np
import pytest
from parity import TOLERANCE
from PIL import Image
from reference import GOLDEN
from vilt_reference import FOLDER, expected

from mlx_vlm_mini import load_answerer

pytestmark = pytest.mark.reference


def test_the_golden():
    stored = np.load(FOLDER / "expected.npz")
    for name, array in expected().items():
        np.testing.assert_allclose(array, stored[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("size", [(41, 40), (40, 200), (333, 57), (7, 9), (640, 480)])
def test_other_sizes_equal_the_reference(tmp_path, size):
    file = tmp_path / "picture.png"
    Image.open(GOLDEN / "photo.jpg").resize(size).save(file)
    found = expected(FOLDER, {"size": (str(file), "is it red?")})
    answerer = load_answerer(FOLDER)
    np.testing.assert_allclose(answerer.pixels(file), found["size/pixel_values"], atol=1e-5)
    np.testing.assert_allclose(answerer.logits(file, "is it red?"), found["size/logits"], atol=TOLERANCE)
