"""Qwen3.5: layers with a recurrent state: pieces of a prompt, conversations, snapshots, names, what is refused."""

import json
import re
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, SHAPES, edit_json, with_paths
from reference import CASES, GOLDEN

from mlx_vlm_mini import Chat, attend, load
from mlx_vlm_mini.checkpoints.folder import open_checkpoint
from mlx_vlm_mini.checkpoints.load import plan
from mlx_vlm_mini.checkpoints.weights import rename
from mlx_vlm_mini.config import DeltaConfig
from mlx_vlm_mini.convert import convert
from mlx_vlm_mini.decoder import state
from mlx_vlm_mini.decoder.delta import DeltaCache, Memory
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.families import qwen3_5
from mlx_vlm_mini.generation.decode import TAIL, prefill
from mlx_vlm_mini.layers import kernels
from mlx_vlm_mini.layers.delta import gated_delta, invert_unit_lower
from mlx_vlm_mini.text.template import ChatTemplate

NAME = "qwen3.5"
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def hybrid():
    return load(GOLDEN / NAME)


def naive(q, k, v, g, b, state):
    """The recurrence token by token, in float64."""
    outputs, groups = [], v.shape[2] // k.shape[2]
    for t in range(q.shape[1]):
        state = state * np.exp(g[:, t])[..., None, None]
        key, query = (np.repeat(each[:, t], groups, axis=1) for each in (k, q))
        delta = b[:, t, :, None] * (v[:, t] - np.einsum("bhvk,bhk->bhv", state, key))
        state = state + delta[..., None] * key[..., None, :]
        outputs.append(np.einsum("bhvk,bhk->bhv", state, query))
    return np.stack(outputs, axis=1), state


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 129, 200])
def test_chunks_equal_the_recurrence(length, either_kernels):
    rng = np.random.default_rng(length)
    q, k, v = rng.normal(size=(2, length, 2, 8)), rng.normal(size=(2, length, 2, 8)), rng.normal(size=(2, length, 6, 5))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    g, b = -0.05 * rng.exponential(size=(2, length, 6)), rng.uniform(size=(2, length, 6))
    given = q, k, v, g, b, rng.normal(size=(2, 6, 5, 8))
    for delta in (gated_delta, either_kernels.delta):
        found = delta(*(mx.array(each.astype(np.float32)) for each in given))
        for own, expected in zip(found, naive(*given), strict=True):
            np.testing.assert_allclose(np.array(own), expected, atol=2e-5)


def test_metal_takes_the_kernel_of_mlx_lm(monkeypatch):
    """With decays as factors; a head whose width its threads cannot share is computed in plain MLX."""
    asked = []

    def kernel(queries, keys, values, factors, betas, state):
        asked.append(factors)
        return gated_delta(queries, keys, values, mx.log(factors), betas, state)

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(kernels, "borrow", lambda module: SimpleNamespace(gated_delta_kernel=kernel))
    for width in (32, 8):
        given = [mx.random.normal((1, 3, 2, width)) for _ in range(3)]
        given += [-mx.ones((1, 3, 2)), mx.ones((1, 3, 2)) / 2, mx.zeros((1, 2, width, width))]
        found, expected = kernels.MLX.delta(*given), gated_delta(*given)
        np.testing.assert_allclose(np.array(found[0]), np.array(expected[0]), rtol=1e-4, atol=1e-4)
    assert len(asked) == 1


def test_decays_of_a_whole_chunk_do_not_overflow():
    """e^100 a token: the upper half of the decays between tokens is infinite."""
    ones = mx.ones((1, 64, 1, 4)) / 2
    out, state = gated_delta(ones, ones, ones, mx.full((1, 64, 1), -100.0), mx.ones((1, 64, 1)), mx.zeros((1, 1, 4, 4)))
    assert np.isfinite(np.array(out)).all() and np.isfinite(np.array(state)).all()


@pytest.mark.parametrize("beta", [0.5, 0.99])
def test_equal_keys_lose_no_digits(beta):
    """All rows of I + A alike, where a product of A's powers has numbers of 1e17."""
    lower = np.tril(np.full((64, 64), beta), -1)
    found = np.array(invert_unit_lower(mx.array(lower.astype(np.float32))))
    np.testing.assert_allclose(found, np.linalg.inv(np.eye(64) + lower), atol=1e-6)


