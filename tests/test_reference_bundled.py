"""transformers loads the bundled model's folder as it is and gives the same answers.

pytest -m reference        needs the `reference` extra
"""

from pathlib import Path

import numpy as np
import pytest
from parity import TOLERANCE
from reference import Reference

from mlx_vlm_mini import load, stream_generate
from mlx_vlm_mini.checkpoints import bundled
from mlx_vlm_mini.data.examples import read_examples
from mlx_vlm_mini.data.questions import write_scenes

pytestmark = pytest.mark.reference


def test_fifty_answers_equal_the_reference(tmp_path):
    write_scenes(tmp_path, 50, seed=50, digits=0.1, test=True)
    model, processor = load()
    reference = Reference(bundled.FOLDER, (bundled.FOLDER / "chat_template.jinja").read_text())
    for example in read_examples(tmp_path / "scenes.jsonl"):
        asked = list(example.messages[:-1])
        chunks = list(stream_generate(model, processor, asked, max_tokens=64))
        assert chunks[-1].finish_reason == "stop"
        expected = reference.answer(_with_names(asked, tmp_path), tmp_path, len(chunks))
        assert [chunk.token for chunk in chunks] == list(expected["token_ids"])
        likeliest = expected["logprobs"].max(axis=-1)
        np.testing.assert_allclose([chunk.logprob for chunk in chunks], likeliest, atol=TOLERANCE)


def _with_names(messages: list, folder: Path) -> list:
    """Messages whose images are names inside a folder."""
    return [
        {
            **message,
            "content": [
                {**part, "image": str(part["image"].relative_to(folder))} if part["type"] == "image" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]
