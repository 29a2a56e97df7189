"""Memory that outlives a server: the journal survives a kill at any step, and what is not this server's is not used."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from types import FrameType
from typing import Any

import pytest

from mmcache.errors import StoreError
from mmcache.store import journal, kept
from mmcache.store.index import Index
from mmcache.store.journal import Journal
from mmcache.store.kept import LAYOUT, PAGE_NBYTES, ROW_NBYTES, Kept, kept_nbytes
from mmcache.store.namespaces import MAX_NAMESPACES, Known, Namespaces, Selection, Stopped
from mmcache.store.notes import MOVED, Notes
from mmcache.store.policies import POLICIES

ENTRIES = 256
SETTINGS: dict[str, str | int] = {"memory": 1 << 20, "alignment": 64, "policy": "value", "access file": "no"}


@pytest.fixture(autouse=True)
def small_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "JOURNAL_NBYTES", 4096)


def memory() -> memoryview:
    return memoryview(bytearray(kept_nbytes(ENTRIES)))


class Life(Kept):
    """A server's start: what was kept, and one column of it taken."""

    def __init__(self, over: memoryview, entries: int = ENTRIES, give_up: str = "", **changed: str | int) -> None:
        super().__init__(over, entries, SETTINGS | changed, give_up=give_up)
        self.column = self.memory(ENTRIES)
        self.begin()


# The journal


def test_a_journal_gives_back_what_was_appended_and_says_when_it_is_full() -> None:
    one = Journal(memoryview(bytearray(16 + 2 * 128)))
    assert list(one) == []
    records = [b"a", b"", b"ccc" * 10]
    assert all(map(one.append, records))
    assert list(one) == records
    assert not one.append(bytes(64))
    assert list(one) == records
    assert not one.rewrite([bytes(64), bytes(64)])
    assert list(one) == records
    assert one.rewrite([b"all"])
    assert one.append(b"more")
    assert list(one) == [b"all", b"more"]
    one.clear()
    assert list(one) == []


def test_a_kill_at_any_step_leaves_the_records_before_or_after_it() -> None:
    over = memoryview(bytearray(16 + 2 * 128))
    one, images, steps = Journal(over), set(), []

    def trace(frame: FrameType, _event: str, _arg: Any) -> Any:
        if frame.f_code.co_filename != journal.__file__:
            return None
        frame.f_trace_opcodes = True
        images.add(bytes(over))
        return trace

    works: list[Callable[[], bool]] = [
        lambda: one.append(b"first"),
        lambda: one.append(b"second" * 8),
        lambda: one.rewrite([b"first", b"third"]),
        lambda: one.append(b"x" * 40),
        lambda: one.rewrite([b"y" * 50]),
        lambda: one.rewrite([b"z"]),
    ]
    tracer = sys.gettrace()  # coverage's
    for work in works:
        before = tuple(one)
        images.clear()
        sys.settrace(trace)
        try:
            assert work()
        finally:
            sys.settrace(tracer)
        left = {tuple(Journal(memoryview(bytearray(image)))) for image in images | {bytes(over)}}
        assert left == {before, tuple(one)}
        steps.append(len(images))
    assert min(steps) > 2  # it was looked at in between


@pytest.mark.parametrize("place", [24, 32, 40, 44])  # a size, a checksum, a record, its end
def test_a_damaged_journal_is_an_error(place: int) -> None:
    over = memoryview(bytearray(16 + 2 * 128))
    assert Journal(over).append(b"first")
    over[place] ^= 0x40
    with pytest.raises(StoreError, match="damaged"):
        list(Journal(over))


def test_a_length_beyond_the_journal_is_an_error() -> None:
    over = memoryview(bytearray(16 + 2 * 128))
    over[16:24].cast("Q")[0] = 1 << 40
    with pytest.raises(StoreError, match="damaged"):
        list(Journal(over))


# What is whose


