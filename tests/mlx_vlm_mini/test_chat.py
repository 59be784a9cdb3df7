"""Conversations: a later turn equals a fresh run of the whole, and nothing is reused that should not be."""

import json
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES
from PIL import Image
from reference import GOLDEN, SPECS

from mlx_vlm_mini import Chat, load, stream_generate
from mlx_vlm_mini.errors import ImageError, PromptError


def fresh(model, processor, messages, max_tokens):
    chunks = list(stream_generate(model, processor, messages, max_tokens=max_tokens))
    return [chunk.token for chunk in chunks], [chunk.logprob for chunk in chunks]


def check(chat, messages, chunks):
    """The answer just given equals a fresh run of the messages before it."""
    tokens, logprobs = fresh(chat.model, chat.processor, messages, len(chunks))
    assert [chunk.token for chunk in chunks] == tokens
    np.testing.assert_allclose([chunk.logprob for chunk in chunks], logprobs, atol=1e-4)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_later_turns_equal_a_fresh_run(name):
    model, processor = load(GOLDEN / name)
    chat = Chat(model, processor, max_tokens=6)
    reused = []
    for turn in (["What is ", PHOTO, "?"], "Which one?", [SHAPES, "and ", PHOTO, " too?"], "Why?"):
        chunks = list(chat.send(turn))
        check(chat, chat.messages[:-1], chunks)
        reused.append(chunks[-1].stats.cached_tokens)
    assert reused[0] == 0
    if model.config.decoder.prefix_lm:  # every key depends on the whole prompt
        assert reused == [0] * 4
    elif model.config.most_tiles is not None:  # the second image changes the first one's slots
        assert reused[1] > reused[2] > 0 and reused[3] > reused[1]
    elif not SPECS[name].chat_template.startswith("{{ bos_token }}"):
        assert all(later > earlier for earlier, later in pairwise(reused))


def test_the_cache_covers_the_answer_where_its_text_gives_the_same_tokens(llava):
    """What the model said is read again only from the first token whose text encodes otherwise."""
    chat = Chat(*llava, max_tokens=4)
    first = list(chat.send("Hi"))
    prompt = first[-1].stats.prompt_tokens
    second = list(chat.send("Yes"))
    assert second[-1].stats.cached_tokens >= prompt - 1


def test_another_picture_of_the_same_size_is_not_the_same(llava):
    model, processor = llava
    red, blue = (Image.new("RGB", (42, 42), color) for color in ("red", "blue"))
    chat = Chat(model, processor, max_tokens=4)
    one = [chunk.logprob for chunk in chat.send([red, "Which colour?"])]
    chat.messages.clear()  # the cache still holds the red one
    chunks = list(chat.send([blue, "Which colour?"]))
    assert chunks[-1].stats.cached_tokens < 9
    check(chat, chat.messages[:-1], chunks)
    assert [chunk.logprob for chunk in chunks] != pytest.approx(one, abs=1e-3)


ROPES = [
    {"rope_type": "dynamic", "factor": 3.0},
    {
        "rope_type": "longrope",
        "short_factor": [1.0] * 10,
        "long_factor": [3.0] * 10,
        "original_max_position_embeddings": 40,
    },
]


@pytest.mark.parametrize("scaling", ROPES, ids=lambda scaling: scaling["rope_type"])
def test_keys_turned_for_a_shorter_conversation_are_not_used_again(copy_of, scaling):
    """The second turn passes the length at which the angles of all positions change."""
    folder = copy_of()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"rope_scaling": scaling, "max_position_embeddings": 40}
    (folder / "config.json").write_text(json.dumps(config))
    chat = Chat(*load(folder), max_tokens=5, context=500)
    for turn in ([PHOTO, "What?"], "And now?", "Why?"):
        chunks = list(chat.send(turn))
        check(chat, chat.messages[:-1], chunks)
    assert chunks[-1].stats.cached_tokens == 0


def test_an_answer_may_contain_the_image_token(llava):
    """Spelled by the model from ordinary tokens; what it says is history, not a picture."""
    model, processor = llava
    spelled = iter(processor.tokenizer.encode("see <imag", add_special_tokens=False)[:9])
    chat = Chat(model, processor, max_tokens=4)
    list(chat.send([PHOTO, "Hi"], sampler=lambda logprobs: mx.array([next(spelled)])))
    chat.messages[-1]["content"][0]["text"] = "I see <image> and <image>."
    chunks = list(chat.send([SHAPES, "Go on"]))
    check(chat, chat.messages[:-1], chunks)
    inputs = processor(chat.messages[:-1])
    assert int(inputs.slots.sum()) == int((inputs.input_ids == model.config.image_token_id).sum()) == 18


