"""Ports of servers under test stay theirs."""

from __future__ import annotations

import socket

import pytest

from mmcache.testing.ports import keeper, own_ports


def test_none_is_given_twice() -> None:
    seen = [port for _ in range(100) for port in own_ports(3)]
    assert len(set(seen)) == 300


def test_none_that_somebody_has_is_given_and_all_of_a_range_are() -> None:
    (first,) = own_ports(1, range(17_000, 19_000))  # where no other test takes any
    within = range(first + 1, first + 4)
    with socket.create_server(("127.0.0.1", within[1])):
        assert {own_ports(1, within)[0] for _ in range(2)} == {within[0], within[2]}


def test_who_asks_for_a_kept_port_has_it_and_nobody_else_is_given_it() -> None:
    with keeper() as kept:
        address = kept.getsockname()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
        with socket.create_server(address), pytest.raises(OSError, match="in use"):
            keeper(address[1])
        socket.create_server(address).close()
