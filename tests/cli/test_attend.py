"""`attend` and `/attend` through the real command: what is written, and what is refused."""

import re
import shutil
from functools import partial

import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES
from click.testing import CliRunner
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import Chat, generate, load
from mlx_vlm_mini.cli import attend as room
from mlx_vlm_mini.cli.attend import is_ours, parse_numbers, preview
from mlx_vlm_mini.cli.chat import command as chat_command
from mlx_vlm_mini.cli.commands import Session, find_settings
from mlx_vlm_mini.cli.look import Look
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.errors import PromptError


def run(*arguments, **options):
    result = CliRunner().invoke(main, ["attend", str(PLAIN), *map(str, arguments)], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


ask = partial(run, "-p", "What is it?", "--max-tokens", 4)


def test_everything_that_can_be_written(llava, tmp_path):
    files = [tmp_path / name for name in ("heat.png", "heat.html", "heat.npz")]
    outputs = [part for file in files for part in ("-o", file)]
    result = ask(
        "-i", PHOTO, "-i", SHAPES, *outputs, "--tokens", tmp_path / "maps", "--reduce", "none", "--layers", "-1"
    )
    assert result.exit_code == 0, result.output
    assert result.stdout == generate(*llava, "What is it?", images=[PHOTO, SHAPES], max_tokens=4) + "\n"
    assert all(map(is_ours, files))
    maps = sorted((tmp_path / "maps").iterdir())
    assert [file.name for file in maps] == [f"token-{i:03d}.png" for i in range(4)] and all(map(is_ours, maps))
    with np.load(files[2]) as arrays:
        assert arrays["weights_1"].shape == (1, 3, 4, 9) and arrays["layers"].tolist() == [1]
    assert not list(tmp_path.glob(".*"))


def test_what_attend_wrote_is_replaced_and_nothing_else(tmp_path):
    own, maps = tmp_path / "own.png", tmp_path / "maps"
    assert ask("-i", PHOTO, "-o", own, "--tokens", maps).exit_code == 0
    before = own.read_bytes()
    shorter = run("-p", "x", "-i", SHAPES, "--answer", "no", "-o", own, "--tokens", maps)
    assert shorter.exit_code == 0 and own.read_bytes() != before
    assert 0 < len(list(maps.iterdir())) < 4
    for name in ("other.png", "other.html", "other.npz"):
        shutil.copy(PHOTO, tmp_path / name)
        refused = ask("-i", PHOTO, "-o", tmp_path / name)
        assert refused.exit_code == 1 and "was not written by attend, so it stays" in refused.stderr
        assert (tmp_path / name).read_bytes() == PHOTO.read_bytes()
    shutil.copy(SHAPES, maps / "token-001.png")
    refused = ask("-i", PHOTO, "--tokens", maps)
    assert refused.exit_code == 1 and "token-001.png was not written by attend" in refused.stderr


def test_a_given_answer(tmp_path):
    result = run("-p", "x", "-i", PHOTO, "--answer", "A house.", "-o", tmp_path / "a.npz", "--reduce", "rollout")
    assert result.stdout.strip() == "A house."
    with np.load(tmp_path / "a.npz") as arrays:
        assert "".join(arrays["texts"]).strip() == "A house." and str(arrays["reduce"]) == "rollout"


def test_a_picture_from_stdin(tmp_path):
    result = ask("-i", "-", "-o", tmp_path / "a.png", input=PHOTO.read_bytes())
    assert result.exit_code == 0 and is_ours(tmp_path / "a.png")


BAD = [
    (["-o", "a.png"], 2, "attend needs an image to look at: give --image"),
    (["-i", PHOTO], 2, "nothing would be shown outside of a terminal: give --output or --tokens"),
    (["-i", PHOTO, "-o", "a.jpg"], 2, "--output takes .png, .html, .npz: a.jpg ends in none of them"),
    (["-i", PHOTO, "-o", "no/a.png"], 2, "--output: there is no folder no"),
    (["-i", PHOTO, "--tokens", "no/maps"], 2, "--tokens: there is no folder no"),
    (["-i", PHOTO, "-o", "a.png", "--layers", "1-"], 2, "--layers takes numbers and ranges, as in 0,4-7,-1, not '1-'"),
    (["-i", PHOTO, "-o", "a.png", "--layers", "5"], 1, "layer 5 does not exist: the decoder has 2, 0 to 1"),
    (["-i", PHOTO, "-o", "a.png", "--heads", "0,9"], 1, "head 9 does not exist: the decoder has 3, 0 to 2"),
    (["-i", PHOTO, "-o", "a.png", "--answer", ""], 1, "the answer is empty: there is no token to explain"),
    (["-i", "nowhere.jpg", "-o", "a.png"], 1, "image not found: nowhere.jpg"),
    (["-i", PHOTO, "-o", "a.png", "--reduce", "rollout", "--layers", "0"], 1, "rollout goes through all layers and heads"),
    (["-i", "-", "-i", "-", "-o", "a.png"], 2, "stdin can give one image"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=lambda value: str(value)[:50])
def test_what_is_refused(arguments, code, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = ask(*arguments)
    assert result.exit_code == code and message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_lists_of_numbers():
    assert parse_numbers("--layers", "0, 4-6,-1") == [0, 4, 5, 6, -1] and parse_numbers("--layers", None) is None


def test_the_preview(llava, capsys, monkeypatch):
    from mlx_vlm_mini import attend

    monkeypatch.setenv("COLORTERM", "truecolor")
    found = attend(*llava, [PHOTO, "What?"], answer="A\x1b[2J house.")
    preview(found, Look(thumbnails="blocks"))
    shown = capsys.readouterr().err
    assert "▀" in shown and "mean of all tokens" in shown
    lines = shown.splitlines()[-len(found.tokens) :]
    assert [round(100 * share) for share in found.shares] == [int(re.search(r"(\d+)%", line)[1]) for line in lines]
    monkeypatch.setattr(room.Look, "note", lambda self, text: None)
    preview(found, Look())
    assert capsys.readouterr().err == ""


@pytest.fixture
def session(llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    chat = Chat(*llava, max_tokens=4)
    return Session(chat, None, look=Look(), settings=find_settings(chat_command), begin=lambda name: Chat(*load(name)))


def test_attend_in_a_conversation(session, tmp_path, capsys):
    session.take("@photo.jpg What is it?")
    session.take("And now?")
    for typed, name in (
        ("", "attention.png"),
        ("", "attention-2.png"),
        (" my.html", "my.html"),
        (" my.html", "my.html"),
    ):
        session.take(f"/attend{typed}")
        assert f"written to {tmp_path / name}\n" in capsys.readouterr().err and is_ours(tmp_path / name)
    with Image.open("attention.png") as image:
        assert image.width > 176
    said = session.chat.messages
    session.take("/attend")
    assert session.chat.messages is said
    session.take("Why?")
    assert session.chat.last_stats.cached_tokens > 0
    session.take("/save talk.json")
    session.take("/load talk.json")
    session.take("/attend read.npz")
    assert is_ours(tmp_path / "read.npz")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["/attend"], "there is no answer yet to look at"),
        (["Hello", "/attend"], "the prompt has no image, so there are no patches to look at"),
        (["@photo.jpg What?", "/attend photo.jpg"], r"/attend takes .png, .html, .npz: photo.jpg ends in none of them"),
        (["@photo.jpg What?", "/attend no/a.png"], "/attend: there is no folder no"),
        (["@photo.jpg What?", "/attend a.png"], "a.png was not written by attend, so it stays"),
    ],
)
def test_what_attend_cannot_do_in_a_conversation(session, tmp_path, lines, message):
    (tmp_path / "a.png").write_bytes(b"mine")
    *before, last = lines
    for line in before:
        session.take(line)
    with pytest.raises(PromptError, match=message):
        session.take(last)


def test_which_layers_attend_is_said(tmp_path):
    """Of Qwen3.5 some; of others all, and nothing is said."""
    file = tmp_path / "heat.npz"
    given = ["-i", str(PHOTO), "-p", "What?", "--max-tokens", "2", "-o", str(file)]
    found = CliRunner().invoke(main, ["attend", str(GOLDEN / "qwen3.5"), *given])
    assert found.exit_code == 0 and "layer 3 attends to the images; layers that keep a state have no" in found.stderr
    file.unlink()
    assert CliRunner().invoke(main, ["attend", str(PLAIN), *given]).stderr == ""
