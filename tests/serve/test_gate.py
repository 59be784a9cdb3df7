"""Who may ask: hosts, origins, keys, preflights, and what every response carries."""

import base64
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from checkpoints import PLAIN

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

import httpx
from serving import Served, served

from mlx_vlm_mini.errors import VLMError
from mlx_vlm_mini.serve.app import ROUTES
from mlx_vlm_mini.serve.gate import host_of, is_this_machine, read_origin
from mlx_vlm_mini.serve.run import Settings, bind, check

KEY = "a key that nobody guesses"


def no_model(source: str) -> Any:
    raise AssertionError("the gate lets nothing through")


@pytest.fixture(scope="module")
def open_server() -> Iterator[Served]:
    with served({"tiny": str(PLAIN)}, no_model, origins=("https://notes.example", "http://mac.local:8080")) as running:
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[Served]:
    with served({"tiny": str(PLAIN)}, no_model, key=KEY) as running:
        yield running


def get(server: Served, path: str = "/health", method: str = "GET", **headers: str) -> httpx.Response:
    with server.client() as client:
        return client.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})


@pytest.mark.parametrize(
    ("host", "lets"),
    [
        ("localhost", True), ("localhost:8080", True), ("LOCALHOST:1", True), ("127.0.0.1:8080", True), ("[::1]:8080", True),
        ("192.168.1.7:8080", True), ("a.localhost", True), ("mac.local:8080", True), ("mac.local", True), ("notes.example", True),
        ("evil.example", False), ("localhost.evil.example", False), ("evil.local", False), ("127.0.0.1.evil.example", False), ("", False),
        ("localhost@evil.example", False), ("[::1", False), ("evil.internal:8080", False),
    ],
)  # fmt: skip
def test_names_of_the_server(open_server, host, lets):
    """What somebody's name server can make lead here is refused."""
    assert get(open_server, host=host).status_code == (200 if lets else 403)


@pytest.mark.parametrize(
    ("origin", "lets"),
    [
        ("http://localhost:3000", True), ("https://localhost", True), ("http://127.0.0.1:5173", True), ("http://[::1]:80", True),
        ("app://obsidian.md", True), ("https://notes.example", True), ("http://mac.local:8080", True), ("http://a.localhost", True),
        ("https://evil.example", False), ("null", False), ("http://notes.example", False), ("https://notes.example.evil.example", False),
        ("http://1.2.3.4", False), ("app://evil", False), ("file://", False), ("http://localhost.evil.example", False), ("", False),
        ("chrome-extension://abc", False), ("http://192.168.1.7", False),
    ],
)  # fmt: skip
def test_origins(open_server, origin, lets):
    for method in ("GET", "POST", "OPTIONS"):
        response = get(open_server, method=method, origin=origin)
        if lets:
            assert response.status_code in (200, 405) and response.headers["access-control-allow-origin"] == origin
        else:
            assert response.status_code == 403 and "access-control-allow-origin" not in response.headers
        assert "origin" in response.headers["vary"].lower()
        assert "access-control-allow-credentials" not in response.headers


def test_a_page_of_the_server_itself_may_ask(open_server):
    assert get(open_server, host="192.168.1.7:8080", origin="http://192.168.1.7:8080").status_code == 200
    assert get(open_server, host="192.168.1.7:8080", origin="http://192.168.1.7:9090").status_code == 403


def test_preflights_need_no_key(locked):
    asked = {
        "origin": "app://obsidian.md", "access_control_request_method": "POST",
        "access_control_request_headers": "authorization, content-type,x-stainless-os, bad name, " + "y" * 100,
        "access_control_request_private_network": "true",
    }  # fmt: skip
    response = get(locked, "/v1/chat/completions", "OPTIONS", **asked)
    assert response.status_code == 204 and response.headers["access-control-allow-origin"] == "app://obsidian.md"
    assert response.headers["access-control-allow-headers"] == "authorization, content-type, x-stainless-os"
    assert response.headers["access-control-allow-private-network"] == "true"
    assert (
        get(locked, "/v1/chat/completions", "OPTIONS", **{**asked, "origin": "https://evil.example"}).status_code == 403
    )


@pytest.mark.parametrize("path", [*ROUTES, "/nothing"])
def test_nothing_is_outside_of_the_key(locked, path):
    place = path.replace("{name:path}", "tiny").replace("{name}", "x")
    for method in ("GET", "POST", "HEAD", "DELETE", "OPTIONS", "PUT"):
        response = get(locked, place, method)
        assert response.status_code == 401 and "Basic" in response.headers["www-authenticate"]


def test_keys(locked):
    basic = base64.b64encode(f"me:{KEY}".encode()).decode()
    for given, status in (
        (f"Bearer {KEY}", 200), (f"bearer  {KEY}", 200), (f"Basic {basic}", 200), (KEY, 401), (f"Bearer {KEY}x", 401),
        (f"Bearer {KEY[:-1]}", 401), ("Bearer", 401), ("Basic ????", 401), (f"Basic {KEY}", 401),
    ):  # fmt: skip
        response = get(locked, authorization=given)
        assert response.status_code == status, given
    error = get(locked, "/v1/models", authorization="Bearer x").json()["error"]
    assert error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
    assert get(locked, "/api/tags").json() == {
        "error": "a key is missing or wrong: send it as `Authorization: Bearer KEY`"
    }


def test_what_every_response_carries(open_server):
    for path in ("/health", "/nothing"):
        headers = get(open_server, path).headers
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer" and "server" not in headers


def test_what_is_no_request_of_http(open_server):
    place = httpx.URL(open_server.url)
    for raw in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection((place.host, place.port), 5) as client:
            client.sendall(raw)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(100)[9:12] in (b"400", b"403", b"431", b"")
    assert get(open_server).status_code == 200


def test_hosts_and_origins_are_read():
    assert host_of("Localhost.:80") == "localhost" and host_of("[::1]:8") == "::1" and host_of("[") == ""
    assert not is_this_machine("192.168.1.1") and is_this_machine("127.9.9.9") and is_this_machine("::1")
    assert read_origin("HTTP://Mac.local:8080/") == "http://mac.local:8080"
    for bad in ("mac.local", "http://", "http://a/b", "http://u@a", "*"):
        with pytest.raises(ValueError, match="is no origin"):
            read_origin(bad)


def test_other_machines_need_a_key():
    assert check(Settings(models=(), host="::1")).key is None
    for host in ("0.0.0.0", "::", "192.168.1.7", "mac.local"):
        with pytest.raises(VLMError, match="give a key with --api-key"):
            check(Settings(models=(), host=host))
        assert check(Settings(models=(), host=host, key="k")).host == host
    with pytest.raises(VLMError, match="the key is empty"):
        check(Settings(models=(), key=" "))
    with pytest.raises(VLMError, match="is no origin"):
        check(Settings(models=(), origins=("mac.local",)))
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(VLMError, match="cannot listen on 127.0.0.1 port"):
            bind("127.0.0.1", taken.getsockname()[1])
