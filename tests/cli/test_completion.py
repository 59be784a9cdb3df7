"""What Tab offers."""

import pytest

from mlx_vlm_mini.cli.completion import complete

COMMANDS = {"/image": "a picture", "/save": "", "/set": "", "/system": ""}
SETTINGS = {"temperature": "0.0", "top_k": "0", "top_p": "0"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "phone list.txt", "my photo.png", ".hidden.png", "a\x1b.png", "photos/one.JPG"):
        (tmp_path / name).touch()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("/s", ["/save ", "/set ", "/system "]),
        ("/image", ["/image "]),
        ("/nothing", []),
        ("s", []),
        ("/set t", ["temperature ", "top_k ", "top_p "]),
        ("/set top-", ["top_k ", "top_p "]),
        ("/set temperature 0", []),
        ("What is @ph", ["photo.jpg", "photos/"]),
        ("@photos/o", ["photos/one.JPG"]),
        ("bob@ph", []),
        ("@my", [r"my\ photo.png"]),
        (r"@my\ ", [r"my\ photo.png"]),
        ('and @"my p', ['"my photo.png"']),
        ('@"photos', ['"photos/']),
        ("@", [r"my\ photo.png", "photo.jpg", "photos/"]),
        ("@.h", [".hidden.png"]),
        ("/image ph", ["photo.jpg", "photos/"]),
        ("/save ph", [r"phone\ list.txt", "photo.jpg", "photos/"]),
        ("/model ph", []),  # no command here
        ("@/no/such/folder/x", []),
        ("@\0", []),
    ],
)  # fmt: skip
def test_offers(here, line, offered):
    found = complete(line, COMMANDS, SETTINGS)
    assert [each.text for each in found] == offered
    for each in found:  # it takes the place of what it begins with
        typed = line[len(line) - each.length :]
        assert each.text.replace("\\", "").startswith(typed.replace("\\", "").replace("-", "_"))


def test_home_and_notes(here, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [each.text for each in complete("@~/photos/", COMMANDS, SETTINGS)] == ["~/photos/one.JPG"]
    (offer,) = complete("/i", COMMANDS, SETTINGS)
    assert (offer.shown, offer.note) == ("/image", "a picture")
