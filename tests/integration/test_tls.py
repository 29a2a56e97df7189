"""TLS on the framed TCP with real certificates: who is verified, what is refused, what plain peers hear, rotation."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

import mmcache
from mmcache.config import ServerConfig
from mmcache.errors import AccessDenied, ConfigError, TransportError
from mmcache.server.access_edit import with_token
from mmcache.server.grants import digest_of
from mmcache.server.serve import Server
from mmcache.testing.process import ServerProcess
from mmcache.transport.base import Op
from mmcache.transport.tcp import Channel
from mmcache.transport.tls import TlsChannel, client_context, server_context
from tests.integration.access_bed import EXPIRED, TOKENS, Bed, ask_join, bed_arguments, write_access
from tests.integration.certificates import Authority
from tests.integration.on_a_loop import OnALoop
from tests.integration.support import MiB, Raw, blanks, eventually, keys_of, run_cli, values_of


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    folder = tmp_path_factory.mktemp("tls")
    authority, arguments = bed_arguments(folder)
    authority.issue("engine-1")
    authority.issue("engine-2")
    authority.issue("")
    authority.issue("engine-1", left=timedelta(minutes=-1), file="expired")
    Authority(folder, "wrong-ca").issue("engine-1", file="forged")
    with ServerProcess("32MiB", *arguments) as server:
        yield Bed(server, authority, folder)


def refused(url: str, token: str | None = None) -> TransportError:
    with pytest.raises(TransportError) as refusal:
        mmcache.connect(url, token=token)
    return refusal.value


# ------------------------------------------------------------------------------------------ who is let in
def test_a_token_or_a_certificate_says_who_asks_and_both_see_the_same_tenant(bed: Bed) -> None:
    keys = keys_of(3, "tls")
    values, back = values_of(keys, 400_000), blanks(3, 400_000)
    with mmcache.connect(bed.url(), token=TOKENS["a"]) as by_token:
        assert by_token.stat()["transport"] == "tls"
        assert all(by_token.put(keys, values))
    with mmcache.connect(bed.with_certificate("engine-1")) as by_certificate:
        assert by_certificate.stat()["transport"] == "tls"  # nobody can tell who is on the unix socket
        assert all(by_certificate.get_into(keys, back))
        assert all(map(np.array_equal, back, values))
    with mmcache.connect(bed.with_certificate("engine-1"), token=TOKENS["a"]) as by_both:
        assert by_both.match_prefix(keys) == 3
    with mmcache.connect(bed.url(), token=TOKENS["b"]) as other:
        assert other.contains(keys) == [False] * 3
    with OnALoop(mmcache.AsyncClient(bed.url(), token=TOKENS["a"])) as on_a_loop:
        assert on_a_loop.contains(keys) == [True] * 3


@pytest.mark.parametrize("token", [None, "wrong", EXPIRED])
def test_tokens_that_are_none_are_refused_alike_over_tls(bed: Bed, token: str | None) -> None:
    error = refused(bed.url(), token)
    assert isinstance(error, AccessDenied)
    assert str(error).startswith("access denied: no valid token or certificate")


@pytest.mark.parametrize(
    ("certificate", "token"),
    [
        ("engine-2", None),  # signed, but not listed
        ("engine-2", TOKENS["a"]),
        ("nameless", None),
        ("nameless", TOKENS["a"]),
        ("engine-1", TOKENS["b"]),  # of two tenants
        ("engine-1", "wrong"),
    ],
)
def test_a_certificate_must_be_listed_and_agree_with_the_token(bed: Bed, certificate: str, token: str | None) -> None:
    assert isinstance(refused(bed.with_certificate(certificate), token), AccessDenied)


@pytest.mark.parametrize(("certificate", "says"), [("expired", "certificate expired"), ("forged", "unknown ca")])
@pytest.mark.parametrize("token", [None, TOKENS["a"]])
def test_an_expired_or_forged_client_certificate_is_refused_even_with_a_token(
    bed: Bed, certificate: str, says: str, token: str | None
) -> None:
    error = refused(bed.with_certificate(certificate), token)
    assert not isinstance(error, AccessDenied)  # it did not come so far
    assert says in str(error)
    assert "a certificate that is valid now, from the CA the server trusts" in str(error)


def test_with_certificates_alone_whoever_has_none_stays_outside(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    engine = authority.issue("engine")
    arguments = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", authority.ca]
    with ServerProcess("1MiB", *arguments) as server:
        assert "certificate required" in str(refused(f"{server.url}?ca={authority.ca}"))
        url = f"{server.url}?ca={authority.ca}&cert={engine[0]}&key={engine[1]}"
        with mmcache.connect(url) as cache:
            assert cache.stat()["transport"] == "shm"
            assert cache.stat()["counters"]["entries"] == 0


# ------------------------------------------------------------------------------------------ whom a client trusts
def test_a_server_is_verified_by_its_authority_and_its_name(bed: Bed) -> None:
    port = bed.server.url.rpartition(":")[2]
    wrong_ca = bed.folder / "wrong-ca.pem"
    assert "certificate was refused" in str(refused(f"{bed.server.url}?ca={wrong_ca}", TOKENS["a"]))
    assert "certificate was refused" in str(refused(bed.server.url, TOKENS["a"]))  # the system's CAs
    other_name = refused(bed.url("&server_name=cache.example"), TOKENS["a"])
    assert "cache.example" in str(other_name)
    for url in (f"mmcaches://localhost:{port}?ca={bed.authority.ca}", bed.url("&server_name=localhost")):
        with mmcache.connect(url, token=TOKENS["a"]) as cache:
            assert cache.stat()["transport"] == "tls"
    with pytest.raises(ConfigError, match="cannot name a server"):
        mmcache.connect(bed.url("&server_name=.."))


def test_an_expired_server_is_refused_and_gets_no_token(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server", left=timedelta(minutes=-1))
    with ServerProcess("1MiB", "--tls-cert", cert, "--tls-key", key) as server:
        assert "certificate has expired" in str(refused(f"{server.url}?ca={authority.ca}", "secret"))


def test_older_tls_is_refused_by_both_ends(bed: Bed) -> None:
    host, port = bed.server.url.removeprefix("mmcaches://").split(":")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(bed.authority.ca)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection((host, int(port)), 10) as sock, pytest.raises(ssl.SSLError, match=r"(?i)version"):
        old.wrap_socket(sock, server_hostname="localhost")
    assert client_context(bed.authority.ca, "", "").minimum_version is ssl.TLSVersion.TLSv1_3


# ------------------------------------------------------------------------------------------ shared memory
def test_the_only_tenant_goes_on_in_shared_memory_with_its_token(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    access = write_access(tmp_path / "access.toml", with_token("", "a", digest_of("a1").hex()))
    with ServerProcess("8MiB", "--access", access, "--tls-cert", cert, "--tls-key", key) as server:
        url = f"{server.url}?ca={authority.ca}"
        keys = keys_of(2, "shm")
        with mmcache.connect(url, token="a1") as near, mmcache.connect(f"{url}&transport=tcp", token="a1") as far:
            assert near.stat()["transport"] == "shm"
            assert far.stat()["transport"] == "tls"
            assert all(near.put(keys, values_of(keys, 1000)))
            assert all(far.get_into(keys, blanks(2, 1000)))


# ------------------------------------------------------------------------------------------ plain and silent peers
def test_a_plain_client_and_a_browser_are_told_and_a_plain_server_too(bed: Bed) -> None:
    address = bed.server.url.removeprefix("mmcaches://")
    assert "this port speaks TLS; use mmcaches://HOST:PORT" in str(refused(f"mmcache://{address}", TOKENS["a"]))
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("GET", "/")
    assert connection.getresponse().status == 400
    connection.close()
    with ServerProcess("1MiB") as plain:
        error = refused(plain.url.replace("mmcache:", "mmcaches:"), "secret")
    assert "the peer does not speak TLS; use mmcache://" in str(error)


def test_a_handshake_that_stalls_holds_up_nobody_and_ends_in_time(tmp_path: Path) -> None:
    authority, arguments = bed_arguments(tmp_path)
    with ServerProcess("1MiB", *arguments, environment={"MMCACHE_IO_TIMEOUT_S": "3"}) as server:
        host, port = server.url.removeprefix("mmcaches://").split(":")
        silent = [socket.create_connection((host, int(port)), 20) for _ in range(4)]
        silent[1].sendall(b"\x16")
        silent[2].sendall(b"\x16\x03\x01\x02\x00" + bytes(100))
        with mmcache.connect(f"{server.url}?ca={authority.ca}", token=TOKENS["a"]) as cache:
            assert cache.stat()["transport"] == "tls"
            for sock in silent:
                with contextlib.suppress(ConnectionError):
                    while sock.recv(4096):  # an alert, or the end
                        pass
                sock.close()
            time.sleep(0.2)
            assert cache.stat()["transport"] == "tls"


# ------------------------------------------------------------------------------------------ settings that cannot work
def test_a_loose_or_foreign_key_is_refused_at_both_ends(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    other_key = authority.issue("other")[1]
    os.chmod(key, 0o640)
    ended = run_cli("serve", "--listen", "127.0.0.1:0", "--memory", "1MiB", "--tls-cert", cert, "--tls-key", key)
    assert ended.returncode == 2
    assert "mode 0640" in ended.stderr
    with pytest.raises(ConfigError, match="mode 0640"):
        mmcache.connect(f"mmcaches://127.0.0.1:1?cert={cert}&key={key}", lazy=True)
    with pytest.raises(ConfigError, match="two PEM files that belong together"):
        server_context(cert, other_key, "", certificate_needed=False)
    with pytest.raises(ConfigError, match=r"CA certificates .* cannot be used"):
        mmcache.connect(f"mmcaches://127.0.0.1:1?ca={other_key}", lazy=True)
    with pytest.raises(ConfigError, match="cannot be used: No such file"):
        mmcache.connect("mmcaches://127.0.0.1:1?ca=/no/such/file", lazy=True)
    with pytest.raises(ConfigError, match="cert and key belong together"):
        mmcache.connect(f"mmcaches://127.0.0.1:1?cert={cert}", lazy=True)
    with pytest.raises(ConfigError, match="use mmcaches://"):
        mmcache.connect("mmcache://127.0.0.1:1?server_name=x", lazy=True)


# ------------------------------------------------------------------------------------------ rotation and expiry
def test_a_new_certificate_is_used_without_a_restart_and_old_connections_go_on(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old-ca"), Authority(tmp_path, "new-ca")
    cert, key = old.issue("server")
    with ServerProcess("1MiB", "--tls-cert", cert, "--tls-key", key, "--unix", "") as server:
        with mmcache.connect(f"{server.url}?ca={old.ca}") as cache:
            new_cert, new_key = new.issue("server", file="renewed")
            os.rename(new_key, key)
            os.rename(new_cert, cert)

            def renewed() -> bool:
                with contextlib.suppress(TransportError):
                    mmcache.connect(f"{server.url}?ca={new.ca}").close()
                    return True
                return False

            eventually(renewed, "the new certificate is shown")
            assert cache.stat()["transport"] == "tls"
        assert "certificate was refused" in str(refused(f"{server.url}?ca={old.ca}"))


def test_a_client_uses_its_renewed_certificate_for_the_next_connection(bed: Bed, tmp_path: Path) -> None:
    mine = Path(bed.authority.issue("engine-2", file="mine")[0])
    with mmcache.connect(bed.with_certificate("mine"), lazy=True) as cache:
        with pytest.raises(AccessDenied):
            cache.stat()
        cert, key = bed.authority.issue("engine-1", file="next")
        os.rename(key, mine.with_suffix(".key"))
        os.rename(cert, mine)
        assert cache.stat()["transport"] == "tls"


def test_a_connection_ends_with_its_client_certificate(bed: Bed) -> None:
    cert, key = bed.authority.issue("engine-1", left=timedelta(seconds=6), file="short")
    context = client_context(bed.authority.ca, cert, key)
    host, port = bed.server.url.removeprefix("mmcaches://").split(":")
    channel = TlsChannel(Channel(socket.create_connection((host, int(port)), 10)), context, "localhost")
    channel.handshake(time.monotonic() + 10)
    raw = object.__new__(Raw)
    raw.sock = channel.sock
    channel.sock.settimeout(20)
    assert ask_join(raw, "")[0] == Op.JOIN
    assert raw.closed_by_peer()
    channel.close()


# ------------------------------------------------------------------ strangers, where only certificates are asked for
@pytest.fixture
def certificates_only(tmp_path: Path) -> Iterator[tuple[Server, tuple[str, int]]]:
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    server = Server(
        ServerConfig(
            listen="127.0.0.1:0",
            unix_path="",
            memory_nbytes=MiB,
            max_connections=64,
            tls_cert=cert,
            tls_key=key,
            tls_client_ca=authority.ca,
        )
    )
    server.start()
    assert server.address is not None
    yield server, server.address
    server.stop()


def test_handshakes_that_are_not_finished_leave_room_without_an_access_file_too(
    certificates_only: tuple[Server, tuple[str, int]],
) -> None:
    server, address = certificates_only
    silent = [socket.create_connection(address) for _ in range(30)]
    last = silent[-1]
    last.settimeout(10)
    with contextlib.suppress(ConnectionError):
        assert last.recv(1) == b"", "turned away"
    assert server.service.connections <= 16, "a quarter of 64"
    for sock in silent:
        sock.close()


def test_a_peer_that_resets_before_its_handshake_is_no_internal_error(
    certificates_only: tuple[Server, tuple[str, int]], caplog: pytest.LogCaptureFixture
) -> None:
    server, address = certificates_only
    with caplog.at_level(logging.DEBUG, "mmcache.server"):
        for _ in range(10):
            sock = socket.create_connection(address)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close with a reset
            sock.sendall(b"\x16\x03\x01")
            sock.close()

        def said() -> list[int]:  # by the server; what tests before this one left behind may have something to say, too
            return [record.levelno for record in caplog.records if record.name.startswith("mmcache.server")]

        eventually(lambda: len(said()) >= 10 and not server.service.connections, "all are noticed and gone")
    assert set(said()) == {logging.DEBUG}, caplog.text
