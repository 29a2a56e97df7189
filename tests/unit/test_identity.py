"""Model and adapter identity: contents decide, paths and links do not, and nothing unreadable passes for a model."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from mmcache import identity
from mmcache.errors import KeyInputError
from mmcache.identity import directory_digest, file_digest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "text_encoder").mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 8}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    (folder / "merges.txt").write_text("a b")
    (folder / "text_encoder" / "model.safetensors").write_bytes(b"encoder")
    return folder


def test_a_digest_is_text_that_a_namespace_takes_as_a_fact(model: Path) -> None:
    for text in (directory_digest(model), file_digest(model / "config.json")):
        assert re.fullmatch("b3:[0-9a-f]{64}", text)
    assert directory_digest(str(model)) == directory_digest(model)


def test_the_path_and_the_times_do_not_matter(model: Path, tmp_path: Path) -> None:
    wanted = directory_digest(model)
    copy = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(model, copy)
    os.utime(copy / "config.json", (0, 0))
    assert directory_digest(copy) == wanted
    assert directory_digest(f"{copy}/") == wanted
    (tmp_path / "link").symlink_to(copy)
    assert directory_digest(tmp_path / "link") == wanted


def test_a_cache_made_of_links_is_the_model_it_links_to(model: Path, tmp_path: Path) -> None:
    wanted = directory_digest(model)
    snapshot, blobs = tmp_path / "snapshots" / "cc59489", tmp_path / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in model.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    assert directory_digest(snapshot) == wanted
    shutil.rmtree(snapshot / "text_encoder")
    (snapshot / "text_encoder").symlink_to(model / "text_encoder")
    assert directory_digest(snapshot) == wanted


SUFFIXES = ("", ".json", ".safetensors", ".bin", ".gguf", ".npy", ".distcp", ".pkl", ".nemo", ".engine", ".py", ".txt")


@pytest.mark.parametrize("stem", ["extra", "license-weights", "readme.v2"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_model_file_counts(model: Path, stem: str, suffix: str) -> None:
    seen = {directory_digest(model)}
    file = model / f"{stem}{suffix}"
    for content in (b"", b"1", b"2"):
        file.write_bytes(content)
        seen.add(directory_digest(model))
    file.rename(model / f"renamed{suffix}")
    seen.add(directory_digest(model))
    (model / f"renamed{suffix}").rename(model / "text_encoder" / f"{stem}{suffix}")
    seen.add(directory_digest(model))
    assert len(seen) == 6


def test_what_is_no_part_of_the_model_does_not_count(model: Path) -> None:
    wanted = directory_digest(model)
    for name in (
        "README.md",
        "LICENSE",
        "NOTICE.txt",
        ".gitattributes",
        ".hidden.json",
        "model.safetensors.lock",
        "picture.png",
    ):
        (model / name).write_text("x")
    for folder, name in ((".cache", "config.json"), ("__pycache__", "modeling.cpython-311.pyc")):
        (model / folder).mkdir()
        (model / folder / name).write_text("x")
    (model / "empty").mkdir()
    assert directory_digest(model) == wanted


@pytest.mark.parametrize("name", ["license.safetensors", "notice.bin", "copying.py", "readme.json", "changelog.npy"])
def test_a_weight_file_named_like_a_document_counts(model: Path, name: str) -> None:
    wanted = directory_digest(model)
    (model / name).write_text("x")
    assert directory_digest(model) != wanted


def test_contents_swapped_between_two_names_are_another_model(model: Path) -> None:
    wanted = directory_digest(model)
    one, two = model / "model.safetensors", model / "text_encoder" / "model.safetensors"
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    assert directory_digest(model) != wanted


def test_a_file_is_its_contents_in_steps_of_any_size(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = file_digest(model / "model.safetensors")
    shutil.copy(model / "model.safetensors", tmp_path / "adapter.bin")
    (tmp_path / "link").symlink_to(tmp_path / "adapter.bin")
    monkeypatch.setattr(identity, "_CHUNK_NBYTES", 100)
    assert file_digest(tmp_path / "adapter.bin") == wanted
    assert file_digest(tmp_path / "link") == wanted
    (tmp_path / "adapter.bin").write_bytes(bytes(range(255)) + b"\x00")
    assert file_digest(tmp_path / "adapter.bin") != wanted


def test_what_is_missing_or_no_model_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyInputError, match=r"cannot read .*missing.*check that it exists"):
        file_digest(tmp_path / "missing")
    with pytest.raises(KeyInputError, match="is no regular file; pass the file itself"):
        file_digest(model)
    with pytest.raises(KeyInputError, match=r"is no directory; pass the folder with config\.json"):
        directory_digest(tmp_path / "missing")
    with pytest.raises(KeyInputError, match="is no directory"):
        directory_digest(model / "config.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyInputError, match="holds no configuration or weight file"):
        directory_digest(tmp_path / "empty")


def test_a_dangling_link_is_no_model_file(model: Path) -> None:
    (model / "model-00002.safetensors").symlink_to(model / "gone")
    with pytest.raises(KeyInputError, match=r"cannot read .*model-00002"):
        directory_digest(model)


def test_a_pipe_is_refused_rather_than_waited_for(model: Path) -> None:
    os.mkfifo(model / "weights.bin")
    with pytest.raises(KeyInputError, match=r"weights\.bin is no regular file"):
        directory_digest(model)


def test_a_link_back_to_its_own_folder_ends_with_an_error(model: Path) -> None:
    (model / "text_encoder" / "loop").symlink_to(model)
    with pytest.raises(KeyInputError, match="is a symbolic link to a folder that holds it"):
        directory_digest(model)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_or_folder_is_refused(model: Path) -> None:
    for path in (model / "config.json", model / "text_encoder"):
        mode = path.stat().st_mode
        path.chmod(0)
        with pytest.raises(KeyInputError, match=f"cannot read .*{path.name}"):
            directory_digest(model)
        path.chmod(mode)