def test_what_the_last_life_left_goes_on_where_the_settings_are_the_same() -> None:
    over = memory()
    first = Life(over)
    assert (first.first, first.why_cold, first.places) == (True, "nothing was stored before", {})
    first.remember_places({"url": "mmcache://127.0.0.1:7"})
    first.column[3] = 9
    second = Life(over)
    assert (second.first, second.why_cold, second.places) == (False, "", {"url": "mmcache://127.0.0.1:7"})
    assert second.column[3] == 9


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"alignment": 4096}, "alignment was 64 and is 4096"),
        ({"policy": "lru", "access file": "yes"}, "policy was value and is lru, access file was no and is yes"),
        ({"memory": 1 << 19}, "memory was 1048576 and is 524288"),
        ({"entries": 128}, "entries was 256 and is 128"),
        ({"give_up": "they all died of it"}, "they all died of it"),
    ],
)
def test_other_settings_begin_anew_and_say_why(changed: dict[str, Any], says: str) -> None:
    over = memory()
    first = Life(over)
    first.column[3] = 9
    first.notes.tenant(0, "somebody")
    second = Life(over, **changed)
    assert second.why_cold == says
    assert not any(second.column)
    assert second.notes.tenants == []
    third = Life(over, **{name: value for name, value in changed.items() if name != "give_up"})
    assert third.why_cold == ""  # what the second stores goes on


def test_a_build_that_lays_out_columns_otherwise_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    over = memory()
    Life(over)
    monkeypatch.setattr(kept, "LAYOUT", LAYOUT + 1)
    assert Life(over).why_cold == f"layout was {LAYOUT} and is {LAYOUT + 1}"


def test_a_server_that_has_too_little_memory_leaves_nothing_for_the_one_before_to_come_back_to() -> None:
    """It serves without, and writes where the values were: an upgrade that is taken back must not trust those rows."""
    over = memory()
    assert Life(over).why_cold
    assert not Life(over).why_cold
    with pytest.raises(StoreError, match="are held for the index"):
        Kept(over, 2 * ENTRIES, SETTINGS)
    assert Life(over).why_cold == "what the server before left is not complete"


def test_too_little_memory_that_was_never_used_stays_so() -> None:
    over = memory()
    with pytest.raises(StoreError, match="are held for the index"):
        Kept(over, 2 * ENTRIES, SETTINGS)
    assert Life(over).why_cold == "nothing was stored before"


def test_a_start_that_was_killed_halfway_is_not_gone_on_with() -> None:
    over = memory()
    Life(over).column[3] = 9
    halfway = Kept(over, ENTRIES, SETTINGS | {"alignment": 128})  # never began
    assert halfway.why_cold
    again = Life(over)
    assert again.why_cold == "what the server before left is not complete"
    assert not any(again.column)


@pytest.mark.parametrize("place", [70, 90])
def test_a_damaged_page_begins_anew(place: int) -> None:
    over = memory()
    Life(over)
    over[place] ^= 0x20
    assert Life(over).why_cold == "what the server before left is not complete"


def test_a_damaged_journal_begins_anew() -> None:
    over = memory()
    Life(over).notes.tenant(0, "somebody")
    over[PAGE_NBYTES + 41] ^= 1
    assert "damaged" in Life(over).why_cold
    assert Life(over).why_cold == ""


def test_too_little_memory_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(StoreError, match="start both anew"):
        Kept(memory()[:-64], ENTRIES, SETTINGS)


def test_what_could_not_be_read_after_all_begins_anew_with_the_same_tenants() -> None:
    over = memory()
    Life(over).notes.tenant(0, "a")
    second = Kept(over, ENTRIES, SETTINGS)
    second.notes.tenant(1, "b")
    second.notes.namespace(1, Known(0, bytes(32)))
    second.forget("no reason")
    column_ = second.memory(ENTRIES)
    column_[3] = 9
    second.begin()
    assert column_[3] == 0
    third = Life(over)
    assert (third.why_cold, third.notes.tenants, third.notes.known) == ("", ["a", "b"], {})


# Notes


def test_notes_are_read_as_they_were_taken_also_after_many() -> None:
    over = memory()
    one = Life(over).notes
    one.tenant(0, "")
    one.tenant(1, "team-b")
    rules = [(Selection(b"\x01\x02", "kv", {"model": "m/é"}, 1, 2.5), Stopped.READS), (Selection(), Stopped.BOTH)]
    for number in range(1, 400):  # many times what the journal holds
        one.namespace(number, Known(1, number.to_bytes(32, "big"), "kv", {"model": f"m{number}"}, 9))
        if number > 3:
            one.namespace(number - 3, None)
        one.stop(Stopped.WRITES, rules)
    found = Life(over)
    assert found.why_cold == ""
    assert found.notes.tenants == ["", "team-b"]
    assert found.notes.known == one.known
    assert set(one.known) == {397, 398, 399}
    assert (found.notes.stopped, found.notes.rules) == (Stopped.WRITES, rules)


