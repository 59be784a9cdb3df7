"""The decoder: embeddings -> hidden states -> logits.

Source: LLaMA (arXiv:2302.13971). Mistral (arXiv:2310.06825) adds grouped queries and a sliding window, Qwen2
(arXiv:2407.10671) biases on queries, keys and values, Qwen3 (arXiv:2505.09388) norms of each head's queries and keys,
Gemma 2 (arXiv:2408.00118) norms on both sides and caps, Llama 3.2 Vision (arXiv:2407.21783) layers that attend to
images, QLLaMA (arXiv:2312.14238) layers in which query tokens do, OPT (arXiv:2205.01068) learned positions and layer
norms. Modules are named as Hugging Face names them.
"""

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.borrow import borrow
from mlx_vlm_mini.config import DecoderConfig
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.layers.rotary import Rotary
from mlx_vlm_mini.layers.types import Recorder, Rope

from .blocks import PerLayerInputs, layer_class, make_norm
from .masks import Rows
from .positions import Counting
from .reading import Pass, Reading
from .rope import depends_on_length, make_ropes, prompt_step
from .sharpness import sharpness
from .state import State


class Decoder(nn.Module):
    """Layers by the kinds that the config names, between an embedding and a head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.num_embeddings, config.hidden_size)
        self.layers = [layer_class(config, kind)(config, kind) for kind in config.layer_types]
        self.norm = make_norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        kinds = dict.fromkeys(config.layer_types) if config.embeddings.learned_positions is None else {}
        # Not a dict, which MLX would take for a part with weights.
        self.ropes = MappingProxyType(make_ropes(config, kinds))
        if config.embeddings.per_layer is not None:
            self.per_layer = PerLayerInputs(config)
        if config.embeddings.learned_positions is not None:
            rows = config.max_position_embeddings + config.embeddings.learned_positions
            self.pos_embed = mx.zeros((rows, config.hidden_size))

    def make_state(self, make: Callable[[], Any] | None = None) -> State:
        """An empty state: one of mlx-lm's caches for each layer that reads text, made by `make`, and those that layers
        of other kinds have of their own."""
        new = make or borrow("models.cache").KVCache
        return State(lambda: [layer.make_cache(new) for layer in self.layers])

    def embed(self, input_ids: mx.array) -> mx.array:
        """int[B, L] -> float[B, L, C]: the tokens' embeddings, scaled where the config says so."""
        # Embeddings in mxfp4 and its kin come out as bfloat16 whatever the rest of the model is.
        embeddings = self.embed_tokens(input_ids).astype(self.norm.weight.dtype)
        scale = self.config.scales.embed_scale
        return embeddings if scale == 1 else embeddings * mx.array(scale, dtype=embeddings.dtype)

    def read(self, input_ids: mx.array) -> Reading:
        """int[B, L] -> what is read of tokens without images."""
        return Reading(self.embed(input_ids), token_ids=input_ids if "per_layer" in self else None)

    def beside(self, reading: Reading) -> tuple[mx.array, ...]:
        """What stands beside the tokens for each layer, the first ones or all."""
        if reading.token_ids is None:
            return reading.beside
        found: tuple[mx.array, ...] = self.per_layer(reading.token_ids, reading.embeddings)
        return found

    def reads_whole(self, length: int) -> bool:
        """Whether the keys of a prompt of this length depend on all of it.

        Then it cannot be read in pieces, nor can keys that were cached for a shorter one be used again.
        """
        return self.config.prefix_lm or depends_on_length(self.config, length)

    def keeps_keys(self, prompt_length: int | None, cached: int, length: int) -> bool:
        """Whether cached keys are those that a prompt of `length` tokens would give again.

        Args:
            prompt_length: tokens of the prompt that the cached sequence began with; None where that is not known.
            cached: tokens in the cache.
        """
        rope = next(iter(self.ropes.values()), None)
        if prompt_length is not None and rope is not None and rope.depends_on == "prompt":
            original = (self.config.rope_scaling or {})["original_max_position_embeddings"]
            return prompt_step(prompt_length, original) == prompt_step(length, original)
        return not self.reads_whole(max(cached, length))

    @property
    def looks_ahead(self) -> bool:
        """Whether the keys of a prompt depend on images that come later (transformers' cross-attention)."""
        cross = self.config.cross_attention
        return cross is not None and cross.blind_rows == "attend"

    def begin(self, reading: Reading, state: State | None = None, attentions: Recorder | None = None) -> Pass:
        """Prepare what all layers share in reading some tokens; the state learns what it has to know of them."""
        length = reading.length
        rows = Rows(0, length) if state is None else state.rows(length)
        offset = 0 if state is None else state.length
        prompt = reading.prompt_length or (state.prompt_length if state is not None else None) or length
        positions = reading.positions or (Counting() if state is None else state.positions)
        spans = (() if state is None else state.spans) + (() if reading.memory is None else reading.memory.spans)
        if state is not None:
            state.prompt_length, state.spans = prompt, spans
            state.positions = positions
        visible = reading.visible if state is None or state.visible is None else state.visible
        first = positions.at(offset, length)
        run = Pass(reading, rows, first, visible, spans, beside=self.beside(reading), attentions=attentions)
        for kind in dict.fromkeys(self.config.layer_types):
            run.masks[kind] = layer_class(self.config, kind).mask(self.config, kind, run)
        made: dict[Rotary, Rope] = {}
        for kind, rope in self.ropes.items():
            if rope not in made:
                made[rope] = self._rotate(rope, run, 0 if state is None else state.lengths, prompt)
            run.ropes[kind] = made[rope]
        run.sharpness = sharpness(self.config.scales.query_scale, offset, length)
        return run

    @staticmethod
    def _rotate(rope: Rotary, run: Pass, before: int | tuple[int, ...], prompt: int | tuple[int, ...]) -> Rope:
        """`before`: tokens before these; `prompt`: those of the prompt; of rows of a batch one number each."""
        length = run.rows.length
        if rope.depends_on == "nothing":
            return rope.at(run.first, length)
        if rope.depends_on == "prompt":
            return rope.at(run.first, length, total=prompt)
        total = before + length if isinstance(before, int) else tuple(each + length for each in before)
        return rope.at(run.first, length, total=total)

    def enter(self, run: Pass) -> mx.array:
        """What the first layer reads of a pass: the embeddings, with learned positions where there are any.

        Raises:
            PromptError: prompt and answer are longer than there are positions.
        """
        x, before = run.reading.embeddings, self.config.embeddings.learned_positions
        if before is None:
            return x
        if not isinstance(run.first, mx.array):
            start = before + run.first
            if start + x.shape[1] > len(self.pos_embed):
                raise PromptError(
                    f"this model has positions for {len(self.pos_embed) - before} tokens, prompt and answer are more: "
                    "shorten them"
                )
            return x + self.pos_embed[start : start + x.shape[1]]
        return x + self.pos_embed[before + run.first[:, None] + mx.arange(x.shape[1])]

    def run_layer(self, number: int, x: mx.array, run: Pass, cache: Any = None) -> mx.array:
        """What a layer gives of its input, float[B, L, C], with what stands beside the tokens for it added."""
        layer, beside = self.layers[number], run.beside[number] if number < len(run.beside) else None
        y: mx.array = layer.join(layer(x, run, cache), beside)
        return y

    def run(self, run: Pass, caches: Sequence[Any]) -> mx.array:
        """All layers and the final norm: float[B, L, C]."""
        x = self.enter(run)
        for number, cache in enumerate(caches):
            x = self.run_layer(number, x, run, cache)
        return self.norm(x)

    def __call__(self, reading: Reading, state: State | None = None, attentions: Recorder | None = None) -> mx.array:
        """Run the layers and the final norm; `logits` turns rows of the result into scores.

        Args:
            reading: L tokens of B rows.
            state: what was read before; these tokens are appended to it.
            attentions: where given, each layer appends its weights float[B, H, L, S], see `Recorder`; S are the tokens,
                in cross-attention layers the keys of all images.

        Returns:
            float[B, L, C].
        """
        run = self.begin(reading, state, attentions)
        hidden = self.run(run, [None] * len(self.layers) if state is None else state.layers)
        if state is not None:
            state.start += reading.length
        return hidden

    def logits(self, hidden: mx.array) -> mx.array:
        """float[B, L, C] -> float[B, L, vocab_size]."""
        logits = self.lm_head(hidden) if "lm_head" in self else self.embed_tokens.as_linear(hidden)
        cap, scaling = self.config.scales.final_logit_softcapping, self.config.scales.logits_scaling
        logits = logits if scaling == 1 else logits / scaling
        return logits if cap is None else cap * mx.tanh(logits / cap)
