"""Thinking: the template's switch, the markers around it, and what becomes of it in every way to answer."""

import json
import shutil
from itertools import pairwise

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, edit_json
from reference import GOLDEN
from thinking import TEMPLATES, said_of, script, write_template

from mlx_vlm_mini import Chat, Engine, attend, batch_generate, generate, load, score, stream_generate
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.text.messages import to_messages
from mlx_vlm_mini.text.template import ChatTemplate
from mlx_vlm_mini.text.thinking import Markers, ThinkingFilter, answer_begins, find_markers

NAME = "qwen3.5"
THINK = Markers("<think>", "</think>")
CHANNEL = Markers("<|channel>thought", "<channel|>")
ANSWER = "Red is left.\nIt is.\n</think>\n\nA red circle."


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """Qwen3.5 whose template thinks by default, and whose tokenizer has the markers as tokens."""
    return load(make(tmp_path_factory.mktemp("thinker") / NAME, "on by default"))


def make(folder, template, *, special=False, markers=THINK):
    shutil.copytree(GOLDEN / NAME, folder)
    write_template(folder, template)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for number, text in enumerate(markers, 372):
        options = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
        tokenizer["added_tokens"].append({"id": number, "content": text.removesuffix("thought"), **options})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def separate(pieces, markers=THINK, place="beginning"):
    found = ThinkingFilter(markers, place)
    parts = [*map(found.add, pieces), found.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


WHOLE = [  # an answer, its markers, where it begins, its thinking and its text
    ("Hm.\n\nSo.\n</think>\n\nYes. </think>", THINK, "thinking", "Hm.\n\nSo.", "Yes. </think>"),
    ("<think>\nHm.</think>Yes.", THINK, "beginning", "Hm.", "Yes."),
    ("\n<think></think>\n\n Yes.\n", THINK, "beginning", "", "Yes.\n"),
    ("  Yes <think> no", THINK, "beginning", "", "  Yes <think> no"),
    ("<thin", THINK, "beginning", "", "<thin"),
    (" \n", THINK, "beginning", "", " \n"),
    ("Hm </thi", THINK, "thinking", "Hm </thi", ""),
    ("Hm </thi nk> so \n", THINK, "thinking", "Hm </thi nk> so", ""),
    ("</think>", THINK, "thinking", "", ""),
    (" \n\n", THINK, "thinking", "", ""),
    ("", THINK, "thinking", "", ""),
    ("<|channel>thought\nHm.\n<channel|>Yes.", CHANNEL, "beginning", "Hm.", "Yes."),
    ("<|channel>thought\n<channel|>Yes.", CHANNEL, "beginning", "", "Yes."),
    ("<think>Hm.</think>Yes.", None, "beginning", "", "<think>Hm.</think>Yes."),
]


@pytest.mark.parametrize(("answer", "markers", "place", "thinking", "text"), WHOLE)
def test_an_answer_is_cut_at_its_markers_whatever_its_pieces(answer, markers, place, thinking, text):
    rng = np.random.default_rng(len(answer))
    for _ in range(20):
        cuts = sorted({0, len(answer), *rng.integers(0, len(answer) + 1, size=rng.integers(0, 8)).tolist()})
        assert separate([answer[a:b] for a, b in pairwise(cuts)], markers, place) == (thinking, text)
    assert separate(answer, markers, place) == (thinking, text)  # character by character


def test_thinking_shows_as_soon_as_it_can():
    found = ThinkingFilter(THINK, "thinking")
    assert [found.add(piece) for piece in ("\n", "Hm", " a", " ", "<", "b", "</", "think", ">", "\n", "Yes", "</")] == [
        ("", ""), ("Hm", ""), (" a", ""), ("", ""), ("", ""), (" <b", ""), ("", ""), ("", ""), ("", ""), ("", ""),
        ("", "Yes"), ("", "</"),
    ]  # fmt: skip


def test_markers_are_those_that_the_template_names():
    assert {name: find_markers(source) for name, source in TEMPLATES.items()} == {
        **dict.fromkeys(TEMPLATES, THINK), "channels": CHANNEL,
    }  # fmt: skip
    assert find_markers("{{ messages }}") is None


SWITCHED = {  # template: what the prompt of each choice ends with
    "on by default": ("<think>\n", "<think>\n", "<think>\n\n</think>\n\n"),
    "off by default": ("<think>\n\n</think>\n\n", "<think>\n", "<think>\n\n</think>\n\n"),
    "the model opens": ("Hi<|assistant|>\n", "Hi<|assistant|>\n", "Hi/nothink<|assistant|>\n<think></think>\n"),
    "channels": ("<|channel>thought\n<channel|>", "<|turn>model\n", "<|channel>thought\n<channel|>"),
}


@pytest.mark.parametrize("name", sorted(SWITCHED))
def test_a_template_is_asked_and_says_by_default_what_it_says(name):
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>"}, "<|image_pad|>")
    for think, end in zip((None, True, False), SWITCHED[name], strict=True):
        (text,) = template.render([{"role": "user", "content": "Hi"}], think=think)
        assert text.endswith(end)
        place = (
            "thinking"
            if end == "<think>\n"
            else "text"
            if end.rstrip().endswith(template.markers.close)
            else "beginning"
        )
        assert answer_begins(text, template.markers) == place


def test_a_template_without_a_switch_refuses_what_it_cannot_do():
    plain = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {}, "<image>")
    plain.check_think(False)  # it never thinks
    with pytest.raises(PromptError, match=r"has no switch for thinking \(enable_thinking\): leave think out"):
        plain.render([{"role": "user", "content": "Hi"}], think=True)
    always = ChatTemplate(TEMPLATES["always"], {}, "<|image_pad|>")
    always.check_think(True)
    with pytest.raises(PromptError, match=r"always thinks: .* \(enable_thinking\); leave think out"):
        always.render([{"role": "user", "content": "Hi"}], think=False)
    untold = ChatTemplate(TEMPLATES["the model opens"].replace("enable_thinking", "other"), {}, "<|image_pad|>")
    for think in (True, False):
        with pytest.raises(PromptError, match="has no switch"):
            untold.check_think(think)


