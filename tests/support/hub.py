"""A stand-in for the Hub's HTTP interface on loopback: model info, file headers, files and ranges of them."""

import base64
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
from urllib.parse import parse_qs

PROGRAM = Path(sys.executable).with_name("mlx-vlm-mini")
COMMIT = "c0ffee" + "0" * 34


class Hub(BaseHTTPRequestHandler):
    """Serves `folders`, and takes uploads into `created`.

    Attributes:
        requests, bytes_sent: method, path and range of each request, and what went out.
        gated: repositories that are shown but not given; `read_only` those that may not be written to.
        cuts: file name to bytes after which the connection breaks, once each.
        damaged: names of files of which a bit is flipped on the way.
        extra: names that listings have besides the real files.
        token: whose bearer may write.
        created: repository to file name to content, after a commit; `stored` what was put for it, by sha256.
    """

    protocol_version = "HTTP/1.1"
    folders: ClassVar[dict[str, Path]] = {}
    gated: ClassVar[set[str]] = set()
    cuts: ClassVar[dict[str, list[int]]] = {}
    damaged: ClassVar[set[str]] = set()
    extra: ClassVar[list[str]] = []
    token: ClassVar[str] = "hf_secret"
    read_only: ClassVar[set[str]] = set()
    created: ClassVar[dict[str, dict[str, bytes]]] = {}
    stored: ClassVar[dict[str, bytes]] = {}
    requests: ClassVar[list[tuple[str, str, str | None]]] = []
    bytes_sent: ClassVar[int] = 0

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        path, body = self.path.partition("?")[0], self.rfile.read(int(self.headers.get("Content-Length") or 0))
        type(self).requests.append((self.command, path, None))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            return self.tree(match[1], parse_qs(body.decode()).get("paths") or json.loads(body)["paths"])
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            return self.refuse(401, "", "Invalid username or password")
        content = json.loads(body) if body.startswith(b"{") and b"\n{" not in body else {}
        if path == "/api/validate-yaml":
            return self.answer(b'{"errors": [], "warnings": []}')
        if path == "/api/repos/create":
            name = f"{content.get('organization', 'somebody')}/{content['name']}"
            if name in self.read_only:
                return self.refuse(403, "", "You don't have the rights to create a model under this namespace")
            self.created.setdefault(name, {})
            return self.answer(json.dumps({"url": f"http://{self.headers['Host']}/{name}", "id": name}).encode())
        if re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in content["files"]
            ]
            return self.answer(json.dumps({"files": modes}).encode())
        if path.endswith(".git/info/lfs/objects/batch"):
            place = f"http://{self.headers['Host']}/lfs/"
            objects = [
                {**each, "actions": {"upload": {"href": f"{place}{each['oid']}"}}} for each in content["objects"]
            ]
            return self.answer(json.dumps({"transfer": "basic", "objects": objects}).encode())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.created[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.created[match[1]][value["path"]] = self.stored[value["oid"]]
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/{match[1]}/commit/{COMMIT}",
                "commitOid": COMMIT,
                "success": True,
            }
            return self.answer(json.dumps(answer).encode())
        return self.refuse(404, "EntryNotFound", "no such path")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert hashlib.sha256(body).hexdigest() == self.path.rpartition("/")[2]
        self.stored[self.path.rpartition("/")[2]] = body
        self.answer(b"")

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        type(self).requests.append((self.command, path, self.headers.get("Range")))
        if path == "/api/whoami-v2":
            if self.headers.get("Authorization") != f"Bearer {self.token}":
                return self.refuse(401, "", "Invalid username or password")
            return self.answer(b'{"type": "user", "name": "somebody"}')
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            return self.info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", path):
            return self.tree(match[1])
        if match := re.fullmatch(r"/(?:spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.file(match[1], match[2], match[3])
        return self.refuse(404, "EntryNotFound", "no such path")

    def listing(self, name: str) -> list[tuple[str, Path]]:
        folder = self.folders[name]
        return [(str(file.relative_to(folder)), file) for file in sorted(folder.rglob("*")) if file.is_file()]

    def info(self, name: str, revision: str) -> None:
        if name in self.gated and name not in self.folders:
            return self.refuse(403, "GatedRepo", "Access to this model is restricted")
        if name not in self.folders:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if revision not in ("main", COMMIT):
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = [{"rfilename": path, "size": file.stat().st_size} for path, file in self.listing(name)]
        files += [{"rfilename": extra, "size": 2} for extra in self.extra]
        return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": files, "private": False}).encode())

    def tree(self, name: str, paths: list[str] | None = None) -> None:
        files = [
            {"type": "file", "path": path, "size": file.stat().st_size, "oid": "0" * 40}
            for path, file in self.listing(name)
            if paths is None or path in paths
        ]
        if paths is None:
            files += [{"type": "file", "path": extra, "size": 2, "oid": "0" * 40} for extra in self.extra]
        self.answer(json.dumps(files).encode())

    def file(self, name: str, revision: str, file_name: str) -> None:
        if name not in self.folders:
            return self.refuse(404, "RepoNotFound", "Repository not found")
        if name in self.gated:
            return self.refuse(401, "GatedRepo", "Access to this model is restricted")
        file = self.folders[name] / file_name
        if not file.is_file():
            return self.refuse(404, "EntryNotFound", "Entry not found")
        data = file.read_bytes()
        tag = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if file_name in self.damaged:
            data = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
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
        if self.command != "HEAD":
            cuts = self.cuts.get(self.path.rpartition("/")[2], []) if self.command == "GET" else []
            sent = body[: cuts.pop(0)] if cuts else body
            self.wfile.write(sent)
            type(self).bytes_sent += len(sent)
            self.close_connection = len(sent) < len(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[tuple[str, type[Hub]]]:
    """The address of a running stand-in, and its class to set up and to look at."""
    own: dict[str, Any] = {"folders": {}, "gated": set(), "cuts": {}, "damaged": set(), "extra": [], "read_only": set()}
    kind = type("Running", (Hub,), {**own, "created": {}, "stored": {}, "requests": [], "bytes_sent": 0})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", kind
        finally:
            server.shutdown()


def run_program(
    address: str, folder: Path, *arguments: object, program: str | Path = PROGRAM, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The program in a folder, with a stand-in as its Hub and a cache of its own."""
    return subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=60, cwd=folder,
        env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"),
             "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment},
    )  # fmt: skip
