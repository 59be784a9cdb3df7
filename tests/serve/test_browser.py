"""The page in a real Chromium: pictures, streams, stop, words and their maps, kept conversations, accessibility."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
sync_api = pytest.importorskip("playwright.sync_api")

from serving import Served, engine_of, served

from mlx_vlm_mini import load

pytestmark = pytest.mark.reference

SCENE = Path(__file__).parents[2] / "examples" / "scene.png"
CHROMIUM = os.environ.get("MLX_VLM_MINI_CHROMIUM") or shutil.which("chromium")
QUESTION, ANSWER = (
    "What do you see?",
    "A large red circle at the top left, a small yellow star at the top right and a large blue square at the bottom.",
)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served({"demo": "demo"}, lambda _: engine_of(*load("demo"), context=2048)) as running:
        yield running


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    if CHROMIUM is None and sys.platform != "darwin":
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, server: Served) -> Iterator[Any]:
    """The page, opened; what it logs, asks of others or fails at is an error."""
    context = chromium.new_context(viewport={"width": 1100, "height": 760})
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((server.url, "data:", "blob:")) else wrong.append(request.url),
    )
    page.goto(server.url)
    page.wait_for_selector("#model option", state="attached")
    page.expected = []  # parts of lines that a test expects in the log
    yield page
    context.close()
    assert not [line for line in wrong if not any(part in line for part in page.expected)]


def ask(page: Any, text: str, *files: Path) -> None:
    if files:
        page.set_input_files("#files", [str(file) for file in files])
        page.wait_for_selector(f"#waiting li:nth-child({len(files)})")
    page.fill("#said", text)
    page.press("#said", "Enter")
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_selector(".assistant:last-child .note, .assistant:last-child .error")


def until(page: Any, true: str) -> None:
    """Wait until an expression is true; by evaluation from outside, which the page's rules for scripts do not bind."""
    for _ in range(200):
        if page.evaluate(true):
            return
        page.wait_for_timeout(50)
    raise AssertionError(true)


def last(page: Any) -> str:
    return page.locator(".assistant .text").last.inner_text()


def check_accessibility(page: Any) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    # axe's script is put in by the debugger's interface, which the page's rules for scripts do not bind
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def test_a_picture_an_answer_and_where_the_model_looked(page):
    page.expected = ["willReadFrequently"]  # this test reads the canvas
    ask(page, QUESTION, SCENE)
    assert last(page) == ANSWER and "tokens/s" in page.locator(".assistant .note").first.inner_text()
    page.hover(".assistant .text")
    page.wait_for_selector(".look canvas")
    maps = {}
    for word in ("red", "yellow", "blue"):
        page.locator(".word", has_text=word).first.hover()
        assert page.locator(".word.now").inner_text() == word
        assert f"“{word}”" in page.locator(".look .note").inner_text()
        maps[word] = brightest(page)
    assert maps["red"][0] < 0.5 and maps["red"][1] < 0.5  # left, top
    assert maps["yellow"][0] > 0.5 and maps["yellow"][1] < 0.5
    page.locator(".word").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator(".word.now").inner_text() == "large"
    check_accessibility(page)
    page.reload()
    page.wait_for_selector(".assistant .text")
    assert last(page) == ANSWER and page.locator(".pictures img").count() == 1


def brightest(page: Any) -> tuple[float, float]:
    """Where in the picture the heat is greatest, from 0 to 1."""
    return page.evaluate(
        """() => { const canvas = document.querySelector('.look canvas'), {width, height} = canvas;
        const data = canvas.getContext('2d').getImageData(0, 0, width, height).data; let most = -1, x = 0, y = 0, n = 0;
        for (let i = 0; i < width * height; i++) { const light = data[4 * i] + data[4 * i + 1];
            if (light > most + 4) { most = light; x = y = n = 0; }
            if (light > most - 4) { x += i % width; y += Math.floor(i / width); n++; } }
        return [x / n / width, y / n / height]; }"""
    )


def test_stop_retry_edit_and_several_conversations(page, server):
    (one,) = server.server.models
    ask(page, "Hi")
    own = one.engine._batch.step
    import time

    try:
        one.engine._batch.step = lambda: (time.sleep(0.3), own())[1]
        page.fill("#said", QUESTION)
        page.set_input_files("#files", str(SCENE))
        page.wait_for_selector("#waiting li")
        page.click("#send")
        page.wait_for_selector("#stop:visible")
        until(page, "document.querySelector('.assistant:last-child .text').textContent.length > 3")
        page.click("#stop")
        page.wait_for_selector("#stop", state="hidden")
    finally:
        one.engine._batch.step = own
    assert 3 < len(last(page)) < len(ANSWER) and "stopped" in page.locator(".note").last.inner_text()
    page.locator("text=Retry").last.click()
    page.wait_for_selector("#stop", state="hidden")
    until(page, "document.querySelector('.assistant:last-child .note')?.textContent.includes('tokens')")
    assert page.locator("#log > li").count() == 4
    page.locator("text=Edit").first.click()
    assert page.input_value("#said") == "Hi" and page.locator("#log > li").count() == 0
    ask(page, "Hello")
    page.click("#new")
    assert page.locator("#log > li").count() == 0
    ask(page, "Another")
    titles = page.locator("#conversations li button:first-child")
    assert titles.all_inner_texts() == ["Another", "Hello"]
    titles.nth(1).click()
    assert page.locator(".user .text").inner_text() == "Hello"
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Delete Hello").click()
    until(page, "document.querySelectorAll('#conversations li').length === 1")