def test_models_that_do_not_think_refuse_to_in_every_way(llava):
    model, processor = llava
    expected = generate(model, processor, "Hi", max_tokens=3)
    assert generate(model, processor, "Hi", max_tokens=3, think=False) == expected
    for ask in (
        lambda: processor("Hi", think=True),
        lambda: generate(model, processor, "Hi", think=True),
        lambda: list(Chat(model, processor, think=True).send("Hi")),
        lambda: attend(model, processor, ["Hi", PHOTO], answer="Yes", think=True),
    ):
        with pytest.raises(PromptError, match="no switch for thinking"):
            ask()
    failed, fine = batch_generate(
        model, processor, [{"prompt": "Hi", "think": True}, {"prompt": "Hi", "think": False}], max_tokens=3
    )
    assert "no switch for thinking" in failed.error and fine.text == expected
    with Engine(model, processor) as engine:
        assert "no switch for thinking" in engine.submit("Hi", think=True).result().error
    with pytest.raises(PromptError, match="think must be True, False or None, not 'on'"):
        generate(model, processor, "Hi", think="on")


def check_thought(chunks, expected=("Red is left.\nIt is.", "A red circle.")):
    assert said_of(chunks) == expected
    assert not any(chunk.thinking and chunk.text for chunk in chunks)


@pytest.mark.parametrize(
    ("template", "special"),
    [
        ("on by default", None), ("off by default", False), ("always", True), ("the model opens", None),
        ("the model opens", True), ("channels", None), ("channels", True),
    ],
)  # fmt: skip
def test_thinking_is_told_from_the_answer(copy_of, tmp_path, template, special):
    """Markers of several tokens, of one, and of one that no text shows; opened by the prompt or by the model."""
    markers = CHANNEL if template == "channels" else THINK
    if special is None:
        folder = copy_of(NAME)
        write_template(folder, template)
    else:
        folder = make(tmp_path / "made", template, special=special, markers=markers)
    model, processor = load(folder)
    opened = template not in ("the model opens", "channels")
    said = ("" if opened else f"{markers.open}\n") + ANSWER.replace("</think>", markers.close)
    chunks = list(stream_generate(model, processor, ["Hi", PHOTO], think=True, **script(processor.tokenizer, said)))
    check_thought(chunks)
    tokens = processor.tokenizer.encode(said)
    assert [chunk.token for chunk in chunks] == tokens and all(chunk.logprob < 0 for chunk in chunks)
    thought, stats = processor.tokenizer.encode(said[: said.index("\n\nA red")]), chunks[-1].stats
    assert stats.thinking_tokens == len(thought) and stats.generated_tokens == len(tokens)
    assert chunks[-1].finish_reason == "length"
    again = generate(model, processor, ["Hi", PHOTO], think=True, **script(processor.tokenizer, said))
    assert again == "A red circle."


