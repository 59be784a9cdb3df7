"""The decoder: embeddings -> logits.

Source: LLaMA (arXiv:2302.13971). Mistral (arXiv:2310.06825) adds grouped queries and a sliding window, Qwen2
(arXiv:2407.10671) biases on queries, keys and values, Qwen3 (arXiv:2505.09388) norms of each head's queries and keys,
Gemma 2 (arXiv:2408.00118) norms on both sides and caps, Llama 3.2 Vision (arXiv:2407.21783) layers that look at images,
QLLaMA (arXiv:2312.14238) layers in which query tokens do.
Modules are named as Hugging Face names them.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_vlm_mini.config import DecoderConfig, LayerType
from mlx_vlm_mini.layers.rotary import turn_once
from mlx_vlm_mini.layers.types import Recorder

from .blocks import CrossAttentionLayer, DecoderLayer, QueryLayer, SandwichLayer, make_norm
from .cross_attention import ImageCache, ShownImage, Span, look
from .masks import ImageBlock, block_mask, causal_mask, rotating_mask
from .query_attention import QuerySight
from .rope import PromptRoPE, depends_on_length, make_rope
from .sections import PlacedImage, SectionedRoPE, add_taps, remember


class Decoder(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.num_embeddings, config.hidden_size)
        layer = SandwichLayer if config.norms.sandwich else DecoderLayer
        kinds: dict[LayerType, Any] = {"cross_attention": CrossAttentionLayer, "query_attention": QueryLayer}
        self.layers = [kinds.get(kind, layer)(config) for kind in config.layer_types]
        self.norm = make_norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rope = make_rope(config)
        if config.window is not None and config.window.sliding_rope_theta is not None:
            self.sliding_rope = make_rope(config, config.window.sliding_rope_theta)
        if config.has_sections:
            self.rope = SectionedRoPE(self.rope, config)

    def embed(self, input_ids: mx.array) -> mx.array:
        """int[B, L] -> float[B, L, C]: the tokens' embeddings, scaled where the config says so."""
        # Embeddings in mxfp4 and its kin come out as bfloat16 whatever the rest of the model is.
        embeddings = self.embed_tokens(input_ids).astype(self.norm.weight.dtype)
        scale = self.config.scales.embed_scale
        return embeddings if scale == 1 else embeddings * mx.array(scale, dtype=embeddings.dtype)

    def reads_whole(self, length: int) -> bool:
        """Whether the keys of a prompt of this length depend on all of it.

        Then it cannot be read in pieces, nor can keys that were cached for a shorter one be used again.
        """
        return self.config.prefix_lm or depends_on_length(self.config, length)

    def rope_after(self, prompt: int) -> Any:
        """Rotary positions of a sequence that begins with a prompt of so many tokens."""
        return self.rope.begun(prompt) if isinstance(self.rope, PromptRoPE) else self.rope

    def keeps_keys(self, begun: int | None, held: int, length: int) -> bool:
        """Whether cached keys are those that a prompt of `length` tokens would give again.

        Args:
            begun: tokens of the prompt that the cached sequence began with; None where that is not known.
            held: tokens in the cache.
        """
        if begun is not None and isinstance(self.rope, PromptRoPE):
            return self.rope.step(begun) == self.rope.step(length)
        return not self.reads_whole(max(held, length))

    @property
    def least_chunk(self) -> int:
        """Tokens that the first chunk of a prompt must have: query tokens, which see one another."""
        return 1 if self.config.queries is None else self.config.queries.num_query_tokens

    @property
    def looks_ahead(self) -> bool:
        """Whether the keys of a prompt depend on images that come later (transformers' cross-attention)."""
        cross = self.config.cross_attention
        return cross is not None and cross.blind_rows == "attend"

    def show(self, number: int, images: Sequence[ShownImage], cache: ImageCache | None) -> ImageCache:
        """Show images to the cross-attention layer of this number; without a cache to it alone."""
        cache = ImageCache() if cache is None else cache
        if images:
            self.layers[number].show(images, cache)
        return cache

    def masks(
        self,
        length: int,
        offset: int = 0,
        prefix: int | None = None,
        spans: Sequence[Span] = (),
        whole: bool = False,
        features: mx.array | None = None,
        blocks: Sequence[ImageBlock] = (),
    ) -> dict[LayerType, Any]:
        """What `length` tokens after `offset` cached ones may look at, by kind of layer: a `Mask`, of cross-attention
        layers a `Sight` or None, of layers with query tokens a `QuerySight`.

        Args:
            prefix: as in a call.
            spans, whole: see `look`.
            features: float[1, P, C], what query tokens look at; None where none are among these tokens.
            blocks: images whose tokens see one another; none of them begins in these tokens and ends behind them.
        """
        if any(block.end > offset and block.start < offset + length for block in blocks):
            return {
                "full_attention": block_mask(length, offset, None, blocks),
                "sliding_attention": block_mask(length, offset, self.config.sliding_window, blocks),
            }
        if not self.config.prefix_lm:
            prefix = 0 if features is None else self.least_chunk
        elif prefix is None:
            prefix = 0 if offset else length
        full = causal_mask(length, offset, None, prefix)
        return {
            "full_attention": full,
            "query_attention": QuerySight(full, features),
            "sliding_attention": causal_mask(length, offset, self.config.sliding_window, prefix),
            "cross_attention": look(spans, length, offset, blind_attend=self.looks_ahead, whole=whole)
            if spans
            else None,
        }

    def __call__(
        self,
        embeddings: mx.array,
        cache: Sequence[Any] | None = None,
        attentions: Recorder | None = None,
        prefix: int | None = None,
        images: Sequence[ShownImage | ImageBlock | PlacedImage] = (),
    ) -> mx.array:
        """Run the layers and the final norm; `logits` turns rows of the result into scores.

        Args:
            embeddings: float[B, L, C].
            cache: one of mlx-lm's KV caches a layer, an `ImageCache` a cross-attention layer; these L tokens are
                appended to it.
            attentions: where given, each layer appends its weights float[B, H, L, S], see `Recorder`; S are the tokens,
                in cross-attention layers the keys of all images.
            prefix: the prompt's tokens: they see one another where the config says `prefix_lm`, and decide on rotary
                positions that go by the prompt. By default those of the call that begins the sequence.
            images: new ones, for cross-attention layers; also those whose tokens only later calls read. Or the one
                that query tokens look at, which are all in this call, the first of it. Or images whose tokens see one
                another, none of which is read in two calls. Or, as `PlacedImage`s, all of the prompt, which the cache
                remembers.

        Returns:
            float[B, L, C].
        """
        caches: list[Any] = [None] * len(self.layers) if cache is None else list(cache)
        spans: tuple[Span, ...] = ()
        shown = [image for image in images if isinstance(image, ShownImage)]
        blocks = [image for image in images if isinstance(image, ImageBlock)]
        for number, kind in enumerate(self.config.layer_types):
            if kind == "cross_attention":
                caches[number] = self.show(number, shown, caches[number])
                spans = caches[number].spans
        first = next(each for each in caches if not isinstance(each, ImageCache))  # all are as long
        offset = 0 if first is None else first.offset
        features = shown[0].features[None] if shown and self.config.queries is not None else None
        masks = self.masks(embeddings.shape[1], offset, prefix, spans, attentions is not None, features, blocks)
        if hasattr(first, "max_size"):
            rotating = rotating_mask(embeddings.shape[1], offset, first.max_size, first.keep)
            masks |= {"full_attention": rotating, "sliding_attention": rotating}
        if prefix is None:
            prefix = getattr(first, "prompt_length", 0) if offset else embeddings.shape[1]
        if first is not None:  # the cache remembers it, as the keys that it holds were turned by it
            first.prompt_length = prefix
        placed = remember([image for image in images if isinstance(image, PlacedImage)], first)
        ropes = self.ropes(placed, offset, embeddings.shape[1], prefix)
        x = embeddings
        for number, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            x = layer(x, mask=masks[kind], rope=ropes[kind], cache=caches[number], attentions=attentions)
            x = add_taps(x, number, placed, offset)
        return self.norm(x)

    def ropes(self, images: Sequence[PlacedImage], offset: int, length: int, prompt: int) -> dict[LayerType, Any]:
        """By kind of layer what turns `length` tokens behind `offset` others of a sequence with these images, which
        begins with a prompt of so many tokens."""
        among = images and isinstance(self.rope, SectionedRoPE)
        usual = self.rope.among(images, offset, length) if among else turn_once(self.rope_after(prompt), offset, length)
        sliding = turn_once(self.sliding_rope, offset, length) if "sliding_rope" in self else usual
        return {kind: sliding if kind == "sliding_attention" else usual for kind in self.config.layer_types}

    def logits(self, hidden: mx.array) -> mx.array:
        """float[B, L, C] -> float[B, L, vocab_size]."""
        logits = self.lm_head(hidden) if "lm_head" in self else self.embed_tokens.as_linear(hidden)
        cap = self.config.scales.final_logit_softcapping
        return logits if cap is None else cap * mx.tanh(logits / cap)
