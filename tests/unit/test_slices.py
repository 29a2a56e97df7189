"""EndpointSlices decided: who is ready, at which address, whatever the API's JSON holds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.cluster.placement import Member, View
from mmcache.cluster.seen import MAX_MEMBERS
from mmcache.cluster.slices import who_is_ready


def endpoint(pod: str, address: str, **conditions: bool) -> dict[str, Any]:
    return {"addresses": [address], "conditions": conditions, "targetRef": {"kind": "Pod", "name": pod}}


def slice_of(*endpoints: dict[str, Any], name: str = "s", family: str = "IPv4", **changed: Any) -> dict[str, Any]:
    ports = [{"name": "metrics", "port": 9600}, {"name": "mmcache", "port": 7600, "protocol": "TCP"}]
    found = {"metadata": {"name": name}, "addressType": family, "endpoints": list(endpoints), "ports": ports}
    return found | changed


def test_ready_pods_are_in_by_name_at_the_port_of_the_name() -> None:
    one = slice_of(
        endpoint("p-0", "10.0.0.1", ready=True, serving=True, terminating=False),
        endpoint("p-1", "10.0.0.2", ready=False),
        endpoint("p-2", "10.0.0.3", ready=True, terminating=True),
        endpoint("p-3", "10.0.0.4"),  # nothing is said: ready, by the API's documentation
    )
    seen = who_is_ready([one], "mmcache", "mmcache")
    assert seen.members == (Member("p-0", "mmcache://10.0.0.1:7600"), Member("p-3", "mmcache://10.0.0.4:7600"))
    assert [(out.id, out.why) for out in seen.left_out] == [("p-1", "not ready"), ("p-2", "terminating")]
    assert seen.problems == ()


def test_a_pod_in_two_slices_and_two_families_is_one_member() -> None:
    slices = [
        slice_of(endpoint("p-0", "fd00::1"), name="b", family="IPv6"),
        slice_of(endpoint("p-0", "10.0.0.1"), name="a"),
        slice_of(endpoint("p-0", "10.0.0.1", ready=False), name="c"),
    ]
    seen = who_is_ready(slices, "mmcache", "mmcaches")
    assert seen.members == (Member("p-0", "mmcaches://10.0.0.1:7600"),)
    assert seen.left_out == ()
    assert who_is_ready(slices[:1], "mmcache", "mmcache").members == (Member("p-0", "mmcache://[fd00::1]:7600"),)


def test_without_a_pod_the_address_is_the_id() -> None:
    one = slice_of({"addresses": ["10.0.0.9"]})
    assert who_is_ready([one], "mmcache", "mmcache").members == (Member("10.0.0.9:7600", "mmcache://10.0.0.9:7600"),)


@pytest.mark.parametrize(
    ("ports", "name", "says"),
    [
        ([{"name": "other", "port": 1}], "mmcache", "no TCP port named 'mmcache'"),
        ([{"name": "mmcache", "port": 1, "protocol": "UDP"}], "mmcache", "no TCP port named 'mmcache'"),
        ([{"name": "a", "port": 1}, {"name": "b", "port": 2}], "", "give port=NAME"),
        ([{"name": "mmcache"}], "mmcache", "no TCP port"),
        (None, "", "give port=NAME"),
    ],
)
def test_a_port_that_cannot_be_told_is_a_problem(ports: Any, name: str, says: str) -> None:
    seen = who_is_ready([slice_of(endpoint("p", "10.0.0.1"), ports=ports)], name, "mmcache")
    assert seen.members == ()
    assert says in seen.problems[0]


def test_the_only_port_needs_no_name() -> None:
    one = slice_of(endpoint("p", "10.0.0.1"), ports=[{"port": 7601}])
    assert who_is_ready([one], "", "mmcache").members == (Member("p", "mmcache://10.0.0.1:7601"),)


def test_a_slice_without_endpoints_is_no_problem() -> None:
    for one in (slice_of(ports=None), slice_of(ports=None) | {"endpoints": None}):
        assert who_is_ready([one], "mmcache", "mmcache").problems == ()


def test_no_more_than_the_limit_are_in() -> None:
    one = slice_of(*(endpoint(f"p-{n:04}", f"10.0.{n >> 8}.{n & 255}") for n in range(MAX_MEMBERS + 1)))
    seen = who_is_ready([one], "mmcache", "mmcache")
    assert len(seen.members) == MAX_MEMBERS
    assert f"{MAX_MEMBERS + 1} pods are ready" in seen.problems[0]


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.just("10.0.0.1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["metadata", "name", "endpoints", "addresses", "conditions", "ready", "ports", "port",
                         "targetRef", "kind", "addressType", "protocol", "terminating"]), inner, max_size=5
    ),
    max_leaves=20,
)  # fmt: skip


@given(st.lists(st.dictionaries(st.sampled_from(["metadata", "endpoints", "ports", "addressType"]), JSON), max_size=4))
def test_whatever_the_json_holds_the_members_make_a_view(slices: list[dict[str, Any]]) -> None:
    seen = who_is_ready(slices, "", "mmcache")
    if seen.members:
        View(seen.members)