def test_enter_while_a_word_is_composed_sends_nothing(page):
    page.fill("#said", "こんにち")
    for event in (
        "{key: 'Enter', isComposing: true, bubbles: true, cancelable: true}",
        "{key: 'Enter', keyCode: 229, bubbles: true, cancelable: true}",
    ):
        page.evaluate(f"document.getElementById('said').dispatchEvent(new KeyboardEvent('keydown', {event}))")
    page.press("#said", "Shift+Enter")
    assert page.locator("#log > li").count() == 0 and page.input_value("#said") == "こんにち\n"


def test_text_from_right_to_left(page):
    ask(page, "مرحبا بالعالم")
    assert page.evaluate("getComputedStyle(document.querySelector('.user .text')).direction") == "rtl"
    assert page.evaluate("getComputedStyle(document.getElementById('said')).direction") == "ltr"


def test_an_answer_is_markdown_and_never_html(page):
    hostile = (
        "**bold** <img src=x onerror=alert(1)> <script>alert(2)</script> [a](javascript:alert(3)) ![p](http://evil.example/p.png) "
        "[site](https://example.com)\\n\\n| a | b |\\n|---|---|\\n| 1 | 2 |"
    )
    found = page.evaluate(
        f"""async () => {{ const {{ render }} = await import('./page/text.js'); const box = document.createElement('div');
        box.append(render("{hostile}")); document.getElementById('log').append(box);
        return [box.querySelector('strong')?.textContent, box.querySelectorAll('img,script').length, box.querySelectorAll('td').length,
            [...box.querySelectorAll('a')].map(a => a.href + ' ' + a.rel)]; }}"""
    )
    links = ["http://evil.example/p.png noopener noreferrer", "https://example.com/ noopener noreferrer"]
    assert found == ["bold", 0, 2, links]  # a picture from elsewhere is a link, which nobody follows unasked


def test_drops_pastes_and_files_that_are_none(page):
    page.expected = ["status of 400"]
    for kind, event in (("drop", "dataTransfer"), ("paste", "clipboardData")):
        page.evaluate(
            f"""async () => {{ const data = new DataTransfer(); data.items.add(new File([new Uint8Array([1, 2])], '{kind}.heic'));
            data.items.add(new File(['x'], 'notes.txt', {{ type: 'text/plain' }}));
            const made = '{kind}' === 'drop' ? new DragEvent('drop', {{ {event}: data, bubbles: true, cancelable: true }})
                : new ClipboardEvent('paste', {{ {event}: data, bubbles: true, cancelable: true }});
            document.body.dispatchEvent(made); }}"""
        )
    page.wait_for_selector("#waiting li:nth-child(2)")
    until(page, "document.querySelectorAll('#waiting .file').length === 2")  # Chromium shows no HEIC
    assert "notes.txt is no picture" in page.locator("#status").inner_text()
    ask(page, "What?")
    assert "is broken" in page.locator(".error").inner_text() or "not an image" in page.locator(".error").inner_text()


def test_a_pdf_and_a_heic_are_shown_with_their_maps(page, tmp_path):
    pil = pytest.importorskip("PIL.Image")
    pdf = tmp_path / "pages.pdf"
    pil.open(SCENE).convert("RGB").save(pdf, "PDF")
    heic = tmp_path / "photo.heic"
    import pillow_heif

    pillow_heif.from_pillow(pil.open(SCENE).convert("RGB")).save(heic)
    ask(page, QUESTION, pdf, heic)
    page.locator("text=Where did it look?").click()
    page.wait_for_selector(".look li:nth-child(2) canvas")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    ask(page, QUESTION, SCENE)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    check_accessibility(page)
    page.click("#drawer")
    page.locator("#conversations button").first.wait_for(state="visible")
    check_accessibility(page)
    page.keyboard.press("Escape")
    page.click("#tune")
    page.wait_for_selector("#settings[open]")
    check_accessibility(page)
    page.fill("#max_tokens", "2")
    page.keyboard.press("Escape")
    ask(page, QUESTION)
    assert (
        "2 tokens" in page.locator(".note").last.inner_text()
        and "cut at the limit" in page.locator(".note").last.inner_text()
    )


def test_errors_are_told(page):
    page.expected = ["status of 404"]
    page.evaluate("document.getElementById('model').append(new Option('nothing', 'nothing', true, true))")
    page.fill("#said", "Hi")
    page.press("#said", "Enter")
    page.wait_for_selector(".error")
    assert "nothing is not served here" in page.locator(".error").inner_text()
