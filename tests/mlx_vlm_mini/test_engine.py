"""Many requests at once: each answer is the one that its prompt gets alone."""

import asyncio
import json
import shutil
import threading
import time
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, with_paths
from goldens import SPECS
from reference import CASES, GOLDEN

from mlx_vlm_mini import Chat, Engine, batch_generate, load, stream_generate
from mlx_vlm_mini.decoder.cross_attention import ImageCache
from mlx_vlm_mini.errors import ContextError, PromptError, VLMError
from mlx_vlm_mini.generation.batch import GROWTH, Batch, Cost, Job
from mlx_vlm_mini.generation.cache import Prefixes
from mlx_vlm_mini.generation.features import Features
from mlx_vlm_mini.generation.options import Options
from mlx_vlm_mini.images.source import Picture

SHAPES = GOLDEN / "shapes.png"


def alone(model: Any, processor: Any, prompt: Any, **options: Any) -> tuple[list[int], list[float], str]:
    chunks = list(stream_generate(model, processor, prompt, **options))
    return [c.token for c in chunks], [c.logprob for c in chunks], "".join(c.text for c in chunks)


def check(answer: Any, expected: tuple[list[int], list[float], str]) -> None:
    assert answer.error is None and answer.finish_reason in ("stop", "length")
    assert answer.token_ids == expected[0] and answer.text == expected[2]
    np.testing.assert_allclose(answer.logprobs, expected[1], atol=1e-4)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_rows_of_every_family_equal_their_prompts_alone(name):
    """Prompts of different lengths and pictures, in chunks of 9 tokens, three rows, answers that end at different times.

    One samples with a seed, one fails at its third token, one is cancelled after its second.
    """
    model, processor = load(GOLDEN / name)
    cases = sorted(SPECS[name].cases)
    asked = [with_paths(CASES[case]) for case in [*cases, *cases[:3]]]
    kinds: list[dict[str, Any]] = [{"max_tokens": 3 + 5 * (number % 3)} for number in range(len(asked))]
    seeded, failing, cancelled = len(asked) - 1, 1 % len(asked), len(asked) - 2
    kinds[seeded] = {"max_tokens": 6, "temperature": 0.9, "seed": 11}
    kinds[failing] = {"max_tokens": 8, "logits_processors": [fail_at(3)]}
    kinds[cancelled] = {"max_tokens": 40}
    batch = Batch(model, processor, size=3, memory=1 << 40, features=Features())
    jobs = [Job(processor(one), Options(**kind, prefill_step=9)) for one, kind in zip(asked, kinds, strict=True)]
    found: dict[Job, list[Any]] = {job: [] for job in jobs}
    for job in jobs:
        batch.add(job)
    while batch.busy:
        for job, said in batch.step():
            found[job].append(said)
        jobs[cancelled].cancelled = len(found[jobs[cancelled]]) >= 2
    for number, (job, prompt, kind) in enumerate(zip(jobs, asked, kinds, strict=True)):
        tokens, logprobs, text = alone(model, processor, prompt, **{**kind, "logits_processors": None})
        got = found[job]
        if number == failing and len(tokens) > 2:
            assert "third" in str(got.pop())
            tokens, logprobs, text = tokens[:2], logprobs[:2], None
        elif number == cancelled and len(tokens) > 2:
            tokens, logprobs, text = tokens[:2], logprobs[:2], None
        assert [chunk.token for chunk in got] == tokens
        np.testing.assert_allclose([chunk.logprob for chunk in got], logprobs, atol=1e-4)
        assert text is None or ("".join(chunk.text for chunk in got) == text and got[-1].finish_reason is not None)


def fail_at(count: int) -> Any:
    """A logits processor that fails when so many tokens are chosen."""
    calls = []

    def process(tokens: Any, logits: Any) -> Any:
        calls.append(1)
        if len(calls) == count:
            raise ValueError("the third is one too many")
        return logits

    return process


def test_sampling_seeds_stops_and_processors_are_each_rows_own(llava):
    def forbid(tokens, logits):
        return mx.where(mx.arange(logits.shape[-1]) == 5, -1e9, logits)

    kinds = [
        {"temperature": 0.8, "seed": 3}, {"temperature": 0.8, "seed": 4, "top_p": 0.9}, {"max_tokens": 2},
        {"repetition_penalty": 1.5}, {"stop": ["e"]}, {"logits_processors": [forbid]}, {"temperature": 1.2, "seed": 3},
    ]  # fmt: skip
    asked = [{"prompt": ["Look", PHOTO], "max_tokens": 9, **kind} for kind in kinds]
    for answer, one in zip(batch_generate(*llava, asked, batch_size=4), asked, strict=True):
        own = {key: value for key, value in one.items() if key != "prompt"}
        check(answer, alone(*llava, one["prompt"], **own))


