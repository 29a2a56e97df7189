"""The compose file of a cluster: `mmcache serve` takes each command, and what it joins is the Redis beside it.

The file itself cannot run here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from mmcache.cli import app
from mmcache.cluster.seen import check_address
from mmcache.config import parse_host_port
from mmcache.server.joining import joined_url

yaml = pytest.importorskip("yaml", reason="comes with the extra kubernetes")
FILE = Path(__file__).resolve().parents[2] / "examples" / "cluster" / "compose.yaml"


def complaints(found: dict[str, Any]) -> list[str]:
    """What is wrong with the services."""
    said = []
    serve: Any = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    addresses = set()
    for name, service in found["services"].items():
        if not set(service["networks"]) <= set(found["networks"]):
            said.append(f"{name} is on a network that is not there")
        if service["command"][0] != "mmcache":
            continue
        options = serve.make_context("serve", list(service["command"][2:])).params
        ((host, port),) = joined_url(options["join"]).hosts
        if found["services"].get(host, {}).get("command", [""])[0] != "redis-server" or port != 6379:
            said.append(f"{name} joins {host}:{port}, where no Redis is")
        address = check_address(options["advertise"]).partition("://")[2]
        if parse_host_port(address) != (name, parse_host_port(options["listen"])[1]):
            said.append(f"{name} advertises {address}")
        addresses.add(address)
    return said if len(addresses) == 3 else [*said, f"{len(addresses)} servers have an address of their own, not 3"]


def test_the_compose_file_fits_together() -> None:
    assert complaints(yaml.safe_load(FILE.read_text())) == []


@pytest.mark.parametrize(
    ("part", "other", "says"),
    [
        ("mmcache://shard-1:7600", "mmcache://shard-0:7600", "shard-1 advertises shard-0:7600"),
        ("redis://redis:6379", "redis://valkey:6379", "joins valkey:6379"),
        ("networks: [cache]", "networks: [lan]", "a network that is not there"),
    ],
)
def test_the_check_can_fail(part: str, other: str, says: str) -> None:
    text = FILE.read_text()
    assert part in text
    assert any(says in one for one in complaints(yaml.safe_load(text.replace(part, other))))


def test_an_option_that_serve_lacks_is_noticed() -> None:
    with pytest.raises(Exception, match="--advertised"):
        complaints(yaml.safe_load(FILE.read_text().replace('"--advertise"', '"--advertised"')))
