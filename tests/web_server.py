"""A web server on this machine for tests of downloads: whole files and ranges, broken connections, a model hub."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Web:
    """What a server holds, and what it was asked for.

    `cuts` are numbers of bytes after which the next answers break off; `errors` are status and X-Error-Code by the
    beginning of a path; `hold` keeps every answer back until it is set.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    tags: Literal["strong", "weak", "none"] = "strong"
    ranges: bool = True
    hold: threading.Event = field(default_factory=threading.Event)
    asked: list[tuple[str, str, str]] = field(default_factory=list)

    def count(self, method: str) -> int:
        """How many requests of that method came."""
        return sum(asked[0] == method for asked in self.asked)

    def publish(self, repo: str, files: dict[str, bytes], revision: str = "main") -> None:
        """A repository of the hub: its files under a branch or tag, and under the commit."""
        for name, content in files.items():
            for place in (revision, COMMIT):
                self.files[f"/{repo}/resolve/{place}/{name}"] = content


class Handler(BaseHTTPRequestHandler):
    """Answers from the server's `web`."""

    server: "Server"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_POST(self) -> None:
        """Uploads, as the hub takes them: make a repository, check a card, ask how to send each file, send them all."""
        web, path = self.server.web, urlsplit(self.path).path
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        web.asked.append(("POST", path, ""))
        if error := next((error for start, error in web.errors.items() if path.startswith(start)), None):
            self.head(error[0], {"X-Error-Code": error[1], "Content-Length": "0"})
            return
        reply: dict[str, object] = {}
        if path == "/api/repos/create":
            asked = json.loads(sent)
            reply = {"url": f"{web.address}/{asked['organization']}/{asked['name']}"}
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(sent)["files"]]
            reply = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            lines = [json.loads(line) for line in sent.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            web.publish(repo, {file["path"]: base64.b64decode(file["content"]) for file in files})
            reply = {"commitUrl": f"{web.address}/{repo}/commit/{COMMIT}", "commitOid": COMMIT}
        content = json.dumps(reply).encode()
        self.head(200, {"Content-Type": "application/json", "Content-Length": str(len(content))})
        self.wfile.write(content)

    def answer(self, *, body: bool) -> None:
        web, path = self.server.web, urlsplit(self.path).path
        web.asked.append((self.command, path, self.headers.get("Range", "")))
        web.hold.wait(30)
        error = next((error for start, error in web.errors.items() if path.startswith(start)), None)
        content = web.files.get(path, web.files.get(unquote(path)))
        if error or content is None:
            status, code = error or (404, "EntryNotFound")
            self.head(status, {"X-Error-Code": code, "Content-Length": "0"})
            return
        tag = ("W/" if web.tags == "weak" else "") + f'"{hashlib.sha256(content).hexdigest()}"'
        start = 0
        if (wanted := self.headers.get("Range")) and web.ranges and self.headers.get("If-Range", tag) == tag:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        if start >= len(content) > 0:
            self.head(416, {"Content-Length": "0"})
            return
        facts = {"Content-Length": str(len(content) - start)} | ({} if web.tags == "none" else {"ETag": tag})
        if start:
            facts["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.head(206 if start else 200, facts)
        if body:
            end = start + web.cuts.pop(0) if web.cuts else len(content)
            self.wfile.write(content[start:end])

    def head(self, status: int, facts: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (facts | {"X-Repo-Commit": COMMIT}).items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing on the terminal."""


class Server(ThreadingHTTPServer):
    """A server with what it holds."""

    daemon_threads = True
    web: Web


@contextmanager
def serving() -> Iterator[Web]:
    """A server that runs until the block ends."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.web = Web(address=f"http://127.0.0.1:{server.server_port}")
        server.web.hold.set()
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.web
        finally:
            server.shutdown()
            thread.join()
