"""As much of the Kubernetes API as Ray's autoscaler uses: pods and RayClusters in memory, over TLS on loopback.

What the autoscaler has no right to in a cluster (KubeRay's Role for it: get, list and patch), is refused.
"""

from __future__ import annotations

import copy
import json
import ssl
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Document = dict[str, Any]
PODS, CLUSTERS = "pods", "rayclusters"
GROUP_OF = {PODS: "/api/v1", CLUSTERS: "/apis/ray.io/v1"}


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def patched(document: Document, operations: list[Document]) -> Document:
    """A JSON patch (RFC 6902) applied; like Kubernetes, `replace` also makes a field that is not there yet."""
    result = copy.deepcopy(document)
    for operation in operations:
        *path, last = operation["path"].split("/")[1:]
        place: Any = result
        for part in path:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if operation["op"] != "replace" or isinstance(place, list):
            raise Refused(422, f"the stub knows no {operation['op']} of {operation['path']}")
        place[last] = operation["value"]
    return result


class Objects:
    """Everything that is stored, each patch that was taken, and how often documents were asked for."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.patches: list[Document] = []
        self.reads: Counter[str] = Counter()
        self._stored: dict[tuple[str, str], Document] = {}
        self._version = 0
        self._lock = threading.RLock()

    def put(self, kind: str, document: Document) -> None:
        """Store a document, in place of one of the same name."""
        with self._lock:
            self._version += 1
            new = copy.deepcopy(document)
            new["metadata"]["resourceVersion"] = str(self._version)
            self._stored[kind, new["metadata"]["name"]] = new

    def get(self, kind: str, name: str) -> Document:
        """A copy of a document."""
        with self._lock:
            if (kind, name) not in self._stored:
                raise Refused(404, f"{kind} {name!r} not found")
            return copy.deepcopy(self._stored[kind, name])

    def delete(self, kind: str, name: str) -> None:
        """Forget a document."""
        with self._lock:
            self._version += 1
            del self._stored[kind, name]

    def items(self, kind: str, labels: dict[str, str]) -> Document:
        """A list of copies of those that have these labels."""
        with self._lock:
            found = [d for (k, _), d in self._stored.items() if k == kind]
            chosen = [d for d in found if labels.items() <= d["metadata"].get("labels", {}).items()]
            return copy.deepcopy({"metadata": {"resourceVersion": str(self._version)}, "items": chosen})

    def patch(self, kind: str, name: str, operations: list[Document]) -> Document:
        """Change a document, and keep the operations."""
        with self._lock:
            self.put(kind, patched(self.get(kind, name), operations))
            self.patches += operations
            return self.get(kind, name)

    def answer(self, method: str, url: str, body: Any) -> Document:
        """What a request gets; `Refused` otherwise."""
        parts = urlsplit(url)
        for kind, group in GROUP_OF.items():
            collection = f"{group}/namespaces/{self.namespace}/{kind}"
            if parts.path == collection and method == "GET":
                selector = parse_qs(parts.query).get("labelSelector", [""])[0]
                return self.items(kind, dict(s.split("=") for s in selector.split(",") if s))
            name = parts.path.removeprefix(collection + "/")
            if name != parts.path and "/" not in name:
                if method == "GET":
                    self.reads[kind] += 1
                    return self.get(kind, name)
                if method == "PATCH":
                    return self.patch(kind, name, body)
        raise Refused(403, f"{method} {parts.path}: not what an autoscaler may do")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._respond()

    def do_PATCH(self) -> None:
        self._respond()

    def do_POST(self) -> None:
        self._respond()

    def do_DELETE(self) -> None:
        self._respond()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _respond(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            code, answer = 200, self.server.objects.answer(self.command, self.path, json.loads(content or "null"))
        except Refused as error:
            code, answer = error.code, {"kind": "Status", "code": error.code, "message": str(error)}
        payload = json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    objects: Objects

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that was killed
            super().handle_error(request, client_address)


class KubeApi:
    """The server; only who has its certificate is let in."""

    def __init__(self, folder: Path, namespace: str) -> None:
        self._certificate, self._key = folder / "api.crt", folder / "api.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "1", "-subj", "/CN=stub", "-addext", "subjectAltName=IP:127.0.0.1"]
        command += ["-out", str(self._certificate), "-keyout", str(self._key)]
        subprocess.run(command, check=True, capture_output=True)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate, self._key)
        context.load_verify_locations(self._certificate)
        context.verify_mode = ssl.CERT_REQUIRED
        self.objects = Objects(namespace)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.objects = self.objects
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def environment(self) -> dict[str, str]:
        """By which Ray's autoscaler finds it, and may talk to it."""
        return {
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT_HTTPS": str(self._server.server_address[1]),
            "RAY_KUBERAY_CLIENT_CERT_PATH": str(self._certificate),
            "RAY_KUBERAY_CLIENT_KEY_PATH": str(self._key),
            "RAY_KUBERAY_CA_CERT_PATH": str(self._certificate),
        }

    def __enter__(self) -> KubeApi:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
