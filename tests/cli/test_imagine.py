"""`imagine` and `/imagine` through the real command: files, what they say, and what is refused."""

import io
import shutil

import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN
from click.testing import CliRunner
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import Chat, imagine, load
from mlx_vlm_mini.cli import imagine as room
from mlx_vlm_mini.cli.chat import command as chat_command
from mlx_vlm_mini.cli.commands import Session, find_settings
from mlx_vlm_mini.cli.look import Look
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.drawing.drawn import read_drawn
from mlx_vlm_mini.errors import CheckpointError, PromptError

JANUS = GOLDEN / "janus"


@pytest.fixture(scope="module")
def loaded():
    return load(JANUS)


def run(*arguments, model=JANUS):
    result = CliRunner().invoke(main, ["imagine", str(model), *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_one_picture(loaded, tmp_path):
    file = tmp_path / "out.png"
    result = run("-p", "a red circle", "-o", file, "--seed", 3, "--guidance", 2, "-t", 0.5)
    assert (result.exit_code, result.stdout) == (0, f"{file}\n"), result.output
    (expected,) = imagine(*loaded, "a red circle", seed=3, guidance=2, temperature=0.5)
    found = read_drawn(file.read_bytes(), "out.png")
    assert (found.token_ids, found.seed, found.guidance) == (expected.token_ids, 3, 2.0)
    np.testing.assert_array_equal(np.array(found.image), np.array(expected.image))
    with Image.open(file) as opened:
        said = opened.text
    assert said["Software"] == "mlx-vlm-mini imagine" and said["Model"] == str(JANUS) and said["Seed"] == "3"
    assert said["Prompt"] == "a red circle"
    assert not [*tmp_path.glob(".*")]


def test_several_pictures_and_what_is_replaced(tmp_path):
    result = run("-p", "a red circle", "-o", tmp_path / "out.png", "--count", 3, "--seed", 1)
    files = [tmp_path / f"out-{number}.png" for number in (1, 2, 3)]
    assert result.exit_code == 0 and result.stdout.split() == [*map(str, files)]
    assert [read_drawn(file.read_bytes(), "").seed for file in files] == [1, 2, 3]
    before = files[1].read_bytes()
    assert run("-p", "a blue one", "-o", tmp_path / "out.png", "--count", 3).exit_code == 0
    assert files[1].read_bytes() != before
    shutil.copy(PHOTO, files[2])
    refused = run("-p", "a red circle", "-o", tmp_path / "out.png", "--count", 3)
    assert refused.exit_code == 1 and "out-3.png was not written by imagine, so it stays" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-p", " ", "-o", "x.png"], 1, "the prompt is empty"),
        (["-p", "a", "-o", "x.jpg"], 2, "--output takes .png"),
        (["-p", "a", "-o", "no/where/x.png"], 2, "there is no folder"),
        (["-p", "a", "-o", "x.png", "--guidance", "-1"], 1, "guidance must be a number from 0, not -1.0"),
        (["-p", "a", "-o", "x.png", "--guidance", "nan"], 1, "guidance must be a number from 0, not nan"),
        (["-p", "a", "-o", "x.png", "--count", "0"], 2, "0 is not in the range"),
        (["-p", "a", "-o", "x.png", "-i", "photo.jpg"], 2, "No such option"),
        (["-p", "a"], 2, "Missing option '-o'"),
    ],
)
def test_refusals(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, "") and message in result.stderr
    assert not [*tmp_path.iterdir()]


def test_a_model_that_cannot_draw_is_refused_by_name_before_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_vlm_mini.checkpoints.load.load_weights", lambda *_, **__: pytest.fail("loaded"))
    result = run("-p", "a", "-o", tmp_path / "x.png", model=PLAIN)
    assert result.exit_code == 1 and f"Error: {PLAIN} cannot draw: family 'llava'" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_nothing_is_left_of_a_drawing_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "mlx_vlm_mini.drawing.drawn.Drawn.to_png", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    result = run("-p", "a red circle", "-o", tmp_path / "out.png")
    assert result.exit_code == 1 and "full" in result.stderr and not [*tmp_path.iterdir()]


