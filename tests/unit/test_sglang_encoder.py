"""The encoder cache's parts that need no SGLang: the plugin where nobody asked for it, settings, names, host memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from mmcache.config import server_config
from mmcache.errors import ConfigError
from mmcache_connectors.sglang.encoder_items import digest_of, modality_of
from mmcache_connectors.sglang.encoder_memory import Pools
from mmcache_connectors.sglang.encoder_settings import EncoderSettings, environment_settings
from mmcache_connectors.sglang.plugin import PREFIX

URL = "mmcache://127.0.0.1:7600"
LOOK = """
import sys
before = set(sys.modules)
from mmcache_connectors.sglang.plugin import activate
activate()
print(sorted(name for name in set(sys.modules) - before if not name.startswith(("_", "encodings"))))
"""


# ------------------------------------------------------------------------------------------------------ the plugin
def test_the_plugin_does_nothing_unless_a_variable_is_set() -> None:
    environment = {name: text for name, text in os.environ.items() if not name.startswith(PREFIX)}
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True, check=True)
    modules = ["mmcache_connectors", "mmcache_connectors.sglang", "mmcache_connectors.sglang.plugin"]
    assert [name for name in eval(done.stdout) if "mmcache" in name or "sglang" in name] == modules
    asked = subprocess.run(
        [sys.executable, "-c", LOOK],
        env=environment | {PREFIX + "URL": URL},
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode == 1  # it goes on to import SGLang, which is not here
    assert "No module named 'sglang'" in asked.stderr


# ---------------------------------------------------------------------------------------------------- the settings
def test_variables_are_the_settings_of_the_hicache_backend() -> None:
    assert environment_settings({PREFIX + "URL": URL, "HOME": "/root", "MMCACHE_MEMORY": "1GiB"}) == EncoderSettings(
        url=URL
    )
    given = {"URL": URL, "DEADLINE_S": "0.5", "MODEL_IDENTITY": "m@1", "VERIFY": "no", "SHARED_EMBEDDINGS": "1"}
    settings = environment_settings({PREFIX + name: text for name, text in given.items()})
    assert settings == EncoderSettings(
        url=URL, deadline_s=0.5, model_identity="m@1", verify=False, shared_embeddings=True
    )


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({}, f"{PREFIX}URL is not set; name a server"),
        ({"URL": ""}, f"{PREFIX}URL is not set"),
        ({"URL": URL, "COLOUR": "1"}, f"{PREFIX}COLOUR is no setting of mmcache's; the known ones are {PREFIX}URL, "),
        ({"URL": URL, "DEADLINE_S": "soon"}, f"{PREFIX}DEADLINE_S is 'soon', which is no float"),
        ({"URL": URL, "DEADLINE_S": "-1"}, "above 0"),
        ({"URL": URL, "VERIFY": "perhaps"}, f"{PREFIX}VERIFY is 'perhaps', which is no bool"),
        ({"URL": "embedded://"}, "start `mmcache serve` and name it"),
        ({"URL": "http://127.0.0.1"}, "scheme 'http'"),
    ],
)
def test_what_cannot_work_is_refused(variables: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        environment_settings({PREFIX + name: text for name, text in variables.items()})


def test_a_server_in_the_same_environment_is_not_disturbed() -> None:
    assert server_config({PREFIX + "URL": URL}) == server_config({})
    with pytest.raises(ConfigError, match="MMCACHE_SGLANF_URL is not a setting"):
        server_config({"MMCACHE_SGLANF_URL": URL})


def test_the_documentation_names_every_variable() -> None:
    text = (Path(__file__).parents[2] / "docs" / "sglang.md").read_text()
    assert all(PREFIX + field.name.upper() in text for field in fields(EncoderSettings))


# ----------------------------------------------------------------------------------------------- names and memory
def test_only_names_that_are_digests_have_a_key() -> None:
    for modality in ("image", "video", "audio"):
        name = f"{modality}-{'0a' * 32}"
        assert (digest_of(name), modality_of(name)) == (b"\x0a" * 32, modality)
    digits = "0a" * 32
    for other in ("18446744073709551615", "", digits, f"once-{digits}", f"image-{digits.upper()}", f"image-{digits}0a"):
        assert digest_of(other) is None
    assert digest_of(f"image-{digits}\n") is digest_of(f" image-{digits}") is digest_of(f"image-{digits[:32]}") is None
    assert digest_of(7) is digest_of(None) is None  # type: ignore[arg-type]


def test_addresses_become_rows_of_one_pool() -> None:
    pools, first, second = Pools(), torch.arange(40.0).reshape(10, 4), torch.arange(30.0).reshape(10, 3)
    pools.add(first)
    pools.add(second)
    (rows,) = pools.rows([first[2].data_ptr()], [3 * 16])
    assert rows.data_ptr() == first[2].data_ptr()
    assert rows.tolist() == first[2:5].tolist()
    pieces = pools.rows([second[7].data_ptr(), second[0].data_ptr()], [3 * 12, 12])
    assert [piece.tolist() for piece in pieces] == [second[7:].tolist(), second[:1].tolist()]


@pytest.mark.parametrize(
    ("rows", "offset", "nbytes"),
    [(0, 0, 0), (0, 0, 15), (0, 4, 16), (8, 0, 3 * 16), (-1, 0, 16), (10, 0, 16)],
    ids=["nothing", "part of a row", "not at a row", "past the end", "before it", "behind it"],
)
def test_other_addresses_are_no_rows(rows: int, offset: int, nbytes: int) -> None:
    pools, pool = Pools(), torch.zeros(10, 4)
    pools.add(pool)
    assert pools.rows([pool.data_ptr() + rows * 16 + offset], [nbytes]) == []
    assert pools.rows([pool.data_ptr(), pool.data_ptr() + rows * 16 + offset], [16, nbytes]) == []


def test_no_memory_is_no_rows() -> None:
    pools = Pools()
    assert pools.rows([1], [16]) == []
    pools.add(torch.zeros(10, 4))
    assert pools.rows([], []) == []


@pytest.mark.parametrize(
    "tensor", [torch.zeros(4), torch.zeros(4, 6)[:, :3], torch.zeros(4, 4, dtype=torch.float16)], ids=str
)
def test_pools_that_are_none_are_refused(tensor: torch.Tensor) -> None:
    pools = Pools()
    pools.add(torch.zeros(10, 4))
    with pytest.raises(ValueError, match="a pool of"):
        pools.add(tensor)
