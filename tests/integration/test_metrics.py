"""The page for Prometheus: the same numbers as STAT, each named once, and nobody beyond this host reads it."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import mmcache
from mmcache.config import ServerConfig
from mmcache.errors import ConfigError, TransportError, UsageError
from mmcache.media import Media
from mmcache.metrics import LABELLED, METRICS
from mmcache.server.serve import Server
from mmcache.testing import faults
from tests.integration.support import blanks, eventually, keys_of, run_cli, values_of

DOCS = Path(__file__).resolve().parents[2] / "docs"


def scrape(url: str) -> dict[str, float]:
    """Every sample by its name, and its label's value behind a colon."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    assert all(family.documentation for family in families)
    return {
        ":".join([sample.name, *sample.labels.values()]): sample.value for one in families for sample in one.samples
    }


def started(**settings: object) -> Server:
    server = Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=16 << 20, **settings))  # type: ignore[arg-type]
    server.start()
    return server


def test_the_page_shows_what_stat_shows_after_real_work(tmp_path: Path) -> None:
    server = started(metrics="127.0.0.1:0", unix_path=str(tmp_path / "s"))  # where no other server that starts looks
    assert server.address is not None
    with mmcache.connect("mmcache://{}:{}".format(*server.address), deadline_s=20) as client:
        keys = keys_of(5, "metrics")
        assert all(client.put(keys[:3], values_of(keys[:3], 5000)))
        client.put(keys[:1], values_of(keys[:1], 5000))
        client.get_into(keys, blanks(5, 5000))
        faults.flip_bit(server.shard, keys.digests[0], 8 * 1000)
        client.get_into(keys[:1], blanks(1, 5000))
        eventually(
            lambda: client.stat()["counters"]["connections"] == 1, "the connection that led to shared memory goes"
        )
        stat = client.stat()["counters"]
        page = scrape(server.metrics_url)
    assert page["mmcache_hits_total"] == 5  # flip_bit looked one up, too
    assert page["mmcache_misses_total"] == 2
    assert page["mmcache_corrupt_dropped_total"] == page["mmcache_put_present_total"] == 1
    assert page[f"mmcache_build_info:{mmcache.__version__}"] == 1
    labelled = {one.prefix + value + one.suffix: (one, value) for one in LABELLED for value in one.values}
    for name, number in stat.items():
        if name in labelled:
            one, value = labelled[name]
            assert page[f"mmcache_{one.name}{'_total' if one.grows else ''}:{value}"] == one.scale * number
        else:
            meaning = METRICS[name]  # a number without a meaning would be a KeyError here
            assert page[f"mmcache_{meaning.name}{'_total' if meaning.grows else ''}"] == number
    server.stop()
    with pytest.raises(urllib.error.URLError):
        scrape(server.metrics_url)


def test_every_number_is_named_once_and_told_of() -> None:
    names = [meaning.name for meaning in METRICS.values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[a-z][a-z_]*", name) and not name.endswith("_total") for name in names)
    told = (DOCS / "python.md").read_text()
    assert [name for name in METRICS if f"`{name}`" not in told] == []
    page = {f"mmcache_{meaning.name}{'_total' if meaning.grows else ''}" for meaning in METRICS.values()}
    used = set(re.findall(r"mmcache_[a-z_]+", (DOCS / "operations.md").read_text()))
    page |= {f"mmcache_{one.name}{'_total' if one.grows else ''}" for one in LABELLED}
    assert used <= page


def test_without_the_option_there_is_no_page_and_elsewhere_it_is_refused() -> None:
    server = started()
    assert server.metrics_url == ""
    server.stop()
    with pytest.raises(ConfigError, match=r"--metrics 0\.0\.0\.0:0 reaches beyond this host.*read what is counted"):
        Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=16 << 20, metrics="0.0.0.0:0"))
    with pytest.raises(ConfigError, match="is not HOST:PORT"):
        Server(ServerConfig(listen="127.0.0.1:0", memory_nbytes=16 << 20, metrics="127.0.0.1:many"))


def test_a_port_that_is_taken_is_told() -> None:
    first = started(metrics="127.0.0.1:0")
    place = first.metrics_url.removeprefix("http://").removesuffix("/metrics")
    second = Server(ServerConfig(listen="127.0.0.1:0", unix_path="", memory_nbytes=16 << 20, metrics=place))
    with pytest.raises(TransportError, match="choose another --metrics"):
        second.start()
    second.stop()
    ended = run_cli("serve", "--listen", "127.0.0.1:0", "--memory", "16MiB", "--metrics", place)
    assert ended.returncode == 1
    assert "choose another --metrics" in ended.stderr
    first.stop()


def test_values_survive_many_scrapes() -> None:
    server = started(metrics="127.0.0.1:0")
    assert server.address is not None
    with mmcache.connect("mmcache://{}:{}".format(*server.address), deadline_s=20) as client:
        keys, back = keys_of(1, "scraped"), blanks(1, 100_000)
        (value,) = values_of(keys, 100_000)
        client.put(keys, [value])
        for number in range(20):
            assert scrape(server.metrics_url)["mmcache_entries"] == 1
            assert all(client.get_into(keys, back))
            assert np.array_equal(back[0], value), number
    server.stop()


def test_what_values_were_computed_from_is_counted_where_writers_say_it() -> None:
    server = started(metrics="127.0.0.1:0")
    assert server.address is not None
    with mmcache.connect("mmcache://{}:{}".format(*server.address), deadline_s=20) as client:
        keys = keys_of(3, "media")
        known = [Media("image", pixels=640 * 480), None, Media("audio", audio_s=2.5)]
        assert all(client.put(keys, values_of(keys, 500), media=known))
        for _ in range(2):
            assert all(client.get_into(keys, blanks(3, 500)))
        page = scrape(server.metrics_url)
        with pytest.raises(UsageError, match="one Media"):
            client.put(keys, values_of(keys, 500), media=known[:2])
        with pytest.raises(UsageError, match="'smell' is unknown"):
            Media("smell")
    server.stop()
    assert page["mmcache_media_hits_total:image"] == 2
    assert page["mmcache_hit_pixels_total:image"] == 2 * 640 * 480
    assert page["mmcache_stored_audio_seconds_total:audio"] == 2.5
    assert page["mmcache_hit_audio_seconds_total:audio"] == 5.0
    assert page["mmcache_kind_hits_total:kv"] == 6
    assert page["mmcache_media_stored_total:video"] == 0
