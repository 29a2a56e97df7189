"""A local HTTP server that speaks as much of the Kubernetes API as a watch of EndpointSlices needs. Not a Kubernetes.

It keeps the protocol (https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes):
lists with a resource version, label selectors, watches from a version as lines of JSON, bookmarks, `timeoutSeconds`,
410 Gone for versions that are compacted (as a status or as an ERROR event), 401 without the token; and it can hang up
or hang.
"""

from __future__ import annotations

import json
import ssl
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from mmcache.testing.ports import keeper

TOKEN = "let-me-in"
SERVICE_LABEL = "kubernetes.io/service-name"


class ApiServer:
    """Holds slices and every event since the last compaction. `tls` is a certificate and its key. A context manager."""

    def __init__(self, namespace: str = "ns", service: str = "cache", tls: tuple[str, str] | None = None) -> None:
        self.namespace, self.service = namespace, service
        self._changed = threading.Condition()
        self._version, self._oldest = 100, 100
        self._slices: dict[str, dict[str, Any]] = {}
        self._events: list[tuple[int, str, dict[str, Any]]] = []
        self._hang_ups = 0
        self.forbidden = self.hanging = self.gone_as_status = False
        self.lists = self.watches = self.bookmarks = 0
        self._tls = tls
        self._server: ThreadingHTTPServer | None = None
        self._keeper = keeper()
        self.port = self._keeper.getsockname()[1]

    # -------------------------------------------------------------------------------------- what a cluster does
    def apply(self, name: str, endpoints: list[dict[str, Any]] | None, service: str = "") -> None:
        """Add or change a slice; its port is named mmcache, and 7600."""
        with self._changed:
            kind = "MODIFIED" if name in self._slices else "ADDED"
            self._version += 1
            meta = {"name": name, "namespace": self.namespace, "resourceVersion": str(self._version)}
            meta |= {"labels": {SERVICE_LABEL: service or self.service}}  # type: ignore[dict-item]
            self._slices[name] = {
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "metadata": meta, "addressType": "IPv4",
                "endpoints": endpoints, "ports": [{"name": "mmcache", "port": 7600, "protocol": "TCP"}],
            }  # fmt: skip
            self._note(kind, self._slices[name])

    def delete(self, name: str) -> None:
        """Delete a slice."""
        with self._changed:
            self._version += 1
            found = self._slices.pop(name)
            found["metadata"]["resourceVersion"] = str(self._version)
            self._note("DELETED", found)

    def _note(self, kind: str, found: dict[str, Any]) -> None:
        self._events.append((self._version, kind, json.loads(json.dumps(found))))
        self._changed.notify_all()

    def bookmark(self) -> None:
        """Tell all who watch how far they are, after changes that do not concern them."""
        with self._changed:
            self._version += 50
            self._events.append((self._version, "BOOKMARK", {}))
            self._changed.notify_all()

    def compact(self) -> None:
        """Forget all events: whoever comes with an older version has to list again."""
        with self._changed:
            self._version += 1
            self._events, self._oldest = [], self._version

    def hang_up(self) -> None:
        """End every watch in the middle of a line."""
        with self._changed:
            self._hang_ups += 1
            self._changed.notify_all()

    # -------------------------------------------------------------------------------------- what it answers
    def list_slices(self, labels: Mapping[str, str]) -> dict[str, Any]:
        """The list, as the API gives it."""
        with self._changed:
            self.lists += 1
            items = [one for one in self._slices.values() if labels.items() <= one["metadata"]["labels"].items()]
            kind = {"kind": "EndpointSliceList", "apiVersion": "discovery.k8s.io/v1"}
            listed = kind | {"metadata": {"resourceVersion": str(self._version)}, "items": items}
            copied: dict[str, Any] = json.loads(json.dumps(listed))
            return copied

    def watch(self, version: int, labels: Mapping[str, str], until_s: float, handler: Handler) -> None:
        """Write events until it is time, or somebody hangs up."""
        with self._changed:
            self.watches += 1
            hang_ups, begun = self._hang_ups, False
            if version < self._oldest and self.gone_as_status:
                handler.refuse(410, "Expired")
                return
            handler.begin()
            if version < self._oldest:
                status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                handler.line({"type": "ERROR", "object": status})
                handler.wfile.write(b"0\r\n\r\n")
                return
            while time.monotonic() < until_s:
                for number, kind, found in [one for one in self._events if one[0] > version]:
                    version = number
                    if kind == "BOOKMARK":
                        self.bookmarks += 1
                        meta = {"resourceVersion": str(number)}
                        handler.line({"type": kind, "object": {"kind": "EndpointSlice", "metadata": meta}})
                    elif labels.items() <= found["metadata"]["labels"].items():
                        handler.line({"type": kind, "object": found})
                begun = self._changed.wait(min(0.5, max(0.0, until_s - time.monotonic()))) or begun
                if self._hang_ups != hang_ups:
                    handler.wfile.write(b'40\r\n{"type": "ADD')
                    handler.close_connection = True
                    return
            handler.wfile.write(b"0\r\n\r\n")

    # -------------------------------------------------------------------------------------- its life
    def __enter__(self) -> Self:
        return self.start()

    def start(self) -> Self:
        """Serve; again at the same port."""
        handler = type("BoundHandler", (Handler,), {"api": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self._tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """Hang up on all, and listen no more."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        self.hang_up()

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._keeper.close()

    def kubeconfig(self, token: str = TOKEN) -> str:
        """What a client needs to reach it; JSON is YAML."""
        named = {"cluster": {"server": f"http://127.0.0.1:{self.port}"}, "user": {"token": token}}
        context = {"cluster": "c", "user": "u", "namespace": "default"}
        return json.dumps(
            {
                "apiVersion": "v1", "kind": "Config", "current-context": "x",
                "clusters": [{"name": "c", "cluster": named["cluster"]}],
                "users": [{"name": "u", "user": named["user"]}],
                "contexts": [{"name": "x", "context": context}],
            }
        )  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """One request."""

    api: ApiServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Lists and watches of slices; 404 for the rest."""
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        labels = dict(one.split("=", 1) for one in query.get("labelSelector", "").split(",") if one)
        while self.api.hanging:
            time.sleep(0.05)
        if self.headers.get("Authorization", "").partition(" ")[::2] not in {("Bearer", TOKEN), ("bearer", TOKEN)}:
            self.refuse(401, "Unauthorized")
        elif self.api.forbidden:
            self.refuse(403, "Forbidden")
        elif parts.path != f"/apis/discovery.k8s.io/v1/namespaces/{self.api.namespace}/endpointslices":
            self.refuse(404, "NotFound")
        elif query.get("watch") in ("true", "True", "1"):
            until_s = time.monotonic() + float(query.get("timeoutSeconds", "60"))
            self.api.watch(int(query["resourceVersion"]), labels, until_s, self)
        else:
            self._answer(200, self.api.list_slices(labels))

    def refuse(self, code: int, reason: str) -> None:
        """A Status object."""
        self._answer(code, {"kind": "Status", "status": "Failure", "code": code, "reason": reason, "message": reason})

    def _answer(self, code: int, found: dict[str, Any]) -> None:
        data = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def begin(self) -> None:
        """A body that comes in pieces."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def line(self, event: dict[str, Any]) -> None:
        """One event, in two pieces: a client must not take a piece for a line."""
        data = json.dumps(event).encode() + b"\n"
        for piece in (data[:20], data[20:]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
