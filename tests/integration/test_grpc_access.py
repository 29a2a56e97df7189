"""Who may call over gRPC: tokens, certificates, tenants; Node and Python over mutual TLS. Strangers learn nothing."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

import mmcache
import mmcache.server.rpc as rpc_server
from mmcache.config import ServerConfig
from mmcache.keyset import Keys
from mmcache.pb import cache_pb2 as pb
from mmcache.server.grants import digest_of
from mmcache.server.serve import Server
from mmcache.testing.process import ServerProcess
from tests.integration.certificates import Authority
from tests.integration.rpc_support import CACHE, ones, put_of, put_request, rpc_to, tensor
from tests.integration.support import MiB, eventually, keys_of
from tests.integration.test_grpc_node import (
    EMBEDDING,
    MISSING,
    MODULES,
    NODE,
    check_node_stored,
    destination,
    key_of,
    node,
)

TOKENS = {"team-a": "mmc_a" * 9, "team-b": "mmc_b" * 9, "ops": "mmc_o" * 9}
DENIED = (
    grpc.StatusCode.UNAUTHENTICATED,
    "access denied: no valid token or certificate came with this call; send authorization: Bearer TOKEN",
)


def write_access(path: Path, *, without: str = "") -> str:
    """An access file with every tenant's token and certificate."""
    lines = [f'[[tenant]]\nname = "{tenant}"' for tenant in TOKENS]
    for tenant, token in TOKENS.items():
        admin = "admin = true" if tenant == "ops" else ""
        if tenant != without:
            lines.append(f'[[token]]\ntenant = "{tenant}"\nsha256 = "{digest_of(token).hex()}"\n{admin}')
        lines.append(f'[[certificate]]\ntenant = "{tenant}"\ncommon_name = "{tenant}-client"')
    fresh = path.with_suffix(".new")
    fresh.touch(mode=0o600)
    fresh.write_text("\n".join(lines))
    fresh.rename(path)
    return str(path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    access = write_access(tmp_path_factory.mktemp("access") / "access.toml")
    with ServerProcess("32MiB", "--grpc", "127.0.0.1:0", "--access", access) as running:
        yield running


@pytest.mark.parametrize(
    "metadata",
    [
        [],
        [("authorization", f"Bearer {TOKENS['team-a'][:-1]}x")],
        [("authorization", "Bearer unknown")],
        [("authorization", "Bearer ")],
        [("authorization", "Bearer " + "x" * 4000)],
        [("authorization", TOKENS["team-a"])],
        [("authorization", f"Basic {TOKENS['team-a']}")],
        [("authorization", f"Bearer {TOKENS['team-a']}"), ("authorization", f"Bearer {TOKENS['team-b']}")],
    ],
    ids=["none", "wrong", "unknown", "empty", "long", "no scheme", "basic", "two"],
)
def test_who_is_not_known_is_refused_before_the_request_is_read(
    server: ServerProcess, metadata: list[tuple[str, str]]
) -> None:
    with rpc_to(server.grpc_address) as rpc:
        for method, body in (("Get", b"\xff"), ("Put", bytes(8 * MiB)), ("Stat", b""), ("Remove", b"")):
            with pytest.raises(grpc.RpcError) as caught:
                rpc.channel.unary_unary(f"/{CACHE.full_name}/{method}")(body, metadata=metadata, timeout=10)
            assert (caught.value.code(), caught.value.details()) == DENIED


def test_health_is_for_everybody_and_the_schema_is_not(server: ServerProcess) -> None:
    with rpc_to(server.grpc_address) as rpc:
        reply = health_pb2_grpc.HealthStub(rpc.channel).Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            ProtoReflectionDescriptorDatabase(rpc.channel).get_services()
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_another_tenants_entry_is_as_if_it_were_not_there(server: ServerProcess) -> None:
    key = keys_of(1, "tenants")[0]
    with (
        rpc_to(server.grpc_address, token=TOKENS["team-a"]) as ours,
        rpc_to(server.grpc_address, token=TOKENS["team-b"]) as theirs,
    ):
        put = put_request(put_of(key, tensor("x", ones(9))))
        assert ours("Put", put).status == bytes([pb.STORED])
        for one in (key.digest, bytes(32)):
            assert theirs("Get", pb.GetRequest(keys=one)) == pb.GetReply(entries=[pb.Entry()])
            assert theirs("Contains", pb.ContainsRequest(keys=one)).present == b"\0"
            assert theirs("Inspect", pb.InspectRequest(key=one)) == pb.InspectReply()
            assert theirs("Delete", pb.DeleteRequest(keys=one)).deleted == b"\0"
            assert theirs("Recheck", pb.RecheckRequest(keys=one)).dropped == b"\0"
        assert theirs("Put", put_request(put_of(key, tensor("x", 2 * ones(9))))).status == bytes([pb.STORED])
        assert ours("Get", pb.GetRequest(keys=key.digest)).entries[0].tensors[0].data == b"\1" * 9
        assert theirs("Stat", pb.StatRequest()).counters.keys() == {"bytes_used"}, "its own, and nobody else's"


def test_what_operators_ask_is_denied_to_others(server: ServerProcess) -> None:
    with rpc_to(server.grpc_address, token=TOKENS["team-a"]) as rpc:
        for method, request in (("Remove", pb.RemoveRequest()), ("Audit", pb.AuditRequest(share=1))):
            code, words = rpc.refused(method, request)
            assert (code, "needs an admin token" in words) == (grpc.StatusCode.PERMISSION_DENIED, True)


def test_a_revoked_token_is_refused_on_an_open_connection(tmp_path: Path) -> None:
    file = tmp_path / "access.toml"
    with (
        ServerProcess("16MiB", "--grpc", "127.0.0.1:0", "--access", write_access(file)) as server,
        rpc_to(server.grpc_address, token=TOKENS["team-a"]) as rpc,
    ):
        question = pb.ContainsRequest(keys=bytes(32))
        rpc("Contains", question)
        write_access(file, without="team-a")

        def refused() -> bool:
            try:
                rpc("Contains", question)
            except grpc.RpcError as error:
                return (error.code(), error.details()) == DENIED
            return False

        eventually(refused, "the token was refused")


# ------------------------------------------------------------------------------------------------ mutual TLS
class Secured(NamedTuple):
    """A server that wants client certificates, and who signs them."""

    server: ServerProcess
    authority: Authority
    folder: Path

    def credentials(self, cert: str = "", key: str = "", ca: str = "") -> Any:
        roots = Path(ca or self.authority.ca).read_bytes()
        if not cert:
            return grpc.ssl_channel_credentials(roots)
        return grpc.ssl_channel_credentials(roots, Path(key).read_bytes(), Path(cert).read_bytes())

    def client(self, cert: str = "", key: str = "", **options: Any) -> Any:
        return rpc_to(self.server.grpc_address, credentials=self.credentials(cert, key), **options)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder)
    cert, key = authority.issue("server")
    files = ["--tls-cert", cert, "--tls-key", key, "--tls-client-ca", authority.ca]
    access = write_access(folder / "access.toml")
    with ServerProcess("32MiB", "--grpc", "127.0.0.1:0", "--access", access, *files) as running:
        yield Secured(running, authority, folder)


