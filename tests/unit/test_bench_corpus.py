"""The benchmark's media are real: files decoded, frames through a real encoder and back."""

from __future__ import annotations

import numpy as np
import pytest

from mmcache.bench import corpus, extras
from mmcache.errors import ConfigError


def test_photos_are_the_files_of_the_wheel_decoded() -> None:
    found = corpus.photos(len(corpus.PHOTOS))
    assert [photo.name for photo in found] == list(corpus.PHOTOS)
    for photo in found:
        assert photo.data[:4] in (b"\x89PNG", b"\xff\xd8\xff\xe0", b"\xff\xd8\xff\xe1")
        assert photo.rgb.dtype == np.uint8
        assert photo.rgb.ndim == 3
        assert photo.rgb.std() > 10
    assert found[0].rgb.shape == (512, 512, 3)


@pytest.mark.parametrize("count", [0, len(corpus.PHOTOS) + 1])
def test_more_photos_than_there_are_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="1 to 8"):
        corpus.photos(count)


def test_a_missing_library_is_named_with_its_remedy() -> None:
    for missing in (extras.load, extras.folder):
        with pytest.raises(ConfigError, match=r"pip install 'mmcache\[bench\]' .*no_such_module_anywhere"):
            missing("no_such_module_anywhere")


def test_a_film_is_an_encoded_file_that_decodes_to_moving_pictures() -> None:
    (photo,) = corpus.photos(1)
    film = corpus.film(photo, frames=24, turns=0.5)
    assert film.data[4:8] == b"ftyp"
    assert film.codec in corpus.ENCODERS
    assert len(film.data) < 24 * corpus.VIDEO_WIDTH * corpus.VIDEO_HEIGHT
    assert len(film.frames) == 24
    assert [round(frame.time_s * corpus.VIDEO_FPS) for frame in film.frames] == list(range(24))
    assert all(frame.rgb.shape == (corpus.VIDEO_HEIGHT, corpus.VIDEO_WIDTH, 3) for frame in film.frames)
    assert len({frame.rgb.tobytes() for frame in film.frames}) == 24
    assert np.array_equal(corpus.decode(film.data)[7].rgb, film.frames[7].rgb)


def test_a_slower_sample_is_part_of_a_faster_one() -> None:
    frames = tuple(corpus.Frame(i / 12, np.full((1, 1, 3), i, dtype=np.uint8)) for i in range(24))
    video = corpus.Video("x", b"", "none", frames)
    assert [frame.time_s for frame in video.sample(2.0)] == [0.0, 0.5, 1.0, 1.5]
    assert [frame.time_s for frame in video.sample(1.0)] == [0.0, 1.0]