def test_thinking_can_be_turned_off(thinker):
    model, processor = thinker
    asked = processor("Hi", think=False)
    assert [asked.answer_begins, *(processor("Hi", think=each).answer_begins for each in (None, True))] == [
        "text", "thinking", "thinking",
    ]  # fmt: skip
    chunks = list(stream_generate(model, processor, "Hi", think=False, **script(processor.tokenizer, "A red circle.")))
    assert said_of(chunks) == ("", "A red circle.") and chunks[-1].stats.thinking_tokens == 0


def test_an_answer_may_end_while_it_thinks(thinker):
    model, processor = thinker
    for end, reason in (((), "length"), ((362,), "stop")):
        chunks = list(stream_generate(model, processor, "Hi", **script(processor.tokenizer, "Red is </thi", *end)))
        assert said_of(chunks) == ("Red is </thi", "") and chunks[-1].finish_reason == reason
        assert chunks[-1].stats.thinking_tokens == len(chunks)


def test_stops_are_those_of_the_answer(thinker):
    model, processor = thinker
    options = script(processor.tokenizer, "Red is left</think>\n\nA red circle is left of it.")
    chunks = list(stream_generate(model, processor, "Hi", stop=["left", "red is"], **options))
    assert said_of(chunks) == ("Red is left", "A red circle is ") and chunks[-1].finish_reason == "stop"


def test_rows_and_requests_think_as_their_prompts_alone(thinker):
    model, processor = thinker
    thinks = {"prompt": ["Hi", PHOTO], **script(processor.tokenizer, ANSWER)}
    silent = {"prompt": "Hi", "think": False, **script(processor.tokenizer, "A red circle.")}
    greedy = {"prompt": "Hi", "max_tokens": 6, "think": False}
    found = batch_generate(model, processor, [thinks, silent, greedy], batch_size=3)
    assert [(answer.thinking, answer.text) for answer in found[:2]] == [
        ("Red is left.\nIt is.", "A red circle."), ("", "A red circle."),
    ]  # fmt: skip
    assert found[0].token_ids == processor.tokenizer.encode(ANSWER)
    alone = list(stream_generate(model, processor, "Hi", max_tokens=6, think=False))
    assert found[2].token_ids == [chunk.token for chunk in alone]
    assert found[2].token_ids != [chunk.token for chunk in stream_generate(model, processor, "Hi", max_tokens=6)]
    with Engine(model, processor, think=False, max_tokens=6) as engine:
        kept = engine.submit("Hi")
        changed = engine.submit(["Hi", PHOTO], think=True, **script(processor.tokenizer, ANSWER))
        assert kept.result().token_ids == found[2].token_ids
        check_thought(list(changed))


def fresh(chat, **options):
    """What a new conversation with the same messages answers to its last message."""
    other = Chat(chat.model, chat.processor, **{**chat.options, **options})
    *other.messages, _ = chat.messages
    said = other.messages.pop()
    return list(other.send([said]))


@pytest.mark.parametrize("template", ["on by default", "keeps thoughts"])
def test_a_turn_after_thinking_equals_a_fresh_run(copy_of, template):
    """Thinking leaves later prompts, or stays in them, as the template says; the state is used as far as that goes."""
    folder = copy_of(NAME)
    write_template(folder, template)
    model, processor = load(folder)
    chat = Chat(model, processor, max_tokens=8)
    first = list(chat.send(["What is in this image?", PHOTO], **script(processor.tokenizer, ANSWER, 362)))
    assert chat.messages[-1] == {
        "role": "assistant", "content": [{"type": "text", "text": "A red circle."}],
        "reasoning_content": "Red is left.\nIt is.",
    }  # fmt: skip
    assert chat.last_tokens == [chunk.token for chunk in first]
    pictures = [part["image"] for part in chat.messages[0]["content"][1:]]
    prompt, _ = processor.expand([*chat.messages, {"role": "user", "content": "And?"}], pictures)
    assert ("Red is left" in prompt) == (template == "keeps thoughts")
    for number, send in enumerate((lambda: chat.send("And?"), chat.retry, lambda: chat.edit("Why?"))):
        found, stats = list(send()), chat.last_stats
        expected = fresh(chat)
        assert [chunk.token for chunk in found] == [chunk.token for chunk in expected]
        np.testing.assert_allclose([c.logprob for c in found], [c.logprob for c in expected], atol=1e-4)
        assert stats.cached_tokens >= (first[0].stats.prompt_tokens - 8 if number else 1)
    assert chat.last_think is None