@pytest.mark.skipif(NODE is None or not MODULES.is_dir(), reason=MISSING)
def test_node_and_python_exchange_embeddings_over_mutual_tls(secured: Secured) -> None:
    server, ca = secured.server, secured.authority.ca
    address = server.grpc_address.replace("127.0.0.1", "localhost")  # Node warns of certificates for addresses
    cert, key = secured.authority.issue("team-a-client")
    options = {"ca": ca, "cert": cert, "key": key}
    assert node(address, "put", "mtls", options=options)["came"] == ["stored"]
    wanted = key_of("mtls")
    with secured.client(cert, key) as rpc:
        (entry,) = rpc("Get", pb.GetRequest(keys=wanted.digest)).entries
        assert {found.name: found.data for found in entry.tensors}["embedding"] == EMBEDDING.tobytes()
    framed = f"{server.url}?ca={ca}&cert={cert}&key={key}"  # the same tenant
    with mmcache.connect(framed, deadline_s=20) as client:
        back = destination()
        assert client.get_into(Keys.of(wanted), [back])[0]
        check_node_stored(back)
        ours = key_of("mtls/python")
        assert client.put(Keys.of(ours), [{"embedding": EMBEDDING}])[0]
    read = node(address, "get", "mtls/python", options=options)["came"]
    assert read["tensors"]["embedding"]["hex"] == EMBEDDING.tobytes().hex()
    theirs = dict(zip(("cert", "key"), secured.authority.issue("team-b-client"), strict=True))
    assert node(address, "get", "mtls", options={"ca": ca, **theirs})["came"] is None
    expired = dict(zip(("cert", "key"), _expired(secured), strict=True))
    assert node(address, "get", "mtls", options={"ca": ca, **expired})["code"] == 14  # UNAVAILABLE