def test_clearing_in_the_middle_of_an_answer_forgets_it(llava):
    chat = Chat(*llava, max_tokens=5)
    answer = chat.send("Hi")
    next(answer)
    chat.clear()
    answer.close()
    assert chat.messages == []
    check(chat, [{"role": "user", "content": "Hi"}], list(chat.send("Hi")))


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_answer_stays_and_the_next_turn_is_right(llava, after):
    chat = Chat(*llava, max_tokens=8)
    answer = chat.send([PHOTO, "What is it?"])
    said = [next(answer).text for _ in range(after)]
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": [{"type": "text", "text": "".join(said)}]}
    chunks = list(chat.send("Go on"))
    assert chunks[-1].stats.cached_tokens > 0
    check(chat, chat.messages[:-1], chunks)


def test_ctrl_c_keeps_what_was_said(llava):
    chat = Chat(*llava, max_tokens=8)
    calls = []

    def interrupt(tokens, logits):
        calls.append(len(tokens))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return logits

    said = []
    with pytest.raises(KeyboardInterrupt):
        for chunk in chat.send([PHOTO, "What is it?"], logits_processors=[interrupt]):
            said.append(chunk.text)
    assert len(said) == 2
    assert chat.messages[-1]["content"][0]["text"] == "".join(said)
    chunks = list(chat.send("Go on"))
    check(chat, chat.messages[:-1], chunks)


def test_a_refused_prompt_changes_nothing(llava):
    chat = Chat(*llava, max_tokens=4)
    list(chat.send([PHOTO, "What is it?"]))
    before = list(chat.messages)
    with pytest.raises(ImageError):
        list(chat.send([SHAPES.with_name("none.png"), "And this?"]))
    assert chat.messages == before
    chunks = list(chat.send("Go on"))
    assert chunks[-1].stats.cached_tokens > 9
    check(chat, chat.messages[:-1], chunks)


def test_clear_forgets_all_but_the_system_message(llava):
    chat = Chat(*llava, system="Be brief.", max_tokens=4)
    first = [chunk.token for chunk in chat.send("Hi")]
    list(chat.send("More"))
    chat.clear()
    assert [message["role"] for message in chat.messages] == ["system"]
    chunks = list(chat.send("Hi"))
    assert [chunk.token for chunk in chunks] == first and chunks[-1].stats.cached_tokens == 0


def test_a_picture_is_opened_and_prepared_once(llava, tmp_path, monkeypatch):
    file = tmp_path / "picture.jpg"
    file.write_bytes(PHOTO.read_bytes())
    chat = Chat(*llava, max_tokens=3)
    list(chat.send([file, "What is it?"]))
    file.unlink()
    encoded = []
    monkeypatch.setattr(type(chat.model), "embed_images", lambda *_: encoded.append(1))
    assert len(list(chat.send("Really?"))) == 3
    assert encoded == []


def test_undo_gives_back_what_was_said_and_retry_and_edit_read_only_what_is_new(llava):
    chat = Chat(*llava, max_tokens=4)
    first = list(chat.send([PHOTO, "What is it?"]))
    used = chat.context_used
    assert used == first[-1].stats.prompt_tokens + 4
    second = list(chat.send(["Not ", SHAPES, "?"]))
    again = list(chat.retry())
    assert [chunk.token for chunk in again] == [chunk.token for chunk in second]
    assert again[-1].stats.cached_tokens == again[-1].stats.prompt_tokens - 1 and again[-1].stats.encoded_images == 0
    assert len(chat.messages) == 4
    edited = list(chat.edit("Or what?"))
    check(chat, chat.messages[:-1], edited)
    assert edited[-1].stats.cached_tokens >= first[-1].stats.prompt_tokens
    (said,) = chat.undo()
    assert said == {"role": "user", "content": [{"type": "text", "text": "Or what?"}]}
    (said,) = chat.undo()
    assert chat.messages == [] and chat.context_used == 0
    with pytest.raises(PromptError, match="nothing was said yet"):
        chat.undo()
    repeated = list(chat.send([said]))
    assert [chunk.token for chunk in repeated] == [chunk.token for chunk in first]
    assert repeated[-1].stats.cached_tokens == repeated[-1].stats.prompt_tokens - 1
    for nothing in (chat.retry, lambda: chat.edit("Hi")):
        chat.clear()
        with pytest.raises(PromptError, match="nothing was said yet"):
            list(nothing())


