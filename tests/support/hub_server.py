"""A hub on loopback for models: what huggingface_hub asks when a folder is uploaded, listed and downloaded again.

Large files travel by its LFS routes, as they do without the package hf_xet; everything else in the commit.
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_of_a_test_that_may_write"
COMMIT = "c" * 40


class Hub:
    """Repositories by name: their files, whether they are private, and the messages of their commits."""

    def __init__(self):
        self.files, self.private, self.messages, self.objects = {}, {}, {}, {}
        self.url = ""


def etag(content):
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def _send(self, code, body=b"", **headers):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _take(self):
        hub, path = self.server.hub, self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not path.startswith("/objects/"):
            return self._send(401, {"error": "Invalid credentials"})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked["organization"] != "me":
                return self._send(403, {"error": f"you may not write to {asked['organization']}"})
            hub.files.setdefault(name, {".gitattributes": b"*.safetensors lfs\n"})
            hub.private.setdefault(name, asked.get("visibility") == "private")
            return self._send(200, {"url": f"{hub.url}/{name}"})
        if path == "/api/validate-yaml":  # of a model card
            return self._send(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/objects/([0-9a-f]+)", path):
            hub.objects[match[1]] = body
            return self._send(200)
        name = re.match(r"/(?:api/models/)?([\w.-]+/[\w.-]+?)(?:\.git)?(/.*|$)", path)
        files = hub.files.get(name[1])
        if files is None:
            return self._send(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        return self._of(name[1], files, name[2], body)

    def _of(self, name, files, route, body):
        hub = self.server.hub
        if route.startswith("/tree/"):
            shown = [{"type": "file", "path": p, "size": len(c), "oid": etag(c)} for p, c in sorted(files.items())]
            return self._send(200, shown)
        if route == "" or route.startswith("/revision/"):
            return self._send(200, {"id": name, "sha": COMMIT, "siblings": [{"rfilename": p} for p in files]})
        if route.startswith("/preupload/"):
            asked = [f["path"] for f in json.loads(body)["files"]]
            mode = {p: "lfs" if p.endswith(".safetensors") else "regular" for p in asked}
            return self._send(
                200, {"files": [{"path": p, "uploadMode": mode[p], "shouldIgnore": False} for p in asked]}
            )
        if route == "/info/lfs/objects/batch":
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/objects/{o['oid']}"}}}
                for o in json.loads(body)["objects"]
            ]
            return self._send(200, {"transfer": "basic", "objects": objects})
        if route.startswith("/commit/"):
            return self._commit(name, files, [json.loads(line) for line in body.splitlines()])
        content = files.get(route.split("/", 3)[3]) if route.startswith("/resolve/") else None
        if content is None:
            return self._send(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        return self._send(200, content, ETag=f'"{etag(content)}"', X_Repo_Commit=COMMIT)

    def _commit(self, name, files, operations):
        hub = self.server.hub
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "header":
                hub.messages.setdefault(name, []).append(value["summary"])
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            else:
                assert operation["key"] == "deletedFile", operation
                del files[value["path"]]
        self._send(200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{hub.url}/{name}/commit/{COMMIT}"})

    do_GET = do_HEAD = do_POST = do_PUT = _take


@contextmanager
def hub_on_loopback(monkeypatch):
    """A hub that huggingface_hub in this process talks to; its token is in the environment."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub, hub.url = hub, f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
