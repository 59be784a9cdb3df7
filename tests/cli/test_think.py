"""Thinking in the terminal: the options, JSON, /set think, and where what is thought shows."""

import json
import sys
from types import SimpleNamespace

import pytest
from checkpoints import PHOTO, PLAIN
from click.testing import CliRunner, Result
from thinking import write_template

from mlx_vlm_mini import load, stream_generate
from mlx_vlm_mini.cli import commands
from mlx_vlm_mini.cli.chat import command
from mlx_vlm_mini.cli.commands import Session, find_settings
from mlx_vlm_mini.cli.look import Look
from mlx_vlm_mini.cli.main import main
from mlx_vlm_mini.cli.writing import Answer, MarkdownAnswer
from mlx_vlm_mini.errors import PromptError
from mlx_vlm_mini.generation.answering import Chunk, Stats
from mlx_vlm_mini.generation.chat import Chat


@pytest.fixture
def folder(copy_of):
    """A checkpoint whose template thinks by default; with so few tokens it never ends to."""
    found = copy_of("qwen3.5")
    write_template(found, "on by default")
    return found


def run(*arguments: object, **options: object) -> Result:
    result = CliRunner().invoke(main, [*map(str, arguments)], **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_generate_prints_the_answer_and_tells_thinking_in_json(folder, tmp_path):
    asked = ["generate", folder, "-p", "Hi", "-i", PHOTO, "--max-tokens", "6"]
    whole = list(stream_generate(*load(folder), ["Hi"], images=[PHOTO], max_tokens=6))
    thinking = "".join(chunk.thinking for chunk in whole)
    shown = run(*asked)
    assert thinking and shown.stdout == "\n"
    assert shown.stderr == "the model was still thinking when the answer had its most tokens (max tokens)\n"
    for think in ([], ["--think"]):
        found = json.loads(run(*asked, *think, "--json").stdout)
        assert (found["thinking"], found["text"]) == (thinking, "")
        assert found["token_ids"] == [chunk.token for chunk in whole]
    silent = json.loads(run(*asked, "--no-think", "--json").stdout)
    assert "thinking" not in silent and silent["text"] and silent["token_ids"] != found["token_ids"]
    out = tmp_path / "out.jsonl"
    run(*asked, "--output", out)
    run(*asked, "--no-think", "--output", out)
    run(*asked, "--output", out)  # which is there already
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line.get("thinking", "") for line in lines] == [thinking, ""] and lines[1]["text"] == silent["text"]


def test_what_cannot_be_is_one_line(tmp_path):
    result = run("generate", PLAIN, "-p", "Hi", "--think")
    assert result.exit_code == 1
    assert result.stderr == (
        "Error: this model's chat template has no switch for thinking (enable_thinking): leave think out\n"
    )
    assert run("generate", PLAIN, "-p", "Hi", "--no-think", "--max-tokens", "2").exit_code == 0


def test_evaluation_may_think(folder, tmp_path):
    (tmp_path / "data.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}) + "\n"
    )
    for options in (["--no-think"], ["--think", "--max-tokens", "3"]):
        found = json.loads(run("eval", folder, "--data", tmp_path / "data.jsonl", "--json", *options).stdout)
        assert found["all"]["questions"] == 1


def test_set_think(folder, capsys):
    chat = Chat(*load(folder), max_tokens=4)
    session = Session(chat, str(folder), look=Look(), settings=find_settings(command), begin=lambda name: chat)
    for line, think in (("on", True), ("off", False), ("none", None)):
        session.take(f"/set think {line}")
        assert chat.options["think"] is think
        assert capsys.readouterr().err == f"think {line}\n"
    session.take("Hi")
    assert capsys.readouterr().out == "\n" and chat.messages[-1]["reasoning_content"]
    session.take("/set think off")
    session.take("/retry")
    assert capsys.readouterr().out.strip() and "reasoning_content" not in chat.messages[-1]
    with pytest.raises(PromptError, match="think: 'perhaps' is not a valid boolean"):
        session.take("/set think perhaps")
    plain = Session(Chat(*load(PLAIN)), "", look=Look(), settings=find_settings(command), begin=lambda name: chat)
    with pytest.raises(PromptError, match="has no switch for thinking"):
        plain.take("/set think on")
    assert "think" not in plain.chat.options and plain.settings()["think"] == "none"


def test_attend_of_an_answer_that_was_thought_about(folder, tmp_path, monkeypatch):
    """As it was asked, whatever /set says since."""
    monkeypatch.chdir(tmp_path)
    chat = Chat(*load(folder), max_tokens=4)
    session = Session(chat, str(folder), look=Look(), settings=find_settings(command), begin=lambda name: chat)
    session.waiting.append({"type": "image", "image": PHOTO})
    asked = []
    monkeypatch.setattr("mlx_vlm_mini.attend", lambda *_, **options: asked.append(options))
    monkeypatch.setattr("mlx_vlm_mini.cli.attend.write_output", lambda *_: None)
    for line in ("/set think on", "What is it?", "/set think off", "/attend heat.png"):
        session.take(line)
    (options,) = asked
    assert options["think"] is True and options["answer"] == chat.last_tokens
    assert commands.defaults()["think"] is None


def chunks(*parts):
    stats = Stats(generated_tokens=3, thinking_tokens=2)
    return [Chunk(text, 1, -1.0, reason, stats, thinking) for thinking, text, reason in parts]


@pytest.mark.parametrize(("terminal", "colour"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("kind", [Answer, MarkdownAnswer])
def test_thinking_is_dim_on_stderr_and_apart_from_the_answer(terminal, colour, kind, monkeypatch, capsys):
    stream = SimpleNamespace(isatty=lambda: terminal, write=sys.stderr.write, flush=sys.stderr.flush)
    monkeypatch.setattr(sys, "stderr", stream)
    with kind(colour=colour) as answer:
        for chunk in chunks(
            ("Hm,\x1b[2J", "", None), (" so", "", None), ("", "", None), ("", "Yes", None), ("", ".", "stop")
        ):
            answer.add(chunk)
    found = capsys.readouterr()
    assert found.out.strip() == "Yes."
    expected = "\x1b[2mHm,␛[2J\x1b[0m\x1b[2m so\x1b[0m\n\n" if colour else "Hm,␛[2J so\n\n"
    assert found.err == (expected if terminal else "")


def test_thinking_that_never_ends_ends_its_line(monkeypatch, capsys):
    stream = SimpleNamespace(isatty=lambda: True, write=sys.stderr.write, flush=sys.stderr.flush)
    monkeypatch.setattr(sys, "stderr", stream)
    answer = Answer()
    answer.add(Chunk("", 1, -1.0, "length", Stats(generated_tokens=2, thinking_tokens=2), "Hm"))
    assert capsys.readouterr().err.startswith("Hm\nthe model was still thinking")
