"""Conversations whose turns an engine answers: what each reads, several at once, and what goes wrong."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES
from reference import GOLDEN

from mlx_vlm_mini import Chat, Engine, load
from mlx_vlm_mini.errors import PromptError, VLMError

SAID = (["What is in this image?", PHOTO], "Which is larger?", ["And this one?", SHAPES])


@pytest.fixture(scope="module", params=["llava-clip-llama", "qwen3.5", "mllama-meta"])
def vlm(request):
    return load(GOLDEN / request.param)


@pytest.fixture(scope="module")
def llava():
    return load(GOLDEN / "llava-clip-llama")


def tokens(chunks):
    return [chunk.token for chunk in chunks]


def acts(chat):
    """Each turn of a conversation, and what it read of its prompt."""
    for prompt in SAID:
        yield list(chat.send(prompt)), chat.last_stats.cached_tokens
    yield list(chat.retry()), chat.last_stats.cached_tokens
    yield list(chat.edit("Why?")), chat.last_stats.cached_tokens
    chat.undo()
    yield list(chat.send("How many?")), chat.last_stats.cached_tokens
    yield list(chat.fork().send("And now?")), None


def test_a_turn_reads_what_a_conversation_alone_reads(vlm):
    with Engine(*vlm, prefix_memory=0) as engine:
        for (found, cached), (expected, wanted) in zip(
            acts(Chat(*vlm, engine=engine, max_tokens=5)), acts(Chat(*vlm, max_tokens=5)), strict=True
        ):
            assert tokens(found) == tokens(expected) and cached == wanted
            np.testing.assert_allclose([c.logprob for c in found], [c.logprob for c in expected], atol=1e-4)


def test_many_conversations_at_once(vlm):
    """Each in a thread of its own, forks among them, beside requests; two rows, so that some wait."""
    expected = [tokens(found) for found, _ in acts(Chat(*vlm, max_tokens=5))]
    with Engine(*vlm, batch_size=2) as engine, ThreadPoolExecutor(4) as pool:
        first = Chat(*vlm, engine=engine, max_tokens=5)
        chats = [first, first.fork(), first.fork(), Chat(*vlm, engine=engine, max_tokens=5)]
        requests = [engine.submit(SAID[0], max_tokens=5) for _ in range(4)]
        for found in pool.map(lambda chat: [tokens(said) for said, _ in acts(chat)], chats):
            assert found == expected
        assert [request.result().token_ids for request in requests] == [expected[0]] * 4


def test_the_first_turns_of_two_conversations_share_what_they_begin_with(vlm):
    with Engine(*vlm) as engine:
        for number in range(2):
            chat = Chat(*vlm, engine=engine, max_tokens=4)
            list(chat.send([PHOTO, "What is it?"]))
            assert (chat.last_stats.cached_tokens > 0) == bool(number)


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"rotate": 64}])
def test_caches_without_rows_answer_beside_the_rows(options):
    vlm = load(GOLDEN / ("qwen3.5" if "kv_bits" in options else "llava-clip-llama"))
    alone, prompts = Chat(*vlm, max_tokens=5, **options), ("Hi", "Why? Tell me more.")
    with Engine(*vlm) as engine:
        other = engine.submit("Hi", max_tokens=30)
        chat = Chat(*vlm, engine=engine, max_tokens=5, **options)
        for prompt in prompts:
            assert tokens(chat.send(prompt)) == tokens(alone.send(prompt))
            assert chat.last_stats.cached_tokens == alone.last_stats.cached_tokens
        assert other.result().error is None


def test_a_turn_that_is_broken_off_leaves_its_row(vlm):
    alone = Chat(*vlm, max_tokens=50)
    with Engine(*vlm, batch_size=1) as engine:
        chat = Chat(*vlm, engine=engine, max_tokens=50)
        for each in (chat, alone):
            list(each.send(SAID[0], max_tokens=3))
            answer = each.send("Why?")
            said = [next(answer).token for _ in range(3)]
            answer.close()
            assert each.last_tokens == said
        assert chat.messages[-1] == alone.messages[-1] and chat.context_used == alone.context_used
        assert engine.submit("Hi", max_tokens=3).result().error is None  # in the one row
        assert tokens(chat.send("And?", max_tokens=4)) == tokens(alone.send("And?", max_tokens=4))
        answer = chat.send("Why?")
        next(answer)
        chat.clear()
        assert list(answer) == [] and chat.messages == []
        assert tokens(chat.send("Hi", max_tokens=3)) == tokens(Chat(*vlm).send("Hi", max_tokens=3))


def test_what_goes_wrong_ends_the_turn_and_no_more(llava):
    said: list[int] = []

    def fail(tokens, logits):
        said.append(1)
        if len(said) == 4:
            raise ValueError("no such token")
        return logits

    with Engine(*llava) as engine:
        chat, alone = Chat(*llava, engine=engine, max_tokens=6), Chat(*llava, max_tokens=6)
        for each in (chat, alone):
            list(each.send(SAID[0]))
        with pytest.raises(VLMError, match="no such token"):
            list(chat.send("Why?", logits_processors=[fail]))
        with pytest.raises(PromptError, match="the context is"):
            list(chat.send("Why?", max_tokens=10**6))
        assert len(chat.messages) == 2
        assert tokens(chat.send("Why?")) == tokens(alone.send("Why?"))
        assert chat.last_stats.cached_tokens > alone.last_stats.cached_tokens  # the prompt was read before
        with pytest.raises(PromptError, match="the engine answers with another model"):
            Chat(*load(GOLDEN / "llava-clip-llama"), engine=engine)


def test_an_engine_that_is_closed_ends_the_turn(llava):
    engine = Engine(*llava)
    chat = Chat(*llava, engine=engine, max_tokens=400)
    list(chat.send("Hi", max_tokens=3))
    answer = chat.send("Why?")
    next(answer)
    engine.close()
    with pytest.raises(PromptError, match="the engine was closed"):
        list(answer)
    with pytest.raises(PromptError, match="the engine was closed"):
        list(chat.send("Why?"))
    assert len(chat.messages) == 2
    chat.engine = None
    alone = Chat(*llava)
    list(alone.send("Hi", max_tokens=3))
    assert tokens(chat.send("Why?", max_tokens=4)) == tokens(alone.send("Why?", max_tokens=4))


def test_a_prompt_that_is_being_read_can_be_given_up(llava):
    """Progress comes from the engine's thread; what was cached before stays."""
    seen, reached = [], threading.Event()
    with Engine(*llava) as engine:
        chat = Chat(*llava, engine=engine, max_tokens=3)
        list(chat.send(SAID[0]))
        used = chat.context_used

        def progress(done, total):
            seen.append((done, total))
            if len(seen) == 3:
                reached.set()
                threading.Event().wait(0.3)

        answer = chat.send(["Tell me more. " * 20], prefill_step=4, progress=progress)
        pool = ThreadPoolExecutor(1)
        first = pool.submit(lambda: next(answer, None))
        assert reached.wait(30)
        request, _ = chat._running
        request.cancel()
        assert first.result() is None and seen[-1][0] < seen[-1][1]
        pool.shutdown()
        chat.undo()
        list(chat.send("Why?"))
        assert chat.last_stats.cached_tokens >= used - 3


def test_a_conversation_is_saved_and_goes_on_with_an_engine(vlm, tmp_path):
    with Engine(*vlm) as engine:
        chat = Chat(*vlm, engine=engine, max_tokens=4)
        list(chat.send(SAID[0]))
        chat.save(tmp_path / "talk.json", cache=True)
        again = Chat.load(tmp_path / "talk.json", *vlm, engine=engine)
        assert again.notes == [] and again.engine is engine
        assert tokens(again.send("Why?")) == tokens(chat.send("Why?"))
        assert again.last_stats.cached_tokens == chat.last_stats.cached_tokens > 9
