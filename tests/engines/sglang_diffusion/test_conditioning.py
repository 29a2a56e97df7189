"""SGLang-diffusion's prompt embeddings in mmcache: the real engine, restarted. Each runs in the engine's environment
(`make test-engines-full`); the model is a Stable Diffusion 3 in little."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmcache.errors import FrameError
from mmcache.frame import MAGIC, parse_header
from mmcache_connectors.sglang.diffusion_plugin import PREFIX
from tests.engines.sglang.harness import Cache, shim_environment
from tests.engines.sglang.stored import flip_found
from tests.engines.sglang_diffusion.counting import LINE
from tests.engines.sglang_diffusion.harness import HERE, Made, diffusing

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]
# What SGLang imports where no variable is set.
NOTHING = ["mmcache_connectors", "mmcache_connectors.sglang", "mmcache_connectors.sglang.diffusion_plugin"]
PROMPT, LATER = "a red fox in the snow", "a blue fox in the snow"


def write_model(folder: Path, seed: int) -> Path:
    command = [sys.executable, "-W", "ignore", str(HERE / "models.py"), str(folder), str(seed)]
    done = subprocess.run(command, env=shim_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "sd3", 0)


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH in which SGLang finds the plugin that counts."""
    folder = tmp_path_factory.mktemp("plugins")
    found = folder / "counting-1.dist-info"
    found.mkdir()
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: counting\nVersion: 1\n")
    group = "[sglang.multimodal_gen.plugins]\ncounting = tests.engines.sglang_diffusion.counting:activate\n"
    (found / "entry_points.txt").write_text(group)
    return folder


@pytest.fixture(scope="module")
def filled(model: Path, plugins: Path) -> Iterator[tuple[Cache, Made]]:
    """The cache that an engine filled before it was killed, and what the engine made."""
    with Cache() as cache:
        with diffusing(model, plugins, {"URL": cache.url}) as engine:
            made = engine.ask(PROMPT)
            assert made.passes == 6  # three encoders, for the prompt and the negative one
            assert engine.ask(PROMPT) == (made.picture, 0)  # SGLang's own cache
            assert cache.counters()["stored"] == 6
        yield cache, made


def test_a_restarted_engine_encodes_nothing_again(model: Path, plugins: Path, filled: tuple[Cache, Made]) -> None:
    cache, made = filled
    with diffusing(model, plugins, {"URL": cache.url}) as engine:
        assert engine.ask(PROMPT) == (made.picture, 0)
        later = engine.ask(LATER)
        assert later.passes == 3  # the negative prompt is the same one
        assert later.picture != made.picture
        assert engine.ask(PROMPT + " ").passes == 3
        cache.suspend()
        assert engine.ask("nobody answers").passes == 3
        cache.resume()
    with diffusing(model, plugins, None) as plain:
        assert plain.ask(PROMPT) == (made.picture, 6)
        assert plain.ask(LATER).picture == later.picture
        assert plain.lines(LINE)[-1].split(LINE)[1].split() == NOTHING


def test_other_weights_of_one_encoder_find_nothing_of_it(
    tmp_path: Path, model: Path, plugins: Path, filled: tuple[Cache, Made]
) -> None:
    """The second encoder's weights, of the same form under the same path."""
    cache, made = filled
    moved = tmp_path / "sd3"
    shutil.copytree(model, moved)
    other = write_model(tmp_path / "other", 1)
    shutil.copytree(other / "text_encoder_2", moved / "text_encoder_2", dirs_exist_ok=True)
    with diffusing(moved, plugins, {"URL": cache.url}) as engine:
        found = engine.ask(PROMPT)
    assert found.passes == 6
    assert found.picture != made.picture


def test_damaged_entries_are_encoded_again_and_a_dead_cache_costs_time_alone(
    model: Path, plugins: Path, filled: tuple[Cache, Made]
) -> None:
    """Last here: the cache does not come back."""
    cache, made = filled
    assert flip_all(cache) >= 6
    with diffusing(model, plugins, {"URL": cache.url}) as engine:
        before = cache.counters()["stored"]
        assert engine.ask(PROMPT) == (made.picture, 6)
        assert len(engine.lines("a damaged entry is not used")) == 6
        assert cache.counters()["stored"] == before + 6  # in place of the damaged ones
        assert engine.ask(LATER).passes == 3
        cache.kill()
        assert engine.ask("nobody there").passes == 3
        assert engine.ask(PROMPT) == (made.picture, 0)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ULR": "mmcache://127.0.0.1:1"}, f"{PREFIX}ULR is no setting of mmcache's; the known ones are {PREFIX}URL"),
        ({"URL": "mmcache://127.0.0.1:1", "DEADLINE_S": "soon"}, f"{PREFIX}DEADLINE_S is 'soon', which is no float"),
    ],
)
def test_settings_that_cannot_work_end_the_start(
    model: Path, plugins: Path, settings: dict[str, str], said: str
) -> None:
    with pytest.raises(AssertionError, match="the engine ended") as raised, diffusing(model, plugins, settings):
        pass
    assert said in str(raised.value)


def flip_all(cache: Cache) -> int:
    """Change one byte in the middle of each entry's first tensor, in the server's memory; how many."""

    def middle(data: memoryview) -> int | None:
        try:
            tensor = parse_header(data).tensors[0]
        except FrameError:
            return None
        return tensor.offset + tensor.nbytes // 2

    return flip_found(cache, MAGIC, middle)
