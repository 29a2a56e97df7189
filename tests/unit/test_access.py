"""The access file as a server sees it: modes and owners, reloads, numbers that stay, and binds beyond this host."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from mmcache.config import ServerConfig
from mmcache.errors import ConfigError
from mmcache.private_file import read_private, write_private
from mmcache.server import serve
from mmcache.server.access import Access
from mmcache.server.access_edit import find_token, with_token, without_token
from mmcache.server.caller import Caller
from mmcache.server.grants import digest_of, parse_grants
from mmcache.store.usage import Quota
from tests.unit.file_clock import change_after
from tests.unit.heard import heard


def by_token(access: Access, token: str) -> Caller | None:
    """Who comes in with this token alone."""
    admitted = access.admit(token, None)
    return admitted.caller if admitted else None


def written(path: Path, text: str, mode: int = 0o600) -> str:
    """`path` with this text, replaced in one step as `mmcache token` does."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(mode)
    new.rename(path)
    return str(path)


def file_of(*tokens: tuple[str, str]) -> str:
    text = ""
    for tenant, token in tokens:
        text = with_token(text, tenant, digest_of(token).hex())
    return text


def test_tokens_come_and_go_and_tenants_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    access = Access(written(path, file_of(("a", "a1"), ("b", "b1"))))
    assert by_token(access, "a1") == Caller(1, "a", admin=False)
    assert by_token(access, "b1") == Caller(2, "b", admin=False)
    written(path, file_of(("c", "c1"), ("b", "b2")))
    assert access.refresh()
    assert by_token(access, "a1") is by_token(access, "b1") is None
    assert by_token(access, "b2") == Caller(2, "b", admin=False)
    assert by_token(access, "c1") == Caller(3, "c", admin=False)
    written(path, file_of(("a", "a2")))
    assert access.refresh()
    assert by_token(access, "a2") == Caller(1, "a", admin=False)
    assert [access.tenants.name(number) for number in (1, 2, 3)] == ["a", "b", "c"]
    assert not access.refresh()


