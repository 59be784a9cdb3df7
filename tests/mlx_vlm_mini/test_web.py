"""Addresses of images: what is asked, and what is not."""

import base64
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from checkpoints import PHOTO, PLAIN
from PIL import Image

import mlx_vlm_mini.images.web as room
from mlx_vlm_mini import load
from mlx_vlm_mini.errors import CheckpointError, ImageError, PromptError
from mlx_vlm_mini.images.source import LOCAL, SERVED, Access, open_image, read_image
from mlx_vlm_mini.images.video import Video

DATA = PHOTO.read_bytes()
asked: list[str] = []


class Pictures(BaseHTTPRequestHandler):
    """By path: a picture, and what a hostile server does."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        asked.append(self.path)
        moved = {
            "/moved": "/a.jpg", "/file": "file:///etc/passwd", "/ftp": "ftp://127.0.0.1/a.jpg", "/loop": "/loop",
            "/inside": f"http://[::ffff:127.0.0.1]:{self.server.server_address[1]}/a.jpg", "/nowhere": None,
            "/named": "http://user:secret@127.0.0.1/a.jpg",
        }  # fmt: skip
        if self.path in moved:
            self._send(302, b"", {"Location": moved[self.path]} if moved[self.path] else {})
        elif self.path.startswith("/a.jpg") or self.path == "/%C3%A9%20.png?q=%20":
            self._send(200, DATA)
        elif self.path == "/text.jpg":
            self._send(200, b"<html>no picture</html>", {"Content-Type": "image/jpeg"})
        elif self.path == "/huge":
            self._send(200, b"", {"Content-Length": str(10**12)})
        elif self.path == "/endless":
            self._send(200, bytes(3 * 2**20), {"Content-Length": None, "Connection": "close"})
        elif self.path == "/cut":
            self._send(200, DATA[:100], {"Content-Length": str(len(DATA))})
        elif self.path in ("/slow", "/slow-header"):
            with_body = self.path == "/slow"
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: 1000\r\n\r\n" if with_body else b"X: "))
            for _ in range(40):
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self._send(404, b"")
        self.close_connection = True

    def _send(self, code: int, body: bytes, headers: dict[str, Any] | None = None) -> None:
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def handle(self) -> None:
        with suppress(OSError):  # whom it serves has left
            super().handle()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield http.server_port
        http.shutdown()


@pytest.fixture
def server(port, monkeypatch) -> str:
    """Its address, this machine's own being allowed."""
    monkeypatch.setenv(room.PRIVATE, "1")
    return f"http://127.0.0.1:{port}"


def test_pictures_are_downloaded(server):
    expected = np.asarray(open_image(DATA))
    for path in ("/a.jpg", "/a.jpg#part", "/moved", "/é .png?q= "):
        np.testing.assert_array_equal(np.asarray(open_image(server + path)), expected)
    assert read_image(server.replace("http", "HTTP") + "/a.jpg").data == DATA


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_encrypted_ones_are_checked(monkeypatch, tmp_path):
    """A certificate that is trusted and for this host is needed; one who never shakes hands is left."""
    monkeypatch.setenv(room.PRIVATE, "1")
    made = tmp_path / "made.pem"
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(made), "-out", str(tmp_path / "c.pem")]
    subprocess.run(["openssl", *options.split(), *names], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c.pem", made)
    trusting = ssl.create_default_context(cafile=str(tmp_path / "c.pem"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Pictures) as http, socket.create_server(("127.0.0.1", 0)) as silent:
        http.daemon_threads = True
        http.socket = context.wrap_socket(http.socket, server_side=True)
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        with pytest.raises(ImageError, match="cannot download .*CERTIFICATE_VERIFY_FAILED"):
            open_image(f"https://localhost:{http.server_port}/a.jpg")
        monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
        assert read_image(f"https://localhost:{http.server_port}/a.jpg").data == DATA
        with pytest.raises(ImageError, match="cannot download .*127.0.0.1"):
            open_image(f"https://127.0.0.1:{http.server_port}/a.jpg")
        http.shutdown()
        monkeypatch.setattr(room, "MOST_SECONDS", 0.2)
        with pytest.raises(ImageError, match="takes longer than 0.2 s"):
            open_image(f"https://localhost:{silent.getsockname()[1]}/a.jpg")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none", "HTTP 404"),
        ("/nowhere", "HTTP 302"),
        ("/text.jpg", "not an image .* but a web page"),
        ("/file", "not http"),
        ("/ftp", "not http"),
        ("/loop", "redirects more than 5 times"),
        ("/named", "holds a name or a password"),
        ("/huge", "is larger than 64 MiB"),
        ("/cut", "bytes too early"),
    ],
)
def test_what_is_refused(server, path, message):
    with pytest.raises(ImageError, match=message) as error:
        open_image(server + path)
    assert "\n" not in str(error.value) and "secret" not in str(error.value)


def test_redirects_are_counted(server):
    asked.clear()
    with pytest.raises(ImageError):
        open_image(server + "/loop")
    assert asked == ["/loop"] * 6


def test_a_body_without_an_end_is_left(server, monkeypatch):
    monkeypatch.setattr(room, "MOST_BYTES", 2**20)
    with pytest.raises(ImageError, match="is larger than 1 MiB"):
        open_image(server + "/endless")


