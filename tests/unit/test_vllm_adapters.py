"""LoRA adapters: a digest by content, and None where the engine may hold other weights. No vLLM needed."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path

import pytest

from mmcache.identity import directory_digest
from mmcache_connectors.vllm import adapters
from mmcache_connectors.vllm.adapters import AdapterIdentities
from tests.unit.heard import heard


def make_adapter(folder: Path, content: bytes = b"lora weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def retrain(folder: Path, content: bytes = b"LORA WEIGHTS") -> None:
    """Other weights of the same size under the same path."""
    before = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    (folder / "adapter_model.safetensors").write_bytes(content)
    os.utime(folder / "adapter_model.safetensors", ns=(before + 1, before + 1))


def test_an_adapter_is_its_contents(tmp_path: Path) -> None:
    one, copy = make_adapter(tmp_path / "one"), make_adapter(tmp_path / "copy")
    other = make_adapter(tmp_path / "other", b"other weights")
    known = AdapterIdentities()
    assert known.identity(1, "name 1", str(one)) == known.identity(2, "name 2", str(copy)) == directory_digest(one)
    assert known.identity(3, "name 3", str(other)) == directory_digest(other) != directory_digest(one)
    assert known.identity(1, "name 1", str(one)) == AdapterIdentities().identity(7, "name 7", str(one))


def test_retrained_under_one_path_is_another_adapter_under_a_new_id_and_none_under_the_old(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_adapter(tmp_path / "a")
    known = AdapterIdentities()
    first = known.identity(1, "name 1", str(path))
    retrain(path)
    with caplog.at_level(logging.WARNING):
        assert [known.identity(1, "name 1", str(path)) for _ in range(3)] == [None] * 3
    assert len(heard(caplog)) == 1
    assert "adapter 1" in caplog.text
    second = known.identity(2, "name 2", str(path))
    assert second == directory_digest(path) != first
    retrain(path, b"lora weights")  # as at first: the engine may still have seen the second
    assert known.identity(1, "name 1", str(path)) is None
    assert known.identity(3, "name 3", str(path)) == first


@pytest.mark.parametrize("change", ["file added", "file gone", "replaced", "folder gone"])
def test_any_change_ends_an_id(tmp_path: Path, change: str) -> None:
    path = make_adapter(tmp_path / "a")
    known = AdapterIdentities()
    assert known.identity(1, "name 1", str(path))
    if change == "file added":
        (path / "new_embeddings.safetensors").write_bytes(b"more")
    elif change == "file gone":
        (path / "adapter_config.json").unlink()
    elif change == "replaced":  # same bytes and times: another inode
        shutil.copy2(path / "adapter_model.safetensors", tmp_path / "same")
        os.replace(tmp_path / "same", path / "adapter_model.safetensors")
    else:
        shutil.rmtree(path)
    assert known.identity(1, "name 1", str(path)) is None
    make_adapter(path)
    assert known.identity(1, "name 1", str(path)) is None


def test_one_id_with_two_paths_is_ambiguous(tmp_path: Path) -> None:
    known = AdapterIdentities()
    assert known.identity(1, "name 1", str(make_adapter(tmp_path / "a")))
    assert known.identity(1, "name 1", str(make_adapter(tmp_path / "b"))) is None
    assert known.identity(1, "name 1", str(tmp_path / "a")) is None


@pytest.mark.parametrize("path", ["", "/nowhere/at/all", "~/no-such-adapter", "acme/not-in-the-cache", "a\0b"])
def test_what_cannot_be_found_is_not_cached(path: str, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    known = AdapterIdentities()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # empty, so "" finds no adapter files here
        assert known.identity(1, "name 1", path) is None
        assert known.identity(1, "name 1", path) is None
    assert len(heard(caplog)) == 1


def test_an_adapter_that_was_never_whole_stays_none(tmp_path: Path) -> None:
    known = AdapterIdentities()
    assert known.identity(1, "name 1", str(tmp_path / "late")) is None
    make_adapter(tmp_path / "late")  # the engine may have loaded something else meanwhile
    assert known.identity(1, "name 1", str(tmp_path / "late")) is None
    assert known.identity(2, "name 2", str(tmp_path / "late"))


def test_files_that_change_while_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_adapter(tmp_path / "a")

    def meanwhile(folder: Path) -> str:
        retrain(path)
        return directory_digest(folder)

    monkeypatch.setattr(adapters, "directory_digest", meanwhile)
    known = AdapterIdentities()
    assert known.identity(1, "name 1", str(path)) is None
    assert known.identity(1, "name 1", str(path)) is None


def test_files_are_read_once_whatever_the_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads = make_adapter(tmp_path / "a"), []

    def counted(folder: Path) -> str:
        reads.append(folder)
        return directory_digest(folder)

    monkeypatch.setattr(adapters, "directory_digest", counted)
    known = AdapterIdentities()
    found: list[str | None] = [known.identity(0, "name 0", str(path))]
    threads = [
        threading.Thread(target=lambda n=number: found.append(known.identity(n % 4, f"name {n % 4}", str(path))))
        for number in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [directory_digest(path)] * 17
    assert len(reads) == 1


def test_memory_is_bounded_and_known_ids_keep_their_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_adapter(tmp_path / "a")
    known = AdapterIdentities(max_adapters=2)
    assert [known.identity(number, f"name {number}", str(path)) is not None for number in range(4)] == [
        True,
        True,
        False,
        False,
    ]
    assert known.identity(0, "name 0", str(path))
    assert known.identity(5, "name 5", "/nowhere") is None
    assert len(heard(caplog)) == 1


def test_before_storing_one_can_ask_whether_the_files_are_still_the_same(tmp_path: Path) -> None:
    path = make_adapter(tmp_path / "a")
    known = AdapterIdentities()
    assert not known.unchanged(1)  # never asked for
    known.identity(1, "name 1", str(path))
    assert known.unchanged(1)
    retrain(path)
    assert not known.unchanged(1)
    shutil.rmtree(path)
    assert not known.unchanged(1)
    assert known.identity(1, "name 1", str(path)) is None
    make_adapter(path)
    assert not known.unchanged(1)


def test_a_name_that_stood_for_two_contents_stands_for_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """vLLM's own caches go by name and path, so they answer the second adapter with the first one's blocks."""
    path, other = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b", b"other weights")
    known = AdapterIdentities()
    assert known.identity(1, "name", str(path)) is not None
    assert known.identity(2, "name", str(path)) == known.identity(1, "name", str(path))  # the same weights again
    assert known.identity(3, "name", str(other)) is None
    assert "new name" in caplog.text
    assert not known.unchanged(1)  # what it finds in the engine's caches may be the other's by now
    assert known.identity(1, "name", str(path)) is None
    assert known.identity(4, "name", str(path)) is None
    assert known.identity(5, "another name", str(other)) == directory_digest(other)