class Counted(Journal):
    """Counts what is written."""

    written = 0

    def _write(self, which: int, records: Iterable[bytes]) -> bool:
        all_of_them = list(records)
        self.written += len(all_of_them)
        return super()._write(which, all_of_them)


def test_no_note_brings_all_that_is_known_with_it_and_each_is_there_at_once() -> None:
    """Of many namespaces that would be a pause of a second, in which the shard answers nobody."""
    over = memoryview(bytearray(16 + 2 * 65_536))
    counted, most, turns, force = Counted(over), 0, 0, over[0]
    one = Notes(counted, pytest.fail, nullcontext())
    one.tenant(0, "")
    for number in range(1, 6000):
        before = counted.written
        one.namespace(number, Known(0, number.to_bytes(32, "big")))
        if number % 7 == 0:
            one.stop(Stopped(number % 4), [])
        if number % 1000 == 0:
            one.tenant(len(one.tenants), f"t{number}")
        if number > 100:
            one.namespace(number - 100, None)
        most = max(most, counted.written - before)
        turns, force = turns + (over[0] != force), over[0]
        if number % 5 == 0:
            again = Notes(Journal(memoryview(bytearray(over))), pytest.fail, nullcontext())
            assert (again.tenants, again.known, again.stopped) == (one.tenants, one.known, one.stopped)
    assert turns > 10
    assert most <= 4 * (MOVED + 2) + len(one.tenants)


def test_after_no_room_was_found_nothing_is_tried_again() -> None:
    over = memoryview(bytearray(16 + 2 * 1024))
    spoilt: list[int] = []
    counted = Counted(over)
    one = Notes(counted, lambda: spoilt.append(1), nullcontext())
    for number in range(1, 100):
        one.namespace(number, Known(0, bytes(32)))
    assert spoilt == [1]
    before = counted.written
    one.namespace(100, Known(0, bytes(32)))
    assert counted.written == before


def test_what_finds_no_room_spoils_the_next_life_and_only_that() -> None:
    over = memory()
    one = Life(over).notes
    for number in range(200):
        one.namespace(1 + number, Known(0, bytes(32), "kv", {"model": "m" * 30}, 31))
    assert Life(over).why_cold == "what the server before left is not complete"
    assert Life(over).why_cold == ""


def test_a_journal_of_other_words_begins_anew() -> None:
    over = memory()
    found = Life(over)
    found._journal.append(b'{"number": 1, "of": 0}')
    assert "makes no sense" in Life(over).why_cold


def test_namespaces_that_are_restored_have_their_numbers_and_their_rules() -> None:
    heard: dict[int, Known | None] = {}
    first = Namespaces(heard.__setitem__)
    one, two = first.number(0, bytes(32), {}), first.number(1, bytes(32), {})
    first.declare(two, "kv", {"model": "m"})
    first.stop(Selection(kind="kv"), Stopped.READS)
    second = Namespaces()
    second.restore({number: known for number, known in heard.items() if known}, first.rules())
    assert (second.number(0, bytes(32), {}), second.number(1, bytes(32), {})) == (one, two)
    assert second.number(2, bytes(32), {}) == two + 1
    assert second.known(two) == first.known(two)
    assert (second.unreadable, second.unwritable) == ({two}, set())


def test_a_namespace_that_is_forgotten_is_told() -> None:
    heard: dict[int, Known | None] = {}
    first = Namespaces(heard.__setitem__)
    for number in range(MAX_NAMESPACES + 1):
        first.number(0, number.to_bytes(32, "big"), {})
    assert heard[1] is None
    assert sum(known is not None for known in heard.values()) == MAX_NAMESPACES


# The layout


@pytest.mark.parametrize("policy", list(POLICIES))
def test_columns_that_are_laid_out_otherwise_need_another_layout_number(policy: str) -> None:
    """If this fails, raise kept.LAYOUT, and write down here what the columns are now."""
    sizes: list[int] = []

    def counted(nbytes: int) -> memoryview:
        sizes.append(nbytes)
        return memoryview(bytearray(nbytes))

    Index(capacity_bytes=1 << 20, max_entries=ENTRIES, seed=1, policy=POLICIES[policy], kept=counted)
    own = {"value": [1, 4], "lru": [], "s3-fifo": [1]}[policy]
    assert (LAYOUT, [nbytes / ENTRIES for nbytes in sizes]) == (2, [1, 36, 8, 4, 4, 4, 4, 1, 1, 36, *own])
    assert sum(sizes) <= ROW_NBYTES * ENTRIES
