"""Training: what is learned from, the stages, going on after a kill, adapters, and what is written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES
from click.testing import CliRunner
from mlx.utils import tree_flatten
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import load
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.data.examples import collate, encode, read_examples
from mlx_vlm_mini.data.questions import write_scenes
from mlx_vlm_mini.decoder.reading import Reading
from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.train.evaluate import evaluate
from mlx_vlm_mini.train.lora import fuse_adapters, load_adapters
from mlx_vlm_mini.train.trainer import MUON_RATE, Settings, Trainer, answers_right, batch_loss, order


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder / "train", 24, seed=1)
    write_scenes(folder / "test", 12, seed=2, test=True)
    return folder


def write(file: Path, *lines: object) -> Path:
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def talk(*contents: object) -> dict:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]}


# Data


def test_only_what_the_assistant_says_is_learned(tmp_path, llava):
    _, processor = llava
    image = {"type": "image", "image": str(PHOTO)}
    file = write(
        tmp_path / "data.jsonl",
        talk([image, {"type": "text", "text": "What is it?"}], "A house.", "Where?", "Under the sky."),
    )
    (example,) = read_examples(file)
    encoded = encode(processor, example)
    said = processor.tokenizer.decode(
        [int(token) for token in encoded.input_ids[encoded.answer]], skip_special_tokens=False
    )
    assert said.split() == ["A", "house.", "Under", "the", "sky.", "</s>"]
    assert int(encoded.slots.sum()) == 9 and not (encoded.slots & encoded.answer).any()
    inputs = processor([*example.messages])
    np.testing.assert_array_equal(
        np.array(inputs.input_ids[0])[: encoded.slots.nonzero()[0][-1]],
        encoded.input_ids[: encoded.slots.nonzero()[0][-1]],
    )


@pytest.mark.parametrize("name", ["llava-siglip-qwen2", "llava-clip-mistral"])
def test_other_chat_templates_show_their_answers_too(name, tmp_path):
    _, processor = load(GOLDEN / name)
    file = write(
        tmp_path / "data.jsonl", talk([{"type": "text", "text": "How many?"}], [{"type": "text", "text": "Three."}])
    )
    encoded = encode(processor, read_examples(file)[0])
    said = processor.tokenizer.decode(
        [int(token) for token in encoded.input_ids[encoded.answer]], skip_special_tokens=False
    )
    end = {"llava-siglip-qwen2": "<|im_end|>", "llava-clip-mistral": "</s>"}[name]
    assert said.strip().startswith("Three.") and end in said and "How" not in said


def test_llavas_own_form_is_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(PHOTO.read_bytes())
    line = {
        "id": "1",
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A house."}],
    }
    (example,) = read_examples(write(tmp_path / "data.jsonl", line))
    assert example.messages[0]["content"] == [
        {"type": "image", "image": tmp_path / "a.jpg"},
        {"type": "text", "text": "What is it?"},
    ]
    assert example.messages[1]["role"] == "assistant"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not a line of training data"),
        ("[1]", "not a line of training data"),
        ({"messages": []}, "the prompt is empty"),
        ({"messages": 3}, "no list of objects with a role"),
        ({"messages": ["Hi"]}, "no list of objects with a role"),
        (talk("Hi"), "the assistant says nothing"),
        (talk([{"type": "image", "image": "none.png"}], "x"), "image not found"),
        (talk([{"type": "image", "image": "bad.png"}], "x"), "is not an image"),
        (talk([{"type": "image", "image": "a" * 300}], "x"), "cannot read image .*: File name too long"),
        (talk([{"type": "image", "image": "~\0"}], "x"), "image"),
        ({"messages": [], "images": ["bad.png"]}, "no message that shows them"),
        ({**talk("Hi", "x"), "kind": ["colour"]}, r"its kind is \['colour'\], not a text"),
        (
            {"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]},
            "more <image> than images",
        ),
        (
            {"image": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]},
            "have no <image>",
        ),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    (tmp_path / "bad.png").write_text("no image")
    file = write(tmp_path / "data.jsonl", talk("Hi", "Yes."), "", line)
    with pytest.raises(PromptError, match=message) as error:
        read_examples(file)
    assert str(error.value).startswith(f"{file}:3: ")


def test_padding_and_neighbours_change_nothing(scenes, llava):
    """The loss of a batch is the sum of the losses of its examples."""
    model, processor = llava
    examples = [encode(processor, example) for example in read_examples(scenes / "train" / "scenes.jsonl")[:3]]
    together, count = batch_loss(model, *collate(examples, 9, pad_rows=4).arrays)
    alone = [batch_loss(model, *collate([example], 9, pad_length=1).arrays) for example in examples]
    assert (
        int(count.item())
        == sum(int(each.item()) for _, each in alone)
        == sum(int(e.answer[1:].sum()) for e in examples)
    )
    assert float(together.item()) == pytest.approx(sum(float(loss.item()) for loss, _ in alone), rel=1e-4)


def test_every_pass_shows_every_example_once():
    steps = [order(step, 10, 4, 7) for step in range(5)]
    shown = [index for step in steps for index in step]
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(10)) and shown[:10] != shown[10:]
    assert order(3, 10, 4, 7) == steps[3] != order(3, 10, 4, 8)
    assert [order(step, 10, 4, None) for step in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


def test_text_that_is_no_text_is_refused(tmp_path, llava):
    (example,) = read_examples(write(tmp_path / "data.jsonl", talk("a\udcff", "b")))
    with pytest.raises(PromptError, match="not valid UTF-8"):
        encode(llava[1], example)


# The loop


def trainer(folder: Path, scenes: Path, model=None, **settings) -> Trainer:
    loaded, processor = load(PLAIN) if model is None else (model, load(PLAIN)[1])
    examples = read_examples(scenes / "test" / "scenes.jsonl")
    chosen = {"steps": 6, "batch_size": 2, "warmup": 2, "checkpoint_every": 2, **settings}
    return Trainer(loaded, processor, examples, folder, Settings(**chosen), valid=examples[:2])


def test_it_learns_to_tell_two_pictures_apart(tmp_path):
    """The same question about two pictures, answered by looking: right with them, wrong with blank ones."""

    def ask(name: Path, answer: str) -> dict:
        return talk([{"type": "image", "image": str(name)}, {"type": "text", "text": "What?"}], answer)

    examples = read_examples(write(tmp_path / "data.jsonl", ask(PHOTO, "A house."), ask(SHAPES, "Two shapes.")))
    model, processor = load(PLAIN)
    assert evaluate(model, processor, examples)["all"].right == 0
    settings = Settings(steps=40, batch_size=2, warmup=4, learning_rate=3e-3, checkpoint_every=40)
    losses = [progress.loss for progress in Trainer(model, processor, examples, tmp_path / "run", settings).run()]
    assert losses[-1] < 0.1 < losses[0]
    score = evaluate(model, processor, examples)["all"]
    assert (score.questions, score.right) == (2, 2) and score.right_blank < 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llava-next-clip-mistral", "family 'llava_next' cuts images into tiles"),
        ("paligemma-gemma", "family 'paligemma' sees later tokens, too"),
        ("gemma3-hub", "family 'gemma3' sees later tokens, too"),
        ("gemma3-text", "family 'gemma3_text' reads no images"),
        ("idefics3-markers", "family 'idefics3' joins image features"),
    ],
)
def test_families_that_cannot_be_trained_are_refused(name, message, tmp_path):
    model, processor = load(GOLDEN / name)
    with pytest.raises(CheckpointError, match=message):
        Trainer(model, processor, [], tmp_path, Settings())


@pytest.mark.parametrize("stage", ["projector", "full", "lora"])
def test_only_what_a_stage_names_changes(tmp_path, scenes, stage):
    before = dict(tree_flatten(load(PLAIN)[0].parameters()))
    run = trainer(tmp_path / "run", scenes, stage=stage)
    list(run.run())
    after = dict(tree_flatten(run.model.parameters()))
    changed = {
        name.partition(".")[0] for name, array in before.items() if name in after and not (after[name] == array).all()
    }
    assert changed == {"projector": {"projector"}, "full": {"vision", "projector", "decoder"}, "lora": set()}[stage]


def test_accumulated_batches_make_the_step_of_one_large_batch(tmp_path, scenes):
    one, two = (trainer(tmp_path / str(n), scenes, batch_size=4 // n, accumulate=n, steps=3) for n in (1, 2))
    losses = [[progress.loss for progress in run.run()] for run in (one, two)]
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-4)


def test_muon_moves_hidden_matrices_in_all_directions_alike(tmp_path, scenes):
    """Its updates are nearly orthogonal matrices; embeddings, norms and the patch projection stay AdamW's."""
    before = dict(tree_flatten(load(PLAIN)[0].parameters()))
    rate = 1e-4
    run = trainer(tmp_path, scenes, optimizer="muon", steps=1, warmup=0, learning_rate=rate, weight_decay=0.0)
    list(run.run())
    moved = {name: np.array(array - before[name]) for name, array in tree_flatten(run.model.parameters())}
    for name in (
        "vision.blocks.0.attn.v_proj.weight",
        "projector.layers.0.weight",
        "decoder.layers.1.mlp.up_proj.weight",
    ):
        values = np.linalg.svd(moved[name], compute_uv=False)[:6]  # so few tokens show no more directions
        rows, columns = moved[name].shape
        expected = MUON_RATE * rate * max(1, rows / columns) ** 0.5
        assert (0.6 * expected < values).all() and (values < 1.3 * expected).all(), name
    for name in ("decoder.embed_tokens.weight", "vision.patch_embed.weight", "decoder.norm.weight"):
        assert np.abs(moved[name]).max() == pytest.approx(rate, rel=0.01), name


