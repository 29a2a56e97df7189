"""Members in a Redis that asks for a password or TLS, in a Redis Cluster, and behind Sentinels: real redis-server."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from mmcache.cluster import redis_members
from mmcache.cluster.seen import CONFIRM_S
from mmcache.cluster.urls import open_membership
from mmcache.errors import ConfigError, TransportError
from tests.integration.certificates import Authority
from tests.integration.members_bed import becomes, ids, leave, stays, watched
from tests.integration.redis_bed import Redis, redis_cluster, redis_sentinels, registered, url_of
from tests.integration.support import eventually

pytestmark = pytest.mark.usefixtures("patient_with_redis")


def private(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def test_a_password_comes_from_a_file_and_is_in_no_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    acl = "user default off", "user cache on >hunter2 ~mmcache:{test}:* &mmcache:{test}:* +@all"
    with Redis("--aclfile", private(tmp_path / "acl", "\n".join(acl))) as there:
        right, wrong = private(tmp_path / "right", "hunter2\n"), private(tmp_path / "wrong", "hunter3\n")
        base = url_of(there).replace("//", "//cache@")
        servers = registered(f"{base}&password_file={right}", 1)
        with watched(f"{base}&password_file={right}") as members:
            assert ids(members) == ["1"]
        with pytest.raises(TransportError, match=r"(?i)invalid username-password") as refused:
            open_membership(f"{base}&password_file={wrong}")
        with pytest.raises(TransportError, match=r"(?i)no ?permission|no access|noperm"):
            open_membership(f"{base}&password_file={right}".replace("cluster=test", "cluster=other"))
        with pytest.raises(TransportError, match="Authentication required"):
            open_membership(url_of(there))
        (tmp_path / "right").chmod(0o644)
        with pytest.raises(ConfigError, match="others could read it"):
            open_membership(f"{base}&password_file={right}")
        (tmp_path / "right").chmod(0o600)
        with pytest.raises(ConfigError, match="no password_file"):
            open_membership(base)
        assert "hunter" not in f"{refused.value} {caplog.text}"
        leave(servers)


def test_tls_is_verified(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("redis")
    files = ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", authority.ca]
    with Redis(*files, "--tls-auth-clients", "no", ssl=True, ssl_ca_certs=authority.ca) as there:
        url = url_of(there).replace("+redis:", "+rediss:")
        servers = registered(f"{url}&redis_ca={authority.ca}", 1)
        with watched(f"{url}&redis_ca={authority.ca}") as members:
            assert ids(members) == ["1"]
        with pytest.raises(TransportError, match="CERTIFICATE_VERIFY_FAILED"):
            open_membership(url)
        leave(servers)


def is_heard(node: Redis) -> bool:
    with contextlib.closing(node.client()) as client:
        return bool(client.pubsub_numsub("mmcache:{test}:changed")[0][1])


def test_a_redis_cluster_serves_as_one_redis_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_members, "POLL_S", 600.0)  # whatever is seen is seen because somebody was woken
    with redis_cluster() as nodes:
        places = ",".join(f"127.0.0.1:{node.port}" for node in nodes[:2])
        url = f"mmcache+redis+cluster://{places}?cluster=test"
        servers = registered(url, 1, 2)
        with watched(url) as members:
            assert ids(members) == ["1", "2"]
            eventually(lambda: any(map(is_heard, nodes)), "the client can be woken")
            servers += registered(url, 3)
            becomes(members, "1", "2", "3")
            assert servers[0].leave()
            becomes(members, "2", "3")
            for node in nodes:
                node.kill()
            for one in servers[1:]:
                assert not one.leave()  # which says so, and lets the server end
                one.gone()
        with pytest.raises(TransportError, match="Redis Cluster cannot be connected"):
            open_membership(url)
        with watched(f"{url}&fallback=127.0.0.1:7") as members:
            assert ids(members) == ["7"]


@pytest.mark.alone
def test_a_failover_by_sentinel_changes_no_view() -> None:
    with redis_sentinels() as (sentinels, master, replica):
        places = ",".join(f"127.0.0.1:{one.port}" for one in sentinels)
        url = f"mmcache+redis+sentinel://{places}/main/0?cluster=test"
        servers = registered(url, 1, 2)
        with watched(url) as members:
            view = members.view()
            master.kill()
            eventually(lambda: replica.client().role()[0] == b"master", "the replica is the master", 60.0)
            stays(lambda: members.view() is view, CONFIRM_S + 3.0)
            servers += registered(url, 3)
            becomes(members, "1", "2", "3")
        leave(servers)
