"""What files say reaches no terminal raw: the progress bar, `info`, `score` and `eval` (SECURITY.md, promise 5)."""

import pytest
from checkpoints import PLAIN

from mlx_vlm_mini.cli import batch, questions, writing

ESCAPE = "\x1b]0;PWNED\x07"


def test_the_progress_bar(tmp_path):
    shown = batch._show(questions.ask("What?", [f"{tmp_path}/a{ESCAPE}\nb.png"], None))
    assert shown.isprintable() and "PWNED" in shown


@pytest.mark.parametrize("terminal", [True, False])
def test_what_commands_print(capsys, monkeypatch, terminal):
    monkeypatch.setattr(writing.sys.stdout, "isatty", lambda: terminal)
    writing.echo(f"kind {ESCAPE}")
    assert (ESCAPE in capsys.readouterr().out) == (not terminal)


@pytest.mark.parametrize("command", ["info", "score", "eval"])
def test_they_print_by_it(command):
    source = (PLAIN.parents[2] / "cli" / f"{command}.py").read_text()
    assert all("json" in line for line in source.splitlines() if "click.echo" in line)
