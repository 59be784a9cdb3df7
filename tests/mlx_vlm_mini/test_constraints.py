"""Answers in a given form: whole ones are valid, cut ones are beginnings of valid ones, and within the form the model
chooses as it does everywhere."""

import json
import re
import subprocess
import sys
from itertools import cycle

import jsonschema
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, with_paths
from goldens import SPECS
from reference import CASES, GOLDEN
from schemas import SCHEMAS

from mlx_vlm_mini import Chat, Engine, batch_generate, generate, load, stream_generate
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.generation import constraints, decode
from mlx_vlm_mini.generation.options import Options
from mlx_vlm_mini.text.token_bytes import TokenBytes

KINDS = (  # of tokenizers: byte fallback, the same without a space dropped, tokenizer.model, ranks, vocab.json, byte-level
    "llava-clip-llama", "gemma3-hub", "internvl-chat-internlm2", "qwen-vl-chat", "internvl-chat-qwen3", "pixtral",
    "paligemma-gemma", "qwen3.5",
)  # fmt: skip
ASK = ["Look", PHOTO]
RECEIPT = SCHEMAS["lines"]
SEEDED = {"temperature": 1.0, "seed": 4}


def answer_all(name, keys, **options):
    """Answers of a random model in these forms, together; whole ones are checked."""
    model, processor = load(GOLDEN / name)
    asked = [
        {"prompt": with_paths(CASES["image"]), "schema": SCHEMAS[key], "seed": number}
        for number, key in enumerate(keys)
    ]
    found = batch_generate(
        model, processor, asked, batch_size=len(keys), **{"max_tokens": 120, "temperature": 1.0, **options}
    )
    for key, answer in zip(keys, found, strict=True):
        assert answer.error is None and answer.finish_reason in ("stop", "length"), (name, key, answer.error)
        if answer.finish_reason == "stop":
            jsonschema.validate(json.loads(answer.text), SCHEMAS[key])
            assert json.dumps(json.loads(answer.text), separators=(",", ":"), ensure_ascii=False).count(
                " "
            ) >= answer.text.count(" ")
    return found


def test_there_are_twenty_schemas_of_many_kinds():
    assert len(SCHEMAS) == 20
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("number", range(len(KINDS)), ids=KINDS)
def test_random_answers_are_valid(number):
    """Of each kind of tokenizer in some forms; the reference suite has all families in all of them."""
    found = answer_all(KINDS[number], [*SCHEMAS][number % 5 :: 5])
    assert sum(answer.finish_reason == "stop" for answer in found) >= 2


# A random model may leave a character of several bytes unfinished where its thinking ends: the text stream then puts a
# replacement character in front of the answer, which the form does not know of.
UNFINISHED = pytest.mark.xfail(reason="an unfinished character before the marker that ends thinking becomes text")


@pytest.mark.reference
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=UNFINISHED) if name == "gemma4-e2b" else name for name in sorted(SPECS)]
)
def test_random_answers_of_every_family_in_every_form_are_valid(name):
    found = answer_all(name, [*SCHEMAS])
    assert sum(answer.finish_reason == "stop" for answer in found) >= 17


def stream(model, processor, **options):
    chunks = list(stream_generate(model, processor, ASK, **{"max_tokens": 60, **options}))
    return chunks, "".join(chunk.text for chunk in chunks)


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen2.5-vl"])
def test_each_token_is_the_likeliest_of_those_allowed_and_its_logprob_is_the_models(name):
    """By a mask made anew, and whole distributions computed afresh."""
    model, processor = load(GOLDEN / name)
    chunks, _ = stream(model, processor, schema=SCHEMAS["arrays"])
    count = model.config.decoder.vocab_size
    form = Options(schema=SCHEMAS["arrays"]).form
    again = constraints.Constraint(
        form, lambda: constraints.Vocabulary(processor.tokenizer, count, processor.eos_token_ids, ())
    )
    inputs = processor(ASK)
    freely = 0
    for chunk in chunks:
        logits = np.array(model(inputs)[0, -1]).astype(np.float64)
        logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        allowed = np.array(again.allowed())
        assert allowed[chunk.token] and logprobs[chunk.token] >= logprobs[allowed].max() - 1e-5
        assert chunk.logprob == pytest.approx(logprobs[chunk.token], abs=1e-4)
        freely += allowed.sum() > 1
        again.add(chunk.token)
        inputs = inputs.followed_by([chunk.token])
    assert again.done and 1 < freely < len(chunks) and chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llava-clip-llama", {}), ("llava-clip-llama", SEEDED), ("qwen3.5", SEEDED), ("mllama-meta", {}),
        *(pytest.param(name, options, marks=pytest.mark.reference) for name, options in zip(sorted(SPECS), cycle([{}, SEEDED, SEEDED]))),
    ],
)  # fmt: skip
def test_tokens_that_are_read_together_change_nothing(name, options, monkeypatch):
    """Those without an alternative: one by one as others are, together, and in rows of a batch."""
    model, processor = load(GOLDEN / name)
    asked = {"schema": SCHEMAS["nested"], "max_tokens": 50, **options}
    together, text = stream(model, processor, **asked)
    monkeypatch.setattr(decode, "MOST_FORCED", 0)
    one_by_one, _ = stream(model, processor, **asked)
    (row,) = batch_generate(model, processor, [{"prompt": ASK, **asked}])
    assert [chunk.token for chunk in together] == [chunk.token for chunk in one_by_one] == row.token_ids
    for others in ([chunk.logprob for chunk in one_by_one], row.logprobs):
        np.testing.assert_allclose([chunk.logprob for chunk in together], others, atol=1e-4)
    assert row.text == text and row.finish_reason == together[-1].finish_reason