@pytest.mark.parametrize("case", ["chunks", "two_images"])
@pytest.mark.parametrize("step", [1, 2, 3, 64, 100])
def test_a_prompt_in_pieces_equals_the_whole(hybrid, case, step):
    model, processor = hybrid
    inputs = processor(with_paths(CASES[case]))
    whole, pieces = model.make_state(), model.make_state()
    logits = model.decoder.logits(model.decoder(model.read(inputs), whole))[:, -1]
    np.testing.assert_allclose(
        np.array(prefill(model.decoder, model.read(inputs), pieces, step=step)), np.array(logits), atol=TOLERANCE
    )
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        if isinstance(one, DeltaCache):
            assert one.memory.inputs.shape == other.memory.inputs.shape == (1, 3, 56)
            np.testing.assert_allclose(np.array(one.memory.state), np.array(other.memory.state), atol=TOLERANCE)
            np.testing.assert_allclose(np.array(one.memory.inputs), np.array(other.memory.inputs), atol=TOLERANCE)


def test_the_state_is_float32_whatever_the_weights_are():
    model, processor = load(GOLDEN / NAME, dtype="bfloat16")
    state = model.make_state()
    mx.eval(prefill(model.decoder, model.read(processor("Which is larger?")), state))
    (found, *_), inputs = state.layers[0].state, state.layers[0].memory.inputs
    assert found.dtype == mx.float32 and inputs.dtype == mx.bfloat16


def memory(number):
    return Memory(mx.full((1, 1, 2, 2), number), mx.full((1, 3, 2), number))


def cache_of(*lengths, snapshots=()):
    cache, done = DeltaCache(), 0
    for length in lengths:
        cache.update(memory(length), length - done)
        done = length
        if length in snapshots:
            cache.snapshot()
    return cache


@pytest.mark.parametrize(
    ("length", "reached"), [(31, 31), (30, 30), (29, 29), (28, 20), (20, 20), (19, 10), (10, 10), (9, 0), (0, 0)]
)
def test_a_cache_goes_back_to_what_it_kept(length, reached):
    """Read to 10, 20, 29 and 30 tokens, 10 and 20 kept; one token back is always there."""
    cache = cache_of(10, 20, 29, 30, snapshots=(10, 20))
    assert cache.reach(length) == reached
    if reached:
        cache.rewind(reached)
        assert cache.offset == min(reached, 30) and float(cache.memory.state.mean()) == min(reached, 30)
        assert [each.length for each in cache.snapshots] == [each for each in (10, 20) if each <= reached]


def test_after_going_back_nothing_later_is_reached():
    cache = cache_of(10, 20, 30, snapshots=(10, 20, 30))
    cache.rewind(10)
    cache.update(memory(12), 2)
    assert [cache.reach(length) for length in (30, 12, 11, 10)] == [30, 12, 10, 10]
    assert cache.reach(9) == 0


@pytest.mark.parametrize(("nbytes", "left"), [(2**29, 8), (5 * 2 * 40 + 1, 5), (1, 2)])
def test_snapshots_are_bounded(monkeypatch, nbytes, left):
    """In number and in bytes, of which one takes 40 of each of two layers; the last two are always there."""
    monkeypatch.setattr(state, "SNAPSHOT_BYTES", nbytes)
    kept = state.State(lambda: [cache_of(1), cache_of(1)])
    for length in range(2, 30):
        for cache in kept.layers:
            cache.update(memory(length), 1)
        kept.snapshot()
    for cache in kept.layers:
        assert [each.length for each in cache.snapshots] == [*range(30 - left, 30)]