@pytest.mark.parametrize(("stage", "optimizer"), [("full", "adamw"), ("full", "muon"), ("lora", "adamw")])
def test_a_resumed_run_takes_the_same_trajectory(tmp_path, scenes, stage, optimizer):
    chosen = {"stage": stage, "optimizer": optimizer}
    whole = [progress.loss for progress in trainer(tmp_path / "whole", scenes, **chosen).run()]
    running = trainer(tmp_path / "cut", scenes, **chosen).run()
    for _ in range(5):  # two checkpoints, and a step after the second
        next(running)
    running.close()
    again = trainer(tmp_path / "cut", scenes, **chosen)
    assert again.step == 4
    np.testing.assert_allclose([progress.loss for progress in again.run()], whole[4:], atol=1e-5)
    logged = [json.loads(line)["loss"] for line in (tmp_path / "cut" / "log.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(logged, whole, atol=1e-5)
    with pytest.raises(CheckpointError, match="another learning_rate"):
        trainer(tmp_path / "cut", scenes, learning_rate=1.0, **chosen)


def test_answers_right():
    targets = np.array([[-1, 5, 6, -1, 7, -1], [8, -1, 9, 9, 9, -1], [-1] * 6])
    assert answers_right(targets, targets) == (4, 4)
    likeliest = np.array([[1, 5, 0, 1, 7, 1], [8, 1, 0, 9, 0, 1], [1] * 6])
    assert answers_right(targets, likeliest) == (2, 4)
    assert answers_right(targets[2:], targets[2:]) == (0, 0)


def test_kill_9_in_the_middle(tmp_path, scenes):
    arguments = [
        "train", str(PLAIN), "--data", str(scenes / "train" / "scenes.jsonl"), "--steps", "12", "--batch-size", "2",
        "--warmup", "2", "--checkpoint-every", "2",
    ]  # fmt: skip
    program = [str(Path(sys.executable).with_name("mlx-vlm-mini")), *arguments, "--output"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run([*program, str(whole)], check=True, capture_output=True)
    with subprocess.Popen([*program, str(cut)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 60
        while not (cut / "log.jsonl").exists() or len((cut / "log.jsonl").read_text().splitlines()) < 5:
            assert time.monotonic() < end and process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert not (cut / "model").exists()
    resumed = subprocess.run([*program, str(cut)], check=True, capture_output=True, text=True)
    assert "going on at step" in resumed.stderr
    curves = [
        [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()] for run in (whole, cut)
    ]
    assert len(curves[0]) == 12
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-5)


def test_adapters_fused_or_apart_give_the_same(tmp_path, scenes):
    output = tmp_path / "run"
    arguments = [
        "train",
        PLAIN,
        "--data",
        scenes / "train" / "scenes.jsonl",
        "--stage",
        "lora",
        "--steps",
        4,
        "--warmup",
        1,
        "--batch-size",
        2,
        "--output",
        output,
    ]
    assert CliRunner().invoke(main, [str(argument) for argument in arguments]).exit_code == 0
    config = json.loads((output / "adapters" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "lora" and config["lora_parameters"]["rank"] == 8
    model, processor = load(PLAIN)
    inputs = processor("What is it?", [PHOTO])
    plain = np.array(model(inputs))
    load_adapters(model, output / "adapters")
    adapted, fused = np.array(model(inputs)), np.array(load(output / "model")[0](inputs))
    np.testing.assert_allclose(adapted, fused, atol=1e-3)
    assert np.abs(adapted - plain).max() > 0.01
    fuse_adapters(model)
    np.testing.assert_allclose(np.array(model(inputs)), adapted, atol=1e-3)
    with pytest.raises(CheckpointError, match="holds adapters for another model"):
        load_adapters(load(GOLDEN / "llava-siglip-qwen2")[0], output / "adapters")


# Composing and measuring


def compose(tmp_path: Path, *options: object) -> Path:
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    text = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 400,
    }
    for name, config in (("vision.json", vision), ("text.json", text)):
        (tmp_path / name).write_text(json.dumps(config))
    arguments = [
        "compose",
        tmp_path / "out",
        "--vision",
        tmp_path / "vision.json",
        "--decoder",
        tmp_path / "text.json",
        "--tokenizer",
        PLAIN,
        *options,
    ]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return tmp_path / "out"


@pytest.mark.parametrize(("projector", "layers"), [("mlp", 2), ("linear", 1)])
def test_two_configs_make_a_model(tmp_path, projector, layers):
    folder = compose(tmp_path, "--projector", projector)
    model, processor = load(folder)
    assert len(model.projector.layers) == layers
    names = set(mx.load(str(folder / "model.safetensors")))
    assert {"language_model.model.norm.weight", "vision_tower.vision_model.pre_layrnorm.weight"} <= names  # the Hub's
    assert model.config.decoder.vocab_size == 421 and processor.image_token == "<image>"
    text = processor.expand(
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}], [], add_generation_prompt=False
    )[0]
    assert text == "<s>USER: Hi ASSISTANT: Yes.</s>"
    wide = processor("Hi", [Image.new("RGB", (90, 30), "red")])
    assert wide.pixel_values.shape == (1, 32, 32, 3) and model(wide).shape[-1] == 421
    (tmp_path / "again").mkdir()
    again = compose(tmp_path / "again", "--projector", projector)
    assert (load(again)[0](wide) == model(wide)).all()


def test_parts_of_a_checkpoint_are_taken_over(tmp_path):
    """The decoder and the tower of a golden, cut out as files of their own."""
    source = load(PLAIN)[0]
    tensors = dict(mx.load(str(PLAIN / "model.safetensors")))
    config = json.loads((PLAIN / "config.json").read_text())
    for name, old, new, part in (
        ("tower", "vision_tower.vision_model.", "vision_model.", "vision_config"),
        ("text", "language_model.", "", "text_config"),
    ):
        (tmp_path / name).mkdir()
        cut = {new + theirs.removeprefix(old): array for theirs, array in tensors.items() if theirs.startswith(old)}
        mx.save_safetensors(str(tmp_path / name / "model.safetensors"), cut, {"format": "pt"})
        (tmp_path / name / "config.json").write_text(json.dumps(config[part]))
    arguments = [
        "compose",
        tmp_path / "out",
        "--vision",
        tmp_path / "tower",
        "--decoder",
        tmp_path / "text",
        "--tokenizer",
        PLAIN,
    ]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    model, _ = load(tmp_path / "out")
    pixels = mx.random.normal((1, 42, 42, 3))
    np.testing.assert_allclose(np.array(model.vision(pixels)), np.array(source.vision(pixels)), atol=1e-5)
    hidden = Reading(mx.random.normal((1, 5, 60)))
    np.testing.assert_allclose(np.array(model.decoder(hidden)), np.array(source.decoder(hidden)), atol=1e-5)


def test_eval_counts_exact_matches(tmp_path, monkeypatch):
    image = {"type": "image", "image": str(SHAPES)}
    lines = [
        {**talk([image, {"type": "text", "text": f"{number}?"}], answer), "kind": kind}
        for number, answer, kind in ((1, "Red.", "colour"), (2, "Two.", "count"), (3, "One.", "count"))
    ]
    examples = read_examples(write(tmp_path / "data.jsonl", *lines))
    blank = []

    def answer(model, processor, messages, **options):
        picture, question = messages[0]["content"]
        blank.append(isinstance(picture["image"], np.ndarray))
        return " Red.\n" if blank[-1] else {"1?": "Red.", "2?": "Two.", "3?": "one"}[question["text"]]

    monkeypatch.setattr("mlx_vlm_mini.train.evaluate.generate", answer)
    scores = evaluate(*load(PLAIN), examples)
    assert {kind: (score.questions, score.right, score.right_blank) for kind, score in scores.items()} == {
        "colour": (1, 1, 1), "count": (2, 1, 0), "all": (3, 2, 1),
    }  # fmt: skip
    assert list(scores) == ["colour", "count", "all"] and blank == [False, True] * 3
    blank.clear()
    seeing = evaluate(*load(PLAIN), examples, blank=False)["all"]
    assert (seeing.questions, seeing.right, seeing.right_blank) == (3, 2, None) and blank == [False] * 3


def test_the_whole_way_in_the_terminal(tmp_path, scenes):
    folder = compose(tmp_path)
    run = tmp_path / "run"

    def invoke(*arguments: object) -> str:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    data = ("--data", scenes / "train" / "scenes.jsonl")
    assert "trained for 3 steps on 24 conversations" in invoke(
        "train", folder, *data, "--steps", 3, "--batch-size", 2, "--output", run, "--dtype", "float16"
    )
    assert "every tensor has its place" in invoke("info", run / "model", "--check")
    table = invoke("eval", run / "model", "--data", scenes / "test" / "scenes.jsonl")
    assert (
        table.splitlines()[0].split() == ["kind", "questions", "right", "blank"] and "all                 12" in table
    )
    seeing = invoke("eval", run / "model", "--data", scenes / "test" / "scenes.jsonl", "--no-blank").splitlines()
    assert seeing[0].split() == ["kind", "questions", "right"] and len(seeing[1].split()) == 4  # "50.0 %" is two
    assert (
        invoke("scenes", tmp_path / "more", "--count", 3, "--test")
        == f"{tmp_path / 'more' / 'scenes.jsonl'}: 3 lines\n"
    )