def _expired(secured: Secured) -> tuple[str, str]:
    return secured.authority.issue("team-a-client", left=timedelta(hours=-1), file="expired")


def test_certificates_that_are_not_good_open_no_connection(secured: Secured) -> None:
    other = secured.folder / "other"
    other.mkdir(exist_ok=True)
    question = pb.ContainsRequest(keys=bytes(32))
    for pair in (_expired(secured), Authority(other, "other-ca").issue("team-a-client"), ("", "")):
        with secured.client(*pair, token=TOKENS["team-a"]) as rpc:
            code, words = rpc.refused("Contains", question)
            assert code == grpc.StatusCode.UNAVAILABLE
            assert "mmcache" not in words
    with rpc_to(secured.server.grpc_address, token=TOKENS["team-a"]) as plain:
        assert plain.refused("Contains", question)[0] == grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("common_name", "token", "allowed"),
    [
        ("team-a-client", "", True),
        ("team-a-client", TOKENS["team-a"], True),
        ("team-a-client", TOKENS["team-b"], False),
        ("team-a-client", "unknown", False),
        ("stranger", "", False),
        ("stranger", TOKENS["team-a"], False),
        ("", TOKENS["team-a"], False),
        ("", "", False),
    ],
)
def test_a_certificate_and_a_token_must_be_one_tenants(
    secured: Secured, common_name: str, token: str, allowed: bool
) -> None:
    with secured.client(*secured.authority.issue(common_name), token=token) as rpc:
        question = pb.ContainsRequest(keys=bytes(32))
        if allowed:
            assert rpc("Contains", question).present == b"\0"
        else:
            assert rpc.refused("Contains", question) == DENIED


def test_a_new_certificate_of_the_server_is_used_without_a_restart(tmp_path: Path) -> None:
    old, new = Authority(tmp_path, "old-ca"), Authority(tmp_path, "new-ca")
    cert, key = old.issue("server")
    access = write_access(tmp_path / "access.toml")
    question = pb.ContainsRequest(keys=bytes(32))
    with ServerProcess(
        "16MiB", "--grpc", "127.0.0.1:0", "--access", access, "--tls-cert", cert, "--tls-key", key
    ) as server:

        def answers(authority: Authority) -> bool:
            credentials = grpc.ssl_channel_credentials(Path(authority.ca).read_bytes())
            with rpc_to(server.grpc_address, credentials=credentials, token=TOKENS["ops"]) as rpc:
                try:
                    return bool(rpc("Contains", question).present)
                except grpc.RpcError:
                    return False

        assert answers(old)
        assert not answers(new)
        fresh_cert, fresh_key = new.issue("server", file="fresh")
        shutil.move(fresh_key, key)
        shutil.move(fresh_cert, cert)
        time.sleep(0.01)
        assert answers(new)


def test_bad_certificates_are_an_error_at_the_start(tmp_path: Path) -> None:
    with (
        pytest.raises(Exception, match="cannot be used"),
        ServerProcess("16MiB", "--grpc", "127.0.0.1:0", "--tls-cert", __file__, "--tls-key", str(_private(tmp_path))),
    ):
        pass


def _private(folder: Path) -> Path:
    path = folder / "key.pem"
    path.touch(mode=0o600)
    return path


def test_a_certificate_that_expires_is_refused_soon_and_no_call_fails_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_server, "CERTIFICATE_CHECK_S", 1)
    authority = Authority(tmp_path)
    cert, key = authority.issue("server")
    config = ServerConfig(
        listen="",
        unix_path="",
        grpc="127.0.0.1:0",
        memory_nbytes=MiB,
        access_file=write_access(tmp_path / "access.toml"),
        tls_cert=cert,
        tls_key=key,
        tls_client_ca=authority.ca,
    )
    running = Server(config)
    running.start()
    assert running.grpc_address
    host, port = running.grpc_address
    begin = time.monotonic()
    pair = authority.issue("team-a-client", left=timedelta(seconds=3))
    pem = [Path(path).read_bytes() for path in (authority.ca, *reversed(pair))]
    question = pb.ContainsRequest(keys=bytes(32))
    with rpc_to(f"{host}:{port}", credentials=grpc.ssl_channel_credentials(*pem)) as rpc:

        def refused() -> bool:
            try:
                rpc("Contains", question)
            except grpc.RpcError as error:
                return bool(error.code() == grpc.StatusCode.UNAVAILABLE)
            return False

        eventually(refused, "the certificate was refused")
        assert time.monotonic() - begin > 2
    running.stop()
