"""The access file: what it may say, what it may not, who is let in, and edits that leave the rest as it was."""

from __future__ import annotations

import contextlib
import hmac
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmcache.errors import ConfigError
from mmcache.server.access_edit import find_token, with_token, without_token
from mmcache.server.grants import Admitted, Grants, digest_of, parse_grants
from mmcache.store.usage import Quota

A, B = digest_of("token of a"), digest_of("token of b")
NOW_S = 1_800_000_000.0
FILE = f"""
# who may come in
[[tenant]]
name = "a"
quota = "2KiB"
namespace_quota = 1024

[[tenant]]
name = "b"

[[token]]
tenant = "a"
sha256 = "{A.hex()}"
expires = "2027-01-15T08:00:01Z"

# for the operators
[[token]]
tenant = "b"
sha256 = "{B.hex().upper()}"
admin = true
note = "cron [[token]]"

[[certificate]]
common_name = "engine-1"
tenant = "a"
"""


def test_a_file_says_who_is_who_and_what_they_may_store() -> None:
    grants = parse_grants(FILE)
    assert grants.tenants["a"].quota == Quota(2048, 1024)
    assert grants.tenants["b"].quota == Quota(None, None)
    assert grants.admit(A, None, NOW_S) == Admitted("a", admin=False, shared_memory=False)
    assert grants.admit(B, None, NOW_S) == Admitted("b", admin=True, shared_memory=False)
    assert grants.admit(b"", "engine-1", NOW_S) == Admitted("a", admin=False, shared_memory=False)


@pytest.mark.parametrize(
    ("digest", "common_name", "now_s"),
    [
        (b"", None, NOW_S),  # nothing came
        (digest_of("token of c"), None, NOW_S),
        (bytes(32), None, NOW_S),
        (A, None, NOW_S + 2),  # expired
        (b"", "engine-2", NOW_S),
        (b"", "", NOW_S),  # a certificate without a name
        (A, "", NOW_S),
        (A, "engine-2", NOW_S),  # a token, and a certificate that is not listed
        (B, "engine-1", NOW_S),  # of another tenant
        (digest_of("token of c"), "engine-1", NOW_S),  # a wrong token is not made good by a certificate
    ],
)
def test_everybody_else_stays_outside(digest: bytes, common_name: str | None, now_s: float) -> None:
    assert parse_grants(FILE).admit(digest, common_name, now_s) is None


def test_a_token_with_a_certificate_of_the_same_tenant_is_let_in() -> None:
    assert parse_grants(FILE).admit(A, "engine-1", NOW_S) == Admitted("a", admin=False, shared_memory=False)


def test_every_entry_is_compared_whatever_came(monkeypatch: pytest.MonkeyPatch) -> None:
    grants, compared = parse_grants(FILE), []
    real = hmac.compare_digest

    def noted(entry: bytes, digest: bytes) -> bool:
        compared.append((entry, digest))
        return real(entry, digest)

    monkeypatch.setattr(hmac, "compare_digest", noted)
    for digest in (A, B, digest_of("wrong"), b""):
        compared.clear()
        grants.admit(digest, None, NOW_S)
        assert [entry for entry, _ in compared] == [A, B]


def test_memory_is_shared_with_a_tenant_only_while_it_is_alone_or_the_file_says_so() -> None:
    alone = with_token("", "a", A.hex())
    assert parse_grants(alone).shares_memory("a")
    both = with_token(alone, "b", B.hex())
    assert not parse_grants(both).shares_memory("a")
    said = both.replace('name = "a"', 'name = "a"\nshared_memory = true')
    assert parse_grants(said).shares_memory("a")
    assert not parse_grants(said).shares_memory("b")
    assert not parse_grants(alone.replace('name = "a"', 'name = "a"\nshared_memory = false')).shares_memory("a")


