"""A hub of models on loopback, as far as huggingface_hub asks it to download one: what it is, and its files."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """One repository's files; every branch and tag is at one commit."""

    name: str
    files: Mapping[str, bytes]
    breaks_at: str = (
        ""  # a file that is answered with an error, one that is not asked for again by the client itself
    )
    asked: list[str] = field(default_factory=list)
    address: str = ""


@contextlib.contextmanager
def hub_server(hub: Hub) -> Iterator[Hub]:
    """Serve it on a free port; its address is in `hub.address`."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(path)
            api, files = f"/api/models/{hub.name}", f"/{hub.name}/resolve/"
            if path.startswith(f"{api}/tree/"):
                self._send(json.dumps([_entry(*item) for item in hub.files.items()]).encode(), body)
            elif path == api or path.startswith(f"{api}/revision/"):
                siblings = [{"rfilename": name, "size": len(text)} for name, text in hub.files.items()]
                self._send(json.dumps({"id": hub.name, "sha": COMMIT, "siblings": siblings}).encode(), body)
            elif path.startswith(files) and (name := path.removeprefix(files).partition("/")[2]) in hub.files:
                self._send(hub.files[name], body, 410 if name == hub.breaks_at and body else 200)
            else:
                self._send(b"", body, 404)

        def _send(self, text: bytes, body: bool, status: int = 200) -> None:
            self.send_response(status)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{_hash(text)}"', "Content-Length": str(len(text))}
            for key, value in (headers | {"Content-Type": "application/json"}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(text)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()


def _hash(text: bytes) -> str:
    return hashlib.sha1(text, usedforsecurity=False).hexdigest()


def _entry(name: str, text: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(text), "oid": _hash(text)}
