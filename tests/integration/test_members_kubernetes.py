"""Membership by Kubernetes: the official client against api_server.py, and what a watch goes through."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mmcache.cluster.membership import Watched
from mmcache.cluster.urls import open_membership
from mmcache.errors import ConfigError, TransportError
from tests.integration.api_server import ApiServer
from tests.integration.certificates import Authority
from tests.integration.members_bed import watched
from tests.integration.support import eventually, in_time, run_cli

pytest.importorskip("kubernetes", reason="the extra kubernetes is not installed")


def pods(*numbers: int, **conditions: bool) -> list[dict[str, Any]]:
    said = {"ready": True, "serving": True, "terminating": False} | conditions
    return [
        {"addresses": [f"10.0.0.{n}"], "conditions": said, "targetRef": {"kind": "Pod", "name": f"cache-{n}"}}
        for n in numbers
    ]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that stands still for a while the API server is late, and not lost."""
    monkeypatch.setattr("mmcache.cluster.kubernetes_members.WAIT_S", 15.0)


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with ApiServer() as one:
        one.apply("s1", pods(1, 2))
        one.apply("other", pods(9), service="other")
        yield one


@pytest.fixture
def url(api: ApiServer, tmp_path: Path) -> str:
    return url_of(api, tmp_path)


def url_of(api: ApiServer, folder: Path, token: str = "let-me-in") -> str:
    path = folder / f"kubeconfig-{token}"
    path.write_text(api.kubeconfig(token))
    return f"mmcache+k8s://ns/cache?port=mmcache&kubeconfig={path}"


def numbers(members: Watched) -> list[int]:
    return [int(member.id.removeprefix("cache-")) for member in members.view().members]


def becomes(members: Watched, *expected: int) -> None:
    eventually(lambda: numbers(members) == list(expected), f"the pods are {expected}")


def test_ready_pods_of_the_service_are_in_and_changes_come_at_once(api: ApiServer, url: str) -> None:
    with watched(url) as members:
        assert [member.address for member in members.view().members] == [
            "mmcache://10.0.0.1:7600",
            "mmcache://10.0.0.2:7600",
        ]
        view = members.view()
        eventually(lambda: api.watches, "it watches")
        api.apply("s2", pods(3))
        becomes(members, 1, 2, 3)
        api.apply("s1", pods(1) + pods(2, terminating=True))
        becomes(members, 1, 3)
        assert [(one.id, one.why) for one in members.seen.left_out] == [("cache-2", "terminating")]
        api.apply("s1", pods(1, ready=False) + pods(2))
        becomes(members, 2, 3)
        api.delete("s2")
        becomes(members, 2)
        api.apply("s1", pods(1, 2))
        becomes(members, 1, 2)
        assert members.view() == view
        assert api.lists == 2  # one at the start, one before the watch


def test_without_ready_pods_the_last_view_goes_on(api: ApiServer, url: str) -> None:
    with watched(url) as members:
        eventually(lambda: api.watches, "it watches")
        api.apply("s1", None)  # as the API says it: null, not an empty list
        eventually(lambda: members.seen.members == (), "it is seen")
        assert numbers(members) == [1, 2]
    with pytest.raises(TransportError, match="no server has joined Kubernetes service ns/cache"):
        open_membership(url)


@pytest.mark.parametrize("as_status", [False, True])
def test_a_version_that_is_gone_is_listed_again(api: ApiServer, url: str, as_status: bool) -> None:
    api.gone_as_status = as_status
    with watched(url) as members:
        eventually(lambda: api.watches, "it watches")
        api.compact()
        api.hang_up()
        api.apply("s1", pods(1, 2, 3))
        becomes(members, 1, 2, 3)
        assert api.lists >= 3


