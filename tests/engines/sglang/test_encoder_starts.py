"""Encoder servers of other kinds, and starts that cannot work: each costs a start."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmcache_connectors.sglang.plugin import PREFIX
from tests.engines.sglang.encoders import GLOBAL_CACHE, encoding
from tests.engines.sglang.harness import Cache, running
from tests.engines.sglang.prompts import TEXTS

pytestmark = pytest.mark.full
NOWHERE = "mmcache://127.0.0.1:1"


@pytest.fixture(scope="module")
def picture(made: Path) -> Path:
    """One picture."""
    return made / "pictures" / "first.png"


@pytest.fixture(scope="module")
def right(made: Path, picture: Path) -> bytes:
    """Its embedding."""
    with encoding(made / "vl", None) as plain:
        return plain.encode([picture]).data


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"URL": NOWHERE, "COLOUR": "red"},
            f"{PREFIX}COLOUR is no setting of mmcache's; the known ones are",
        ),
        ({"VERIFY": "yes"}, f"{PREFIX}URL is not set; name a server"),
    ],
)
def test_bad_settings_end_the_start_and_say_what_to_change(made: Path, settings: dict[str, str], said: str) -> None:
    with (
        pytest.raises(AssertionError, match="the encoder server ended") as raised,
        encoding(made / "vl", settings, *GLOBAL_CACHE),
    ):
        pass
    assert said in str(raised.value)


def test_a_cache_that_is_not_there_is_warned_of_and_no_more(made: Path, picture: Path, right: bytes) -> None:
    with encoding(made / "vl", {"URL": NOWHERE}, *GLOBAL_CACHE) as encoder:
        assert len(encoder.lines("mmcache", "does not answer")) == 1
        for encoded in (1, 0):  # SGLang's own memory has it then
            answer = encoder.encode([picture])
            assert (answer.data, answer.encoded) == (right, encoded)


def test_another_dtype_is_another_embedding(made: Path, picture: Path, right: bytes) -> None:
    with Cache() as cache:
        with encoding(made / "vl", {"URL": cache.url}, *GLOBAL_CACHE) as encoder:
            assert encoder.encode([picture]).data == right
            cache.settle()
        with encoding(made / "vl", {"URL": cache.url}, *GLOBAL_CACHE, "--dtype", "float16") as other:
            answer = other.encode([picture])
        assert answer.encoded == 1
        assert len(answer.data) == len(right)
        assert answer.data != right
        with encoding(made / "vl", {"URL": cache.url}, *GLOBAL_CACHE) as again:
            answer = again.encode([picture])
        assert (answer.data, answer.encoded) == (right, 0)


def test_an_engine_that_is_no_encoder_goes_on_as_ever(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREFIX + "URL", NOWHERE)
    with running(made / "text") as engine:
        assert len(engine.ask(TEXTS["plain"]).tokens) == 8
        assert engine.lines("'mooncake' is already registered")
        assert not engine.lines("does not answer")


@pytest.mark.parametrize(("ranks", "processes"), [("--dp-size", 3), ("--tp-size", 2)])
def test_two_ranks_share_one_cache(made: Path, picture: Path, ranks: str, processes: int) -> None:
    """SGLang itself loads plugins in an encoder server's first process only."""
    with Cache() as cache:
        with encoding(made / "vl", {"URL": cache.url}, *GLOBAL_CACHE, ranks, "2") as encoder:
            first = encoder.encode([picture])
            cache.settle()
            assert len(encoder.lines("'mooncake' is already registered")) == processes
        with encoding(made / "vl", {"URL": cache.url}, *GLOBAL_CACHE, ranks, "2") as again:
            answer = again.encode([picture])
        assert (answer.data, answer.encoded) == (first.data, 0)
        assert cache.counters()["stored"] == 1
