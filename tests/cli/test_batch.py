"""generate for scripts: many prompts, many pictures, lines of JSON, and going on after an interruption."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES
from click.testing import CliRunner, Result

from mlx_vlm_mini.cli.answers import Output
from mlx_vlm_mini.cli.batch import left_to_do
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.cli.progress import Tally
from mlx_vlm_mini.cli.questions import Item, Questions, ask, read_prompts, spread
from mlx_vlm_mini.errors import ImageError, PromptError
from mlx_vlm_mini.images.source import read_image


def run(*arguments: object, **options: object) -> Result:
    result = CliRunner().invoke(main, ["generate", str(PLAIN), "--max-tokens", "3", *map(str, arguments)], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name in ("b.jpg", "a.JPG", "._a.JPG", "more/c.jpg"):
        shutil.copy(PHOTO, folder / name)
    shutil.copy(SHAPES, folder / "d[1].png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_pictures_of_folders_and_patterns(pictures):
    def names(*images: str) -> list[str] | None:
        found = spread(images)
        return None if found is None else [str(name).removeprefix(f"{pictures}/") for name in found]

    assert names(f"{pictures}/b.jpg", "nowhere.png", "-", "https://host/a?b=[c]") is None
    assert names(f"{pictures}/d[1].png") is None  # it is there: a name, not a pattern
    assert names(str(pictures)) == ["a.JPG", "b.jpg", "d[1].png"]
    assert names(f"{pictures}/**") == ["a.JPG", "b.jpg", "d[1].png", "more/c.jpg"]
    assert names(f"{pictures}/*.jpg", "x.png", f"{pictures}/more") == ["b.jpg", "x.png", "more/c.jpg"]
    for nothing in (f"{pictures}/*.gif", f"{pictures}/*.txt"):
        with pytest.raises(PromptError, match=r"there are no pictures in .*/\*\."):
            names(nothing)


def test_each_picture_gets_the_prompt_and_a_bad_one_is_reported(pictures, tmp_path):
    (pictures / "bad.png").write_text("no picture")
    result = run("-p", "What is it?", "-i", pictures, "--output", tmp_path / "out.jsonl")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.splitlines() == [
        f"Error: {pictures}/bad.png is not an image that Pillow can read, but text: save it as JPEG or PNG, and give that",
        "Error: 1 of 4 could not be answered: see their lines of output",
    ]
    a, b, bad, d = lines_of((tmp_path / "out.jsonl").read_text())
    assert [entry["images"] for entry in (a, b, bad, d)] == [[f"{pictures}/{name}"] for name in ("a.JPG", "b.jpg", "bad.png", "d[1].png")]  # fmt: skip
    assert (a["text"], a["token_ids"]) == (b["text"], b["token_ids"]) and a["prompt"] == "What is it?"
    assert "is not an image that Pillow can read" in bad["error"] and "text" not in bad
    alone = lines_of(run("-p", "What is it?", "-i", pictures / "d[1].png", "--json").stdout)[0]
    for name in ("images", "text", "token_ids", "finish_reason", "prompt_tokens", "image_tokens"):
        assert d[name] == alone[name]
    np.testing.assert_allclose(d["logprobs"], alone["logprobs"], atol=1e-4)
    assert d.keys() - alone.keys() == {"key", "prompt"} and not alone.keys() - d.keys()


def test_questions_about_a_picture_share_its_cache(pictures, tmp_path):
    (tmp_path / "prompts.txt").write_text("What is it?\nHello\n")
    entries = lines_of(run("--prompt-file", tmp_path / "prompts.txt", "-i", pictures, "--system", "Be short.").stdout)
    assert [(Path(entry["images"][0]).name, entry["prompt"]) for entry in entries] == [
        (name, prompt) for name in ("a.JPG", "b.jpg", "d[1].png") for prompt in ("What is it?", "Hello")
    ]
    for entry in entries:
        alone = run("-p", entry["prompt"], "-i", entry["images"][0], "--system", "Be short.", "--json")
        assert json.loads(alone.stdout)["token_ids"] == entry["token_ids"]
    a, _, _, _, d, _ = cached = [entry["cached_tokens"] for entry in entries]
    assert a == 0 and d > 0  # the system message is what two pictures share
    assert [tokens >= d + 9 for tokens in cached] == [
        False,
        True,
        True,
        True,
        False,
        True,
    ]  # a and b are the same picture


def test_it_goes_on_where_it_was_stopped(pictures, tmp_path):
    out = tmp_path / "out.jsonl"
    (pictures / "bad.png").write_text("no picture")
    asked = ("-p", "What?", "-i", pictures, "--output", out)
    run(*asked)
    whole = out.read_text()
    first, second, *_ = whole.splitlines(keepends=True)
    out.write_text(first + second[:100])  # killed while it wrote
    result = run(*asked)
    assert f"{out} holds 1 of 4 answers already" in result.stderr.splitlines()
    texts = [(entry["key"], entry.get("text")) for entry in lines_of(out.read_text())]
    assert texts == [(entry["key"], entry.get("text")) for entry in lines_of(whole)]
    assert out.read_text().startswith(first)
    shutil.copy(PHOTO, pictures / "bad.png")  # it is tried again, and is good now
    result = run(*asked)
    assert result.exit_code == 0 and len(out.read_text().splitlines()) == 5
    result = run(*asked, "--seed", 1)  # other settings: all of them
    assert result.exit_code == 0 and len(out.read_text().splitlines()) == 9
    before = out.read_bytes()
    done = run("-p", "What?", "-i", pictures, "--output", out)
    assert done.stderr == f"{out} holds 4 of 4 answers already\n" and out.read_bytes() == before


def test_a_picture_that_changes_before_its_turn_is_asked_about_again(pictures, tmp_path, monkeypatch):
    """Its answer would stand under the key of the picture that it was."""
    changed = pictures / "b.jpg"

    def change(*arguments: object) -> list:
        found = [*left_to_do(*arguments)]
        shutil.copy(SHAPES, changed)
        return iter(found)

    monkeypatch.setattr("mlx_vlm_mini.cli.batch.left_to_do", change)
    asked = ("-p", "What?", "-i", pictures, "--output", tmp_path / "out.jsonl")
    result = run(*asked)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == f"Error: {changed} changed meanwhile: the same command asks about it again"
    assert ["error" in entry for entry in lines_of((tmp_path / "out.jsonl").read_text())] == [False, True, False]
    monkeypatch.undo()
    assert run(*asked).exit_code == 0
    assert lines_of((tmp_path / "out.jsonl").read_text())[-1]["images"] == [str(changed)]


def test_prompts_line_by_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("What is it?\n\n  Hello \nHello\n")
    entries = lines_of(run("--prompt-file", tmp_path / "prompts.txt", "-i", PHOTO).stdout)
    assert [entry["prompt"] for entry in entries] == ["What is it?", "Hello", "Hello"]
    assert len({entry["key"] for entry in entries}) == 3
    assert entries[1]["text"] == run("-p", "Hello", "-i", PHOTO).stdout.rstrip("\n")
    piped = lines_of(run("--prompt-file", "-", "-i", PHOTO, input="Hello\n").stdout)
    assert piped[0]["text"] == entries[1]["text"] and piped[0]["key"] == entries[1]["key"]


def test_prompts_as_messages(tmp_path):
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    content = [{"type": "image", "image": "photo.jpg"}, {"type": "text", "text": "Hello"}]
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"id": 7, "messages": [{"role": "user", "content": content}]}) + "\n")
    (entry,) = lines_of(run("--prompt-file", file).stdout)
    assert entry["id"] == 7 and entry["images"] == [str(tmp_path / "photo.jpg")]
    assert entry["messages"] == [{"role": "user", "content": content}]
    assert entry["text"] == run("-p", "Hello", "-i", PHOTO).stdout.rstrip("\n")
    both = run("--prompt-file", file, "-i", PHOTO)
    assert both.exit_code == 1 and "name their own pictures" in both.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": 1}', "prompts.jsonl:2: an image is not a path or a URL"),
        ('{"prompt": "x"}', "prompts.jsonl:2: not a line {\"messages\": [...]}"),
        ("{", "prompts.jsonl:2: not a line"),
        ('{"messages": [{"role": "user"}]}', "prompts.jsonl:2: the user message has no content"),
        ('{"messages": [], "images": ["a.png"]}', "prompts.jsonl:2: it has images and no message that shows them"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "the assistant has the last word in it"),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}]}', "an image is not a path or a URL"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_before_anything_is_loaded(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n' + line + "\n")
    with pytest.raises(PromptError) as raised:
        list(read_prompts(str(file), None))
    assert message in str(raised.value)


@pytest.mark.parametrize("name", ["~\0/a.png", "~\ud800", "a" * 300, "\0"])
def test_names_that_no_file_has_are_told_when_they_are_asked_about(tmp_path, name):
    file = tmp_path / "prompts.jsonl"
    part = {"type": "image", "image": name}
    file.write_text(json.dumps({"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]}))
    (item,) = read_prompts(str(file), None)
    assert item.images == [str(tmp_path / name)]
    assert item.key({}) == item.key({})
    with pytest.raises(ImageError):
        read_image(item.images[0])
    with pytest.raises(ImageError):
        read_image(name)


def test_system_messages():
    def roles(item: Item) -> list[str]:
        return [message["role"] for message in item.messages]

    assert roles(ask("x", [], None)) == ["user"] and roles(ask("x", [], "be short")) == ["system", "user"]


def test_what_a_key_depends_on(pictures):
    name = str(pictures / "b.jpg")
    keys = [ask("x", [name], None).key({"seed": 1}), ask("x", [name], None).key({"seed": 2}), ask("y", [name], None).key({"seed": 1}), ask("x", [str(pictures / "a.JPG")], None).key({"seed": 1}), ask("x", [name], "s").key({"seed": 1}), ask("x", [], None).key({"seed": 1})]  # fmt: skip
    assert len(set(keys)) == len(keys) and keys[0] == ask("x", [name], None).key({"seed": 1})


def test_a_file_of_something_else_is_left_alone(tmp_path):
    for content in ('{"a": 1}\n', "notes\n", "notes", '{"key": 1', "\x80"):
        file = tmp_path / "notes.jsonl"
        file.write_bytes(content.encode("latin-1"))
        result = run("-p", "x", "--output", file)
        assert result.exit_code == 1 and f"{file}:1 is no answer of generate" in result.stderr
        assert file.read_bytes() == content.encode("latin-1")


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_a_name_that_is_not_utf8(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(PHOTO, folder / os.fsdecode(b"\xff.jpg"))
    assert run("-p", "x", "-i", folder, "--output", tmp_path / "out.jsonl").exit_code == 0
    assert lines_of((tmp_path / "out.jsonl").read_text())[0]["images"] == [f"{folder}/\udcff.jpg"]
    again = run("-p", "x", "-i", folder, "--output", tmp_path / "out.jsonl")
    assert "holds 1 of 1 answers already" in again.stderr
    assert len(run("-p", "x", "-i", folder).stdout.splitlines()) == 1


def test_a_device_is_written_and_not_read():
    assert run("-p", "x", "--output", "/dev/null").exit_code == 0
    full = run("-p", "x", "--output", "/dev/full")
    assert full.exit_code == 1 and "No space left on device" in full.stderr and full.stderr.count("\n") == 1


def test_one_run_at_a_time(tmp_path):
    with Output(tmp_path / "out.jsonl"), pytest.raises(PromptError, match="another run is writing"):
        Output(tmp_path / "out.jsonl")


def test_a_question_asked_twice_is_answered_twice():
    questions = Questions(([ask("x", [], None)] for _ in range(3)), 3)
    with Output(None) as output:
        keys = [key for key, _ in left_to_do(questions, output, {}, None, Tally())]
    assert keys == [keys[0], f"{keys[0]}-2", f"{keys[0]}-3"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-p", "x", "--prompt-file", "y"],
        ["--prompt-file", "-", "-i", "-"],
        ["-p", "x", "-i", "-", "--output", "/tmp/never.jsonl"],
        ["-p", "x", "-i", str(PHOTO.parent), "--draw", "/tmp/never.png"],
    ],
)
def test_what_does_not_go_together(arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stderr.startswith("Usage: "), result.output


def test_prompts_that_cannot_be_read(tmp_path):
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "bad").write_bytes(b"\xff\n")
    for name, message in [("gone", "No such file"), ("empty", "has no prompts"), ("bad", "cannot read")]:
        result = run("--prompt-file", tmp_path / name)
        assert result.exit_code == 1 and message in result.stderr