def test_another_try_is_another_sample(llava):
    chat = Chat(*llava, max_tokens=8, temperature=2.0, seed=5)
    answers = [[chunk.token for chunk in chat.send("Hi")]] + [[chunk.token for chunk in chat.retry()] for _ in range(2)]
    assert len({tuple(tokens) for tokens in answers}) == 3 and len(chat.messages) == 2
    assert [chunk.token for chunk in chat.retry(seed=5)] == answers[0]


def test_a_refused_retry_or_edit_changes_nothing(llava):
    chat = Chat(*llava, max_tokens=4)
    list(chat.send("Hi"))
    before = list(chat.messages)
    for refused in (chat.edit([SHAPES.with_name("none.png")]), chat.retry(max_tokens=10**6), chat.edit("a" * 10**4)):
        with pytest.raises((ImageError, PromptError)):
            list(refused)
        assert chat.messages == before


def test_another_system_message_is_read_and_the_pictures_stay_encoded(llava):
    chat = Chat(*llava, system="Be brief.", max_tokens=4)
    list(chat.send([PHOTO, "What is it?"]))
    chat.system = "Be long."
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    chunks = list(chat.send("And?"))
    check(chat, chat.messages[:-1], chunks)
    assert chunks[-1].stats.encoded_images == 0 and 0 < chunks[-1].stats.cached_tokens < 9
    chat.system = None
    assert chat.messages[0]["role"] == "user" and chat.system is None
    check(chat, [*chat.messages, {"role": "user", "content": "So?"}], list(chat.send("So?")))


@pytest.mark.parametrize("action", ["send", "undo", "fork", "save", "system"])
def test_whatever_is_done_ends_an_answer_and_keeps_what_was_said(llava, action, tmp_path):
    chat = Chat(*llava, max_tokens=8)
    answer = chat.send([PHOTO, "What is it?"])
    said = "".join(next(answer).text for _ in range(3))
    if action == "send":
        list(chat.send("Go on"))
    elif action == "undo":
        assert len(chat.undo()) == 1 and chat.messages == []
    elif action == "fork":
        assert chat.fork().messages == chat.messages
    elif action == "save":
        chat.save(tmp_path / "a.json")
    else:
        chat.system = "Be brief."
    if action != "undo":
        spoken = next(message for message in chat.messages if message["role"] == "assistant")
        assert spoken["content"][0]["text"] == said
    before = list(chat.messages)
    assert list(answer) == [] and chat.messages == before
    chunks = list(chat.send("Now?"))
    check(chat, chat.messages[:-1], chunks)


def test_a_full_context_is_refused_with_its_numbers(llava):
    chat = Chat(*llava, max_tokens=8, context=100)
    list(chat.send([PHOTO, "What is it?"]))
    before, used = list(chat.messages), chat.context_used
    with pytest.raises(PromptError) as error:
        list(chat.send(["x" * 40, SHAPES]))
    tokens = len(
        chat.processor(
            [
                *before,
                {"role": "user", "content": [{"type": "text", "text": "x" * 40}, {"type": "image", "image": SHAPES}]},
            ]
        ).slots
    )
    assert f"would take {tokens} tokens (18 of images) and its answer up to 8, and the context is 100: undo" in str(
        error.value
    )
    assert chat.messages == before and chat.context_used == used
    chunks = list(chat.send("Hm?"))
    check(chat, chat.messages[:-1], chunks)
    assert chunks[-1].stats.context_limit == 100 and chunks[-1].stats.cached_tokens > 0
    assert Chat(*llava).context == 512
    with pytest.raises(PromptError, match="shorten the message"):
        list(Chat(*llava, context=20).send("a long message"))


def test_the_oldest_turns_are_dropped_whole(llava):
    chat = Chat(*llava, system="Be brief.", max_tokens=8, context=120, on_full="drop")
    for turn in range(6):
        chunks = list(chat.send([PHOTO, f"What is it? {turn}"]))
        check(chat, chat.messages[:-1], chunks)
        assert chunks[-1].stats.prompt_tokens + 8 <= 120
        assert chat.messages[0]["role"] == "system" and chat.messages[-2]["content"][1]["text"] == f"What is it? {turn}"
        assert len(chat.messages) // 2 + chat.dropped_turns == turn + 1
    assert chat.dropped_turns > 2 and chunks[-1].stats.encoded_images == 0
    before, dropped = list(chat.messages), chat.dropped_turns
    with pytest.raises(PromptError, match="shorten the message"):
        list(chat.send("y" * 200))
    assert chat.messages == before and chat.dropped_turns == dropped
