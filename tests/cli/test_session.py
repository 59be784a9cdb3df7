"""What can be typed into a conversation, on a real model: each command, and what the next answer is after it."""

import json
import shutil

import pytest
from checkpoints import PHOTO, PLAIN, SHAPES
from PIL import Image
from reference import GOLDEN

from mlx_vlm_mini import Chat, load
from mlx_vlm_mini.cli import commands
from mlx_vlm_mini.cli.chat import command
from mlx_vlm_mini.cli.commands import COMMANDS, Session, find_settings
from mlx_vlm_mini.cli.look import Look
from mlx_vlm_mini.errors import ImageError, PromptError, VLMError


@pytest.fixture
def begin(llava, tmp_path, monkeypatch):
    """Begin a conversation in a folder with two pictures."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    shutil.copy(SHAPES, tmp_path / "my shapes.png")

    def make(*lines: str, model: object = llava, look: Look | None = None, **options: object) -> Session:
        chat = Chat(*model, **{"max_tokens": 6, **options})
        again = lambda name: Chat(*load(name), max_tokens=6)  # noqa: E731
        session = Session(chat, str(PLAIN), look=look or Look(), settings=find_settings(command), begin=again)
        for line in lines:
            assert session.take(line)
        return session

    return make


def answers(session: Session) -> list[str]:
    return [each["content"][0]["text"] for each in session.chat.messages if each["role"] == "assistant"]


def shape_of(session: Session) -> list[list[str]]:
    """What each message of the user consists of."""
    return [
        [part["text"] if part["type"] == "text" else part["image"].origin.path.name for part in each["content"]]
        for each in session.chat.messages
        if each["role"] == "user"
    ]


def test_pictures_stay_where_they_were_typed(begin, capsys):
    session = begin("Compare @photo.jpg with @'my shapes.png'!", "/image my\\ shapes.png", "And this?")
    assert shape_of(session) == [
        ["Compare ", "photo.jpg", " with ", "my shapes.png", "!"],
        ["my shapes.png", "And this?"],
    ]
    assert session.chat.last_stats.encoded_images == 0 and session.waiting == []
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers(session))


def test_undo_edit_and_back_equal_a_fresh_conversation(begin, capsys):
    wanted = answers(begin("@photo.jpg What is it?", "And now?"))
    assert answers(begin("@photo.jpg What is it?", "Hello", "/undo", "And now?")) == wanted
    assert "taken back: Hello\n" in capsys.readouterr().err
    assert answers(begin("@photo.jpg What is it?", "@photo.jpg Hello", "/edit And now?", "/undo", "And now?")) == wanted
    assert answers(begin("@photo.jpg What is it?", "/fork", "Hello", "Hm", "/back", "And now?")) == wanted
    assert "back behind: @" in capsys.readouterr().err
    assert answers(begin("x", "/clear", "@photo.jpg What is it?", "And now?")) == wanted


def test_edit_keeps_pictures_that_it_does_not_speak_of(begin):
    session = begin("/image photo.jpg", "What is it?", "/edit What colour?")
    assert shape_of(session) == [["photo.jpg", "What colour?"]]
    assert answers(session) == answers(begin("@photo.jpg What colour?"))
    session.take("/edit And @'my shapes.png'?")
    assert shape_of(session) == [["And ", "my shapes.png", "?"]]


def test_edit_in_the_editor(begin):
    session = begin("Compare @photo.jpg with @'my shapes.png', please")
    shown = []

    def ask(text: str) -> str:
        shown.append(text)
        return text.replace(", please", "").replace("Compare", "Mix")

    session.ask = ask
    session.take("/edit")
    assert shown == ['Compare @"photo.jpg" with @"my shapes.png", please']
    assert shape_of(session) == [["Mix ", "photo.jpg", " with ", "my shapes.png"]]
    session.ask = lambda text: ""  # given up
    session.take("/edit")
    assert shape_of(session) == [["Mix ", "photo.jpg", " with ", "my shapes.png"]]


def test_retry_gives_another_answer(begin, capsys):
    session = begin("@photo.jpg What is it?", "/retry")
    first = answers(session)
    assert "at temperature 0.7" in capsys.readouterr().err
    assert session.chat.options.get("temperature") is None and len(first) == 1
    session = begin("@photo.jpg What is it?", temperature=1.0, seed=3)
    seen = {tuple(answers(session))}
    for _ in range(3):
        session.take("/retry")
        seen.add(tuple(answers(session)))
        assert session.chat.last_stats.encoded_images == 0
    assert len(seen) > 1 and "temperature" not in capsys.readouterr().err


def test_settings(begin, capsys):
    session = begin("/set", "/set\ttemperature 0.5", "/set top-k 3", '/set stop "a b" c', "/set max_tokens 2")
    assert capsys.readouterr().err.splitlines()[:3] == [
        "max_tokens           6",
        "temperature          0.0",
        "top_p                0.0",
    ]
    assert session.chat.options == {"max_tokens": 2, "temperature": 0.5, "top_k": 3, "stop": ("a b", "c")}
    session.take("Hello")
    assert session.chat.last_stats.generated_tokens == 2
    session.take("/set stop none")
    session.take("/set temperature")
    assert capsys.readouterr().err.splitlines()[-2:] == ["stop none", "temperature 0.5"]
    for line, message in [
        ("/set temperature x", "temperature: 'x' is not a valid float"),
        ("/set temperature -1", "temperature: -1.0 is not in the range"),
        ("/set temperature nan", "temperature must be 0 or more"),
        ("/set top_k 1 2", "top_k is one value, not 2"),
        ("/set nonsense 1", "there is no setting 'nonsense': /set lists them"),
        ("/set sampler x", "there is no setting 'sampler'"),
        ('/set stop "x', "/set: no closing quotation"),
    ]:
        with pytest.raises(PromptError) as raised:
            session.take(line)
        assert message in str(raised.value)
    assert session.chat.options["temperature"] == 0.5


def test_the_system_message(begin, capsys):
    session = begin("/system", "Hello", "/system Be short.", "/system", "/undo", "Hello")
    notes = capsys.readouterr().err.splitlines()
    assert notes[:3] == ["no system message", "system message: Be short.", "system message: Be short."]
    assert answers(session) == answers(begin("Hello", system="Be short."))
    session.take("/system off")
    assert session.chat.messages[0]["role"] == "user"


def test_save_and_load(begin, tmp_path, capsys):
    session = begin("@photo.jpg What is it?", "/save --cache my chat.json", "And now?")
    saved = json.loads((tmp_path / "my chat.json").read_text())
    assert saved["messages"][0]["content"][0]["path"] == "photo.jpg" and (tmp_path / "my chat.safetensors").exists()
    loaded = begin("/load my chat.json", "And now?")
    assert answers(loaded) == answers(session) and loaded.chat.last_stats.cached_tokens > 0
    assert 'going on behind: @"photo.jpg" What is it?' in capsys.readouterr().err
    shutil.copy(SHAPES, tmp_path / "photo.jpg")
    begin("/load my\\ chat.json")
    assert "photo.jpg has changed since the conversation was saved" in capsys.readouterr().err


def test_another_model_goes_on_with_the_conversation(begin, capsys, tmp_path):
    other = GOLDEN / "llava-next-clip-mistral"
    lines = ("@photo.jpg What is it?", "/image my shapes.png")
    session = begin(*lines, f"/model {other}", "/undo", "@photo.jpg What is it?", system="Be short.")
    fresh = begin("/image my shapes.png", "@photo.jpg What is it?", model=load(other), system="Be short.")
    assert answers(session) == answers(fresh)
    session = begin("Hello", "/model")
    assert capsys.readouterr().err.splitlines()[-1] == f"{PLAIN}, family llava"
    with pytest.raises(VLMError, match="folder not found"):
        session.take("/model /no/such")
    assert len(answers(session)) == 1 and session.model == str(PLAIN)


def test_the_clipboard(begin, monkeypatch, tmp_path):
    monkeypatch.setattr("PIL.ImageGrab.grabclipboard", lambda: Image.open(PHOTO))
    session = begin("/paste", "What is it?")
    assert answers(session) == answers(begin("@photo.jpg What is it?"))
    session.take("/edit What?")
    assert answers(session) == answers(begin("@photo.jpg What?"))
    session.take("/save chat.json")
    assert answers(begin("/load chat.json")) == answers(session)
    monkeypatch.setattr("PIL.ImageGrab.grabclipboard", lambda: ["notes.txt", str(tmp_path / "photo.jpg")])
    assert answers(begin("/paste", "What is it?")) == answers(begin("@photo.jpg What is it?"))

    def missing() -> None:
        raise NotImplementedError("xclip is required")

    for grab, message in [(lambda: None, "no picture on the clipboard"), (lambda: ["notes.txt"], "no picture"), (missing, "cannot be read here")]:  # fmt: skip
        monkeypatch.setattr("PIL.ImageGrab.grabclipboard", grab)
        with pytest.raises(ImageError, match=message):
            session.take("/paste")


def test_what_begins_with_a_slash(begin, capsys, tmp_path):
    session = begin("/nonsense now", "/1/2 of it", "//quit", f"{tmp_path}/photo.jpg What?")
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(";")[0] for note in notes] == ["unknown command /nonsense", "unknown command /1/2"]
    assert shape_of(session) == [["/quit"], ["photo.jpg", "What?"]]
    assert not session.take("/quit")
    for line in (f"{tmp_path}/gone.png What?", "/image gone.png", "@gone.png What?"):
        with pytest.raises(ImageError, match=r"image not found: .*gone\.png"):
            session.take(line)
    for line in (
        "/image",
        "/save",
        "/load",
        "/back",
        "/load gone.json",
        "/save ~nobody/x\0",
        "/load \0",
        "/model \0",
        "/image \0",
        "@\0.png",
    ):
        with pytest.raises(VLMError):
            session.take(line)
    assert len(answers(session)) == 2


def test_nothing_to_take_back(begin):
    for line in ("/undo", "/retry", "/edit x", "/edit"):
        with pytest.raises(PromptError, match="nothing was said yet"):
            begin(line)


def test_a_full_context(begin, capsys):
    session = begin(context=45, on_full="drop")
    for line in ("@photo.jpg What is it?", "And now?"):
        session.take(line)
    assert "the context was full: 1 of the oldest turns are forgotten" in capsys.readouterr().err
    refused = begin("@photo.jpg What is it?", context=45)
    with pytest.raises(PromptError, match="and the context is 45"):
        refused.take("And now?")


def test_costs_and_help(begin, capsys):
    begin("@photo.jpg What is it?", "/stats", "/help", look=Look(costs=True))
    notes = capsys.readouterr().err
    assert "6 tokens, " in notes and "context 41 of 512" in notes
    assert "images               1\n" in notes and "encoded_images       1\n" in notes
    for name in COMMANDS:
        assert f"\n{name} " in notes
    assert all(hasattr(Session, f"_{name[1:]}") or name == "/quit" for name in COMMANDS)


def test_a_thumbnail_shows_what_was_attached(begin, capsys, monkeypatch):
    monkeypatch.setattr(commands.Status, "show", lambda *_: None)
    begin("Is @photo.jpg it?", look=Look(thumbnails="blocks"))
    shown = capsys.readouterr()
    assert "▀" in shown.err and "▀" not in shown.out and "photo.jpg, " in shown.err
