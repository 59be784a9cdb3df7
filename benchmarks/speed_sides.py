"""What is measured, once for each side: mlx-vlm-mini, mlx-vlm, and transformers on torch.

    python speed_sides.py ours|peer|torch        started by speed.py, each by its own Python

Stays alive and answers requests on stdin with replies on stdout, a line of JSON each, so that the sides take turns. A
request names a method of the side and its arguments; the reply is what the method gives, with `cpu` (processor
seconds of all threads) and `rss` (the most memory that the process held meanwhile, in bytes). Seconds are measured
inside, around what a user waits for. What a side cannot do is answered with `error`.

Decoding starts from a cache of random keys and values, the same for all sides, so that long contexts need not be read;
answers are greedy and as long as asked for. `thread` is the main thread's processor time, in which Python runs and MLX
builds its graph, and in which nothing is computed; `building` is that without the time inside `mx.async_eval`.
"""

import contextlib
import json
import os
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ANSWER = "There is a small house with a red roof under a tree."
SECOND = "Which colours?"
Reply = dict[str, Any]


def peak_memory() -> int:
    """The most memory that the process held since `forget_peak`; where that is not possible, since it began."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class OnMlx:
    """What mlx-vlm-mini and mlx-vlm have in common: caches, and how the main thread's time is told apart."""

    mx: Any

    def filled(self, cache: list[Any], context: int, heads: int, width: int) -> list[Any]:
        """A cache that holds so many random tokens."""
        mx = self.mx
        for number, entry in enumerate(cache):
            keys, values = (mx.random.normal((1, heads, context, width), key=mx.random.key(number)) for _ in range(2))
            entry.update_and_fetch(keys, values)
        mx.eval([entry.state for entry in cache])
        return cache

    def timed(self, tokens: Any, count: int) -> Reply:
        """Times a token of all but the first of an iterator's `count` + 1."""
        mx, inside = self.mx, [0.0]
        plain = mx.async_eval

        def async_eval(*arrays: Any) -> None:
            begin = time.thread_time()
            plain(*arrays)
            inside[0] += time.thread_time() - begin

        mx.async_eval = async_eval
        try:
            next(tokens)
            begin, thread, inside[0], done = time.perf_counter(), time.thread_time(), 0.0, 0
            for _ in tokens:
                done += 1
                if done == count:
                    break
            seconds, thread = time.perf_counter() - begin, time.thread_time() - thread
        finally:
            mx.async_eval = plain
        assert done == count, f"{done} tokens instead of {count}"
        return {"seconds": seconds / count, "thread": thread / count, "building": (thread - inside[0]) / count}


