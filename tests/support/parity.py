"""What parity is, wherever it is asked for."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from checkpoints import with_paths
from reference import GOLDEN

from mlx_vlm_mini import Chat, load
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


TURNS: list[list[dict[str, str]]] = [
    [{"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "What?"}],
    [{"type": "text", "text": "Why?"}],
    [{"type": "text", "text": "And this?"}, {"type": "image", "image": "shapes.png"}],
]


def check_turns(name: str, reference: Any, turns: list[list[dict[str, str]]] = TURNS) -> None:
    """Each answer of a conversation, for which we keep what was read before, against a reference's to the whole."""
    model, processor = load(GOLDEN / name)
    chat, messages = Chat(model, processor, max_tokens=5), list[dict[str, Any]]()
    for content in turns:
        messages.append({"role": "user", "content": content})
        chunks = list(chat.send(with_paths(messages[-1:])))
        expected = reference.answer(messages, GOLDEN, 5)
        assert [chunk.token for chunk in chunks] == expected["token_ids"].tolist()[: len(chunks)]
        chosen = expected["logprobs"][np.arange(len(chunks)), expected["token_ids"][: len(chunks)]]
        np.testing.assert_allclose([chunk.logprob for chunk in chunks], chosen, atol=TOLERANCE)
        messages.append(chat.messages[-1])


def changed(name: str, folder: Path, text: dict[str, Any], vision: dict[str, Any], image: dict[str, Any]) -> Path:
    """A golden's copy with other numbers in its text config, its vision config and its image processor's settings."""
    shutil.copytree(GOLDEN / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config).update(text)
    config["vision_config"].update(vision)
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "preprocessor_config.json"
    file = file if file.exists() else folder / "processor_config.json"
    content = json.loads(file.read_text())
    content.get("image_processor", content).update(image)
    file.write_text(json.dumps(content))
    return folder
