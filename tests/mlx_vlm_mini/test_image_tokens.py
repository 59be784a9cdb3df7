"""How many tokens an image may have: for a request, for an image, and what is refused. Gemma 4's budgets: test_gemma4.py."""

import json

import pytest
from checkpoints import PHOTO, SHAPES
from click.testing import CliRunner
from reference import GOLDEN

from mlx_vlm_mini import Chat, Engine, batch_generate, load, stream_generate
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.text.messages import take_beside, to_messages

QWEN = "qwen2.5-vl"


@pytest.fixture(scope="module")
def qwen():
    return load(GOLDEN / QWEN)


def counts(processor, *parts, **options):
    return [image.tokens for image in processor([*parts, "What?"], **options).images]


def shown(image, **more):
    return {"type": "image", "image": image, **more}


def test_pixels_are_limited_where_images_have_any_size(qwen):
    """To sides of whole tokens; the least number of pixels gives way."""
    _, processor = qwen
    usual = counts(processor, PHOTO)
    assert usual[0] > 6
    assert counts(processor, PHOTO, image_tokens=13) == [12]
    assert counts(processor, shown(PHOTO, tokens=13), shown(SHAPES, tokens=4), PHOTO) == [12, 2, *usual]
    assert counts(processor, shown(PHOTO, tokens=13), PHOTO, image_tokens=4) == [12, 2]
    assert counts(processor, PHOTO, image_tokens=10**9)[0] > usual[0]  # it takes the place of the checkpoint's limit


@pytest.mark.parametrize("name", ["llava-clip-llama", "gemma3-crops", "internvl-qwen2", "pixtral"])
def test_families_without_a_limit_refuse_it_in_a_line(name):
    _, processor = load(GOLDEN / name)
    with pytest.raises(PromptError, match=r"images of .* have no limit of tokens: leave image_tokens out"):
        processor([PHOTO, "What?"], image_tokens=100)
    assert processor("What?", image_tokens=100).images == ()


@pytest.mark.parametrize("tokens", [0, -1, 1.5, "70", True, [70]])
def test_what_is_no_number_of_tokens(qwen, tokens):
    for part in (shown(PHOTO, tokens=tokens), {"type": "image_url", "image_url": "a.png", "tokens": tokens}):
        with pytest.raises(PromptError, match="an image part's tokens must be a whole number of 1 or more, not"):
            to_messages([part, "What?"])
    with pytest.raises(PromptError, match="image_tokens must be"):
        next(stream_generate(*qwen, [PHOTO, "What?"], image_tokens=tokens))
    with pytest.raises(PromptError, match="'tokens', which is not known"):
        to_messages([{"type": "video", "video": "a.mp4", "tokens": 70}, "What?"])


def test_parts_keep_their_tokens():
    (message,) = to_messages(
        [shown("a.png", tokens=70), {"type": "image_url", "image_url": {"url": "b"}, "tokens": 140}, "?"]
    )
    assert [part.get("tokens") for part in message["content"]] == [70, 140, None]
    messages = [{"role": "user", "content": [{"type": "image", "tokens": 70}, {"type": "text", "text": "?"}]}]
    (message,) = to_messages(messages, images=["a.png"])
    assert message["content"][0] == shown("a.png", tokens=70)
    (message,) = take_beside({"messages": messages, "images": ["b.png"]})
    assert message["content"][0] == shown("b.png", tokens=70)


def test_every_way_to_ask_takes_the_option(qwen):
    model, processor = qwen
    (chunk,) = stream_generate(model, processor, [PHOTO, "What?"], image_tokens=13, max_tokens=1)
    assert chunk.stats.image_tokens == 12
    chat = Chat(model, processor, max_tokens=1, image_tokens=13)
    list(chat.send([PHOTO, "What?"]))
    list(chat.send([PHOTO, "What?"], image_tokens=4))
    assert [image.tokens for image in processor(chat.messages).images] == [12, 2]
    prompts = [[PHOTO, "What?"], {"prompt": [PHOTO, "What?"], "image_tokens": 4}]
    answers = batch_generate(model, processor, prompts, image_tokens=13, max_tokens=1)
    assert [answer.stats.image_tokens for answer in answers] == [12, 2]
    with Engine(model, processor, image_tokens=13, max_tokens=1) as engine:
        requests = [engine.submit([PHOTO, "What?"]), engine.submit([PHOTO, "What?"], image_tokens=4)]
        assert [request.result().stats.image_tokens for request in requests] == [12, 2]


def test_boxes_lie_in_the_picture_that_the_model_was_shown(qwen):
    _, processor = qwen
    assert processor.answer_scale((96, 70), 13) == processor.settings_of(13).tiling.fit((96, 70))
    assert processor.answer_scale((96, 70), 13) != processor.answer_scale((96, 70))


def test_the_command_line(tmp_path):
    def run(name, *arguments):
        given = ["generate", GOLDEN / name, "-p", "What?", "-i", PHOTO, "--max-tokens", "1", "--image-tokens", "13"]
        return CliRunner().invoke(main, [*map(str, given), *map(str, arguments)])

    assert json.loads(run(QWEN, "--json").stdout)["image_tokens"] == 12
    assert run(QWEN, "--output", tmp_path / "out.jsonl").exit_code == 0
    (line,) = (tmp_path / "out.jsonl").read_text().splitlines()
    assert json.loads(line)["image_tokens"] == 12
    refused = run("llava-clip-llama")
    assert refused.exit_code == 1
    assert str(refused.exception) == "images of family 'llava' have no limit of tokens: leave image_tokens out" or (
        refused.stderr.strip() == "Error: images of family 'llava' have no limit of tokens: leave image_tokens out"
    )