def test_fewer_steps_than_tokens(llava, monkeypatch):
    """What has no alternative is not sampled."""
    calls = []
    keep = decode.Chooser.__call__
    monkeypatch.setattr(decode.Chooser, "__call__", lambda self, *given: calls.append(1) or keep(self, *given))
    chunks, text = stream(*llava, schema=SCHEMAS["constants"])
    assert text == '{"kind":"receipt","version":3}' and len(calls) < len(chunks) / 3


def test_traced_steps_are_the_same(llava, traced_steps):
    chunks, _ = stream(*llava, schema=RECEIPT)
    (row,) = batch_generate(*llava, [{"prompt": ASK, "schema": RECEIPT}], max_tokens=60)
    assert [chunk.token for chunk in chunks] == row.token_ids


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.3}, {"top_k": 2}, {"min_p": 0.5}, {"repetition_penalty": 1.3}, {"temperature": 5.0},
        {"sampler": lambda logprobs: mx.argmax(logprobs, axis=-1)},
    ],
)  # fmt: skip
def test_samplers_choose_among_what_is_allowed(llava, options):
    """Also those that count probabilities together, which without renormalizing would leave nothing."""
    asked = {"schema": SCHEMAS["enums"], "temperature": 1.0, "seed": 1, **options}
    chunks, text = stream(*llava, **asked)
    assert chunks[-1].finish_reason == "stop"
    jsonschema.validate(json.loads(text), SCHEMAS["enums"])
    (row,) = batch_generate(*llava, [{"prompt": ASK, **asked}])
    assert row.token_ids == [chunk.token for chunk in chunks]


@pytest.mark.parametrize("name", ["llava-clip-llama", "qwen-vl-chat"])
def test_a_cut_answer_is_the_beginning_of_the_whole_one(name):
    model, processor = load(GOLDEN / name)
    chunks, whole = stream(model, processor, schema=SCHEMAS["unicode"])
    assert chunks[-1].finish_reason == "stop"
    for most in [*range(1, len(chunks), 4), len(chunks) - 1, len(chunks)]:
        cut, text = stream(model, processor, schema=SCHEMAS["unicode"], max_tokens=most)
        assert whole.startswith(text) and "\ufffd" not in text
        assert cut[-1].finish_reason == ("stop" if most == len(chunks) else "length")
        assert [chunk.token for chunk in cut] == [chunk.token for chunk in chunks[:most]]


@pytest.mark.parametrize("name", KINDS)
def test_choices(name):
    """An answer is one of them, whatever space the tokenizer drops or the model puts in front."""
    model, processor = load(GOLDEN / name)
    choices = ["yes", "no", "nothing", "ça 🙂"]
    for seed in range(3):
        text = generate(model, processor, ASK, choices=choices, temperature=3.0, seed=seed)
        assert text in choices
    spaced = [" yes", "  two"]
    assert generate(model, processor, ASK, choices=spaced) in spaced


def test_a_space_that_a_template_leaves_to_the_model(llava, monkeypatch):
    """It may come, and is no part of the answer."""
    model, processor = load(GOLDEN / "qwen2-vl")
    space = processor.tokenizer.encode(" ", add_special_tokens=False)
    asked = {"choices": ["yes"], "sampler": None}

    def first(tokens, logits):
        return mx.where(mx.arange(logits.shape[-1]) == space[0], 1e9, logits)

    chunks, text = stream(model, processor, **asked, logits_processors=[first])
    assert chunks[0].token == space[0] and text == "yes" and chunks[-1].finish_reason == "stop"


@pytest.mark.parametrize("regex", [r"\d{1,3}", r"[é-ü]{2}", r"(red|blue)( (circle|star))?", r"a+b?"])
def test_regular_expressions(llava, regex):
    for seed in range(3):
        chunks, text = stream(*llava, regex=regex, temperature=1.0, seed=seed)
        assert re.fullmatch(regex, text, re.ASCII) if chunks[-1].finish_reason == "stop" else chunks


def test_a_grammar(llava):
    grammar = 'start: sum\nsum: NUMBER | sum "+" NUMBER\nNUMBER: /[0-9]/'
    chunks, text = stream(*llava, grammar=grammar, temperature=1.0, seed=2, max_tokens=40)
    text = text if chunks[-1].finish_reason == "stop" else text.removesuffix("+")
    assert re.fullmatch(r"[0-9](\+[0-9])*", text)


