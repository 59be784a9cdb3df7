"""Properties: whatever is done in a conversation, each answer equals a fresh run of the messages before it, its pictures
encoded once."""

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import Chat, Engine, load, stream_generate
from mlx_vlm_mini.errors import PromptError

LONG = "llava with longrope"  # whose angles change at 56 tokens, for all positions
MODELS = (
    "llava-clip-mistral", "llava-next-siglip-qwen2", "internvl-qwen2", "internvl-chat-phi3", "llava-original-v1.6-mistral",
    "llava-onevision", "idefics3-markers", "gemma3-hub", "gemma3-crops", "paligemma2-gemma2", "mllama-meta",
    "mllama-transformers", "qwen-vl-chat", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3.5", "qwen3.5-moe", "pixtral",
    "mistral3", LONG,
)  # fmt: skip
PICTURES = (PHOTO, SHAPES, SHAPES.read_bytes(), Image.new("RGB", (50, 40), "red"), Image.new("RGB", (50, 40), "blue"))
TEXTS = ("Hi", "What is it? ", " and\n", "Why? Tell me more.", "no")

parts = st.lists(st.sampled_from(TEXTS) | st.integers(0, len(PICTURES) - 1).map(PICTURES.__getitem__), max_size=3)
prompts = st.builds(lambda begin, rest: [*begin, rest], parts, st.sampled_from(TEXTS))
steps = st.tuples(  # in which of two conversations, the second of which is a fork of the first
    st.sampled_from(("send", "send", "edit", "interrupt", "undo", "retry", "fork")), st.integers(0, 1), prompts
)


@cache
def model_of(name):
    if name != LONG:
        return load(GOLDEN / name)
    with TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(PLAIN, Path(temporary) / "long"))
        config = json.loads((folder / "config.json").read_text())
        scaling = {
            "rope_type": "longrope", "short_factor": [1.0] * 10, "long_factor": [3.0] * 10,
            "original_max_position_embeddings": 56,
        }  # fmt: skip
        config["text_config"] |= {"rope_scaling": scaling}
        (folder / "config.json").write_text(json.dumps(config))
        return load(folder)


def check_fresh(chat, chunks):
    """The tokens of an answer and their log-probabilities, by a run that knows nothing: its tokens are put into its mouth."""
    model, processor = chat.model, chat.processor
    said = iter([chunk.token for chunk in chunks])
    best = []

    def say(logprobs):
        best.append(int(logprobs[0].argmax()))
        return mx.array([next(said)])

    raw = [{**message, "content": [_raw(part) for part in message["content"]]} for message in chat.messages[:-1]]
    alone = list(stream_generate(model, processor, raw, max_tokens=len(chunks), sampler=say))
    np.testing.assert_allclose(
        [chunk.logprob for chunk in chunks], [chunk.logprob for chunk in alone], atol=1e-4, rtol=0
    )
    return best


def _raw(part):
    """An image as it was given, so that the fresh run prepares it itself."""
    if part["type"] == "text":
        return part
    return {"type": "image", "image": part["image"].origin.path or part["image"].origin.data}


def hold(name, plan, **options):
    """Do what a plan says in two conversations, and compare each answer with a fresh run."""
    model, processor = model_of(name)
    chat = Chat(model, processor, context=10**6, max_tokens=3, **options)
    if not any(kind in name for kind in ("paligemma", "-mistral", "mllama")):  # templates that take no system message
        chat.system = "Be brief."
    chats, seen, encoded = [chat, chat], set(), 0
    for kind, place, prompt in [("send", 0, ["Begin"]), ("fork", 1, []), *plan]:
        chat = chats[place]
        begun = any(message["role"] == "user" for message in chat.messages)
        if kind == "fork":
            chats[place] = chats[1 - place].fork()
            continue
        if kind == "undo":
            before = len(chat.messages)
            if begun:
                assert chat.undo()[-1]["role"] == "user" and len(chat.messages) == before - 2
            else:
                with pytest.raises(PromptError, match="nothing was said yet"):
                    chat.undo()
            continue
        if kind == "retry" and begun:
            chunks = list(chat.retry(temperature=1.0, seed=len(plan)))
        elif kind == "interrupt":
            answer = chat.send(prompt)
            chunks = [next(answer), next(answer)]
            answer.close()
        else:
            chunks = list(chat.edit(prompt) if kind == "edit" and begun else chat.send(prompt))
        best = check_fresh(chat, chunks)
        if kind != "retry":
            assert [chunk.token for chunk in chunks] == best
        seen |= {image.digest for image in processor(chat.messages[:-1]).images}
        encoded += chunks[-1].stats.encoded_images
    assert encoded == len(seen)


@pytest.mark.parametrize("name", MODELS)
@settings(deadline=None, max_examples=12, derandomize=True, database=None)
@given(plan=st.lists(steps, min_size=4, max_size=7))
def test_every_answer_equals_a_fresh_run(name, plan):
    hold(name, plan)


KINDS = (
    "llava-clip-mistral",
    "gemma3-hub",
    "paligemma2-gemma2",
    "mllama-meta",
    "qwen-vl-chat",
    "qwen2-vl",
    "qwen3.5",
    LONG,
)


@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.reference) for name in MODELS]
)
@settings(deadline=None, max_examples=3, derandomize=True, database=None)
@given(plan=st.lists(steps, min_size=4, max_size=7))
def test_the_same_as_rows_of_an_engine(name, plan):
    """Beside a long answer of somebody else's, and one that ends in between; what is left is whole."""
    model, processor = model_of(name)
    asked = ["Why? Tell me more.", PHOTO]
    with Engine(model, processor, batch_size=3, max_tokens=200) as engine:
        other = [engine.submit(asked), engine.submit("Hi", max_tokens=4)]
        hold(name, plan, engine=engine)
        other[0].cancel()
        assert other[1].result().error is None
        expected = [chunk.token for chunk in stream_generate(model, processor, asked, max_tokens=4)]
        assert engine.submit(asked, max_tokens=4).result().token_ids == expected


ONE_IMAGE = ("qllama", "blip2-opt", "instructblip-vicuna")


@pytest.mark.parametrize("name", ONE_IMAGE)
@settings(deadline=None, max_examples=12, derandomize=True, database=None)
@given(picture=st.sampled_from(PICTURES), plan=st.lists(steps, min_size=4, max_size=7))
def test_every_answer_about_one_image_equals_a_fresh_run(name, picture, plan):
    """Families that take one image: it comes first, and all that is said are texts."""
    chat = Chat(*model_of(name), context=10**6, max_tokens=3)
    chats, seen, encoded = [chat, chat], set(), 0
    for kind, place, prompt in [("send", 0, [picture, "Begin"]), ("fork", 1, []), *plan]:
        chat, texts = chats[place], [part for part in prompt if isinstance(part, str)]
        if kind == "fork":
            chats[place] = chats[1 - place].fork()
            continue
        if kind in ("undo", "edit") and len(chat.messages) < 3:  # which would take the image away
            continue
        if kind == "undo":
            chat.undo()
            continue
        if kind == "retry":
            chunks = list(chat.retry(temperature=1.0, seed=len(plan)))
        else:
            chunks = list(getattr(chat, "edit" if kind == "edit" else "send")(prompt if not chat.messages else texts))
        best = check_fresh(chat, chunks)
        if kind != "retry":
            assert [chunk.token for chunk in chunks] == best
        seen |= {image.digest for image in chat.processor(chat.messages[:-1]).images}
        encoded += chunks[-1].stats.encoded_images
    assert encoded == len(seen)
