"""mmcache.testing.trouble for every way to a shard."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mmcache
from mmcache.client.blocking import Client
from mmcache.config import parse_url
from mmcache.testing.leaks import GROWTH_NBYTES, Reader, Taken
from mmcache.testing.trouble import TROUBLES, Trouble
from mmcache.testing.way import SLACK_S, LateError, Way
from mmcache.transport.base import HIT, Result
from tests.contract.ways import WAYS, way_of
from tests.integration.on_a_loop import OnALoop

pytestmark = pytest.mark.alone
TRIES = 6  # so many that some are left where the machine spoils one
WITH_A_CLIENT = [one for one in TROUBLES if "leave" not in one.name]  # of this process


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Way:
    return way_of(request.param, tmp_path_factory.mktemp("way"))


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.name)
def test_the_contract_holds_in_trouble(way: Way, trouble: Trouble) -> None:
    trouble.run(way)


class Awaited(Way):
    """A way that an asyncio client goes."""

    def connect(self, address: str, deadline_s: float, *, lazy: bool = False) -> Any:
        """It, behind a loop that waits."""
        return OnALoop(mmcache.AsyncClient(self.url(address), deadline_s=deadline_s, lazy=lazy))


@pytest.mark.parametrize("name", ["tcp", "tls"])
@pytest.mark.parametrize("trouble", WITH_A_CLIENT, ids=lambda trouble: trouble.name)
def test_it_holds_for_asyncio_too(name: str, trouble: Trouble, tmp_path: Path) -> None:
    way = way_of(name, tmp_path)
    trouble.run(Awaited(way.name, way.arguments, way.address, way.url))


class Liar(Client):
    """Says of whatever it is asked that it was read."""

    def get_into(self, keys: Any, buffers: Any, **options: Any) -> list[Result]:
        """Hits."""
        return [HIT] * len(keys)


class Believed(Way):
    """A way by which a Liar goes."""

    def connect(self, address: str, deadline_s: float, *, lazy: bool = False) -> Client:
        """The Liar."""
        return Liar(replace(parse_url(self.url(address)), deadline_s=deadline_s))


@pytest.mark.parametrize("trouble", WITH_A_CLIENT, ids=lambda trouble: trouble.name)
def test_a_client_that_lies_breaks_it(trouble: Trouble, tmp_path: Path) -> None:
    way = way_of("tcp", tmp_path)
    with pytest.raises(AssertionError, match="a hit with another value"):
        trouble.run(Believed(way.name, way.arguments, way.address, way.url))


class Late(Client):
    """So many of its calls take longer than a machine that runs other tests, too, would."""

    late = 0

    def get_into(self, keys: Any, buffers: Any, **options: Any) -> list[Result]:
        """Right, and late."""
        if Late.late:
            Late.late -= 1
            time.sleep(self.config.deadline_s + SLACK_S)
        return super().get_into(keys, buffers, **options)


class Dawdling(Way):
    """A way by which a Late goes."""

    def connect(self, address: str, deadline_s: float, *, lazy: bool = False) -> Client:
        """The Late."""
        return Late(replace(parse_url(self.url(address)), deadline_s=deadline_s))


@pytest.mark.parametrize("lates", [2, TRIES])
def test_a_call_that_is_late_at_every_try_is_noticed(
    lates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = way_of("tcp", tmp_path)
    (trouble,) = (one for one in TROUBLES if one.name.startswith("a_stopped_server"))
    monkeypatch.setattr("mmcache.testing.trouble.TRIES", TRIES)
    monkeypatch.setattr(Late, "late", lates)
    with pytest.raises(LateError) if lates == TRIES else contextlib.nullcontext():
        trouble.run(Dawdling(way.name, way.arguments, way.address, way.url))
    assert Late.late == 0


@pytest.mark.parametrize("less", [Taken(1, 0, 0), Taken(0, 1, 0), Taken(0, 0, GROWTH_NBYTES + (1 << 20))])
def test_what_is_not_given_back_is_noticed(less: Taken) -> None:
    with Reader("mmcache://127.0.0.1:1") as reader:
        now = Taken(*reader.tell("taken"))
        reader.settles(now)
        with pytest.raises(AssertionError, match="became"):
            reader.settles(Taken(*(had - one for had, one in zip(now, less, strict=True))), patience_s=0.2)