def test_a_chat_can_think_now_and_then(thinker):
    model, processor = thinker
    chat = Chat(model, processor, think=False, max_tokens=5)
    found = [list(chat.send("Hi")), list(chat.send("Why?", think=True)), list(chat.retry()), list(chat.send("And?"))]
    chat.undo()
    chat.undo()
    again = list(chat.send("Why?", think=True))
    assert chat.last_think is True
    assert [chunk.token for chunk in again] == [chunk.token for chunk in found[1]]
    assert [c.token for c in found[1]] != [c.token for c in found[2]]
    assert said_of(again)[1] == ""


def test_a_saved_conversation_keeps_what_it_thought(thinker, tmp_path):
    model, processor = thinker
    chat = Chat(model, processor, think=False, max_tokens=5)
    list(chat.send("Hi", think=True, **script(processor.tokenizer, ANSWER)))
    chat.save(tmp_path / "talk.json")
    again = Chat.load(tmp_path / "talk.json", model, processor)
    assert again.messages == chat.messages and again.options["think"] is False
    assert [c.token for c in again.send("Why?")] == [c.token for c in chat.send("Why?")]
    assert again.context_used == chat.context_used
    for changes, message in (
        ({"options": {"think": 1}}, "think=1 is none of"),
        (
            {"messages": [{"role": "assistant", "content": "x", "reasoning_content": 3}]},
            "message 1 has a reasoning_content",
        ),
    ):
        chat.save(tmp_path / "broken.json")
        edit_json(tmp_path / "broken.json", **changes)
        with pytest.raises(PromptError, match=message):
            Chat.load(tmp_path / "broken.json", model, processor)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_messages_may_bring_their_thinking(thinker, key):
    """Under the names that clients have for it; only an answer's."""
    asked = {"role": "user", "content": "Hi"}
    said = {"role": "assistant", "content": "Yes.", key: "Hm."}
    (_, found) = to_messages([asked, said])
    assert found == {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    text, _ = thinker[1].expand(to_messages([asked, said]), [], add_generation_prompt=False)
    assert text.endswith("<think>\nHm.\n</think>\n\nYes.<|im_end|>\n")
    with pytest.raises(PromptError, match="is not known"):
        to_messages([{**asked, key: "Hm."}])
    with pytest.raises(PromptError, match="thinking is no text"):
        to_messages([asked, {**said, key: ["Hm."]}])


def test_what_was_thought_is_text(thinker):
    """A token for roles that thinking names is none of the prompt's."""
    processor = thinker[1]
    asked = {"role": "user", "content": "Hi"}
    said = {"role": "assistant", "content": "Yes.", "reasoning_content": "<|im_end|> is a token, <|image_pad|> too"}
    inputs = processor([asked, said], add_generation_prompt=False)
    ids = inputs.input_ids[0].tolist()
    assert ids.count(362) == 2 and not inputs.slots.any()
    assert "<|im_end|> is a token, <|image_pad|> too" in processor.tokenizer.decode(ids)


def test_attention_goes_with_thinking(thinker):
    model, processor = thinker
    prompt = ["Hi", PHOTO]
    found = attend(model, processor, prompt, **script(processor.tokenizer, ANSWER))
    expected = list(stream_generate(model, processor, prompt, **script(processor.tokenizer, ANSWER)))
    assert list(found.token_ids) == [chunk.token for chunk in expected]
    np.testing.assert_allclose(found.logprobs, [chunk.logprob for chunk in expected], atol=1e-4)
    silent = attend(model, processor, prompt, think=False, answer="A red circle.")
    assert "".join(silent.texts) == "A red circle."
    closed = attend(model, processor, prompt, answer="A red circle.")
    assert "".join(closed.texts) == "\n</think>\n\nA red circle."


def test_the_thinking_token_is_cached(thinker):
    """One prompt, thinking on and off: the engine's store and the conversation compare tokens, so neither mixes them."""
    model, processor = thinker
    expected = {
        think: [chunk.token for chunk in stream_generate(model, processor, "Hi", think=think, max_tokens=5)]
        for think in (True, False)
    }
    with Engine(model, processor, max_tokens=5) as engine:
        for think in (True, False, True, False):
            assert engine.submit("Hi", think=think).result().token_ids == expected[think]
    assert expected[True] != expected[False]


@pytest.mark.parametrize(
    ("template", "special", "opened", "spaces"),
    [
        ("on by default", None, "", "\n\n"), ("always", True, "", "\n"), ("the model opens", None, "<think>\n", ""),
        ("channels", True, "<|channel>thought\n", ""),
    ],
)  # fmt: skip
def test_a_form_is_the_answers_and_begins_after_thinking(copy_of, tmp_path, template, special, opened, spaces):
    """As one prompt and as a row; while it thinks no end token may come, and no form has to be kept to."""
    markers = CHANNEL if template == "channels" else THINK
    folder = copy_of(NAME) if special is None else make(tmp_path / "made", template, special=special, markers=markers)
    if special is None:
        write_template(folder, template)
    model, processor = load(folder)
    tokens = processor.tokenizer.encode(f"{opened}Red {{ is\n{markers.close}{spaces}")
    barred = []

    def sampler():
        left = iter(tokens)

        def sample(logprobs):
            barred.append(bool(logprobs[0, 362] == -mx.inf))
            token = next(left, None)
            assert token is None or logprobs[0, token] > -mx.inf
            return mx.argmax(logprobs, axis=-1) if token is None else mx.array([token])

        return sample

    options = {"choices": ["yes", "no"], "think": True, "max_tokens": 60}
    chunks = list(stream_generate(model, processor, "Hi", sampler=sampler(), **options))
    thinking, text = said_of(chunks)
    assert thinking == "Red { is" and text in ("yes", "no") and chunks[-1].finish_reason == "stop"
    assert all(barred) and [chunk.token for chunk in chunks[: len(tokens)]] == tokens
    rows = batch_generate(model, processor, [{"prompt": "Hi", "sampler": sampler()} for _ in range(2)], **options)
    assert [(row.thinking, row.text) for row in rows] == [(thinking, text)] * 2
    assert rows[0].token_ids == [chunk.token for chunk in chunks]


def test_a_model_that_does_not_begin_to_think_keeps_to_the_form(copy_of):
    """Also where white space would end nothing, and where a marker of several tokens was begun."""
    folder = copy_of(NAME)
    write_template(folder, "the model opens")
    model, processor = load(folder)
    first = processor.tokenizer.encode("<think>")[0]

    def sampler(logprobs):
        return mx.argmax(mx.where(mx.arange(logprobs.shape[-1]) == first, -mx.inf, logprobs), axis=-1)

    for think in (None, True, False):
        chunks = list(stream_generate(model, processor, "Hi", think=think, choices=["yes"], sampler=sampler))
        assert said_of(chunks) == ("", "yes")
    begun = iter([first])
    chunks = list(
        stream_generate(
            model, processor, "Hi", choices=["yes"], max_tokens=12,
            sampler=lambda logprobs: mx.array([next(begun)]) if begun.__length_hint__() else mx.argmax(logprobs, axis=-1),
        )
    )  # fmt: skip
    assert processor.tokenizer.decode([chunk.token for chunk in chunks]).startswith("<think>")


def test_choices_are_scored_where_no_thinking_comes_first(thinker):
    found = score(*thinker, "Hi", choices=["yes", "no"], think=False)
    assert [each.text for each in found] == ["yes", "no"]
    with pytest.raises(PromptError, match=r"asked before the model thinks: turn that off \(think\)"):
        score(*thinker, "Hi", choices=["yes", "no"])
    (answer,) = batch_generate(*thinker, ["Hi"], choices=["yes", "no"], probabilities=True)
    assert "asked before the model thinks" in answer.error