class Ours(OnMlx):
    name = "mlx-vlm-mini"

    def start(self, folder: str) -> Reply:
        begin = time.perf_counter()
        from mlx_vlm_mini import load

        self.model, self.processor = load(folder)
        seconds = time.perf_counter() - begin
        import mlx.core as mx

        self.mx = mx
        self.decode(8, 2)
        return {"seconds": seconds, "versions": {name: version(name) for name in ("mlx-vlm-mini", "mlx", "mlx-lm")}}

    def decode(self, context: int, tokens: int, traced: bool = False) -> Reply:
        from mlx_vlm_mini.generation import step
        from mlx_vlm_mini.generation.decode import decode

        os.environ[step.COMPILE], step.BUILT_FIRST = str(int(traced)), 0
        mx, decoder = self.mx, self.model.decoder
        state = self.model.make_state()
        self.filled(state.layers, context, decoder.config.num_key_value_heads, decoder.config.head_dim)
        state.start = context
        logits = decoder.logits(decoder(decoder.read(mx.array([[5]])), state))[:, 0]
        mx.eval(logits)
        steps = decode(
            decoder, logits, state, prompt=mx.array([5]), max_tokens=tokens + 2,
            sampler=lambda logprobs: mx.argmax(logprobs, axis=-1),
        )  # fmt: skip
        return self.timed(steps, tokens)

    def stream(self, tokens: int) -> Reply:
        from mlx_vlm_mini import stream_generate

        return self.timed(stream_generate(self.model, self.processor, "Is it?", max_tokens=tokens + 2), tokens)

    def preprocess(self, image: str, keep: str | None = None) -> Reply:
        begin = time.perf_counter()
        prepared = self.processor.prepare(Path(image))
        seconds = time.perf_counter() - begin
        if keep:
            import numpy as np

            np.save(keep, prepared.pixel_values)
        return {"seconds": seconds}

    def pillow(self, image: str) -> Reply:
        """Decoding and resizing alone, by bare Pillow."""
        from PIL import Image

        begin = time.perf_counter()
        opened = Image.open(image)
        short = self.model.config.vision.image_size
        scale = short / min(opened.size)
        opened.resize((round(opened.width * scale), round(opened.height * scale)), Image.Resampling.BICUBIC)
        return {"seconds": time.perf_counter() - begin}

    def difference(self, first: str, second: str) -> Reply:
        import numpy as np

        return {"value": float(np.abs(np.load(first) - np.load(second)).max())}

    def encode(self, image: str) -> Reply:
        pixels = self.mx.array(self.processor.prepare(Path(image)).pixel_values)
        begin = time.perf_counter()
        self.model.embed_images(pixels)
        return {"seconds": time.perf_counter() - begin}

    def first(self, images: list[str], question: str) -> Reply:
        from mlx_vlm_mini import stream_generate

        self.mx.reset_peak_memory()
        begin = time.perf_counter()
        prompt = [*map(Path, images), question]
        chunk = next(stream_generate(self.model, self.processor, prompt, max_tokens=2))
        stats = chunk.stats
        return {
            "seconds": time.perf_counter() - begin, "prompt": stats.prompt_tokens, "image_s": stats.image_s,
            "prefill_s": stats.prefill_s, "mlx_peak": self.mx.get_peak_memory(),
        }  # fmt: skip

    def follow(self, image: str, question: str) -> Reply:
        from mlx_vlm_mini import Chat

        said = self.processor.tokenizer.encode(ANSWER, add_special_tokens=False)
        chat = Chat(self.model, self.processor, max_tokens=len(said))
        for prompt in ([Path(image), question], SECOND):
            tokens = iter(said)
            begin, first = time.perf_counter(), None
            for chunk in chat.send(prompt, sampler=lambda _, tokens=tokens: self.mx.array([next(tokens)])):
                first = first or time.perf_counter() - begin
                stats = chunk.stats
        return {"seconds": first, "prompt": stats.prompt_tokens, "cached": stats.cached_tokens}

    def captions(self, images: list[str], question: str, tokens: int) -> Reply:
        from mlx_vlm_mini import Chat

        begin = time.perf_counter()
        chat = Chat(self.model, self.processor, max_tokens=tokens)  # as `generate --output` goes
        for image in images:
            chat.messages = []
            assert len(list(chat.send([Path(image), question]))) == tokens
        return {"seconds": (time.perf_counter() - begin) / len(images)}

    def bandwidth(self) -> Reply:
        from mlx_vlm_mini.cli.measure import measure_bandwidth, weight_bytes

        return {"bytes_per_s": measure_bandwidth(), "bytes_per_token": weight_bytes(self.model)["token"]}

    def together(self, images: list[str], question: str, tokens: int, rows: int) -> Reply:
        from mlx_vlm_mini import batch_generate

        begin = time.perf_counter()
        prompts = [[Path(image), question] for image in images]
        found = batch_generate(self.model, self.processor, prompts, max_tokens=tokens, batch_size=rows)
        assert all(len(answer.token_ids) == tokens for answer in found)
        return {"seconds": (time.perf_counter() - begin) / len(images)}