def test_one_that_fails_does_not_stop_the_others(llava):
    calls: list[tuple[int, int]] = []
    prompts = [
        "Hi",
        ["Look", GOLDEN / "missing.png"],
        {"prompt": "Hi", "top_p": 7},
        {"prompt": "Hi", "colour": 1},
        ["Hi", PHOTO],
    ]
    found = batch_generate(*llava, prompts, max_tokens=3, progress=lambda *at: calls.append(at))
    assert [answer.error is None for answer in found] == [True, False, False, False, True]
    assert "missing.png" in found[1].error and "top_p" in found[2].error and found[1].text == ""
    assert calls == [(n, 5) for n in range(1, 6)]
    assert batch_generate(*llava, []) == []
    for bad in (0, 1.5, "8"):
        with pytest.raises(PromptError, match="batch_size must be a whole number of 1 or more"):
            batch_generate(*llava, ["Hi"], batch_size=bad)
    with pytest.raises(PromptError, match="max_tokens"):
        batch_generate(*llava, ["Hi"], max_tokens=0)


def test_a_failing_row_ends_alone(llava):
    """Also in the middle: a processor that leaves no token, and numbers that are not finite."""
    said: list[int] = []

    def break_third(tokens, logits):
        said.append(1)
        return mx.full(logits.shape, float("nan")) if len(said) == 3 else logits

    asked = [{"prompt": "Hi", "logits_processors": [break_third]}, {"prompt": ["Hi", PHOTO]}, {"prompt": "Why?"}]
    found = batch_generate(*llava, asked, max_tokens=8)
    assert "nan" in found[0].error and len(found[0].token_ids) == 2
    for answer, one in zip(found[1:], asked[1:], strict=True):
        check(answer, alone(*llava, one["prompt"], max_tokens=8))


def test_an_exception_of_a_caller_ends_its_own_answer(llava):
    """A sampler or a logits processor that raises, at the first token or later, ends one row and no other."""
    said: list[int] = []

    def raise_third(tokens, logits):
        said.append(1)
        if len(said) == 3:
            raise ValueError("not today")
        return logits

    def refuse(logprobs):
        raise ZeroDivisionError("never")

    asked = [{"prompt": ["Hi", PHOTO]}, {"prompt": "Hi", "logits_processors": [raise_third]}, {"prompt": "Hi", "sampler": refuse}, {"prompt": "Why?"}]  # fmt: skip
    found = batch_generate(*llava, asked, max_tokens=8)
    whole = alone(*llava, "Hi", max_tokens=8)[0]
    assert "not today" in found[1].error and found[1].token_ids == whole[:2]
    assert "never" in found[2].error and not found[2].token_ids
    for at in (0, 3):
        check(found[at], alone(*llava, asked[at]["prompt"], max_tokens=8))


def test_requests_join_and_leave_while_others_are_answered(llava):
    expected = {text: alone(*llava, [text, PHOTO], max_tokens=30) for text in ("One", "Two", "Three", "Four")}
    with Engine(*llava, batch_size=2, max_tokens=30) as engine:
        first = engine.submit(["One", PHOTO])
        chunks = iter(first)
        begun = [next(chunks) for _ in range(3)]
        others = {text: engine.submit([text, PHOTO]) for text in ("Two", "Three", "Four")}
        others["Two"].cancel()
        found = {text: request.result() for text, request in others.items()}
        rest = [*begun, *chunks]
    assert [chunk.token for chunk in rest] == expected["One"][0]
    check(found["Three"], expected["Three"])
    check(found["Four"], expected["Four"])
    assert len(found["Two"].token_ids) < 30 and found["Two"].finish_reason is None


def test_a_cancelled_request_frees_its_row_within_a_step(llava):
    model, processor = llava
    batch = Batch(model, processor, size=2, memory=1 << 30, features=Features())
    jobs = [Job(processor("Hi"), Options(max_tokens=50)) for _ in range(3)]
    for job in jobs:
        batch.add(job)
    while batch.rows < 2:
        batch.step()
    jobs[0].cancelled = True
    assert all(job is not jobs[0] for job, _ in batch.step())
    for _ in range(2):
        batch.step()
    assert batch.rows == 2 and batch.waiting == 0  # the third took its place


