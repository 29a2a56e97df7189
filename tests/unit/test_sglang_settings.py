"""The HiCache backend's settings: what is known, what is refused, and that the table in the documentation is theirs."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mmcache.errors import ConfigError
from mmcache_connectors.sglang.settings import Settings, parse_settings

URL = "mmcache://127.0.0.1:7600"
GIVEN = {"backend_name": "mmcache", "module_path": "m", "class_name": "C", "interface_v1": 1, "url": URL}


def test_sglangs_own_keys_are_not_mmcaches() -> None:
    assert parse_settings(GIVEN) == Settings(url=URL)
    more = {"deadline_s": 2, "verify": False, "model_identity": "m@1", "allocator": "shm"}
    assert parse_settings(GIVEN | more) == Settings(url=URL, deadline_s=2, verify=False, model_identity="m@1")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, '"url" is missing'),
        ({"url": URL, "colour": 1}, "unknown setting 'colour' for mmcache; the known ones are url, deadline_s"),
        ({"url": 7}, "url=7 is no str"),
        ({"url": URL, "verify": 1}, "verify=1 is no bool"),
        ({"url": URL, "deadline_s": True}, "deadline_s=True is no float"),
        ({"url": URL, "deadline_s": 0}, "above 0"),
        ({"url": URL, "deadline_s": float("nan")}, "above 0"),
        ({"url": "embedded://"}, "every scheduler process would hold a cache of its own"),
        ({"url": "http://127.0.0.1"}, "scheme 'http'"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_settings(settings)


def test_the_documented_table_is_the_settings() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "sglang.md").read_text()
    rows = re.findall(r"^\| `([a-z_]+)` \| (?:`(.*?)`|must be given) \|", text, re.MULTILINE)
    defaults = {field.name: getattr(Settings(url=""), field.name) for field in fields(Settings)}
    assert [name for name, _ in rows] == list(defaults)
    for name, default in rows:
        if name != "url":
            assert default == json.dumps(defaults[name])