@pytest.mark.parametrize(
    ("layers", "heads", "megabytes", "snapshots"), [(48, 48, 154, 3), (24, 32, 52, 8), (18, 16, 20, 8)]
)
def test_what_a_snapshot_takes_of_published_sizes(layers, heads, megabytes, snapshots):
    """Of 27B, 9B and 0.8B in bfloat16, as docs/chat.md says."""
    config = DeltaConfig(
        num_key_heads=16, num_value_heads=heads, key_head_dim=128, value_head_dim=128, conv_kernel=4
    )  # fmt: skip
    one = heads * 128 * 128 * 4 + 3 * config.mixed_size * 2
    assert round(layers * one / 1e6) == megabytes
    assert min(state.SNAPSHOTS, state.SNAPSHOT_BYTES // (layers * one)) == snapshots


def test_a_fork_goes_on_by_itself(hybrid):
    model, processor = hybrid
    state, decoder = model.make_state(), model.decoder
    mx.eval(prefill(decoder, model.read(processor("Which is larger?")), state))
    twin = state.fork()

    def say(state, *tokens):
        for token in tokens:
            logits = decoder.logits(decoder(decoder.read(mx.array([[token]])), state))
        return np.array(logits[0, -1])

    first = say(state, 5, 6, 7)
    say(twin, 100, 101)
    twin.snapshot()
    assert state.rewind(state.start - 1) == state.start
    np.testing.assert_allclose(say(state, 7), first, atol=TOLERANCE)


def test_turns_equal_fresh_runs(hybrid):
    """Each answer is that of the whole conversation; what is read again is what the states cannot give."""
    model, processor = hybrid
    chat = Chat(model, processor, max_tokens=6)
    for prompt in (["What is in this image?", PHOTO], "Which is larger?", ["And this one?", SHAPES], "How many?"):
        before = [*chat.messages]
        tokens = [chunk.token for chunk in chat.send(prompt)]
        stats, fresh = chat.last_stats, Chat(model, processor, max_tokens=6)
        fresh.messages = before
        assert [chunk.token for chunk in fresh.send(prompt)] == tokens
        if before:
            assert stats.cached_tokens > 0


def test_again_undone_and_edited(hybrid):
    model, processor = hybrid
    chat = Chat(model, processor, max_tokens=5)
    list(chat.send(["What is in this image?", PHOTO]))
    second = [chunk.token for chunk in chat.send("Which is larger?")]
    stats = chat.last_stats
    assert [chunk.token for chunk in chat.retry()] == second
    assert chat.last_stats.cached_tokens == stats.prompt_tokens - TAIL
    list(chat.edit("How many?"))
    assert chat.last_stats.cached_tokens > 90  # the picture among them
    assert [chunk.token for chunk in chat.edit("Which is larger?")] == second


def test_another_question_about_an_image_begins_behind_it(hybrid):
    """And another last image behind the one before: what stands before is not read again."""
    model, processor = hybrid
    chat = Chat(model, processor, max_tokens=5)
    first, second = (
        ["See ", PHOTO, "Describe the photo in a few words"],
        "What is in this image? A red circle stands left.",
    )
    list(chat.send([*first, SHAPES, second]))
    ends = processor(chat.messages).image_ends
    assert len(ends) == 2 and ends[0] < ends[1] - 20
    list(chat.edit([*first, SHAPES, "How many objects do you see?"]))
    assert chat.last_stats.cached_tokens == ends[1]
    found, fresh = list(chat.edit([*first, PHOTO, second])), Chat(model, processor, max_tokens=5)
    assert chat.last_stats.cached_tokens == ends[0]
    expected = list(fresh.send([*first, PHOTO, second]))
    assert [chunk.token for chunk in found] == [chunk.token for chunk in expected]
    np.testing.assert_allclose([c.logprob for c in found], [c.logprob for c in expected], atol=TOLERANCE)


def test_an_answer_that_is_broken_off_is_gone_on_with(hybrid):
    model, processor = hybrid
    chat = Chat(model, processor, max_tokens=9)
    answer = chat.send(["What is in this image?", PHOTO])
    for _ in range(3):
        next(answer)
    answer.close()
    before = [*chat.messages]
    tokens, fresh = [chunk.token for chunk in chat.send("Why?")], Chat(model, processor, max_tokens=9)
    fresh.messages = before
    assert [chunk.token for chunk in fresh.send("Why?")] == tokens


def test_what_states_cannot_do_is_refused_in_a_line(hybrid):
    model, processor = hybrid
    with pytest.raises(PromptError, match="'qwen3_5' keeps states of all tokens"):
        Chat(model, processor, rotate=64)


def saved(chat, folder):
    chat.save(folder / "talk.json", cache=True)
    return Chat.load(folder / "talk.json", chat.model, chat.processor)


def test_a_saved_cache_goes_on_and_back_as_the_conversation_does(hybrid, tmp_path):
    """To the same lengths, with the same tokens and log-probabilities; as often as it is saved again."""
    model, processor = hybrid
    chat = Chat(model, processor, max_tokens=5)
    for prompt in (["What is in this image?", PHOTO], "Which is larger?"):
        list(chat.send(prompt))
    for act in (lambda each: each.send("How many?"), lambda each: each.retry(), lambda each: each.edit("Why?")):
        again = saved(saved(chat, tmp_path), tmp_path)
        assert again.notes == []
        expected, found = list(act(chat)), list(act(again))
        assert [chunk.token for chunk in found] == [chunk.token for chunk in expected]
        np.testing.assert_allclose([c.logprob for c in found], [c.logprob for c in expected], atol=TOLERANCE)
        assert again.last_stats.cached_tokens == chat.last_stats.cached_tokens > 90


@pytest.mark.parametrize("other", ["qwen3.5-moe", "qwen3-vl"])
def test_states_of_another_model_are_not_used(hybrid, other, tmp_path):
    """Neither way round; one line says so."""
    first, second = hybrid, load(GOLDEN / other)
    for writer, reader in ((first, second), (second, first)):
        chat = Chat(*writer, max_tokens=3)
        list(chat.send("Which is larger?"))
        chat.save(tmp_path / "talk.json", cache=True)
        again = Chat.load(tmp_path / "talk.json", *reader)
        (note,) = again.notes
        assert note.endswith("was saved with another model: the conversation is read anew") and "\n" not in note
        tokens = [chunk.token for chunk in again.send("Why?")]
        fresh = Chat(*reader, max_tokens=3)
        fresh.messages = again.messages[:2]
        assert [chunk.token for chunk in fresh.send("Why?")] == tokens and again.last_stats.cached_tokens == 0
        file = tmp_path / "talk.safetensors"  # and of a conversation of this model with the other's states
        other_states = file.read_bytes()
        chat = Chat(*reader, max_tokens=3)
        list(chat.send("Which is larger?"))
        chat.save(tmp_path / "talk.json", cache=True)
        file.write_bytes(other_states)
        (note,) = Chat.load(tmp_path / "talk.json", *reader).notes
        assert note.endswith("was computed by another model: the conversation is read anew")


def test_files_of_states_that_cannot_be_are_read_anew(hybrid, tmp_path):
    model, processor = hybrid
    chat = Chat(model, processor, max_tokens=5)
    list(chat.send(["What is in this image?", PHOTO]))
    chat.save(tmp_path / "talk.json", cache=True)
    file = tmp_path / "talk.safetensors"
    arrays, metadata = mx.load(str(file), return_metadata=True)
    lengths = arrays["lengths"]
    assert len(lengths) == 3 and arrays["layers.0.1.state"].dtype == mx.float32
    for changes, note in (
        ({"lengths": lengths[::-1]}, "does not say which states it holds"),
        ({"lengths": lengths + 1}, "does not say which states it holds"),
        ({"lengths": lengths[:1]}, "does not say which states it holds"),
        ({"lengths": lengths[:, 0]}, "does not say which states it holds"),
        ({"lengths": mx.arange(1, len(arrays["held"]) + 1, dtype=mx.uint64)[:, None]}, "does not say which states"),
        ({"layers.1.0.inputs": None}, "has not the layers of this model"),
        ({"layers.1.3.inputs": arrays["layers.1.0.inputs"]}, "has not the layers of this model"),
        ({"lengths": None}, "has not the layers of this model"),
        ({"layers.1.0.inputs": arrays["layers.1.0.inputs"][:, 1:]}, r"layers.1.0.inputs is F32\[1, 2, 56\]"),
        ({"layers.1.0.state": arrays["layers.1.0.state"].astype(mx.bfloat16)}, r"is BF16\["),
    ):
        left = {name: each for name, each in {**arrays, **changes}.items() if each is not None}
        mx.save_safetensors(str(file), left, metadata)
        again = Chat.load(tmp_path / "talk.json", model, processor)
        (found,) = again.notes
        assert re.search(note, found) and found.endswith("the conversation is read anew")


def test_attention_is_shown_of_layers_that_have_it(hybrid):
    model, processor = hybrid
    found = attend(model, processor, ["What is in this image?", PHOTO], max_tokens=3, reduce="none")
    assert found.layers == (3,) and found.images[0].weights.shape[:3] == (1, 2, 3)
    one = attend(model, processor, ["What is in this image?", PHOTO], max_tokens=3, reduce="none", layers=[-1])
    np.testing.assert_allclose(one.images[0].weights, found.images[0].weights, atol=TOLERANCE)
    with pytest.raises(PromptError, match="layer 1 has no attention weights; images are seen by 3"):
        attend(model, processor, ["What?", PHOTO], max_tokens=3, layers=[1, 3])
    with pytest.raises(PromptError, match="layers of this model have none"):
        attend(model, processor, ["What?", PHOTO], max_tokens=3, reduce="rollout")


def as_mlx(folder):
    """Rewrite a folder's tensors as mlx-community has them: other names, kernels as MLX's, norms with their 1."""
    checkpoint, tensors = open_checkpoint(folder), {}
    for name in checkpoint.tensors:
        array = checkpoint.read(name)
        if name.endswith("conv1d.weight") or "patch_embed.proj.weight" in name:
            array = mx.moveaxis(array, 1, -1)
        if name.endswith("norm.weight") and "language_model" in name and "linear_attn" not in name:
            array = array + 1
        name = name.replace("model.language_model.", "language_model.model.").replace("model.visual.", "vision_tower.")
        tensors["language_model.lm_head.weight" if name == "lm_head.weight" else name] = mx.contiguous(array)
    for file in folder.glob("model*"):
        file.unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})


