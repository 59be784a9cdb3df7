"""A stand-in for the Hub's HTTP interface on loopback: model info, file headers, files and ranges of them."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

PROGRAM = Path(sys.executable).with_name("mlx-vlm-mini")
COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """Serves `folders`; `requests` notes method, path and range of each request, `bytes_sent` what went out."""

    protocol_version = "HTTP/1.1"
    folders: ClassVar[dict[str, Path]] = {}
    gated: ClassVar[set[str]] = set()
    requests: ClassVar[list[tuple[str, str, str | None]]] = []
    bytes_sent: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        type(self).requests.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", path):
            return self.tree(match[1])
        if match := re.fullmatch(r"/(?:spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(match[1], match[2], match[3])
        return self.refuse(404, "EntryNotFound", "no such path")

    def info(self, name: str, revision: str) -> None:
        if name in self.gated:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        if name not in self.folders:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [{"rfilename": file.name, "size": file.stat().st_size} for file in sorted(self.folders[name].iterdir())]
        return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": files, "private": False}).encode())

    def tree(self, name: str) -> None:
        files = [
            {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
            for file in sorted(self.folders[name].iterdir())
        ]
        self.answer(json.dumps(files).encode())

    def file(self, name: str, revision: str, file_name: str) -> None:
        if name not in self.folders:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        file = self.folders[name] / file_name
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = file.read_bytes()
        tag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
            tag["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            return self.answer(data[start : end + 1], 206, tag)
        return self.answer(data, 200, tag)

    def refuse(self, code: int, error: str, message: str) -> None:
        self.answer(b"", code, {"X-Error-Code": error, "X-Error-Message": message})

    def answer(self, body: bytes, code: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            type(self).bytes_sent += len(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[tuple[str, type[Hub]]]:
    """The address of a running stand-in, and its class to set up and to look at."""
    kind = type("Running", (Hub,), {"folders": {}, "gated": set(), "requests": [], "bytes_sent": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", kind
        finally:
            server.shutdown()


def run_program(address: str, folder: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program in a folder, with a stand-in as its Hub and a cache of its own."""
    return subprocess.run(
        [PROGRAM, *map(str, arguments)], capture_output=True, text=True, timeout=60, cwd=folder,
        env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"),
             "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
    )  # fmt: skip