def test_a_long_prompt_delays_others_by_one_chunk(llava):
    model, processor = llava
    batch = Batch(model, processor, size=4, memory=1 << 30, features=Features())
    short, long = (
        Job(processor("Hi"), Options(max_tokens=60)),
        Job(processor(["x " * 200]), Options(max_tokens=2, prefill_step=8)),
    )
    batch.add(short)
    batch.step()
    batch.add(long)
    while batch.waiting or batch.rows < 2:
        assert [job for job, _ in batch.step()][:1] == [short]  # a token of the short one after each chunk


def test_rows_wait_for_memory(llava):
    model, processor = llava
    cost, config = Cost.of(model), model.config.decoder
    assert cost.token == config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    inputs = processor("Hi")
    row = (len(inputs.slots) + 20 + GROWTH) * cost.token
    both = row + cost.admitting(Job(inputs, Options(max_tokens=20)))  # one row, and one more that is read
    assert 2 * row < both < 3 * row
    memory = both + 2 * both // config.num_hidden_layers + 1
    batch = Batch(model, processor, size=8, memory=memory, features=Features())
    for _ in range(5):
        batch.add(Job(inputs, Options(max_tokens=20)))
    most = 0
    while batch.busy:
        batch.step()
        most = max(most, batch.rows)
    assert most == 2
    small = Batch(model, processor, size=8, memory=1, features=Features())  # one at a time is always let in
    small.add(Job(inputs, Options(max_tokens=2)))
    assert any(found for found in (small.step() for _ in range(3)))


@pytest.mark.parametrize("name", ["llava-clip-llama", "gemma3-hub", "qwen3.5", "mllama-transformers"])
def test_what_rows_are_said_to_take_is_what_they_take(name):
    """Bytes of the caches of a batch, with a sliding window, with states of linear attention, with images' keys."""
    model, processor = load(GOLDEN / name)
    batch = Batch(model, processor, size=3, memory=1 << 40, features=Features())
    batch.cost = replace(batch.cost, weights=1 << 40)
    for prompt in ("x " * 150, [PHOTO, "What?"], "Hi"):
        batch.add(Job(processor(prompt), Options(max_tokens=100)))
    while batch.waiting or batch.rows < 3:
        batch.step()
    batch.step()
    (group,) = batch._groups
    begun, most = group.state.nbytes, group.nbytes(batch.cost)
    assert 0.7 * batch.cost.rows(3, group.state.start, 1) <= begun <= most
    while batch.rows == 3:
        assert group.state.nbytes <= most
        batch.step()


def test_rows_of_very_different_lengths_do_not_lengthen_one_another(llava):
    """Those alike in length are decoded together, others in a group of their own, which ends when it can."""
    model, processor = llava
    prompts = ["Hi", "x " * 300, "Why?", "x " * 290, "So?"]
    expected = [alone(model, processor, prompt, max_tokens=30) for prompt in prompts]
    batch = Batch(model, processor, size=8, memory=1 << 40, features=Features())
    batch.cost = replace(batch.cost, weights=200 * batch.cost.token)
    jobs = [Job(processor(prompt), Options(max_tokens=30)) for prompt in prompts]
    said: dict[Job, list[int]] = {job: [] for job in jobs}
    for job in jobs:
        batch.add(job)
    most, groups = 0, []
    while batch.busy:
        for job, chunk in batch.step():
            said[job].append(chunk.token)
        groups.append(len(batch._groups))
        most = max(most, sum(group.padding() for group in batch._groups))
        assert all(group.padding() <= 200 for group in batch._groups)
    assert max(groups) == 2 and most > 0
    assert [*said.values()] == [tokens for tokens, _, _ in expected]
    together = Batch(model, processor, size=8, memory=1 << 40, features=Features())
    for prompt in prompts[:2]:
        together.add(Job(processor(prompt), Options(max_tokens=30)))
    while together.rows < 2:
        together.step()
    assert len(together._groups) == 1 and together._groups[0].padding() > 200  # fewer bytes than the weights have


def test_groups_become_one_when_rows_leave(llava):
    model, processor = llava
    batch = Batch(model, processor, size=8, memory=1 << 40, features=Features())
    batch.cost = replace(batch.cost, weights=100 * batch.cost.token)
    jobs = [Job(processor(text), Options(max_tokens=60)) for text in ("x " * 100, "Hi", "Why?")]
    for job in jobs:
        batch.add(job)
    while batch.rows < 3:
        batch.step()
    assert len(batch._groups) == 2  # 2 rows of some tokens, one of 200
    jobs[1].cancelled = True
    batch.cost = replace(batch.cost, weights=300 * batch.cost.token)
    batch.step()
    assert len(batch._groups) == 1 and batch.rows == 2