def last(model, processor, case="two_images"):
    logits = model(processor(with_paths(CASES[case])))[0, -1]
    return np.array(logits - mx.logsumexp(logits))


def test_mlx_files_have_the_one_in_their_norms(hybrid, copy_of, tmp_path):
    folder = copy_of(NAME)
    as_mlx(folder)
    np.testing.assert_allclose(last(*load(folder)), last(*hybrid), atol=TOLERANCE)
    for source, result in ((folder, tmp_path / "from mlx"), (GOLDEN / NAME, tmp_path / "from the Hub")):
        convert(source, result)
        np.testing.assert_allclose(last(*load(result)), last(*hybrid), atol=TOLERANCE)


def test_a_layer_that_drafts_is_dropped(hybrid, copy_of):
    folder = copy_of(NAME)
    tensors = mx.load(str(folder / "model.safetensors"))
    for name in ("fc", "norm", "pre_fc_norm_hidden", "layers.0.self_attn.q_proj", "layers.0.mlp.experts.gate_up_proj"):
        tensors[f"mtp.{name}.weight"] = mx.zeros((3, 5))
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "pt"})
    assert len(plan(open_checkpoint(folder)).unused) == 5
    np.testing.assert_allclose(last(*load(folder)), last(*hybrid), atol=TOLERANCE)


