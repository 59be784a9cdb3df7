"""The page's files and rules, and the attention that it shows; a browser uses it in test_browser.py."""

import base64
import hashlib
import plistlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN, SHAPES

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from serving import Served, data_url, engine_of, served

from mlx_vlm_mini import attend, load
from mlx_vlm_mini.serve import browser
from mlx_vlm_mini.serve.limits import Limits

PAGE = Path(browser.__file__).parent / "page"
LIBRARIES = {
    "markdown-it.mjs": "d5432491790141da046b1197353705db03264f40b5727f3b4b591f5aba193e30",
    "purify.mjs": "5e8c53cd086a012531fc754ee6a7ad7a02e8a06fc4dadd805b912e128c3f6c58",
}


@pytest.fixture(scope="module")
def model() -> tuple[Any, Any]:
    return load(PLAIN, access="served")


@pytest.fixture(scope="module")
def server(model: tuple[Any, Any]) -> Iterator[Served]:
    with served({"tiny": str(PLAIN)}, lambda _: engine_of(*model, context=400)) as running:
        yield running


def test_a_browser_gets_the_page_and_other_clients_what_they_look_for(server):
    with server.client() as client:
        page = client.get("/", headers={"accept": "text/html,*/*"})
        assert page.headers["content-type"].startswith("text/html") and "<title>mlx-vlm-mini" in page.text
        assert client.get("/").text == "Ollama is running"
        for name in browser.FILES:
            response = client.get(f"/page/{name}")
            assert response.status_code == 200 and response.content == (PAGE / name).read_bytes()
            assert "script-src 'self'" in response.headers["content-security-policy"]
        for name in ("../browser.py", "..%2Fbrowser.py", "vendor/LICENSES.txt", "nothing.js", "", "/etc/passwd"):
            assert client.get(f"/page/{name}").status_code == 404


def test_every_file_is_served_and_every_import_is_there():
    shown = {str(file.relative_to(PAGE)) for file in PAGE.rglob("*") if file.is_file()}
    assert shown == {*browser.FILES, "vendor/LICENSES.txt"}
    for name in browser.FILES:
        if name.endswith(".js"):
            text = (PAGE / name).read_text()
            for imported in re.findall(r'from "\./([^"]+)"', text):
                assert imported in browser.FILES
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|https?://", text), (
                name
            )


def test_nothing_is_inline_and_nothing_from_elsewhere():
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<script>|<style|\son\w+=|style=|javascript:|https?://|//", html)
    assert all(source in browser.FILES for source in re.findall(r'(?:src|href)="page/([^"]+)"', html))
    assert "url(" not in (PAGE / "style.css").read_text()
    for rule in (
        "default-src 'none'",
        "frame-ancestors 'none'",
        "connect-src 'self'",
        "require-trusted-types-for 'script'",
    ):
        assert rule in browser.POLICY
    assert "unsafe" not in browser.POLICY and "*" not in browser.POLICY


def test_the_libraries_are_their_authors():
    for name, digest in LIBRARIES.items():
        assert hashlib.sha256((PAGE / "vendor" / name).read_bytes()).hexdigest() == digest
    notices = (PAGE / "vendor" / "LICENSES.txt").read_text()
    for name in ("markdown-it", "linkify-it", "mdurl", "entities", "uc.micro", "punycode.js", "DOMPurify"):
        assert f"== {name}\n" in notices


def look(server: Served, messages: Any, **fields: Any) -> Any:
    with server.client() as client:
        return client.post("/v1/attention", json={"messages": messages, **fields})


def asked(*files: Path) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def test_attention_is_the_librarys(server, model):
    answer = {"role": "assistant", "content": "a red circle"}
    found = look(server, [*asked(PHOTO, SHAPES), answer]).json()
    own = attend(*model, [PHOTO.read_bytes(), SHAPES.read_bytes(), "What?"], answer="a red circle")
    assert [token["text"] for token in found["tokens"]] == list(own.texts)
    assert "".join(token["text"] for token in found["tokens"]).strip() == "a red circle"
    np.testing.assert_allclose([token["share"] for token in found["tokens"]], own.shares, atol=1e-5)
    brightest = np.zeros(len(own.texts))
    for image, seen in zip(found["images"], own.images, strict=True):
        assert image["picture"].startswith("data:image/jpeg;base64,") and max(image["rows"], image["columns"]) == 48
        heats = [
            np.frombuffer(base64.b64decode(heat), np.uint8).reshape(image["rows"], image["columns"])
            for heat in image["heats"]
        ]
        brightest = np.maximum(brightest, [heat.max() for heat in heats])
        # where a token's heat is greatest lies a patch that has much of its attention
        for token, heat in enumerate(heats):
            row, column = np.unravel_index(heat.argmax(), heat.shape)
            x, y = (column + 0.5) * seen.size[1] / image["columns"], (row + 0.5) * seen.size[0] / image["rows"]
            inside = [
                weight
                for weight, (left, top, right, bottom) in zip(seen.weights[token], seen.boxes, strict=True)
                if left <= x <= right and top <= y <= bottom
            ]
            assert max(inside) == pytest.approx(np.max(seen.weights[token]), rel=0.2)
    np.testing.assert_array_equal(brightest, 255)


@pytest.mark.parametrize(
    ("messages", "status", "message"),
    [
        ([], 400, "one message or more"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}], 400, "hold no picture"),
        (asked(PHOTO), 400, "the last message must be the answer"),
        ([*asked(PHOTO), {"role": "assistant", "content": " "}], 400, "the last message must be the answer"),
        ([*asked(PHOTO), {"role": "assistant", "content": "a " * 500}], 400, "the model's context is 400"),
    ],
    ids=["none", "text", "no answer", "empty", "long"],
)
def test_attention_without_what_it_needs(server, messages, status, message):
    response = look(server, messages)
    assert response.status_code == status and message in response.json()["error"]["message"]


def test_the_documents_settings_are_well_formed():
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text()
    plist = plistlib.loads(re.search(r"```xml\n(.*?)```", text, re.DOTALL)[1].encode())
    assert plist["ProgramArguments"][1] == "serve" and plist["ExitTimeOut"] > Limits().drain
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "docs/server.md", "exec")
