"""What once broke a fuzz target breaks nothing, and what the targets check can fail. Continuous integration runs them
(`make fuzz`); here they get no random input."""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from mmcache.frame import pack_header, parse_header
from tests.fuzz import bed
from tests.fuzz.__main__ import Outcome, main, report, reproduce
from tests.fuzz.edits import Piece, edit_frame, mend, pack, split
from tests.fuzz.frame_target import FrameTarget
from tests.fuzz.server_target import frame_of, read_answers
from tests.fuzz.targets import REAL, start, unavailable

needs_atheris = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel here")


@pytest.mark.parametrize("name", REAL)
def test_seeds_and_what_once_broke_a_target_break_nothing(name: str) -> None:
    if reason := unavailable(name):
        pytest.skip(reason)
    target = start(name)
    try:
        for data in [*target.seeds(), *(path.read_bytes() for path in bed.regressions(name))]:
            assert len(data) <= target.max_nbytes
            target.check(data)
    finally:
        target.close()


# ------------------------------------------------------------------------------------------- the checks can fail
@needs_atheris
def test_a_bug_is_found_and_its_input_kept_and_reproduced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["planted", "--folder", str(tmp_path), "--seconds", "60", "--seed", "1"]) == 1
    said = capsys.readouterr().out
    (kept,) = (tmp_path / "crashes").iterdir()
    assert "crashes=1" in said
    assert "the planted bug" in said
    assert f"planted --reproduce {kept}" in said
    with pytest.raises(AssertionError, match="planted bug"):
        reproduce("planted", kept)


def test_too_little_time_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(Outcome("frame", 3, 1000, 1.0, 0, (), 0), 1000, tmp_path)
    assert not report(Outcome("frame", 3, 999, 1.0, 0, (), 0), 1000, tmp_path)
    assert "its time was up after 999 of 1000 bytes" in capsys.readouterr().out


def test_an_internal_error_in_the_log_is_a_complaint() -> None:
    complaints = bed.Complaints()
    try:
        logging.getLogger("mmcache.server").error("connection dropped")
        with pytest.raises(AssertionError, match="connection dropped"):
            complaints.check()
        complaints.check()
    finally:
        complaints.close()


@pytest.mark.parametrize("limit", [bed.memory_below, bed.resident_below])
def test_memory_over_the_limit_is_noticed(limit: Callable[[int], object]) -> None:
    with pytest.raises(AssertionError, match="the limit is"), limit(1 << 20):  # type: ignore[attr-defined]
        bytearray(b"x" * (64 << 20))  # more than an allocator keeps from earlier: it must ask for pages


def test_a_hang_is_told_from_a_moment_of_slowness() -> None:
    def slow_once() -> bool:
        tries.append(time.monotonic())
        return len(tries) > 1

    tries: list[float] = []
    bed.in_time(slow_once, "this")
    with pytest.raises(AssertionError, match="3 times in a row"):
        bed.in_time(lambda: False, "that")


def test_more_and_more_descriptors_are_noticed() -> None:
    descriptors = bed.Descriptors()
    descriptors.check()
    # Some more: threads that other tests began in this process may close theirs meanwhile.
    files = [open(__file__) for _ in range(bed.SPARE_DESCRIPTORS + 50)]  # noqa: SIM115
    with pytest.raises(AssertionError, match="descriptors are open"):
        descriptors.check()
    for file in files:
        file.close()


def test_a_reader_that_takes_other_bytes_for_the_same_frame_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    target, frame = FrameTarget(), frame_of(0)
    target.check(frame)
    monkeypatch.setattr("tests.fuzz.frame_target.parse_header", lambda data, verify: parse_header(frame))
    with pytest.raises(AssertionError):
        target.check(frame[:40] + b"!" + frame[41:])


@pytest.mark.parametrize(
    "answer", [b"\2", b"MMC1", Piece(11, 1, b"", 5, b"").pack(), Piece(11, 1, b"\xff", 0, b"").pack()]
)
def test_an_answer_no_server_may_give_is_noticed(answer: bytes) -> None:
    with pytest.raises(Exception, match=r"."):
        read_answers(answer)


# ------------------------------------------------------------------------------------------- the changes reach deep
def test_mended_frames_are_sound_again() -> None:
    frame = bytearray(frame_of(0))
    frame[-1] ^= 1
    frame[56] ^= 1
    assert parse_header(mend(frame, 2, 16384)).checksum != parse_header(frame_of(0)).checksum
    random, sound = Random(1), 0
    for _ in range(300):
        edited = edit_frame(frame_of(0), random, 16384)
        assert len(edited) <= 16384
        try:
            header = parse_header(edited)
        except Exception:
            continue
        sums = [stored.checksum for stored in header.tensors]
        sound += pack_header(header.meta, [stored.spec for stored in header.tensors], sums, header.alignment) != frame
    assert sound > 30


def test_a_stream_is_its_messages() -> None:
    pieces = [Piece(1, 1, b"abc", 0, b""), Piece(5, 2, b"", 9, b"payload"), Piece(200, 3, b"", 0, b"")]
    assert split(pack(b"before", pieces)) == (b"before", pieces)
