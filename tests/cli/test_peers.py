"""`bench --against` and `--report`: rows of other programs, their failures, files. No time is asserted."""

import io
import json

import pytest
from checkpoints import PHOTO, PLAIN
from click.testing import CliRunner

from mlx_vlm_mini.cli import bench, peers
from mlx_vlm_mini.cli.main import main

QUICK = ["--bandwidth", "10", "--max-tokens", "3", "--context", "40", "-i", str(PHOTO)]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


class Failing(peers.Mini):
    def answer(self, image, question, tokens):
        raise RuntimeError("cannot read\nthis picture")


class InProcess:
    """A side in this process, which a test can replace."""

    def __init__(self, name):
        self.name, self.side = name, peers.SIDES[name][0]()

    def ask(self, **request):
        replies = io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(peers.SIDES, self.name, (lambda: self.side, ""))
            peers.main(self.name, io.StringIO(json.dumps(request)), replies)
        return json.loads(replies.getvalue())

    def end(self):
        pass


@pytest.fixture
def others(monkeypatch):
    """Two installed programs: one that answers as ours, one that fails."""
    monkeypatch.setattr(peers, "_Process", InProcess)
    monkeypatch.setitem(peers.SIDES, "mlx-vlm", (peers.Mini, "mlx_vlm_mini"))
    monkeypatch.setitem(peers.SIDES, "transformers", (Failing, "mlx_vlm_mini"))


def test_rows_of_all_programs_and_a_report(others, tmp_path):
    code, out, err = run(
        PLAIN, *QUICK, "--against", "mlx-vlm,transformers", "--report", tmp_path / "found.md", "--json"
    )
    assert (code, err) == (0, "")
    ours, same, failed = json.loads(out)["against"]
    assert [row["side"] for row in (ours, same, failed)] == ["mlx-vlm-mini", "mlx-vlm", "transformers"]
    assert ours["prompt_tokens"] == same["prompt_tokens"] == 39 and ours["same_tokens"] == same["same_tokens"] == 3
    assert min(ours[key] for key in ("load_s", "first_token_s", "tokens_per_s", "peak_rss_bytes")) > 0
    assert failed["error"] == "RuntimeError: cannot read" and "tokens_per_s" not in failed
    assert json.loads((tmp_path / "found.json").read_text()) == json.loads(out)
    lines = (tmp_path / "found.md").read_text().splitlines()
    assert sum(line.startswith("| mlx-vlm ") for line in lines) == 1
    assert "| transformers | failed: RuntimeError: cannot read | | | | | |" in lines


def test_tokens_that_differ_are_counted():
    answers = [{"token_ids": [4, 5, 6], "first_token_s": 1.0, "decode_s": 0.5, "prompt_tokens": 9}]
    found = peers._summarize(answers, [4, 5, 7])
    assert (found["same_tokens"], found["tokens_per_s"]) == (2, 4.0)
    assert peers._summarize([{**answers[0], "token_ids": [4]}], [4, 5])["tokens_per_s"] is None


def test_a_side_runs_in_a_process_of_its_own():
    (row,) = peers.compare(
        str(PLAIN), str(PHOTO), "?", [peers.OURS], tokens=2, rounds=1, dtype=None, say=lambda text: None
    )
    assert row["prompt_tokens"] > 9 and row["same_tokens"] == 2 and row["versions"]["mlx-vlm-mini"]
    (row,) = peers.compare(
        str(PLAIN / "nowhere"), str(PHOTO), "?", [peers.OURS], tokens=2, rounds=1, dtype=None, say=lambda text: None
    )
    assert "nowhere" in row["error"]


def test_errors_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "missing", lambda name: True)
    for code, text, arguments in (
        (2, "'llama.cpp' is unknown", ["--against", "llama.cpp"]),
        (2, "pip install mlx-vlm", ["--against", "mlx-vlm"]),
        (2, "should end in .md or .json", ["--report", "found.txt"]),
        (2, "there is no folder", ["--report", tmp_path / "no" / "found.md"]),
    ):
        found, out, err = run(PLAIN, *QUICK, *arguments)
        assert (found, out) == (code, "") and text in err


@pytest.mark.reference
def test_transformers_answers_alike():
    code, out, _ = run(PLAIN, *QUICK, "--against", "transformers", "--json")
    ours, theirs = json.loads(out)["against"]
    assert code == 0 and theirs["prompt_tokens"] == ours["prompt_tokens"] and theirs["same_tokens"] == 3
