"""`mmcache token`: files nobody else can read, tokens shown once, listed without secrets, revoked by their digest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mmcache
from mmcache.server.grants import digest_of, parse_grants
from mmcache.testing.process import ServerProcess
from tests.integration.support import run_cli


def token_cli(*words: str) -> str:
    ended = run_cli("token", *words)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_from_a_new_file_to_a_client_and_back_out(tmp_path: Path) -> None:
    file, out = tmp_path / "access.toml", tmp_path / "a.token"
    printed = token_cli("new", "-f", str(file), "-t", "team-a", "--quota", "1GiB", "--note", "by [/hand]")
    assert token_cli("new", "-f", str(file), "-t", "team-a", "--out", str(out)) == ""
    assert [path.stat().st_mode & 0o777 for path in (file, out)] == [0o600, 0o600]
    written = out.read_text().strip()
    text = file.read_text()
    for token in (printed, written):
        assert token.startswith("mmc_")
        assert len(token) >= 4 + 43  # 256 bits
        assert token not in text
        assert digest_of(token).hex() in text
    rows = json.loads(token_cli("list", "-f", str(file), "--json"))
    assert [(row["tenant"], row["sha256"], row["admin"], row["note"]) for row in rows] == [
        ("team-a", digest_of(printed).hex()[:12], False, "by [/hand]"),
        ("team-a", digest_of(written).hex()[:12], False, ""),
    ]
    assert "by [/hand]" in token_cli("list", "-f", str(file))
    with ServerProcess("1MiB", "--access", str(file)) as server:
        with mmcache.connect(f"{server.url}?token_file={out}") as cache:
            assert cache.stat()["transport"] == "shm"
        stat = run_cli("stat", "-c", f"{server.url}?token_file={out}", "--json")
        assert json.loads(stat.stdout)["counters"] == {"bytes_used": 0}
        top = run_cli("top", "--count", "1", "-c", f"{server.url}?token_file={out}")
        assert (top.returncode, "admin tokens only" in top.stderr) == (1, True)
        denied = run_cli("stat", "-c", server.url)
        assert denied.returncode == 1
        assert "access denied" in denied.stderr
    token_cli("revoke", digest_of(printed).hex()[:8], "-f", str(file))
    assert [grant.digest for grant in parse_grants(file.read_text()).tokens] == [digest_of(written)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.token", "access.toml"]


def test_what_cannot_be_done_ends_with_2_and_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "access.toml"
    made = json.loads(token_cli("new", "-f", str(file), "-t", "a", "--admin", "--json"))
    before = file.read_text()
    out = tmp_path / "there"
    out.write_text("mine")
    for words, says in [
        (["new", "-t", "a b"], "cannot name a tenant"),
        (["new", "-t", "a", "--quota", "1GiB"], "change its quota there"),
        (["new", "-t", "b", "--quota", "lots"], "tenant 2, quota: 'lots' is not a size"),
        (["new", "-t", "a", "--expires", "soon"], "a time with its zone"),
        (["new", "-t", "a", "--out", str(out)], "File exists"),
        (["revoke", made["sha256"][:4]], "too short"),
        (["revoke", "0" * 12], "no token begins"),
        (["revoke", made["sha256"]], "it is the last one"),
    ]:
        ended = run_cli("token", *words, "-f", str(file))
        assert (ended.returncode, ended.stdout) == (2, "")
        assert says in ended.stderr
    assert file.read_text() == before
    assert out.read_text() == "mine"
    file.chmod(0o644)
    for words in (["list"], ["new", "-t", "a"], ["revoke", made["sha256"]]):
        ended = run_cli("token", *words, "-f", str(file))
        assert ended.returncode == 2
        assert "chmod 600" in ended.stderr
    assert "No such file" in run_cli("token", "list", "-f", str(tmp_path / "none")).stderr
    assert "make the directory first" in run_cli("token", "new", "-t", "a", "-f", str(tmp_path / "x" / "y")).stderr


def test_several_editors_at_once_lose_nothing(tmp_path: Path) -> None:
    file = tmp_path / "access.toml"
    command = [sys.executable, "-m", "mmcache", "token", "new", "-f", str(file), "-t"]
    editors = [subprocess.Popen([*command, f"team-{number}"], stdout=subprocess.DEVNULL) for number in range(4)]
    assert [editor.wait(60) for editor in editors] == [0] * 4
    assert len(parse_grants(file.read_text()).tokens) == 4
