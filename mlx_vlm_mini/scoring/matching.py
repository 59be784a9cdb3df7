"""How well texts fit images: by CLIP, or by QLLaMA in three ways.

Source: arXiv:2312.14238, section 3.3; modeling_internvl.py of github.com/OpenGVLab/InternVL, `encode_image`,
`encode_text` and the matching part of its training.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.hub import find_folder
from mlx_vlm_mini.checkpoints.load import load
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.families import qllama
from mlx_vlm_mini.images.source import ImageSource
from mlx_vlm_mini.model import VLM
from mlx_vlm_mini.processor import Processor

from .clip import Scorer
from .clip import load_scorer as load_clip

ScoreMode = Literal["c", "g", "match"]
PREFIX = "summarize:"  # of texts that become vectors
LONGEST = 80  # tokens of a text, as the models were trained and are published; what is behind them is not read


class QueryScorer:
    """Says how well texts fit images, by a model with query tokens.

    scorer = load_scorer("OpenGVLab/InternVL-14B-224px", mode="g")
    scorer.probabilities(["photo.jpg"], ["a cat", "a dog"])

    Attributes:
        mode: `c` compares the pooled image features with the text (InternVL-C), `g` these and the pooled queries
            (InternVL-G), each by cosine; `match` reads image and text together and says of each pair whether it fits.
    """

    def __init__(self, model: VLM, processor: Processor, mode: ScoreMode) -> None:
        self.model = model
        self.processor = processor
        self.mode = mode

    def tokenize(self, text: str) -> list[int]:
        """The text between the special tokens, with its prefix where it becomes a vector; cut to 80 tokens."""
        tokenizer = self.processor.tokenizer
        first, last = (
            tokenizer.token_to_id(tokenizer.special_tokens.get(f"{end}_token", "")) for end in ("bos", "eos")
        )
        if first is None or last is None:
            raise CheckpointError("the tokenizer names no bos_token and eos_token, between which texts are compared")
        ids = tokenizer.encode(text if self.mode == "match" else PREFIX + text, add_special_tokens=False)
        return [first, *ids[: LONGEST - 2], last]

    def _image_vector(self, features: mx.array) -> mx.array:
        contrast = self.model.contrast
        vector = contrast.image_pool(features[None])
        if self.mode == "g":
            vector = _unit(vector) + _unit(contrast.query_pool(self.model.query(features)))
        return _unit(vector)

    def _text_vector(self, ids: mx.array) -> mx.array:
        decoder = self.model.decoder
        return _unit(decoder(decoder.read(ids))[:, -1] @ self.model.contrast.text_projection)

    def _match(self, features: mx.array, ids: mx.array) -> mx.array:
        scores = self.model.contrast.match(self.model.query(features, self.model.decoder.embed(ids))).mean(axis=1)
        return scores[:, 1] - scores[:, 0]

    def logits(self, images: Sequence[ImageSource], texts: Sequence[str]) -> np.ndarray:
        """float32[images, texts]: cosines times the learned scale; of `match` the score for fitting, less the other.

        Raises:
            ImageError: an image cannot be opened.
            PromptError: there are no images or no texts.
        """
        if not images or not texts:
            raise PromptError("there must be an image and a text to compare")
        said = [mx.array([self.tokenize(text)], dtype=mx.int32) for text in texts]
        if self.mode != "match":
            said = _each(self._text_vector(ids) for ids in said)
        rows = []
        for image in images:
            features = self.model.embed_images(mx.array(self.processor.prepare(image).pixel_values))[0]
            if self.mode == "match":
                row = mx.concatenate(_each(self._match(features, ids) for ids in said))
            else:
                row = mx.exp(self.model.contrast.logit_scale) * (mx.concatenate(said) @ self._image_vector(features)[0])
            rows.append(np.array(row.astype(mx.float32)))
        return np.stack(rows)

    def probabilities(self, images: Sequence[ImageSource], texts: Sequence[str]) -> np.ndarray:
        """float32[images, texts]: for each image, which of the texts it is about if it is about one of them; of `match`
        for each pair by itself whether it fits."""
        return self.probabilities_of(self.logits(images, texts))

    def probabilities_of(self, logits: np.ndarray) -> np.ndarray:
        """The same of logits that are there."""
        if self.mode != "match":
            return Scorer.probabilities_of(logits)
        return np.exp(-np.logaddexp(0, -logits), dtype=np.float32)


def _each(arrays: Iterable[mx.array]) -> list[mx.array]:
    """One after the other, so that memory does not grow with their number."""
    found: list[mx.array] = []
    for array in arrays:
        mx.eval(array)
        found.append(array)
    return found


def _unit(x: mx.array) -> mx.array:
    x = x.astype(mx.float32)
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)


def load_scorer(
    name: str | Path, *, revision: str | None = None, mode: ScoreMode | None = None
) -> Scorer | QueryScorer:
    """Load what says how well texts fit images: CLIP in float32, QLLaMA in the type that `load` chooses.

    Args:
        name: a checkpoint folder, or a name on the Hugging Face Hub such as "openai/clip-vit-base-patch32".
        revision: branch, tag or commit on the Hub.
        mode: of QLLaMA, see `QueryScorer`; by default `c`.

    Raises:
        CheckpointError: the checkpoint cannot be found, read or understood, is of another kind, or has no such mode.
    """
    if mode is not None and mode not in get_args(ScoreMode):
        raise CheckpointError(f"the mode must be one of {', '.join(get_args(ScoreMode))}, not {mode!r}")
    checkpoint = open_checkpoint(find_folder(name, revision=revision))
    if qllama.is_qllama(checkpoint.config):
        return QueryScorer(*load(checkpoint.folder), mode or "c")
    if mode is not None:
        raise CheckpointError(f"{name} compares in one way only: leave the mode out")
    return load_clip(checkpoint.folder)