def test_rotation_overlaps_and_a_pass_ends_with_its_token(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    text = file_of(("a", "old"))
    access = Access(written(path, text))
    old = access.admit("old", None)
    assert old is not None
    text = with_token(text, "a", digest_of("new").hex())
    written(path, text)
    access.refresh()
    new = access.admit("new", None)
    assert new is not None
    assert new.caller == old.caller
    assert access.still(old)
    text = without_token(text, find_token(parse_grants(text), digest_of("old").hex()))
    written(path, text)
    access.refresh()
    assert not access.still(old)
    assert access.still(new)


def test_a_pass_ends_when_the_right_to_the_memory_does(tmp_path: Path) -> None:
    path = tmp_path / "access.toml"
    access = Access(written(path, file_of(("a", "a1"))))
    held = access.admit("a1", None)
    assert held is not None
    assert held.shared_memory
    written(path, file_of(("a", "a1"), ("b", "b1")))
    access.refresh()
    assert not access.still(held)
    assert access.still(held._replace(shared_memory=False))


def test_an_expiry_is_noticed_without_a_change_of_the_file(tmp_path: Path) -> None:
    now_s = [1_800_000_000.0]
    text = with_token("", "a", digest_of("a1").hex(), expires="2027-01-15T08:00:05Z")
    access = Access(written(tmp_path / "access.toml", text), wall_s=lambda: now_s[0])
    held = access.admit("a1", None)
    assert held is not None
    assert not access.refresh()
    now_s[0] += 10
    assert access.refresh()
    assert not access.still(held)
    assert by_token(access, "a1") is None
    assert not access.refresh()


def test_quotas_are_told_by_number(tmp_path: Path) -> None:
    text = with_token(file_of(("a", "a1")), "b", digest_of("b1").hex(), quota="2KiB", namespace_quota="1KiB")
    access = Access(written(tmp_path / "access.toml", text))
    assert access.quotas == {1: Quota(None, None), 2: Quota(2048, 1024)}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_loose_modes_are_refused_at_the_start(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "access.toml", file_of(("a", "a1")), mode)
    with pytest.raises(ConfigError, match=f"mode 0{mode:o}.*chmod 600"):
        Access(path)


@pytest.mark.parametrize("trouble", ["loose", "nonsense", "gone", "not text"])
def test_a_bad_file_at_a_reload_leaves_the_old_one_in_force_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    path = tmp_path / "access.toml"
    access = Access(written(path, file_of(("a", "a1"))))
    if trouble == "loose":
        change_after(path.stat().st_ctime_ns, path, lambda one: one.chmod(0o644))
    elif trouble == "gone":
        path.unlink()
    elif trouble == "nonsense":
        written(path, "[[token]]\n")
    else:
        path.write_bytes(b"\xff\xfe")
    with caplog.at_level(logging.WARNING, "mmcache.server"):
        assert not access.refresh()
        assert not access.refresh()
    assert len(heard(caplog)) == 1
    assert "stays in force" in caplog.text
    assert by_token(access, "a1") is not None
    path.unlink(missing_ok=True)
    written(path, file_of(("a", "a2")))
    assert access.refresh()
    assert by_token(access, "a2") is not None


def test_a_private_file_must_be_ours_regular_and_of_a_sane_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_private(str(tmp_path / "none"), "secret")
    with pytest.raises(ConfigError, match=r"not a regular file|Is a directory"):
        read_private(str(tmp_path), "secret")
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_private(str(tmp_path / "fifo"), "secret")
    big = tmp_path / "big"
    big.touch(0o600)
    os.truncate(big, (4 << 20) + 1)
    with pytest.raises(ConfigError, match="larger than 4 MiB"):
        read_private(str(big), "secret")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "access.toml", file_of(("a", "a1")))
    os.chown(path, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        Access(path)


def test_a_private_file_is_written_closed_and_whole(tmp_path: Path) -> None:
    old_mask = os.umask(0)
    try:
        write_private(tmp_path / "token", b"x", replace=False, what="token file")
    finally:
        os.umask(old_mask)
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="File exists"):
        write_private(tmp_path / "token", b"y", replace=False, what="token file")
    assert (tmp_path / "token").read_bytes() == b"x"
    write_private(tmp_path / "token", b"z", replace=True, what="token file")
    assert (tmp_path / "token").read_bytes() == b"z"
    assert [path.name for path in tmp_path.iterdir()] == ["token"]


# ------------------------------------------------------------------------------------------ binds beyond this host
TLS = {"tls_cert": "c", "tls_key": "k"}


@pytest.mark.parametrize(
    "settings",
    [
        {"access_file": "a", **TLS},
        {"tls_client_ca": "ca", **TLS},
        {"access_file": "a", "tls_client_ca": "ca", **TLS},
        {"insecure_network": True},
    ],
)
def test_other_hosts_may_come_where_they_are_known_and_nobody_listens_in(settings: dict[str, str]) -> None:
    assert serve._resolve(ServerConfig(**settings), "0.0.0.0:1", "--listen")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "option", "says"),
    [
        ({}, "--listen", "--access FILE or --tls-client-ca FILE, with --tls-cert and --tls-key"),
        (TLS, "--listen", "give --access FILE or --tls-client-ca FILE \\("),
        ({"access_file": "a"}, "--listen", "--tls-cert and --tls-key, as tokens and values would travel readable"),
        ({"access_file": "a", **TLS}, "--metrics", "the page has no access control"),
        ({}, "--metrics", "--insecure-network"),
    ],
)
def test_other_hosts_may_not_otherwise_and_it_says_what_is_missing(
    settings: dict[str, str], option: str, says: str
) -> None:
    config = ServerConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=says):
        serve._resolve(config, "0.0.0.0:1", option)
    assert serve._resolve(config, "127.0.0.1:1", option)


def test_halves_of_tls_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="belong together"):
        ServerConfig(tls_cert="c")
    with pytest.raises(ConfigError, match="belong together"):
        ServerConfig(tls_key="k")
    with pytest.raises(ConfigError, match="needs tls_cert"):
        ServerConfig(tls_client_ca="ca")
