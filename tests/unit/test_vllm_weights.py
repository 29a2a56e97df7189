"""Which weights an engine loads: identities of folders, files, snapshots and random weights. No vLLM needed."""

from __future__ import annotations

import copy
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmcache.errors import KeyInputError
from mmcache.identity import directory_digest, file_digest
from mmcache_connectors.vllm import weights
from mmcache_connectors.vllm.identities import shared_identities
from mmcache_connectors.vllm.weights import ModelSource, WeightsIdentity, model_identity, model_sources, stat_signature

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_model(folder: Path, content: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hidden_size": 128}')
    (folder / "model.safetensors").write_bytes(content)
    return folder


def make_snapshot(cache: Path, commit: str = COMMIT) -> Path:
    """A Hugging Face cache as the hub's client lays it out: a snapshot is links to content-named files."""
    repository = cache / "models--acme--tiny"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        (repository / "blobs" / f"hash-of-{name}").write_text(name)
        (snapshot / name).symlink_to(f"../../blobs/hash-of-{name}")
    return snapshot


def engine(path: Path | str, draft: Path | None = None, **load: Any) -> SimpleNamespace:
    """As much of a vLLM configuration as says which weights are loaded."""

    def model(at: Path | str) -> SimpleNamespace:
        return SimpleNamespace(model=str(at), model_weights="", revision=None, seed=load.get("seed", 0))

    return SimpleNamespace(
        model_config=model(path),
        load_config=SimpleNamespace(load_format=load.get("load_format", "auto")),
        parallel_config=SimpleNamespace(tensor_parallel_size=load.get("tp", 1), pipeline_parallel_size=1),
        speculative_config=SimpleNamespace(draft_model_config=model(draft), draft_load_config=None) if draft else None,
    )


def identity_of(config: SimpleNamespace, name: str | None = None) -> str | None:
    found = WeightsIdentity(config, name)
    identity = found.ready(timeout_s=30)
    assert (identity is None) != (found.error is None)
    return identity


def test_a_folder_is_its_contents_not_its_place(tmp_path: Path) -> None:
    one, other = make_model(tmp_path / "one"), make_model(tmp_path / "other")
    assert model_identity(ModelSource(str(one))) == model_identity(ModelSource(str(other))) == directory_digest(one)
    before = identity_of(engine(one))
    (one / "model.safetensors").write_bytes(b"retrain")
    assert identity_of(engine(one)) != before


def test_a_single_weight_file(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"weights")
    assert model_identity(ModelSource(str(file))) == file_digest(file)


def test_random_weights_are_not_the_folders(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    kinds = [
        engine(model),
        engine(model, load_format="dummy"),
        engine(model, load_format="dummy", seed=1),
        engine(model, load_format="dummy", tp=2),
    ]
    identities = [identity_of(config) for config in kinds]
    assert None not in identities
    assert len(set(identities)) == 4
    assert identity_of(engine(model, seed=1)) == identities[0]  # real weights do not depend on a seed
    assert "dummy" in str(identity_of(kinds[1], "mine"))


def test_a_draft_models_weights_count(tmp_path: Path) -> None:
    target, draft, other = (make_model(tmp_path / name, name.encode()) for name in ("target", "draft", "other"))
    found = {identity_of(engine(target)), identity_of(engine(target, draft)), identity_of(engine(target, other))}
    assert len(found) == 3
    assert [source.model for source in model_sources(engine(target, draft))] == [str(target), str(draft)]


def test_the_place_the_weights_really_came_from_decides(tmp_path: Path) -> None:
    config = engine(make_model(tmp_path / "configuration-only"))
    config.model_config.model_weights = "s3://bucket/model"
    found = WeightsIdentity(config)
    assert found.ready(timeout_s=30) is None
    assert "model_identity" in str(found.error)


def test_an_untouched_snapshot_is_its_commit(tmp_path: Path) -> None:
    snapshot = make_snapshot(tmp_path)
    assert model_identity(ModelSource(str(snapshot))) == f"acme/tiny@{COMMIT}"


@pytest.mark.parametrize("touch", ["edited", "foreign link", "branch name"])
def test_a_touched_snapshot_is_its_contents(tmp_path: Path, touch: str) -> None:
    snapshot = make_snapshot(tmp_path, "main" if touch == "branch name" else COMMIT)
    file = snapshot / "model.safetensors"
    if touch == "edited":
        file.unlink()
        file.write_text("retrained")
    elif touch == "foreign link":
        (tmp_path / "elsewhere").write_text("retrained")
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere")
    assert model_identity(ModelSource(str(snapshot))) == directory_digest(snapshot)


@pytest.mark.parametrize("model", ["acme/nowhere", "s3://bucket/model", "", "no such folder", "../nowhere"])
def test_weights_nobody_can_name_are_an_error_with_the_remedy(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "hub_snapshot", lambda *_: None)
    with pytest.raises(KeyInputError, match="model_identity"):
        model_identity(ModelSource(model or "no-model"))
    found = WeightsIdentity(engine(model or "no-model"))
    assert found.ready(timeout_s=30) is None
    assert "model_identity" in str(found.error)
    assert identity_of(engine(model or "no-model"), "acme/mine@1") == "acme/mine@1"


def test_files_that_change_while_they_are_read_have_no_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "m")

    def meanwhile(path: Path) -> str:
        (model / "model.safetensors").write_bytes(b"still being copied")
        return directory_digest(path)

    monkeypatch.setattr(weights, "directory_digest", meanwhile)
    with pytest.raises(KeyInputError, match="changed while"):
        model_identity(ModelSource(str(model)))


def test_the_engine_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, may_go = make_model(tmp_path / "m"), threading.Event()

    def slow(path: Path) -> str:
        assert may_go.wait(30)
        return "b3:slow"

    monkeypatch.setattr(weights, "directory_digest", slow)
    found = WeightsIdentity(engine(model))
    assert found.ready() is None
    assert found.ready(timeout_s=0.01) is None
    assert found.error is None
    may_go.set()
    assert found.ready(timeout_s=30) == "b3:slow"


def test_no_error_of_any_kind_leaves_the_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> str:
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(weights, "directory_digest", broken)
    found = WeightsIdentity(engine(make_model(tmp_path / "m")))
    assert found.ready(timeout_s=30) is None
    assert "disk on fire" in str(found.error)


def test_a_signature_changes_with_any_file(tmp_path: Path) -> None:
    model = make_model(tmp_path / "m")
    signatures = [stat_signature(model)]
    (model / "model.safetensors").write_bytes(b"weightz")
    os.utime(model / "model.safetensors", ns=(1, 1))
    signatures.append(stat_signature(model))
    (model / "more").mkdir()
    (model / "more" / "x").touch()
    signatures.append(stat_signature(model))
    (model / "config.json").rename(model / "config2.json")
    signatures.append(stat_signature(model))
    assert len(set(signatures)) == 4
    (model / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(KeyInputError, match="cannot look at"):
        stat_signature(model)


class ModelConfig:
    """An engine's."""


def test_the_connectors_of_one_engine_hear_of_new_weights_together() -> None:
    """One inside vLLM's MultiConnector was given a copy of the engine's configuration."""
    config, other = SimpleNamespace(model_config=ModelConfig()), SimpleNamespace(model_config=ModelConfig())
    inside, beside = shared_identities(copy.copy(config)), shared_identities(config)
    inside.new_epoch()
    assert beside.epoch == inside.epoch != ""
    assert shared_identities(other).epoch == ""