TENANT = '[[tenant]]\nname = "a"\n'
TOKEN = f'[[token]]\ntenant = "a"\nsha256 = "{A.hex()}"\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "lets nobody in"),
        (TENANT, "mmcache token new"),
        ("[[tenant", "it is not TOML"),
        ("[[users]]\n", "'users'"),
        ("tenant = 3", "begin each entry with [[tenant]]"),
        ("tenant = [3]", "begin each entry with [[tenant]]"),
        (TOKEN, "token 1, tenant: 'a' is not in the file; add [[tenant]] with name = 'a'"),
        (TENANT + '[[token]]\ntenant = "a"\n', "token 1, sha256: is missing"),
        (TENANT + '[[token]]\ntenant = "a"\nsha256 = "mmc_abc"\n', "never the token itself"),
        (TENANT + TOKEN + TOKEN, "token 2, sha256: is that of token 1 too"),
        (TENANT + TENANT + TOKEN, "tenant 2, name: is that of tenant 1 too"),
        ('[[tenant]]\nname = "a b"\n' + TOKEN, "tenant 1, name: is 'a b'; use 1 to 64 letters"),
        ('[[tenant]]\nname = ""\n' + TOKEN, "tenant 1, name"),
        ("[[tenant]]\nname = 3\n" + TOKEN, 'tenant 1, name: is 3; write name = "team-a"'),
        (TENANT + 'quota = "much"\n' + TOKEN, "tenant 1, quota: 'much' is not a size; write a number with a unit"),
        (TENANT + "quota = -1\n" + TOKEN, "tenant 1, quota: '-1' is not a size"),
        (TENANT + "namespace_quota = true\n" + TOKEN, "tenant 1, namespace_quota: 'True' is not a size"),
        (TENANT + "qouta = 1\n" + TOKEN, "tenant 1, qouta: is unknown; a tenant has other fields"),
        (TENANT + 'shared_memory = "yes"\n' + TOKEN, "tenant 1, shared_memory: is 'yes'; write shared_memory = true"),
        (TENANT + TOKEN + "admin = 1\n", "token 1, admin: is 1; write admin = true"),
        (TENANT + TOKEN + 'expires = "soon"\n', "token 1, expires: is 'soon'; write a time with its zone"),
        (TENANT + TOKEN + 'expires = "2026-12-31"\n', "with its zone"),
        (TENANT + TOKEN + "expires = 2026-12-31T00:00:00\n", "with its zone"),
        (TENANT + TOKEN + "expires = 12\n", "with its zone"),
        (TENANT + '[[certificate]]\ntenant = "a"\n', "certificate 1, common_name: is missing"),
        (TENANT + '[[certificate]]\ntenant = "a"\ncommon_name = ""\n', "certificate 1, common_name: is empty"),
        (TENANT + 2 * '[[certificate]]\ntenant = "a"\ncommon_name = "x"\n', "is that of certificate 1 too"),
        ('token = [{tenant="x"}]\n' * 1 + TENANT, "token 1, tenant: 'x' is not in the file"),
    ],
)
def test_a_bad_file_names_the_entry_the_field_and_the_remedy(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_grants(text)
    assert says in str(refusal.value)


def test_more_entries_than_are_compared_in_a_moment_are_refused() -> None:
    tokens = "".join(f'[[token]]\ntenant = "a"\nsha256 = "{number:064x}"\n' for number in range(4097))
    with pytest.raises(ConfigError, match="the limit is 4096"):
        parse_grants(TENANT + tokens)


@given(st.text(max_size=200))
def test_any_text_is_grants_or_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert isinstance(parse_grants(TENANT + TOKEN + text), Grants)


def test_a_time_of_toml_itself_will_do_and_without_one_it_is_for_ever() -> None:
    grants = parse_grants(TENANT + TOKEN + "expires = 2027-01-15T08:00:01Z\n")
    assert grants.tokens[0].expires_s == NOW_S + 1
    assert grants.expires_between(NOW_S, NOW_S + 1)
    assert not grants.expires_between(NOW_S + 1, NOW_S + 9)
    assert parse_grants(TENANT + TOKEN).tokens[0].expires_s == math.inf


# ------------------------------------------------------------------------------------------ edits
def test_a_token_is_added_and_taken_out_and_all_else_stays_as_it_was() -> None:
    new = digest_of("new").hex()
    added = with_token(FILE, "b", new, note='say "x" \\')
    assert added.startswith(FILE.rstrip("\n"))
    assert parse_grants(added).tokens[-1].note == 'say "x" \\'
    assert without_token(added, find_token(parse_grants(added), new[:6])).strip() == FILE.strip()
    left = without_token(FILE, find_token(parse_grants(FILE), A.hex().upper()[:8]))
    assert "# who may come in" in left
    assert "# for the operators\n[[token]]" in left
    assert A.hex() not in left
    assert list(parse_grants(left).tenants) == ["a", "b"]


def test_a_new_tenant_comes_with_its_quota_and_an_old_ones_is_not_touched() -> None:
    text = with_token("", "a", A.hex(), quota="1GiB", namespace_quota="64MiB", admin=True)
    grants = parse_grants(text)
    assert grants.tenants["a"].quota == Quota(1 << 30, 64 << 20)
    assert grants.tokens[0].admin
    with pytest.raises(ConfigError, match="change its quota there"):
        with_token(text, "a", B.hex(), quota="2GiB")


BAD_EDITS: list[tuple[dict[str, Any], str]] = [
    ({"tenant": "a b"}, "cannot name a tenant"),
    ({"tenant": "c", "quota": "lots"}, "is not a size"),
    ({"expires": "tomorrow"}, "a time with its zone"),
    ({"note": "two\nlines"}, "cannot be printed"),
    ({"sha256": A.hex()}, "is that of token 1 too"),
]


@pytest.mark.parametrize(("words", "says"), BAD_EDITS)
def test_what_would_make_a_bad_file_is_refused(words: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        with_token(FILE, **({"tenant": "a", "sha256": digest_of("x").hex()} | words))


def test_a_token_is_named_by_enough_digits_and_the_last_one_stays() -> None:
    grants = parse_grants(TENANT + TOKEN)
    with pytest.raises(ConfigError, match="too short"):
        find_token(grants, A.hex()[:5])
    with pytest.raises(ConfigError, match="no token begins"):
        find_token(grants, "0" * 64)
    with pytest.raises(ConfigError, match="it is the last one"):
        without_token(TENANT + TOKEN, grants.tokens[0])


def test_a_file_laid_out_otherwise_is_left_to_its_owner() -> None:
    text = f'token = [{{tenant="a", sha256="{A.hex()}"}}, {{tenant="a", sha256="{B.hex()}"}}]\n' + TENANT
    with pytest.raises(ConfigError, match="edit it by hand"):
        without_token(text, parse_grants(text).tokens[0])
    with pytest.raises(ConfigError):
        with_token(text, "a", digest_of("x").hex())
