"""PDFs in the terminal: all pages of one prompt, or an answer about each."""

import io
import json

import pytest
from checkpoints import PLAIN
from click.testing import CliRunner
from PIL import Image

from mlx_vlm_mini.cli.line import Mention, parse_line
from mlx_vlm_mini.cli.main import main


@pytest.fixture
def report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    pages = [Image.new("RGB", (40, 50), colour) for colour in ("red", "green", "blue")]
    pages[0].save(buffer, "PDF", save_all=True, append_images=pages[1:])
    (tmp_path / "report.pdf").write_bytes(buffer.getvalue())
    return tmp_path / "report.pdf"


def run(*words: str, stdin: bytes | None = None):
    return CliRunner().invoke(main, [*map(str, words)], input=stdin)


def test_one_prompt_shows_all_pages(report):
    asked = ("generate", PLAIN, "-p", "What?", "--max-tokens", "2", "--json")
    one = json.loads(run(*asked, "-i", "report.pdf[2]").stdout)
    all_pages = json.loads(run(*asked, "-i", "report.pdf").stdout)
    assert all_pages["images"] == ["report.pdf[1]", "report.pdf[2]", "report.pdf[3]"]
    assert all_pages["image_tokens"] == 3 * one["image_tokens"] > 0
    assert (
        json.loads(run(*asked, "-i", "-", stdin=report.read_bytes()).stdout)["image_tokens"]
        == all_pages["image_tokens"]
    )
    many = run(*asked, "-i", "report.pdf", "--max-pages", "2")
    assert many.exit_code == 1 and "report.pdf: 3 pages, and the limit is 2: choose some" in many.stderr


def test_with_output_each_page_is_a_picture_of_its_own(report):
    asked = ("generate", PLAIN, "-p", "What?", "--max-tokens", "2", "--output", "o.jsonl", "-i", "report.pdf[1-2]")
    assert run(*asked).exit_code == 0
    first = [json.loads(line) for line in (report.parent / "o.jsonl").read_text().splitlines()]
    assert [entry["images"] for entry in first] == [["report.pdf[1]"], ["report.pdf[2]"]]
    assert "error" not in first[0] and first[0]["key"] != first[1]["key"]
    assert "holds 2 of 2 answers already" in run(*asked).stderr
    assert run(*asked, "--dpi", "50").exit_code == 0  # another picture, so that it is asked again
    lines = (report.parent / "o.jsonl").read_text().splitlines()
    assert len(lines) == 4 and not any("error" in json.loads(line) for line in lines)


def test_a_prompt_file_names_pages(report):
    said = {
        "role": "user",
        "content": [{"type": "image", "image": "report.pdf[2-]"}, {"type": "text", "text": "What?"}],
    }
    (report.parent / "q.jsonl").write_text(json.dumps({"messages": [said]}) + "\n")
    entry = json.loads(run("generate", PLAIN, "--prompt-file", "q.jsonl", "--max-tokens", "2").stdout)
    assert entry["images"] == ["report.pdf[2]", "report.pdf[3]"] and entry["image_tokens"] > 0


@pytest.mark.parametrize(
    ("line", "source"),
    [
        ("What is on @report.pdf[2]?", "report.pdf[2]"),
        ("@report.pdf[1,3-], please", "report.pdf[1,3-]"),
        ('see @"a report.pdf[2]" now', "a report.pdf[2]"),
        ("see @a\\ report.pdf[2] now", "a report.pdf[2]"),
        ("@nowhere.pdf", "nowhere.pdf"),
    ],
)
def test_pages_in_a_line(line, source):
    parts = parse_line(line, lambda path: path == "report.pdf")
    assert [part.source for part in parts if isinstance(part, Mention)] == [source]
    assert "".join(part.typed if isinstance(part, Mention) else part for part in parts) == line


def test_chat_shows_pages(report):
    said = run("chat", PLAIN, "--plain", "--max-tokens", "2", stdin=b"Compare @report.pdf[1-2]\n/stats\n")
    assert said.exit_code == 0, said.stderr
    assert "images               2" in said.stderr
