"""A typed line -> text and pictures."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_vlm_mini.cli.line import Mention, parse_line, read_path, strip_edges

THERE = {
    "photo.jpg", "a b.jpg", "/home/u/photo.jpg", "/home/u/a b.jpg", "/home/u/it's.png", "notes.txt", "/home/u/notes.txt", "plain",
    "/home/u/10\u202fAM.png", "a?.png", "odd\\ name.png",
}  # fmt: skip


def is_there(path: str) -> bool:
    return path in THERE


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("What is it?", ["What is it?"]),
        ("", []),
        ("@photo.jpg", ["<photo.jpg>"]),
        ("What is @photo.jpg?", ["What is ", "<photo.jpg>", "?"]),
        ("Compare @photo.jpg with (@plain), please", ["Compare ", "<photo.jpg>", " with (", "<plain>", "), please"]),
        ('Look: @"a b.jpg".', ["Look: ", "<a b.jpg>", "."]),
        ("@'a b.jpg' and more", ["<a b.jpg>", " and more"]),
        (r"@a\ b.jpg and more", ["<a b.jpg>", " and more"]),
        ("@a?.png?", ["<a?.png>", "?"]),
        (r"@odd\ name.png", [r"<odd\ name.png>"]),
        ("@notes.txt", ["<notes.txt>"]),  # it is there: opening it says what is wrong with it
        ("one\n@photo.jpg\ntwo", ["one\n", "<photo.jpg>", "\ntwo"]),
        ("@nowhere.png, or?", ["<nowhere.png>", ", or?"]),
        ('@"no where.PNG"', ["<no where.PNG>"]),
        ("ask @alice, or bob@photo.jpg", ["ask @alice, or bob@photo.jpg"]),
        (r"\@photo.jpg a@b @ @@ @", [r"\@photo.jpg a@b @ @@ @"]),
        ("@https://host/a.png?size=1, yes", ["<https://host/a.png?size=1>", ", yes"]),
        ("@https://host/a", ["@https://host/a"]),
        ("/home/u/photo.jpg What?", ["</home/u/photo.jpg>", " What?"]),
        (r"What? /home/u/a\ b.jpg ", ["What? ", "</home/u/a b.jpg>", " "]),
        ("'/home/u/a b.jpg' What?", ["</home/u/a b.jpg>", " What?"]),
        ('"/home/u/it\'s.png"', ["</home/u/it's.png>"]),
        ("file:///home/u/a%20b.jpg What?", ["</home/u/a b.jpg>", " What?"]),
        ("file://localhost/home/u/photo.jpg", ["</home/u/photo.jpg>"]),
        ("/home/u/10\u202fAM.png", ["</home/u/10\u202fAM.png>"]),  # as macOS names a screenshot
        ("/home/u/photo.jpg /home/u/photo.jpg", ["</home/u/photo.jpg>", " ", "</home/u/photo.jpg>"]),
        ("photo.jpg is text, /home/u/notes.txt, (/home/u/photo.jpg) and /home/u/photo.jpg, too", None),
        ("/home/u/gone.png '/home/u/gone.png' file:///home/u/gone.png", None),
        ("[/INST] <image> x[i] \\", None),
    ],
)  # fmt: skip
def test_pictures_in_a_line(line, expected):
    found = [f"<{part.source}>" if isinstance(part, Mention) else part for part in parse_line(line, is_there)]
    assert found == ([line] if expected is None else expected)


PIECES = st.sampled_from(
    ["@", '"', "'", "\\", " ", "\n", "/", "file://", "photo.jpg", "/home/u/a b.jpg", ".png", "%", "?"]
)


@given(st.lists(PIECES | st.text(max_size=3)).map("".join))
def test_what_was_typed_is_kept(line):
    parts = parse_line(line, is_there)
    assert "".join(part.typed if isinstance(part, Mention) else part for part in parts) == line
    strip_edges(parts)
    read_path(line, is_there)


@given(st.text())
def test_text_without_pictures_comes_back_unchanged(text):
    if not any(isinstance(part, Mention) for part in parse_line(text, lambda _: False)):
        assert parse_line(text, lambda _: False) == ([text] if text else [])
    plain = text.replace("@", "")
    assert parse_line(plain, lambda _: False) == ([plain] if plain else [])


def test_spaces_at_the_edges():
    def of(line: str) -> list[str]:
        return [part if isinstance(part, str) else "P" for part in strip_edges(parse_line(line, is_there))]

    assert of("  @photo.jpg  What? ") == ["P", "What?"]
    assert of("What? @photo.jpg ") == ["What? ", "P"]
    assert of(" Compare @photo.jpg with @plain now ") == ["Compare ", "P", " with ", "P", " now"]
    assert of(" @photo.jpg with @plain ") == ["P", " with ", "P"]
    assert of("@photo.jpg  @plain \n now") == ["P", "P", "now"]
    assert of("@photo.jpg @plain") == ["P", "P"]
    assert of("   ") == []


@pytest.mark.parametrize(
    ("typed", "path"),
    [
        (" photo.jpg ", "photo.jpg"),
        ("'a b.jpg'", "a b.jpg"),
        ('"a b.jpg"', "a b.jpg"),
        ("a b.jpg", "a b.jpg"),
        (r"x\ y.jpg", "x y.jpg"),
        (r"odd\ name.png", r"odd\ name.png"),
        ("file:///tmp/a%20b", "/tmp/a b"),
        ("", ""),
        ("'", "'"),
    ],
)  # fmt: skip
def test_a_path_alone(typed, path):
    assert read_path(typed, is_there) == path
