"""A Hub on this machine: the endpoints that huggingface_hub uses to read and write a model repository, over HTTP.

The client is the real one, in a process of its own (HF_ENDPOINT is read when it is imported). Storage behind LFS is the
basic kind; Xet, the Hub's own, is switched off by HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "a" * 40
TOKEN = "hf_secret"


@dataclass
class Hub:
    """Repositories, and what was asked."""

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256."""
    made: list[dict[str, Any]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    """Files of which the first answer ends half way."""
    read_only: bool = False
    address: str = ""

    def publish(self, repo: str, folder: Path) -> None:
        """A folder's files as a repository."""
        self.repos[repo] = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (its caller's name)
        """Nothing on stderr."""

    def _answer(self, status: int, data: Any = None, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        body = json.dumps(data).encode() if data is not None else body
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    @property
    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, repo: str) -> dict[str, bytes] | None:
        if repo not in self.hub.repos:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif repo in self.hub.gated and not self._known:
            self._refuse(401, "GatedRepo", "Access to model is restricted")
        else:
            return self.hub.repos[repo]
        return None

    def do_GET(self) -> None:
        """Reads."""
        path = self.path.split("?")[0]
        self.hub.log.append(f"{self.command} {path}")
        if path == "/api/whoami-v2":
            return (
                self._answer(200, {"name": "owner", "type": "user", "auth": {}})
                if self._known
                else self._refuse(401, "", "Invalid credentials in Authorization header")
            )
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repo, what, revision = found[1], found[2], found[3] or "main"
            files = self._repo(repo)
            if files is None:
                return None
            if revision not in ("main", COMMIT):
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            if what == "tree":
                entries = [{"type": "file", "path": n, "size": len(b), "oid": _sha1(b)} for n, b in files.items()]
                return self._answer(200, entries)
            siblings = [{"rfilename": n} for n in files]
            return self._answer(
                200, {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False}
            )
        if found := re.fullmatch(rf"/([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            return self._file(found[1], found[2])
        return self._refuse(404, "", f"no such address {path}")

    def do_HEAD(self) -> None:
        """Reads without the content."""
        self.do_GET()

    def _file(self, repo: str, name: str) -> None:
        files = self._repo(repo)
        if files is None:
            return None
        if name not in files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        content, start, status = files[name], 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            start, status = int(asked[1]), 206
        headers = {"ETag": f'"{_sha1(content)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes",
                   "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}  # fmt: skip
        if self.command == "GET" and name in self.hub.cut:
            self.hub.cut.discard(name)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[start : len(content) // 2])
            self.close_connection = True
            return None
        return self._answer(status, headers=headers, body=content[start:])

    def do_POST(self) -> None:
        """Writes."""
        path = self.path.split("?")[0]
        self.hub.log.append(f"POST {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self._known:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if self.hub.read_only:
            return self._refuse(403, "", "You don't have the rights to do this")
        if path == "/api/repos/create":
            data = json.loads(body)
            repo = f"{data.get('organization') or 'owner'}/{data['name']}"
            if repo in self.hub.repos:
                return self._answer(409, {"error": "You already created it", "url": f"{self.hub.address}/{repo}"})
            self.hub.made.append(data)
            self.hub.repos[repo] = {}
            return self._answer(200, {"url": f"{self.hub.address}/{repo}", "id": repo, "name": repo})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            large = (".gguf", ".safetensors")
            return self._answer(200, {"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular",
                 "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]})  # fmt: skip
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            return self._answer(200, {"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{self.hub.address}/objects/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]})  # fmt: skip
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.repos[found[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.repos[found[1]][value["path"]] = self.hub.objects[value["oid"]]
            url = f"{self.hub.address}/{found[1]}/commit/{COMMIT}"
            return self._answer(200, {"commitUrl": url, "commitOid": COMMIT, "success": True})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tag/(\w+)", path):
            self.hub.tags[json.loads(body)["tag"]] = found[2]
            return self._answer(200, {})
        return self._refuse(404, "", f"no such address {path}")

    def do_PUT(self) -> None:
        """The bytes of a large file."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        oid = self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self._answer(200)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that listens until the end."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
