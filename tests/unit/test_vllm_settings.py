"""The connector's settings: what is accepted, and that everything else is an error with the remedy."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from mmcache.errors import ConfigError
from mmcache_connectors.vllm.settings import EncoderSettings, Settings, parse_settings

URL = "mmcache://127.0.0.1:7600"


def test_the_url_is_enough() -> None:
    settings = parse_settings({"url": URL}, Settings)
    assert (settings.load_mode, settings.trust_media_uuids, settings.save_decode_blocks) == ("async", False, True)
    assert settings.lookup_s + settings.load_s == pytest.approx(settings.deadline_s)


def test_every_setting_can_be_given() -> None:
    given: dict[str, Any] = {
        "url": URL, "load_mode": "sync", "deadline_s": 2, "lookup_wait_ms": 0, "save_decode_blocks": False,
        "save_buffer_mib": 8, "trust_media_uuids": True, "model_identity": "m@1", "weights_epoch": "7",
        "audit_share": 0.01, "explain_misses": False, "record_misses": "/tmp/misses",
        "extra_facts": {"cluster": "a"},
    }  # fmt: skip
    assert given.keys() == {one.name for one in fields(Settings)}
    settings = parse_settings(given, Settings)
    assert {name: getattr(settings, name) for name in given} == given


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({}, 'needs "url"'),
        ({"url": ""}, 'needs "url"'),
        ({"url": URL, "deadline": 1}, "no setting 'deadline'; it takes url, deadline_s"),
        ({"url": "redis://127.0.0.1"}, "scheme 'redis'"),
        ({"url": "embedded://?memory=1GiB"}, "scheduler and workers would each hold a cache of their own"),
        ({"url": URL + "?speed=1"}, "unknown option 'speed'"),
        ({"url": URL, "load_mode": "lazy"}, "use async or sync"),
        ({"url": URL, "deadline_s": "1"}, "write a number"),
        ({"url": URL, "deadline_s": 0}, "from 0.01 to 600"),
        ({"url": URL, "deadline_s": float("nan")}, "from 0.01 to 600"),
        ({"url": URL, "lookup_wait_ms": 1000}, "from 0 to 100"),
        ({"url": URL, "audit_share": 1.5}, "a share from 0 to 1"),
        ({"url": URL, "save_decode_blocks": 1}, "write true or false"),
        ({"url": URL, "save_buffer_mib": True}, "write a whole number"),
        ({"url": URL, "save_buffer_mib": 0}, "from 1 to"),
        ({"url": URL, "extra_facts": {"a": 1}}, "write names and values as strings"),
        ({"url": URL, "extra_facts": "a=1"}, "write an object of strings"),
        ({"url": 7}, "write a string"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(extra: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_settings(extra, Settings)


def test_every_setting_says_what_it_does() -> None:
    assert all(one.metadata.get("help") for one in fields(Settings))


def test_the_encoder_caches_settings_are_its_own() -> None:
    given: dict[str, Any] = {"url": URL, "load_buffer_mib": 8, "audit_share": 0.5, "shared_embeddings": True}
    settings = parse_settings(given, EncoderSettings)
    assert {name: getattr(settings, name) for name in given} == given
    assert all(one.metadata.get("help") for one in fields(EncoderSettings))
    for extra, why in (
        ({"load_mode": "sync"}, "ec_connector_extra_config has no setting 'load_mode'"),
        ({"load_buffer_mib": 0}, "from 1 to"),
        ({"audit_share": 2}, "from 0 to 1"),
        ({"shared_embeddings": True, "trust_media_uuids": True}, "set one only"),
    ):
        with pytest.raises(ConfigError, match=why):
            parse_settings({"url": URL} | extra, EncoderSettings)
