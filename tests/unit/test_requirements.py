"""Installing mmcache beside an engine changes nothing the engine has pinned.

tests/data holds the frozen requirements of working installations: facts, not ours to edit. Every range that mmcache,
or anything mmcache pulls in, asks for must admit the version pinned there, so an installer has nothing to replace.
What is pulled in is read from the metadata of what is installed here. A pinned version that is admitted stays, and
what it asks for is met there already: the walk ends at it, whatever version is installed here.
"""

from __future__ import annotations

import tomllib
from collections.abc import Container, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FROZEN = sorted((ROOT / "tests" / "data").glob("*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(text: str) -> dict[str, str]:
    """Version by normalised name, from `name==version` lines; the last of two lines for one name wins, as for pip."""
    pairs = (line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def asked_for(requirements: list[str], pinned: Container[str] = ()) -> Iterator[tuple[str, Requirement]]:
    """(who asks, requirement) for `requirements` of mmcache and, transitively, of whatever of them is installed and not
    pinned (but for a pinned one's extras, which may be new)."""
    waiting = [("mmcache", Requirement(text), frozenset[str]()) for text in requirements]
    seen = set()
    while waiting:
        who, requirement, extras = waiting.pop()
        environments = [{"extra": extra} for extra in extras or {""}]
        if requirement.marker and not any(requirement.marker.evaluate(environment) for environment in environments):
            continue
        yield who, requirement
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, wanted) in seen or (name in pinned and not wanted):
            continue
        seen.add((name, wanted))
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [(name, Requirement(text), wanted) for text in needed]


def clashes(requirements: list[str], pinned: dict[str, str]) -> list[str]:
    """One line for every requirement that an installer could only meet by replacing a pinned version."""
    return [
        f"{who} asks for {requirement}, pinned is {version}"
        for who, requirement in asked_for(requirements, pinned)
        if (version := pinned.get(canonicalize_name(requirement.name))) is not None
        and not requirement.specifier.contains(version, prereleases=True)
    ]


def test_the_frozen_lists_are_there() -> None:
    assert {path.stem.split("-")[0] for path in FROZEN} >= {"vllm", "sglang", "xfuser", "lmcache"}
    beside = ROOT / "tests" / "data" / "sglang-diffusion-cpu-0.5.23.txt"  # what comes to SGLang's own list
    assert beside in FROZEN
    assert all(len(pins(path.read_text())) > (5 if path == beside else 50) for path in FROZEN)


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("extra", ["base", "media", "cluster", "kubernetes"])
def test_installing_changes_no_pinned_version(frozen: Path, extra: str) -> None:
    requirements = PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra != "base" else [])
    assert clashes(requirements, pins(frozen.read_text())) == []


@pytest.mark.parametrize("frozen", FROZEN, ids=lambda path: path.stem)
def test_the_grpc_extra_fits_too(frozen: Path) -> None:
    """Its own ranges only: health checking and reflection have a release for each protobuf and grpcio, not one for all,
    so what the ones that are installed here ask for says nothing about what is installed there."""
    pinned = pins(frozen.read_text())
    extra = PROJECT["optional-dependencies"]["grpc"]
    assert [clash for clash in clashes(extra, pinned) if clash.startswith("mmcache ")] == []
    assert clashes(["grpcio>=99"], {"grpcio": "1.85.1"}) == ["mmcache asks for grpcio>=99, pinned is 1.85.1"]


def test_the_base_install_has_neither_torch_nor_an_engine() -> None:
    names = {canonicalize_name(requirement.name) for _, requirement in asked_for(PROJECT["dependencies"])}
    assert names.isdisjoint(
        {"torch", "triton", "vllm", "sglang", "diffusers", "transformers", "grpcio", "grpcio-tools"}
    )
    assert {"numpy", "protobuf", "blake3", "xxhash", "typer", "rich", "markdown-it-py"} <= names  # the walk went deeper


@pytest.mark.parametrize(
    ("requirement", "pinned", "expected"),
    [
        ("numpy<2", {"numpy": "2.4.6"}, ["mmcache asks for numpy<2, pinned is 2.4.6"]),
        ("protobuf<7,>=5.29", {"protobuf": "7.36.2"}, ["mmcache asks for protobuf<7,>=5.29, pinned is 7.36.2"]),
        ("rich", {"markdown-it-py": "0.1"}, ["rich asks for markdown-it-py>=2.2.0, pinned is 0.1"]),
        ("rich", {"rich": "13.9.4", "markdown-it-py": "0.1"}, []),  # what is there meets what it asks for
        ("numpy>=1.26", {"numpy": "2.4.6"}, []),
        ("no-such-distribution>=2", {"numpy": "2.4.6"}, []),
    ],
)
def test_the_check_can_fail(requirement: str, pinned: dict[str, str], expected: list[str]) -> None:
    assert clashes([requirement], pinned) == expected