def test_the_progress_says_tokens_and_seconds(monkeypatch):
    times = iter((10.0, 10.5, 11.0, 20.0))
    monkeypatch.setattr(room.time, "monotonic", lambda: next(times))
    said = []

    class Lines:
        def show(self, text):
            said.append(text)

    progress = room.progress_on(Lines())
    for done in (1, 2, 3):
        progress(done, 576)
    assert said == [
        "drawing: 1 of 576 tokens", "drawing: 2 of 576 tokens, 287 s left", "drawing: 3 of 576 tokens, 286 s left"
    ]  # fmt: skip


def make_session(loaded, name="janus"):
    return Session(
        Chat(*loaded, max_tokens=3), name, look=Look(), settings=find_settings(chat_command), begin=lambda _: None
    )


def test_a_drawn_picture_enters_the_conversation(loaded, tmp_path, monkeypatch, capsys):
    """As pixels, and the next question is about it."""
    monkeypatch.chdir(tmp_path)
    session = make_session(loaded)
    session.take("/imagine a red circle")
    session.take("What is it?")
    (part, _) = session.chat.messages[0]["content"]
    prepared = part["image"]
    drawn = read_drawn((tmp_path / "imagined.png").read_bytes(), "")
    assert drawn.prompt == "a red circle" and prepared.size == (8, 8)
    expected = loaded[1].prepare(drawn.image)
    np.testing.assert_array_equal(prepared.pixel_values, expected.pixel_values)
    session.take("/imagine another")
    assert (tmp_path / "imagined-2.png").is_file() and len(session.waiting) == 1
    assert "written to imagined-2.png" in capsys.readouterr().err


def test_what_a_conversation_cannot_draw(loaded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptError, match="the prompt is empty"):
        make_session(loaded).take("/imagine")
    with pytest.raises(CheckpointError, match="plain cannot draw: family 'llava'"):
        make_session(load(PLAIN), "plain").take("/imagine a circle")
    assert not [*tmp_path.iterdir()]


def test_a_picture_shows_where_a_person_looks(loaded, monkeypatch, capsys):
    (drawn,) = imagine(*loaded, "a red circle", seed=3)
    monkeypatch.setattr("sys.stderr", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    room.show(drawn, Look(thumbnails="blocks"), "out.png")
    import sys

    shown = sys.stderr.getvalue()
    assert "▀" in shown and "out.png, 8x8" in shown and "seed 3: 16 tokens" in shown


def attend(*arguments):
    return CliRunner().invoke(main, ["attend", str(JANUS), *map(str, arguments)])


def test_attention_of_a_drawn_file(tmp_path):
    run("-p", "a red circle", "-o", tmp_path / "out.png", "--seed", 1)
    files = [tmp_path / name for name in ("heat.png", "heat.html", "heat.npz")]
    outputs = [part for file in files for part in ("-o", file)]
    result = attend("--drawn", tmp_path / "out.png", *outputs, "--tokens", tmp_path / "words")
    assert result.exit_code == 0, result.output
    with np.load(files[2]) as arrays:
        assert arrays["weights_0"].shape == (3, 16) and arrays["tokens"].tolist() == ["a", "red", "circle"]
    assert len([*(tmp_path / "words").iterdir()]) == 3 and "went to these words" in files[1].read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--drawn", "shapes.png", "-o", "x.npz"], 1, "shapes.png is no picture that mlx-vlm-mini imagine drew"),
        (["--drawn", "none.png", "-o", "x.npz"], 1, "cannot read none.png: No such file"),
        (["--drawn", "shapes.png", "-p", "x", "-o", "x.npz"], 2, "leave out --prompt"),
        (["-i", "shapes.png", "-o", "x.npz"], 2, "attend needs a question"),
    ],
)
def test_files_that_were_not_drawn(tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    shutil.copy(GOLDEN / "shapes.png", tmp_path)
    result = attend(*arguments)
    assert result.exit_code == code and message in result.stderr, result.output
