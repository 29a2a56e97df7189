"""Settings of SGLang's plugins in the environment: what is taken, and what each error says to do."""

from __future__ import annotations

import re

import pytest

from mmcache.errors import ConfigError
from mmcache_connectors.sglang.environment import environment_settings
from mmcache_connectors.sglang.settings import Settings

URL = "mmcache://127.0.0.1:7600"


def test_each_setting_has_its_variable() -> None:
    given = {
        "X_URL": URL,
        "X_DEADLINE_S": "2.5",
        "X_MODEL_IDENTITY": "repository@commit",
        "X_VERIFY": "No",
        "Y_URL": "y",
    }
    assert environment_settings(given, "X_") == Settings(URL, 2.5, "repository@commit", False)
    assert environment_settings({"X_URL": URL}, "X_") == Settings(URL)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "X_URL is not set; name a server"),
        ({"X_URL": ""}, "X_URL is not set"),
        ({"X_ULR": URL}, "X_ULR is no setting of mmcache's; the known ones are X_URL, X_DEADLINE_S"),
        ({"X_URL": URL, "X_VERIFY": "perhaps"}, "X_VERIFY is 'perhaps', which is no bool"),
        ({"X_URL": URL, "X_DEADLINE_S": "soon"}, "X_DEADLINE_S is 'soon', which is no float"),
        ({"X_URL": URL, "X_DEADLINE_S": "0"}, "must be above 0"),
        ({"X_URL": "embedded://"}, "start `mmcache serve` and name it"),
    ],
)
def test_what_cannot_work_is_said(given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        environment_settings(given, "X_")