def test_rows_with_frequencies_of_their_own(tmp_path):
    """Scalings that depend on the length: rows on both sides of it, and one that crosses it while it is answered."""
    for name, scaling in (
        ("llava-clip-llama", {"rope_type": "dynamic", "factor": 2.0}),
        ("llava-clip-llama", {"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 40}),
    ):
        folder = tmp_path / scaling["rope_type"]
        shutil.copytree(GOLDEN / name, folder)
        config = json.loads((folder / "config.json").read_text())
        text = config["text_config"]
        half = text["hidden_size"] // text["num_attention_heads"] // 2
        if scaling["rope_type"] == "longrope":
            scaling |= {"short_factor": [1.0 + 0.1 * n for n in range(half)], "long_factor": [2.0 + 0.3 * n for n in range(half)]}  # fmt: skip
        else:
            text["max_position_embeddings"] = 40
        text["rope_scaling"] = scaling
        (folder / "config.json").write_text(json.dumps(config))
        model, processor = load(folder)
        asked = ["Hi", "x " * 60, ["Look", PHOTO], "y " * 14]
        lengths = [len(processor(prompt).slots) for prompt in asked]
        assert min(lengths) + 30 > 40 > min(lengths) and max(lengths) > 60, lengths
        for answer, prompt in zip(batch_generate(model, processor, asked, max_tokens=30), asked, strict=True):
            check(answer, alone(model, processor, prompt, max_tokens=30))


@pytest.mark.parametrize("name", ["mllama-meta", "mllama-transformers"])
def test_rows_that_attend_to_images(name):
    """None, one, two that follow one another, and two with text between them, in every order of joining and leaving."""
    model, processor = load(GOLDEN / name)
    kinds = ["Hi", ["What?", PHOTO], [PHOTO, SHAPES, "Both?"], [PHOTO, "and", SHAPES, "?"]]
    assert any(isinstance(entry, ImageCache) for entry in model.make_state().layers)
    for order in ([0, 1, 2, 3], [3, 0, 2, 1], [0, 0, 2]):
        asked = [{"prompt": kinds[kind], "max_tokens": 4 + 3 * place} for place, kind in enumerate(order)]
        for answer, one in zip(batch_generate(model, processor, asked, batch_size=3), asked, strict=True):
            check(answer, alone(model, processor, one["prompt"], max_tokens=one["max_tokens"]))


@pytest.mark.parametrize("caches", [{"kv_bits": 8}, {"rotate": 24}])
def test_caches_without_rows_are_used_one_by_one(wide, caches):
    """Through the same interface, in turns; each answer is that of a conversation with such a cache."""
    model, processor = load(wide)
    prompts = ["Hello there, how is it going today?", ["Look", PHOTO], "Why?"]
    expected = [[c.token for c in Chat(model, processor, max_tokens=20, **caches).send(prompt)] for prompt in prompts]
    found = batch_generate(model, processor, prompts, max_tokens=20, **caches)
    assert [answer.token_ids for answer in found] == expected
    with Engine(model, processor, max_tokens=20, **caches) as engine:
        requests = [engine.submit(prompt) for prompt in prompts]
        assert [request.result().token_ids for request in requests] == expected
    with pytest.raises(PromptError, match="kv_bits must be"):
        Engine(model, processor, kv_bits=3)


def test_prompts_that_begin_alike_are_read_once(llava):
    model, processor = llava
    with Engine(model, processor, max_tokens=4) as engine:
        first = engine.submit([PHOTO, "What is it?"]).result()
        again = engine.submit([PHOTO, "What is it?"]).result()
        other = engine.submit([PHOTO, "Which colour?"]).result()
        different = engine.submit([SHAPES, "Which colour?"]).result()
    assert first.stats.cached_tokens == 0 and first.stats.encoded_images == 1
    assert again.stats.cached_tokens == again.stats.prompt_tokens - 1
    assert other.stats.cached_tokens > other.stats.image_tokens and other.stats.encoded_images == 0
    assert different.stats.cached_tokens < different.stats.image_tokens and different.stats.encoded_images == 1
    for answer, prompt in (
        (again, [PHOTO, "What is it?"]),
        (other, [PHOTO, "Which colour?"]),
        (different, [SHAPES, "Which colour?"]),
    ):
        check(answer, alone(model, processor, prompt, max_tokens=4))


@pytest.mark.parametrize(
    "name", ["llava-clip-llama", "qwen2.5-vl", "qwen3.5", "paligemma-gemma", "mllama-meta", "internvl-qwen2"]
)
def test_eight_questions_about_a_photo_that_come_together_encode_it_once(name):
    """And read it once, but in families where a prompt's keys depend on all of it."""
    model, processor = load(GOLDEN / name)
    asked = [[PHOTO, f"Question {number}?"] for number in range(8)]
    with Engine(model, processor, max_tokens=3) as engine:
        requests = [engine.submit(prompt) for prompt in asked]
        answers = [request.result() for request in requests]
    for found in (answers, batch_generate(model, processor, asked, max_tokens=3)):
        assert sum(answer.stats.encoded_images for answer in found) == 1
        shared = [answer.stats.cached_tokens > answer.stats.image_tokens for answer in found]
        assert shared == [False] + [name != "paligemma-gemma"] * 7
        for answer, prompt in zip(found[1:3], asked[1:3], strict=True):
            check(answer, alone(model, processor, prompt, max_tokens=3))


@pytest.mark.parametrize("name", ["qwen2.5-vl", "gemma3-hub", "paligemma-gemma", "internvl-rms-qwen3", "qllama"])
def test_what_prefixes_find_is_exact(name):
    model, processor = load(GOLDEN / name)
    prompts = [
        [PHOTO, "What is it?"],
        [PHOTO, "Why is it so?"],
        [SHAPES, "What is it?"],
        [PHOTO, "What is it? Say more."],
    ]
    with Engine(model, processor, max_tokens=5) as engine:
        for prompt in prompts:
            check(engine.submit(prompt).result(), alone(model, processor, prompt, max_tokens=5))


def test_prefixes_stay_within_their_memory(llava):
    model, processor = llava
    inputs = [processor(f"{word} " * 9) for word in ("a", "b", "c")]
    states = []
    for each in inputs:
        state = model.make_state()
        model(each, state)
        state.evaluate()
        states.append(state)
    kept = Prefixes(2 * states[0].nbytes)
    for each, state in zip(inputs, states, strict=True):
        kept.add(each, state)
        assert kept.nbytes <= kept.limit
    assert kept.find(model, inputs[0]).length < kept.find(model, inputs[2]).length == len(inputs[2].slots) - 1
    tiny = Prefixes(10)
    tiny.add(inputs[0], states[0])
    assert tiny.nbytes == 0


def test_many_threads_submit_at_once(llava):
    prompts = [f"Question {n}?" for n in range(10)]
    expected = {prompt: alone(*llava, prompt, max_tokens=5) for prompt in prompts}
    found: dict[str, Any] = {}
    with Engine(*llava, batch_size=4, max_tokens=5) as engine:
        threads = [threading.Thread(target=lambda p=p: found.update({p: engine.submit(p).result()})) for p in prompts]
        chat = Chat(*llava, max_tokens=5)
        for thread in threads:
            thread.start()
        beside = [chunk.token for chunk in chat.send(prompts[0])]
        for thread in threads:
            thread.join(60)
    assert beside == expected[prompts[0]][0]
    for prompt in prompts:
        check(found[prompt], expected[prompt])


def test_an_event_loop_reads_answers(llava):
    async def ask(engine, prompt):
        return [chunk.token async for chunk in engine.submit(prompt)]

    async def both(engine):
        return await asyncio.gather(ask(engine, "Hi"), ask(engine, ["Look", PHOTO]))

    with Engine(*llava, max_tokens=6) as engine:
        one, other = asyncio.run(both(engine))
    assert one == alone(*llava, "Hi", max_tokens=6)[0] and other == alone(*llava, ["Look", PHOTO], max_tokens=6)[0]


def test_errors_come_where_the_request_is_read(llava):
    with Engine(*llava, max_tokens=4) as engine:
        bad = engine.submit(["Look", GOLDEN / "missing.png"])
        good = engine.submit("Hi")
        with pytest.raises(VLMError, match="missing.png"):
            list(bad)
        check(good.result(), alone(*llava, "Hi", max_tokens=4))
        with pytest.raises(PromptError, match="temperature"):
            engine.submit("Hi", temperature=-1)
        assert "missing" in engine.submit(GOLDEN / "missing.png").result().error
    with pytest.raises(PromptError, match="the engine is closed"):
        engine.submit("Hi")
    engine.close()  # twice does nothing


def test_cancelled_requests_leave_nothing(llava):
    with Engine(*llava, batch_size=1, max_tokens=100_000) as engine:
        first = engine.submit("Hi")
        next(iter(first))
        others = [engine.submit("Hi") for _ in range(20)]
        for request in [first, *others]:
            request.cancel()
        check(engine.submit("Hi", max_tokens=3).result(), alone(*llava, "Hi", max_tokens=3))
        assert not engine._requests and not engine._batch.busy


def test_who_asked_is_told_when_an_answer_is_whole(llava):
    told: list[Any] = []
    with Engine(*llava, max_tokens=3) as engine:
        good, bad = engine.submit("Hi"), engine.submit(GOLDEN / "missing.png")
        for request in (good, bad):
            request.add_done_callback(told.append)
        answers = [good.result(), bad.result()]
        gone = engine.submit("Hi", max_tokens=100_000)
        gone.add_done_callback(told.append)
        gone.cancel()
    good.add_done_callback(told.append)  # at once
    assert {*told} == {good, bad, gone} and len(told) == 4 and told[-1] is good
    assert answers[0].error is None and "missing" in answers[1].error


def test_an_event_loop_waits_for_many_at_once(llava):
    """More readers than threads of the loop's executor: the last one's answer is read while the first ones wait."""

    async def last(engine):
        waiting = [asyncio.create_task(drain(engine.submit("Hi", max_tokens=100_000))) for _ in range(60)]
        await asyncio.sleep(0)
        request = engine.submit("Hi", max_tokens=2)
        found = [chunk.token async for chunk in request]
        for task in waiting:
            task.cancel()
        return found

    async def drain(request):
        try:
            return [chunk async for chunk in request]
        finally:
            request.cancel()

    with Engine(*llava, batch_size=80) as engine:
        assert asyncio.run(last(engine)) == alone(*llava, "Hi", max_tokens=2)[0]


def test_closing_ends_what_is_open(llava):
    engine = Engine(*llava, batch_size=1, max_tokens=100_000)
    open_, waiting = engine.submit("Hi"), [engine.submit("Why?") for _ in range(30)]
    next(iter(open_))
    engine.close()
    assert all("closed" in (request.result().error or "") for request in waiting)
    begin = time.perf_counter()
    assert "closed" in open_.result().error and time.perf_counter() - begin < 5


def test_many_tasks_of_one_loop_wait_without_threads(llava):
    """More of them than the loop has threads, those that wait for a row included."""
    expected = alone(*llava, "Hi", max_tokens=4)

    async def ask(engine: Engine) -> list[int]:
        return [chunk.token async for chunk in engine.submit("Hi", max_tokens=4)]

    async def ask_all(engine: Engine) -> list[list[int]]:
        before = threading.active_count()
        tasks = [asyncio.create_task(ask(engine)) for _ in range(60)]
        await asyncio.sleep(0.05)
        assert threading.active_count() <= before + 1  # which opens pictures
        return await asyncio.gather(*tasks)

    with Engine(*llava, batch_size=4) as engine:
        assert asyncio.run(ask_all(engine)) == [expected[0]] * 60


def test_a_context_ends_answers_and_refuses_prompts(llava):
    length = len(llava[1]("Hi").slots)
    with Engine(*llava, context=length + 3) as engine:
        found = engine.submit("Hi", max_tokens=50).result()
        assert len(found.token_ids) == 3 and found.finish_reason == "length"
        refused = engine.submit("Hi " * 40).result().error
        assert refused is not None and f"the model's context is {length + 3}" in refused
        with pytest.raises(ContextError):
            next(iter(engine.submit("Hi " * 40)))


def test_pictures_that_come_again_are_decoded_once(llava, monkeypatch):
    model, processor = llava
    prepared: list[Any] = []
    own = processor.prepare
    monkeypatch.setattr(processor, "prepare", lambda source, *more: prepared.append(source) or own(source, *more))
    with Engine(model, processor, max_tokens=2) as engine:
        for question in ("What?", "Why?"):
            assert engine.submit([PHOTO, question]).result().error is None
    assert sum(isinstance(source, Picture) for source in prepared) == 1


def test_what_waits_when_an_engine_is_closed_gets_an_error(llava):
    engine = Engine(*llava, max_tokens=500)
    requests = [engine.submit([PHOTO, "What?"]) for _ in range(20)]
    engine.close()
    assert all(request.result().error for request in requests[10:])