def test_bookmarks_carry_a_watch_over_a_compaction(api: ApiServer, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmcache.cluster import kubernetes_members

    monkeypatch.setattr(kubernetes_members, "WATCH_S", 1)
    with watched(url) as members:
        eventually(lambda: api.watches, "it watches")

        def told() -> int:  # unless its watch ended just then: it lists again, and watches again
            begun = api.watches
            api.compact()
            api.bookmark()
            eventually(lambda: api.bookmarks or api.watches > begun, "it was told, or watches again")
            return api.bookmarks

        eventually(told, "it was told")
        lists, begun = api.lists, api.watches
        eventually(lambda: api.watches >= begun + 2, "it watches again, from the bookmark")
        assert api.lists == lists
        api.apply("s1", pods(1))
        becomes(members, 1)
        assert members.counters["source_losses"] == 0


def test_a_watch_that_is_cut_off_or_refused_loses_nothing(api: ApiServer, url: str) -> None:
    with watched(url) as members:
        view = members.view()
        eventually(lambda: api.watches, "it watches")
        api.stop()
        eventually(lambda: members.counters["source_losses"], "it is noticed")
        time.sleep(0.5)
        assert members.view() is view
        api.forbidden = True
        api.start()
        time.sleep(0.5)
        assert members.view() is view
        api.forbidden = False
        api.apply("s1", pods(1, 2, 3))
        becomes(members, 1, 2, 3)
        assert members.counters["source_losses"] == 1


def test_what_is_wrong_at_the_start_is_said(
    api: ApiServer, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TransportError, match="the API server says 401"):
        open_membership(url_of(api, tmp_path, "no-token"))
    api.forbidden = True
    with pytest.raises(TransportError, match="403 Forbidden; allow get, list and watch of endpointslices"):
        open_membership(url)
    api.forbidden = False
    with pytest.raises(TransportError, match="no server has joined"):
        open_membership(url.replace("ns/cache", "ns/absent"))
    api.hanging = True
    monkeypatch.undo()  # WAIT_S is what it is

    def hangs_s() -> float:
        began_s = time.monotonic()
        with pytest.raises(TransportError, match="does not answer"):
            open_membership(url)
        return time.monotonic() - began_s

    in_time(hangs_s, 6.0)
    api.hanging = False
    with pytest.raises(ConfigError, match=r"run in a pod with a service account, or give kubeconfig=PATH"):
        open_membership("mmcache+k8s://ns/cache?kubeconfig=/no/such/file")
    with watched(f"{url}&fallback=127.0.0.1:1".replace("ns/cache", "ns/absent")) as members:
        assert [member.id for member in members.view().members] == ["127.0.0.1:1"]


@pytest.mark.parametrize("text", ["{", "[]", "hello", "current-context: x\ncontexts: 3\n", "\x00"])
def test_a_kubeconfig_of_nonsense_is_an_error_that_says_what_to_do(text: str, tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(text)
    with pytest.raises(ConfigError, match="give kubeconfig=PATH"):
        open_membership(f"mmcache+k8s://ns/cache?kubeconfig={path}")


def test_a_pod_uses_its_service_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    authority = Authority(tmp_path)
    (tmp_path / "token").write_text("let-me-in")
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", authority.ca)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    with ApiServer(tls=authority.issue("api")) as api:
        api.apply("s1", pods(1, 2))
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(api.port))
        with watched("mmcache+k8s://ns/cache?port=mmcache") as members:
            eventually(lambda: api.watches, "it watches")
            api.apply("s1", pods(1))
            becomes(members, 1)


def test_drain_is_left_to_kubernetes(url: str) -> None:
    ended = run_cli("cluster", "drain", "cache-1", "-c", url)
    assert ended.returncode == 2
    assert "delete its pod" in ended.stderr
    ended = run_cli("cluster", "status", "-c", f"{url}&connect_s=0.1&deadline_s=0.2")
    assert ended.returncode == 1
    assert "cache-1" in ended.stdout
    assert "2 of 2 do not answer" in ended.stderr
