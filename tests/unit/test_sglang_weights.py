"""What stands for the weights SGLang loaded, and that changed files do not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mmcache.errors import ConfigError
from mmcache.identity import directory_digest, file_digest
from mmcache_connectors.sglang.weights import ChangedFiles, Contents, model_identity, process_start_s
from tests.unit.file_clock import change_after


def arguments(path: object, **changed: Any) -> dict[str, Any]:
    defaults = {"revision": None, "load_format": "auto", "weight_cache_mode": "off", "download_dir": None}
    return {"model_path": str(path), **defaults, **changed}


def later() -> Contents:
    """As if the process began a minute from now: files are old."""
    return Contents(time.time() + 60)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "1.safetensors").write_text("weights")
    return tmp_path


def test_a_model_is_its_contents(model: Path) -> None:
    assert model_identity(arguments(model), "", later()) == directory_digest(model)
    file = model / "config.json"  # as with gguf
    assert model_identity(arguments(file), "", later()) == file_digest(file)


def test_a_name_that_is_given_is_believed() -> None:
    for values in (arguments("/nowhere"), arguments("org/m", load_format="remote", weight_cache_mode="client")):
        assert model_identity(values, "given@1", later()) == "given@1"


@pytest.mark.parametrize("name", [".", "config.json", "shards", "shards/1.safetensors"])
def test_what_changed_after_the_start_is_not_what_was_loaded(model: Path, name: str) -> None:
    started_ns = time.time_ns()
    assert Contents(started_ns / 1e9).digest(str(model)) == directory_digest(model)
    # As a copy that keeps times does: only the inode's own time tells.
    change_after(started_ns, model / name, lambda place: os.utime(place, (1, 1)))
    with pytest.raises(ChangedFiles, match="restart the engine"):
        Contents(started_ns / 1e9).digest(str(model))


def test_what_changes_while_it_is_read_is_not_what_was_loaded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the files' times come from a clock that is behind."""

    def read(path: str) -> str:
        weights = model / "shards" / "1.safetensors"
        change_after(weights.stat().st_ctime_ns, weights, lambda file: file.write_text("others"))
        return "b3:"

    monkeypatch.setattr("mmcache_connectors.sglang.weights.directory_digest", read)
    with pytest.raises(ChangedFiles, match=r"1\.safetensors"):
        later().digest(str(model))


def test_each_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = later()
    made = contents.digest(str(model))
    monkeypatch.setattr("mmcache_connectors.sglang.weights.directory_digest", None)
    assert contents.digest(os.path.relpath(model)) == made


@pytest.mark.parametrize(
    "changed",
    [
        {"weight_cache_mode": "client"},
        *({"load_format": form} for form in ("remote", "remote_instance", "ipc_cache", "rdma", "private")),
    ],
)
def test_weights_that_come_from_elsewhere_need_a_name(model: Path, changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r'come from elsewhere .* give "model_identity"'):
        model_identity(arguments(model, **changed), "", later())


class Hub:
    """Stands for huggingface_hub, which mmcache's own environment lacks."""

    cached: str | None = None

    def try_to_load_from_cache(self, repository: str, file: str, revision: str | None) -> str | None:
        if repository.count("/") > 1:
            raise ValueError(f"{repository} is no name of a repository")
        assert (repository, file, revision) == ("org/m", "config.json", "main")
        return self.cached


COMMIT = "c0ffee" * 6 + "1234"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """A cache with one repository, as Hugging Face lays it out: links to files named by their contents."""
    blobs, snapshot = (tmp_path / "models--org--m" / name for name in ("blobs", f"snapshots/{COMMIT}"))
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    made = Hub()
    made.cached = str(snapshot / "config.json")
    monkeypatch.setitem(sys.modules, "huggingface_hub", made)
    return made


def test_a_repository_is_the_commit_that_was_downloaded(hub: Hub) -> None:
    assert model_identity(arguments("org/m", revision="main"), "", later()) == f"org/m@{COMMIT}"
    folder = str(Path(str(hub.cached)).parent)
    assert model_identity(arguments(folder, revision=None), "", later()) == f"org/m@{COMMIT}"


def test_files_put_there_by_hand_are_what_they_hold(hub: Hub) -> None:
    file = Path(str(hub.cached))
    file.unlink()
    file.write_text('{"hidden_act": "other"}')
    assert model_identity(arguments("org/m", revision="main"), "", later()).startswith("b3:")


@pytest.mark.parametrize(
    ("path", "there", "changed"),
    [("org/m", False, {}), ("org/m", True, {"download_dir": "/models"}), ("s3://bucket/m", False, {})],
)
def test_what_nothing_here_tells_has_to_be_named(hub: Hub, path: str, there: bool, changed: dict[str, Any]) -> None:
    hub.cached = hub.cached if there else None
    with pytest.raises(ConfigError, match='give "model_identity"'):
        model_identity(arguments(path, revision="main", **changed), "", later())


def test_a_process_knows_when_it_began() -> None:
    before = time.time()
    code = "from mmcache_connectors.sglang.weights import process_start_s as s; import time; time.sleep(.3); print(s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert before - 0.05 <= float(done.stdout) <= time.time() - 0.3
    assert process_start_s() < before
