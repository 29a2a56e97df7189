"""The gRPC server: a thin shell of threads, limits, TLS, health and reflection around TensorService.

Needs the extra `grpc`; nothing imports this module unless `--grpc` asks for it. The schema's methods are unary, but
their handlers read the request themselves: so who asks is known before a payload is received, and a peer that sends
or reads too slowly is let go.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from mmcache.config import ServerConfig
from mmcache.errors import TransportError
from mmcache.pb import cache_pb2 as pb
from mmcache.server.caller import Caller
from mmcache.server.refuse import BadRequest
from mmcache.server.service import Service
from mmcache.server.tensor_service import METHODS, Gone, TensorService
from mmcache.server.watched import Watched
from mmcache.transport.tls import server_context

log = logging.getLogger("mmcache.server")
SERVICE: Final = pb.DESCRIPTOR.services_by_name["Cache"].full_name
WORKERS: Final = 8
MAX_CALLS: Final = 64  # running and waiting
MAX_STREAMS: Final = 100  # of one connection
MAX_REFLECTIONS: Final = 2  # each takes a worker while it is open
SLOWEST_NBYTES_PER_S: Final = 4 << 20  # as on the framed socket: slower payload, either way, is not waited for
WATCH_S: Final = 0.5
CERTIFICATE_CHECK_S: Final = 60
DENIED: Final = "access denied: no valid token or certificate came with this call; send authorization: Bearer TOKEN"
_CODES: Final[dict[int, Any]] = {
    pb.ErrorReply.LIMIT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    pb.ErrorReply.UNSUPPORTED: grpc.StatusCode.UNIMPLEMENTED,
    pb.ErrorReply.DENIED: grpc.StatusCode.PERMISSION_DENIED,
}


def server_credentials(config: ServerConfig) -> Any:
    """TLS from the settings' files, which are looked at for every connection; None without. Raises ConfigError.

    With `tls_client_ca` a client certificate is needed: gRPC does not know how to ask for one that may be left out.
    """
    if not config.tls_cert:
        return None

    def load() -> Any:
        # Their errors are better than gRPC's, which does not say what is wrong.
        server_context(config.tls_cert, config.tls_key, config.tls_client_ca, certificate_needed=True)
        chain, key = Path(config.tls_cert).read_bytes(), Path(config.tls_key).read_bytes()
        roots = Path(config.tls_client_ca).read_bytes() if config.tls_client_ca else None
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots)

    files = [path for path in (config.tls_cert, config.tls_key, config.tls_client_ca) if path]
    watched = Watched(files, load, "TLS certificate for gRPC")
    return grpc.dynamic_ssl_server_credentials(
        watched.value, lambda: watched.value if watched.refresh() else None, bool(config.tls_client_ca)
    )


class RpcServer:
    """Serves gRPC at `place` (host, port; port 0 picks) from `start` until `stop`.

    Raises TransportError if it cannot, ConfigError for certificates that cannot be used.
    """

    def __init__(self, service: Service, place: tuple[str, int]) -> None:
        credentials = server_credentials(service.config)
        self._tensors = TensorService(service)
        self._draining = False
        self._calls = Calls(service.config.io_timeout_s)
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="mmcache-grpc")
        self._server = grpc.server(self._pool, options=_options(service.config), maximum_concurrent_rpcs=MAX_CALLS)
        methods = {name: grpc.stream_unary_rpc_method_handler(functools.partial(self._serve, name)) for name in METHODS}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods), _Unknown()))
        self._health = health.HealthServicer(experimental_non_blocking=True)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._add_reflection()
        host, port = place
        place_text = f"[{host}]" if ":" in host else host
        try:
            if credentials is None:
                port = self._server.add_insecure_port(f"{place_text}:{port}")
            else:
                port = self._server.add_secure_port(f"{place_text}:{port}", credentials)
        except RuntimeError as error:
            self._pool.shutdown()
            raise TransportError(f"gRPC cannot be served on {place_text}:{port}; choose another --grpc") from error
        self.address = host, port

    def _add_reflection(self) -> None:
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        servicer = reflection.ReflectionServicer(names)
        answer, slots = servicer.ServerReflectionInfo, threading.Semaphore(MAX_REFLECTIONS)

        def bounded(requests: Any, context: Any) -> Iterator[Any]:
            self._caller(context)
            if not slots.acquire(blocking=False):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "others are reading the schema; try again")
            try:
                with self._calls.receiving(context, 0):
                    yield from answer(requests, context)
            finally:
                slots.release()

        servicer.ServerReflectionInfo = bounded
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, self._server)

    def start(self) -> None:
        """Answer calls; health says SERVING."""
        self._server.start()
        self._calls.start()
        for name in ("", SERVICE):
            self._health.set(name, health_pb2.HealthCheckResponse.SERVING)

    def drain(self) -> None:
        """Health says NOT_SERVING from now on, and new calls are refused; those running go on."""
        self._draining = True
        self._health.enter_graceful_shutdown()

    def stop(self, deadline: float) -> None:
        """Drain, wait for running calls until `deadline` (monotonic seconds), then end them, and every connection."""
        self.drain()
        while self._calls.count and time.monotonic() < deadline:
            time.sleep(0.01)
        self._server.stop(grace=max(deadline - time.monotonic(), 0) if self._calls.count else 0.2).wait()
        self._calls.stop()
        self._pool.shutdown()  # nobody touches the arena any more

    def _caller(self, context: Any) -> Caller:
        values = [value for name, value in context.invocation_metadata() if name == "authorization"]
        token = ""
        if values:
            scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
            if scheme.lower() != "bearer" or not token:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, DENIED)
        try:
            return self._tensors.service.admit(token, _common_name(context)).caller
        except BadRequest:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, DENIED)
            raise

    def _serve(self, method: str, requests: Iterator[bytes], context: Any) -> bytes:
        if self._draining:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the server is stopping; ask another, or again later")
        caller = self._caller(context)
        held = ExitStack()
        with self._calls.receiving(context, self._tensors.limit_nbytes):
            body = next(requests, b"")  # none at all is an empty one
        try:
            if not held.enter_context(self._tensors.service.inflight(len(body))):
                raise BadRequest("too many bytes are in flight; try again", pb.ErrorReply.LIMIT)
            reply = self._tensors.call(method, caller, body, held, lambda: _waits(context))
        except BaseException as error:
            held.close()
            self._refuse(method, context, error)
            raise
        held.callback(self._tensors.service.shard.tell_uses)
        self._calls.sending(context, len(reply), held.close)
        return reply

    def _refuse(self, method: str, context: Any, error: BaseException) -> None:
        if isinstance(error, BadRequest):
            context.abort(_CODES.get(error.code, grpc.StatusCode.INVALID_ARGUMENT), str(error))
        if isinstance(error, Gone):
            context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the call's time was up before the answer was complete")
        log.error("%s failed after an internal error", method, exc_info=error)
        context.abort(grpc.StatusCode.INTERNAL, "an internal error; the server's log has it")


def _common_name(context: Any) -> str | None:
    """The one common name of the verified client certificate, "" where it has none or several; None without one."""
    shown = context.auth_context()
    names = shown.get("x509_common_name", [])
    if "x509_pem_cert" not in shown and not names:
        return None
    return names[0].decode(errors="replace") if len(names) == 1 else ""


def _waits(context: Any) -> bool:
    left_s = context.time_remaining()
    return context.is_active() and (left_s is None or left_s > 0)


def _options(config: ServerConfig) -> list[tuple[str, int]]:
    age_ms = 1000 * CERTIFICATE_CHECK_S
    return [
        # A connection shows its certificate at its start only: it ends, and the next one shows what is valid then.
        *([("grpc.max_connection_age_ms", age_ms)] if config.tls_client_ca else []),
        ("grpc.so_reuseport", 0),  # else two servers share a port, and neither knows
        # Twice the limit, so that most of what is too large hears our own words about it.
        ("grpc.max_receive_message_length", min(2 * config.max_grpc_nbytes, (1 << 31) - 1)),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        ("grpc.max_metadata_size", 16 << 10),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # none: a small message must not become a large one
        ("grpc.server_handshake_timeout_ms", int(1000 * config.io_timeout_s)),
        ("grpc.keepalive_time_ms", 60_000),
        # Also how long a peer may take nothing of what it is sent.
        ("grpc.keepalive_timeout_ms", int(1000 * config.io_timeout_s)),
    ]


class _Unknown:
    """Says of a method this server does not have what it does have; asked last."""

    def service(self, call: Any) -> Any:
        """A handler that refuses, for names that look like ours; None for all others."""
        if not call.method.startswith("/mmcache."):
            return None

        def refuse(requests: Any, context: Any) -> None:
            context.abort(
                grpc.StatusCode.UNIMPLEMENTED,
                f"this server speaks {SERVICE}, with {', '.join(METHODS)}; use its schema, or upgrade it",
            )

        return grpc.stream_unary_rpc_method_handler(refuse)


class Calls:
    """The calls under way, and when each must be done with receiving or sending; overdue ones are cancelled."""

    def __init__(self, io_timeout_s: float) -> None:
        self._io_timeout_s = io_timeout_s
        self._due: dict[int, tuple[float, Any]] = {}
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mmcache-grpc-watch", daemon=True)

    @property
    def count(self) -> int:
        """How many are being received, answered or sent."""
        return len(self._due)

    def receiving(self, context: Any, nbytes: int) -> ExitStack:
        """From here on, to the end of the block, at most `nbytes` come; the call counts until `sending` or its end."""
        self._set(context, self._deadline(nbytes))
        if not context.add_callback(lambda: self._forget(context)):
            self._forget(context)
        block = ExitStack()
        block.callback(self._set_if_there, context, float("inf"))
        return block

    def sending(self, context: Any, nbytes: int, done: Callable[[], None]) -> None:
        """`nbytes` go out; `done` is called when they have, or never will."""
        self._set_if_there(context, self._deadline(nbytes))
        if not context.add_callback(done):
            done()

    def _deadline(self, nbytes: int) -> float:
        return time.monotonic() + self._io_timeout_s + nbytes / SLOWEST_NBYTES_PER_S

    def _set(self, context: Any, due: float) -> None:
        with self._lock:
            self._due[id(context)] = (due, context)

    def _set_if_there(self, context: Any, due: float) -> None:
        with self._lock:
            if id(context) in self._due:
                self._due[id(context)] = (due, context)

    def _forget(self, context: Any) -> None:
        with self._lock:
            self._due.pop(id(context), None)

    def start(self) -> None:
        """Begin to look for overdue calls."""
        self._thread.start()

    def stop(self) -> None:
        """Stop looking."""
        self._stopping.set()

    def _run(self) -> None:
        while not self._stopping.wait(WATCH_S):
            now = time.monotonic()
            with self._lock:
                overdue = [context for due, context in self._due.values() if due < now]
            for context in overdue:
                context.cancel()
