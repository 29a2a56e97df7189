"""EndpointSlices of a Kubernetes service (discovery.k8s.io/v1, as the API's JSON) and who is in, given them. Pure.

An endpoint may be in two slices at once, and a service of two address families has each of its pods in both: a pod is
one member, by its name (https://kubernetes.io/docs/concepts/services-networking/endpoint-slices/).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from mmcache.cluster.placement import Member
from mmcache.cluster.seen import MAX_MEMBERS, LeftOut, Seen, check_address, check_id
from mmcache.errors import ConfigError
from mmcache.units import place_text

_FAMILIES: Final = ("IPv4", "IPv6", "FQDN")  # the first of them that a pod has


def who_is_ready(slices: Iterable[Mapping[str, Any]], port_name: str, scheme: str) -> Seen:
    """Members: ready pods that are not about to end, at the port of this name; empty: the only port there is."""
    members: dict[str, Member] = {}
    left_out: dict[str, LeftOut] = {}
    problems: set[str] = set()
    for one in sorted(slices, key=_family):
        name = str(_map(one.get("metadata")).get("name"))
        port = _port(one, port_name)
        endpoints = list(_maps(one.get("endpoints")))
        if endpoints and port is None:
            wanted = f"named {port_name!r}" if port_name else "of its own, but none or several: give port=NAME"
            problems.add(f"EndpointSlice {name} has no TCP port {wanted}")
            continue
        for endpoint in endpoints:
            assert port is not None
            try:
                id_, address = _place(endpoint, port, scheme)
            except ConfigError as error:
                problems.add(f"EndpointSlice {name}: {error}")
                continue
            if why := _why_not(endpoint):
                left_out.setdefault(id_, LeftOut(id_, address, why))
            else:
                members.setdefault(id_, Member(id_, address))
    kept = sorted(members.values())
    if len(kept) > MAX_MEMBERS:
        problems.add(f"{len(kept)} pods are ready; the first {MAX_MEMBERS} by name are used")
    out = tuple(one for id_, one in sorted(left_out.items()) if id_ not in members)
    return Seen(tuple(kept[:MAX_MEMBERS]), out, tuple(sorted(problems)))


def _family(one: Mapping[str, Any]) -> tuple[int, str]:
    kind = one.get("addressType")
    return _FAMILIES.index(kind) if kind in _FAMILIES else len(_FAMILIES), str(_map(one.get("metadata")).get("name"))


def _port(one: Mapping[str, Any], name: str) -> int | None:
    ports = [port for port in _maps(one.get("ports")) if (port.get("protocol") or "TCP") == "TCP"]
    found = [port for port in ports if not name or port.get("name") == name]
    number = found[0].get("port") if len(found) == 1 else None
    return number if isinstance(number, int) and 0 < number < 65536 else None


def _place(endpoint: Mapping[str, Any], port: int, scheme: str) -> tuple[str, str]:
    addresses = endpoint.get("addresses")
    if not isinstance(addresses, list) or not addresses or not isinstance(addresses[0], str):
        raise ConfigError("an endpoint has no address")
    place = place_text(addresses[0], port)
    pod = _map(endpoint.get("targetRef"))
    return check_id(pod.get("name") if pod.get("kind") == "Pod" else place), check_address(f"{scheme}://{place}")


def _why_not(endpoint: Mapping[str, Any]) -> str:
    conditions = _map(endpoint.get("conditions"))
    if conditions.get("terminating"):
        return "terminating"
    return "not ready" if conditions.get("ready") is False else ""  # not said: as good as ready, says the API


def _map(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _maps(value: object) -> Iterator[Mapping[str, Any]]:
    return (one for one in value if isinstance(one, dict)) if isinstance(value, list) else iter(())