def test_names_in_all_layouts():
    for theirs, ours in {
        "model.language_model.layers.2.linear_attn.conv1d.weight": "decoder.layers.2.linear_attn.conv1d.weight",
        "model.language_model.layers.2.linear_attn.A_log": "decoder.layers.2.linear_attn.A_log",
        "language_model.model.layers.2.linear_attn.norm.weight": "decoder.layers.2.linear_attn.norm.weight",
        "language_model.model.layers.2.input_layernorm.weight": "decoder.layers.2.input_layernorm.weight",
        "model.visual.merger.linear_fc1.bias": "projector.layers.0.bias",
        "language_model.lm_head.weight": "decoder.lm_head.weight",
    }.items():
        assert rename(theirs, qwen3_5.WEIGHTS) == (ours,)
    with pytest.raises(KeyError):
        rename("model.language_model.layers.2.linear_attn.other", qwen3_5.WEIGHTS)


def test_layers_without_a_list_and_rotary_numbers_beside_the_rope():
    text = json.loads((GOLDEN / NAME / "config.json").read_text())["text_config"]
    vision = json.loads((GOLDEN / NAME / "config.json").read_text())["vision_config"]
    expected = qwen3_5.config({"text_config": text, "vision_config": vision}).decoder
    rope = {key: value for key, value in text["rope_parameters"].items() if key != "partial_rotary_factor"}
    sparse = {key: value for key, value in text.items() if key != "layer_types"}
    for beside in ({}, {"partial_rotary_factor": 0.25}):
        given = {**sparse, **beside, "rope_parameters": rope}
        found = qwen3_5.config({"text_config": given, "vision_config": {**vision, "model_type": "qwen3_5"}}).decoder
        assert found.layer_types == expected.layer_types and found.shapes == expected.shapes
    assert expected.shapes["full_attention"].rotary_dims == 8


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("text_config", {"layer_types": ["linear_attention"] * 3 + ["sliding_attention"]}, "not 'sliding_attention'"),
        ("text_config", {"layer_types": ["linear_attention"] * 4}, "needs a layer that attends to tokens"),
        ("text_config", {"layer_types": ["full_attention"] * 4}, "go together"),
        ("text_config", {"linear_num_value_heads": 3}, "num_value_heads 3 is not a multiple of num_key_heads 2"),
        ("text_config", {"hidden_act": "gelu"}, "takes the activation silu, not 'gelu'"),
        ("text_config", {"linear_key_head_dim": 0}, "key_head_dim must be a whole number"),
        ("text_config", {"linear_num_value_heads": 10**9}, "num_value_heads must be a whole number"),
        ("text_config", {"linear_num_value_heads": 10**8}, "the files do not belong together"),
        ("text_config", {"linear_conv_kernel_dim": 5}, "conv1d.weight has shape"),
        ("text_config", {"full_attention_interval": 0, "layer_types": None}, "malformed"),
        ("vision_config", {"deepstack_visual_indexes": [1]}, "deepstack_visual_indexes must be empty"),
        ("vision_config", {"num_position_embeddings": 26}, "must be a square"),
    ],
)
def test_configs_that_cannot_be_are_refused_in_a_line(copy_of, part, changes, message):
    folder = copy_of(NAME)
    config = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", **{part: {**config[part], **changes}})
    with pytest.raises(CheckpointError, match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


THINKING = """{%- macro render(content, trim=true) -%}{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}{%- if part.type == 'image' or 'image' in part -%}<|vision_start|><|image_pad|><|vision_end|>
{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}
{%- set ns = namespace(last=messages|length - 1, looking=true) -%}
{%- for message in messages[::-1] -%}{%- set index = (messages|length - 1) - loop.index0 -%}
{%- if ns.looking and message.role == 'user' -%}{%- set ns.looking = false -%}{%- set ns.last = index -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}{%- set said = render(message.content)|trim -%}
{%- if message.role == 'assistant' -%}{%- if '</think>' in said -%}
{%- set said = said.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}
{%- if loop.previtem and loop.previtem.role == 'assistant' -%}{{ '\\n' }}{%- endif -%}{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' + said.rstrip('\\n') + '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}
{%- else -%}{{ '<think>\\n' }}{%- endif -%}{%- endif -%}"""


def test_a_template_that_thinks_by_default_is_rendered():
    """Macros with defaults, namespaces, messages backwards, the item before: what the Hub's template uses."""
    messages = [
        {"role": "user", "content": [{"type": "text", "text": " Why? "}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<think>\nHm.\n</think>\n\nSo."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
    ]
    template = ChatTemplate(THINKING, {}, "<|image_pad|>")
    assert "<|image_pad|>".join(template.render(messages)) == (
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>And this?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )


def test_thoughts_that_later_prompts_lack_cost_an_answer_and_no_more(copy_of):
    """The prompt ends in `<think>`, which the next one has not: the state goes back to before it."""
    folder = copy_of(NAME)
    (folder / "chat_template.jinja").write_text(THINKING)
    model, processor = load(folder)
    chat = Chat(model, processor, max_tokens=5)
    list(chat.send(["What is in this image?", PHOTO]))
    read, before = chat.last_stats.prompt_tokens, [*chat.messages]
    tokens, fresh = [chunk.token for chunk in chat.send("Why?")], Chat(model, processor, max_tokens=5)
    assert chat.last_stats.cached_tokens == read - TAIL
    fresh.messages = before
    assert [chunk.token for chunk in fresh.send("Why?")] == tokens