def test_an_answer_that_may_go_on_ends_with_an_end_token(llava):
    """`a*` may end anywhere, and the model says where."""
    model, processor = llava
    for seed in range(20):
        chunks, text = stream(model, processor, regex="a*", temperature=50.0, seed=seed)
        if chunks[-1].token in processor.eos_token_ids:
            assert chunks[-1].finish_reason == "stop" and set(text) <= {"a"}
            return
    raise AssertionError("no end token in twenty answers")


def test_conversations(llava):
    """Turns with and without a form, and each equal to a fresh run of the whole conversation."""
    chat = Chat(*llava, max_tokens=40)
    one = list(chat.send(ASK, schema=SCHEMAS["arrays"]))
    assert one[-1].finish_reason == "stop"
    chat.send("And?")
    two = [chunk.token for chunk in chat.send("Which?", choices=["this", "that"])]
    fresh = [
        chunk.token for chunk in stream_generate(*llava, chat.messages[:-1], choices=["this", "that"], max_tokens=40)
    ]
    assert two == fresh and chat.messages[-1]["content"][0]["text"] in ("this", "that")
    given = []
    for chunk in chat.send("Say more", schema=RECEIPT):  # left in the midst of tokens that were read together
        given.append(chunk.token)
        if len(given) == 3:
            break
    three = [chunk.token for chunk in chat.send("And now?")]
    assert three == [chunk.token for chunk in stream_generate(*llava, chat.messages[:-1], max_tokens=40)]


def test_an_engine(llava):
    with Engine(*llava, batch_size=3, max_tokens=60) as engine:
        requests = [engine.submit(ASK, schema=SCHEMAS[key]) for key in ("enums", "arrays")]
        free = engine.submit(ASK)
        found = [request.result() for request in requests]
        for key, answer in zip(("enums", "arrays"), found, strict=True):
            assert answer.token_ids == [chunk.token for chunk in stream(*llava, schema=SCHEMAS[key])[0]]
        assert free.result().token_ids == [chunk.token for chunk in stream(*llava)[0]]
        with pytest.raises(PromptError, match="choice 1 is empty"):
            engine.submit("Hi", choices=[""])
    with pytest.raises(PromptError, match="the regex cannot be followed"):
        batch_generate(*llava, ["Hi"], regex="((")


def without(text):
    """A table that lacks the tokens with a text in them."""

    def read(tokenizer, count, keep=constraints.read_token_bytes):
        table = keep(tokenizer, count)
        return TokenBytes(
            tuple(b"" if text in token else token for token in table.tokens), table.strips, table.misfits, None
        )

    return read


def test_a_tokenizer_that_cannot_write_the_form(llava, monkeypatch):
    """Said in a line, at the first token or later; in a batch of that row alone."""
    monkeypatch.setattr(constraints, "read_token_bytes", without(b"q"))
    monkeypatch.setattr(constraints, "_kept", {})
    for regex in ("qa", "a{3}q"):
        with pytest.raises(
            PromptError, match="the regex cannot be followed: the tokenizer has no token for what must come next"
        ) as error:
            generate(*llava, ASK, regex=regex)
        assert "\n" not in str(error.value)
    found = batch_generate(
        *llava, [{"prompt": ASK, "regex": "a{3}q"}, {"prompt": ASK, "regex": "a{3}"}, {"prompt": ASK, "regex": "qa"}]
    )
    assert "no token" in found[0].error and "no token" in found[2].error
    assert (found[1].text, found[1].finish_reason, found[1].error) == ("aaa", "stop", None)


def test_tokens_of_images_and_special_ones_are_never_said():
    model, processor = load(GOLDEN / "llava-original-v1.5")
    count = model.config.decoder.vocab_size
    own = constraints.Vocabulary(processor.tokenizer, count, processor.eos_token_ids, {processor.image_token_id, 300})
    for number in [*processor.eos_token_ids, 300]:
        assert own.tokens[number] == b""
    assert {*np.flatnonzero(own.texts).tolist()} >= processor.eos_token_ids and not own.texts[300]


def test_stops_of_a_conversation_style_do_not_cut_a_form():
    """`###` ends an answer of the oldest LLaVA; inside a form it is text."""
    model, processor = load(GOLDEN / "llava-original-v0")
    assert "###" in processor.stops
    chunks, text = stream(model, processor, schema={"const": "a###b"})
    assert text == '"a###b"' and chunks[-1].finish_reason == "stop"
    _, text = stream(model, processor, schema={"const": "a###b"}, stop="##")
    assert text == '"a'


def test_nobody_imports_llguidance_before_it_is_used():
    code = """
import sys
from mlx_vlm_mini import Chat, Engine, generate, load
model, processor = load()
generate(model, processor, "Hi", max_tokens=1)
assert "llguidance" not in sys.modules
print(generate(model, processor, "Hi", choices=["yes", "no"]))
assert "llguidance" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() in ("yes", "no"), done.stderr
