"""Functions that callers bring, samplers and the like, and what they may do wrong: one line, and only their own answer."""

import mlx.core as mx
import pytest
from checkpoints import PHOTO

from mlx_vlm_mini import Chat, Engine, batch_generate, generate, stream_generate
from mlx_vlm_mini.errors import VLMError

SHAPE = "the sampler gave .*, not whole numbers of the shape"
BEYOND = "log-probability of nan .* a sampler gave none of its tokens"
LOGITS = "a logits processor gave .*, not logits of the shape"
WRONG = {
    "two tokens": ({"sampler": lambda logprobs: mx.array([1, 2])}, SHAPE),
    "no axis": ({"sampler": lambda logprobs: mx.array(3)}, SHAPE),
    "a number": ({"sampler": lambda logprobs: 3}, SHAPE),
    "half a token": ({"sampler": lambda logprobs: mx.array([1.5])}, SHAPE),
    "a token beyond": ({"sampler": lambda logprobs: mx.array([10**6])}, BEYOND),
    "a token before": ({"sampler": lambda logprobs: mx.array([-1])}, BEYOND),
    "fewer logits": ({"logits_processors": [lambda tokens, logits: logits[:, :5]]}, LOGITS),
    "more rows": ({"logits_processors": [lambda tokens, logits: mx.concatenate([logits, logits])]}, LOGITS),
    "no logits": ({"logits_processors": [lambda tokens, logits: None]}, LOGITS),
    "no function": ({"sampler": 3}, "sampler must be a function, not 3"),
    "no progress": ({"progress": 3}, "progress must be a function, not 3"),
    "no list": ({"logits_processors": 3}, "logits_processors must be a list of functions, not 3"),
    "no functions": ({"logits_processors": [3]}, "logits_processors must be a list of functions"),
}


@pytest.mark.parametrize("kind", sorted(WRONG))
def test_what_a_callers_function_gives_ends_its_answer_alone(llava, kind):
    options, message = WRONG[kind]
    with pytest.raises(VLMError, match=message) as error:
        generate(*llava, "Hi", max_tokens=4, **options)
    assert "\n" not in str(error.value)
    with pytest.raises(VLMError, match=message):
        list(Chat(*llava, max_tokens=4).send("Hi", **options))
    expected = [chunk.token for chunk in stream_generate(*llava, ["Look", PHOTO], max_tokens=6)]
    asked = [{"prompt": ["Look", PHOTO], "max_tokens": 6}, {"prompt": "Hi", **options}]
    fine, failed = batch_generate(*llava, asked, max_tokens=4)
    assert fine.token_ids == expected
    with pytest.raises(VLMError, match=message):
        raise VLMError(failed.error)


def test_a_callback_that_fails_is_its_own_fault(llava):
    """The engine's thread calls it, and answers on."""

    def fail(request):
        raise ValueError("no")

    with Engine(*llava, max_tokens=3) as engine:
        first = engine.submit("Hi")
        first.add_done_callback(fail)
        assert first.result().error is None and engine.submit("Hi").result().token_ids == first_tokens(llava)


def first_tokens(llava):
    return [chunk.token for chunk in stream_generate(*llava, "Hi", max_tokens=3)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_function_that_ends_its_thread_leaves_nobody_waiting(llava):
    """As sys.exit() does: all requests end, and further ones are refused."""

    def leave(logprobs):
        raise SystemExit(3)

    engine = Engine(*llava, max_tokens=200)
    requests = [engine.submit("Hi"), engine.submit("Hi", sampler=leave), engine.submit("Why?")]
    assert all("closed" in request.result().error for request in requests)
    with pytest.raises(VLMError, match="the engine is closed"):
        engine.submit("Hi")
    engine.close()


@pytest.mark.parametrize("value", [-1, 1.5, "a", True])
def test_numbers_that_are_none_are_refused_where_they_are_given(llava, value):
    for name, kinds in (
        ("context", (Chat, Engine)), ("feature_memory", (Chat, Engine)), ("prefix_memory", (Engine,)),
        ("rotate", (Chat, Engine)),
    ):  # fmt: skip
        for kind in kinds:
            with pytest.raises(VLMError, match=f"{name} must be a whole number of . or more, not {value!r}"):
                kind(*llava, **{name: value})