class Peer(OnMlx):
    name = "mlx-vlm"

    def start(self, folder: str) -> Reply:
        begin = time.perf_counter()
        import mlx_vlm.chat as room

        self.chat = room.MLXVisionChat(folder, temperature=0.0)
        self.model, self.processor = self.chat.model, self.chat.processor
        seconds = time.perf_counter() - begin
        import mlx.core as mx

        self.mx, self.room, self.plain = mx, room, room.stream_generate
        self.decode(8, 2)
        return {"seconds": seconds, "versions": {name: version(name) for name in ("mlx-vlm", "mlx", "transformers")}}

    def decode(self, context: int, tokens: int) -> Reply:
        from mlx_vlm.generate import generate_step
        from mlx_vlm.models.cache import make_prompt_cache

        text = self.model.config.text_config
        width = text.hidden_size // text.num_attention_heads
        cache = self.filled(make_prompt_cache(self.model.language_model), context, text.num_key_value_heads, width)
        steps = generate_step(self.mx.array([[5]]), self.model, None, None, prompt_cache=cache, max_tokens=tokens + 2)
        return self.timed(steps, tokens)

    def _prompt(self, question: str, images: int) -> str:
        from mlx_vlm.prompt_utils import apply_chat_template

        return apply_chat_template(self.processor, self.model.config, question, num_images=images)

    def stream(self, tokens: int) -> Reply:
        prompt = self._prompt("Is it?", 0)
        return self.timed(self.plain(self.model, self.processor, prompt, max_tokens=tokens + 2), tokens)

    def _inputs(self, image: str) -> Any:
        from mlx_vlm.utils import prepare_inputs

        index = self.model.config.image_token_index
        return prepare_inputs(
            self.processor, images=[image], prompts=self._prompt("Is it?", 1), image_token_index=index
        )

    def preprocess(self, image: str, keep: str | None = None) -> Reply:
        begin = time.perf_counter()
        self.mx.eval(self._inputs(image)["pixel_values"])
        return {"seconds": time.perf_counter() - begin}

    def encode(self, image: str) -> Reply:
        inputs = self._inputs(image)
        self.mx.eval(inputs["input_ids"], inputs["pixel_values"])
        begin = time.perf_counter()
        found = self.model.get_input_embeddings(
            inputs["input_ids"], inputs["pixel_values"], mask=inputs["attention_mask"]
        )
        self.mx.eval(found.inputs_embeds)
        return {"seconds": time.perf_counter() - begin}

    def first(self, images: list[str], question: str) -> Reply:
        begin = time.perf_counter()
        prompt = self._prompt(question, len(images))
        chunk = next(self.plain(self.model, self.processor, prompt, image=images, max_tokens=2))
        return {"seconds": time.perf_counter() - begin, "prompt": chunk.prompt_tokens}

    def follow(self, image: str, question: str) -> Reply:
        from mlx_vlm.generate import PromptCacheState
        from mlx_vlm.vision_cache import VisionFeatureCache

        chat, seen = self.chat, {}
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        said = tokenizer.encode(ANSWER, add_special_tokens=False)
        chat.max_tokens = len(said)
        chat.history.clear()
        chat.vision_cache, chat.prompt_cache_state = VisionFeatureCache(), PromptCacheState()
        chat.process_image(image)

        def timed(*given: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            for number, chunk in enumerate(self.plain(*given, **named)):
                if number == 0:
                    seen["seconds"] = time.perf_counter() - begin
                seen["prompt"] = chunk.prompt_tokens
                yield chunk

        self.room.stream_generate = timed
        try:
            for text in (question, SECOND):
                tokens = iter(said)
                chat.stream_kwargs = {"sampler": lambda _, tokens=tokens: self.mx.array([next(tokens, said[-1])])}
                chat.add_to_history("user", text)
                chat.add_to_history("assistant", chat.generate_response())
        finally:
            self.room.stream_generate = self.plain
        return seen

    def captions(self, images: list[str], question: str, tokens: int) -> Reply:
        begin = time.perf_counter()
        for image in images:
            prompt = self._prompt(question, 1)
            said = list(self.plain(self.model, self.processor, prompt, image=[image], max_tokens=tokens))
            assert said[-1].generation_tokens == tokens
        return {"seconds": (time.perf_counter() - begin) / len(images)}

    def together(self, images: list[str], question: str, tokens: int, rows: int) -> Reply:
        from mlx_vlm.generate.ar import batch_generate

        begin = time.perf_counter()
        found = batch_generate(
            self.model, self.processor, images, prompts=[question for _ in images], max_tokens=tokens
        )
        assert found.stats.generation_tokens == tokens * len(images)
        return {"seconds": (time.perf_counter() - begin) / len(images)}


class Torch:
    """transformers' classes and a bare loop around them, which is less than its `generate` does."""

    name = "transformers on torch"

    def start(self, folder: str) -> Reply:
        begin = time.perf_counter()
        import torch
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.torch = torch
        torch.set_grad_enabled(False)
        self.model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        seconds = time.perf_counter() - begin
        self.decode(8, 2)
        return {"seconds": seconds, "versions": {name: version(name) for name in ("transformers", "torch")}}

    def _steps(self, token: Any, cache: Any, count: int) -> None:
        for _ in range(count):
            out = self.model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1, keepdim=True)

    def decode(self, context: int, tokens: int) -> Reply:
        from transformers import DynamicCache

        text, cache = self.model.config.text_config, DynamicCache(config=self.model.config.text_config)
        shape = 1, text.num_key_value_heads, context, text.head_dim
        for number in range(text.num_hidden_layers):
            cache.update(self.torch.randn(shape), self.torch.randn(shape), number)
        token = self.torch.tensor([[5]])
        self._steps(token, cache, 2)
        begin = time.perf_counter()
        self._steps(token, cache, tokens)
        return {"seconds": (time.perf_counter() - begin) / tokens}

    def _inputs(self, images: list[str], *texts: str) -> Any:
        parts = [{"type": "image"} for _ in images]
        messages = [
            {"role": role, "content": [*(parts if number == 0 else []), {"type": "text", "text": text}]}
            for number, (role, text) in enumerate(zip(("user", "assistant", "user"), texts, strict=False))
        ]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        from PIL import Image

        return self.processor(images=[Image.open(image) for image in images], text=prompt, return_tensors="pt")

    def preprocess(self, image: str, keep: str | None = None) -> Reply:
        begin = time.perf_counter()
        pixels = self._inputs([image], "Is it?")["pixel_values"]
        seconds = time.perf_counter() - begin
        if keep:
            import numpy as np

            np.save(keep, pixels.numpy().transpose(0, 2, 3, 1))
        return {"seconds": seconds}

    def encode(self, image: str) -> Reply:
        pixels = self._inputs([image], "Is it?")["pixel_values"]
        begin = time.perf_counter()
        self.model.get_image_features(pixel_values=pixels)
        return {"seconds": time.perf_counter() - begin}

    def first(self, images: list[str], question: str, *more: str) -> Reply:
        begin = time.perf_counter()
        inputs = self._inputs(images, question, *more)
        self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1).item()
        return {"seconds": time.perf_counter() - begin, "prompt": inputs["input_ids"].shape[1]}

    def follow(self, image: str, question: str) -> Reply:
        """The whole conversation read again, for nothing is kept from turn to turn."""
        return self.first([image], question, ANSWER, SECOND)

    def captions(self, images: list[str], question: str, tokens: int) -> Reply:
        begin = time.perf_counter()
        for image in images:
            inputs = self._inputs([image], question)
            out = self.model(**inputs, use_cache=True, logits_to_keep=1)
            self._steps(out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values, tokens - 1)
        return {"seconds": (time.perf_counter() - begin) / len(images)}

    def together(self, images: list[str], question: str, tokens: int, rows: int) -> Reply:
        from PIL import Image

        parts = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = self.processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        self.processor.tokenizer.padding_side = "left"
        begin = time.perf_counter()
        for first in range(0, len(images), rows):
            opened = [Image.open(image) for image in images[first : first + rows]]
            inputs = self.processor(images=opened, text=[prompt] * len(opened), return_tensors="pt")
            found = self.model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
            assert found.shape[1] == inputs["input_ids"].shape[1] + tokens
        return {"seconds": (time.perf_counter() - begin) / len(images)}


def main(kind: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a side prints does not belong among the replies
    side = {"ours": Ours, "peer": Peer, "torch": Torch}[kind]()
    for line in sys.stdin:
        request = json.loads(line)
        forget_peak()
        cpu = time.process_time()
        try:
            reply = getattr(side, request.pop("do"))(**request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"}
        print(json.dumps({"cpu": time.process_time() - cpu, "rss": peak_memory(), **reply}), file=replies, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
