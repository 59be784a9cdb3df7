"""The page at `/`: files of this package, allowed to ask this server and nobody else."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from . import ollama
from .refusals import Refusal
from .server import Server

TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "mjs": "text/javascript",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types dompurify"
)
"""No script and no style inside of the page, nothing from elsewhere, and no text that becomes HTML but DOMPurify's."""
FILES = (
    "index.html", "style.css", "icon.svg", "main.js", "client.js", "store.js", "text.js", "attention.js",
    "vendor/markdown-it.mjs", "vendor/purify.mjs",
)  # fmt: skip


async def root(server: Server, request: Request) -> Response:
    """`GET /`: the page for a browser, and for clients of Ollama's interface what they look for."""
    if "text/html" in request.headers.get("accept", ""):
        return _send("index.html")
    return await ollama.running(server, request)


async def file(server: Server, request: Request) -> Response:
    """`GET /page/{name}`."""
    return _send(request.path_params["name"])


def _send(name: str) -> Response:
    if name not in FILES:
        raise Refusal(404, f"the page has no file {name[:100]}")
    headers = {"content-security-policy": POLICY, "cross-origin-opener-policy": "same-origin"}
    data = files(__package__).joinpath("page", *name.split("/")).read_bytes()
    return Response(data, media_type=TYPES[name.rpartition(".")[2]], headers=headers)