@pytest.mark.parametrize("path", ["/slow", "/slow-header"])
def test_a_server_that_takes_its_time_is_left(server, monkeypatch, path):
    """Byte by byte, each within the socket's limit, in the answer's head, too."""
    monkeypatch.setattr(room, "MOST_SECONDS", 0.3)
    begin = time.monotonic()
    with pytest.raises(ImageError, match="takes longer than 0.3 s"):
        open_image(server + path)
    assert time.monotonic() - begin < 1.5


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "localhost", "2130706433", "0177.0.0.1", "0x7f000001", "127.1", "0.0.0.0", "0", "[::1]", "[::]",
        "[::ffff:127.0.0.1]", "[::127.0.0.1]", "[64:ff9b::7f00:1]", "10.0.0.1", "172.16.0.1", "192.168.1.1",
        "169.254.169.254", "[fe80::1]", "[fd00:ec2::254]", "100.100.100.200", "[2002:7f00:1::]", "224.0.0.1",
        "255.255.255.255", "168.63.129.16", "192.0.0.192", "[ff02::1]",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_are_not_asked(port, monkeypatch, host):
    def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("it was connected to")

    monkeypatch.delenv(room.PRIVATE, raising=False)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ImageError, match="cannot download|only public addresses are opened") as error:
        open_image(f"http://{host}:{port}/a.jpg")
    if ":" not in host:  # this machine may have no IPv6
        assert "set MLX_VLM_MINI_PRIVATE_URLS=1" in str(error.value)


def test_what_is_public():
    for address in ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"):
        assert room.is_public(address), address
    for address in ("fe80::1%eth0", "64:ff9b::a00:1", "2002:a00:1::", "::ffff:10.0.0.1", "2001:db8::1", "198.18.0.1"):
        assert not room.is_public(address), address


def test_a_name_is_resolved_once_and_all_its_addresses_count(port, monkeypatch):
    """The connection goes to the address that was checked; a second answer cannot lead elsewhere."""
    answers = iter([["127.0.0.1"], ["8.8.8.8", "127.0.0.1"]])
    real = socket.getaddrinfo

    def resolve(host: str, port: int, *args: Any, **options: Any) -> Any:
        if host != "pictures.example":
            return real(host, port, *args, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert room.download(f"http://pictures.example:{port}/a.jpg", private=True) == DATA  # one answer was enough
    with pytest.raises(ImageError, match="only public"):
        room.download(f"http://pictures.example:{port}/a.jpg", private=False)


def test_each_redirect_is_checked_again(port, monkeypatch):
    """As where a public server leads to one of this machine: the first address is taken for public here."""
    monkeypatch.setattr(room, "is_public", lambda address: address == "127.0.0.1")
    for path in ("/inside", "/moved"):
        if path == "/moved":
            assert room.download(f"http://127.0.0.1:{port}{path}", private=False) == DATA
        else:
            with pytest.raises(ImageError, match="only public|cannot download"):
                room.download(f"http://127.0.0.1:{port}{path}", private=False)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://", "names no host"),
        ("http://user:pw@example.com/a.png", "holds a name or a password"),
        ("http://a:99999/x", "cannot download"),
        ("http://[1/x", "cannot download"),
        ("http://a\x1b]0;x/\n", "cannot download"),
        (f"http://{'a' * 70}.example/", "cannot download"),
    ],
)
def test_addresses_that_are_none(url, message):
    with pytest.raises(ImageError, match=message) as error:
        open_image(url)
    assert str(error.value).isprintable() and "pw" not in str(error.value)


def test_whom_others_ask_opens_no_names(server, llava, tmp_path):
    """`SERVED` takes what is sent, and opens nothing by its name; the processor asks it each time."""
    _, processor = llava
    link = "data:image/jpeg;base64," + base64.b64encode(DATA).decode()
    for source in (DATA, link, Image.new("RGB", (4, 4)), np.zeros((4, 4, 3), np.uint8)):
        assert open_image(source, access=SERVED).mode == "RGB"
    for source in (str(PHOTO), PHOTO, server + "/a.jpg", "/dev/zero", "file:///etc/passwd"):
        with pytest.raises(ImageError, match="not opened here: send the image itself"):
            open_image(source, access=SERVED)
    with pytest.raises(ImageError, match="only public"):
        read_image(server + "/a.jpg", Access(urls=True))
    assert read_image(server + "/a.jpg", Access(urls=True, private_urls=True)).data == DATA
    before = processor.access
    assert processor.access == LOCAL
    processor.access = SERVED
    assert load(PLAIN, access="served")[1].access == SERVED
    with pytest.raises(CheckpointError, match="access must be 'local' or 'served', not 'all'"):
        load(PLAIN, access="all")
    try:
        for part in (
            {"type": "image", "image": str(PHOTO)},
            {"type": "image_url", "image_url": {"url": server + "/a.jpg"}},
            {"type": "image", "path": "/etc/passwd"},
        ):
            with pytest.raises(ImageError, match="not opened here"):
                processor([{"role": "user", "content": [part, {"type": "text", "text": "?"}]}])
        assert processor([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": link}}]}]).images
        with pytest.raises(PromptError, match="takes no videos"):
            processor.prepare(Video(str(tmp_path)))
    finally:
        processor.access = before
