"""Real pictures: photos that scikit-image ships, and videos really encoded from them and decoded again.

Only media in, pixels out. Nothing is downloaded: the photos are files inside the installed scikit-image wheel, and a
video is a pan and zoom over a photo, encoded to mp4 in memory and decoded from those bytes. No keys and no cache here.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmcache.bench import extras
from mmcache.errors import ConfigError

Pixels = npt.NDArray[np.uint8]

PHOTOS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "ihc.png",
    "retina.jpg",
)
VIDEO_WIDTH, VIDEO_HEIGHT, VIDEO_FPS = 320, 240, 12
ENCODERS = ("libx264", "mpeg4")


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo as it lies on disk (`data`) and decoded: `rgb` is uint8 (height, width, 3)."""

    name: str
    data: bytes
    rgb: Pixels


@dataclass(frozen=True, eq=False)
class Frame:
    """One decoded video frame: its presentation time in seconds and its RGB pixels, uint8 (height, width, 3)."""

    time_s: float
    rgb: Pixels


@dataclass(frozen=True, eq=False)
class Video:
    """An encoded video (`data`: a whole mp4 file), the codec that wrote it, and every frame decoded from it."""

    name: str
    data: bytes
    codec: str
    frames: tuple[Frame, ...]

    def sample(self, fps: float) -> tuple[Frame, ...]:
        """The frames nearest to the times k / fps, as a processor that samples at `fps` picks them."""
        end_s = self.frames[-1].time_s
        times_s = np.arange(0.0, end_s + 1e-6, 1.0 / fps)
        have_s = np.array([frame.time_s for frame in self.frames])
        return tuple(self.frames[int(np.argmin(np.abs(have_s - time_s)))] for time_s in times_s)


def photos(count: int) -> list[Photo]:
    """The first `count` of PHOTOS, decoded.

    Raises:
        ConfigError: scikit-image or pillow is not installed, a picture is missing, or there are not that many.
    """
    if not 1 <= count <= len(PHOTOS):
        raise ConfigError(f"{count} photos asked for, but the corpus has 1 to {len(PHOTOS)}: choose a number in there")
    image = extras.load("PIL.Image")
    folder = extras.folder("skimage") / "data"
    found = []
    for name in PHOTOS[:count]:
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise ConfigError(f"this scikit-image has no data/{name} ({error}): reinstall scikit-image") from error
        found.append(Photo(name, data, np.asarray(image.open(io.BytesIO(data)).convert("RGB"))))
    return found


def film(photo: Photo, *, frames: int, turns: float) -> Video:
    """A video of `frames` frames at VIDEO_FPS: the camera circles over the photo `turns` times while zooming in.

    The frames go through a real encoder and come back through a real decoder, so they carry its losses and times.

    Raises:
        ConfigError: PyAV or pillow is not installed, or this PyAV has none of ENCODERS.
    """
    av = extras.load("av")
    codec = next((name for name in ENCODERS if name in av.codecs_available and _can_encode(av, name)), None)
    if codec is None:
        raise ConfigError(f"this PyAV can encode none of {', '.join(ENCODERS)}: reinstall av from its wheel")
    file = io.BytesIO()
    options = {"preset": "ultrafast", "crf": "23"} if codec == "libx264" else {"qscale": "4"}
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=VIDEO_FPS, options=options)
        stream.width, stream.height, stream.pix_fmt = VIDEO_WIDTH, VIDEO_HEIGHT, "yuv420p"
        for index, view in enumerate(shots(photo, frames, turns=turns)):
            frame = av.VideoFrame.from_ndarray(view, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, VIDEO_FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    data = file.getvalue()
    return Video(Path(photo.name).stem + ".mp4", data, codec, decode(data))


def decode(data: bytes) -> tuple[Frame, ...]:
    """Every frame of an mp4 file's first video stream, in order of presentation."""
    av = extras.load("av")
    with av.open(io.BytesIO(data)) as container:
        return tuple(Frame(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0))


def shots(
    photo: Photo,
    frames: int,
    *,
    turns: float,
    start: float = 0.0,
    size: tuple[int, int] = (VIDEO_WIDTH, VIDEO_HEIGHT),
) -> Iterator[Pixels]:
    """What the camera of a video sees, uint8 (height, width, 3) of `size`, which is (width, height).

    It begins `start` of a turn along its circle; another start shows other pixels.
    """
    image = extras.load("PIL.Image")
    picture = image.fromarray(photo.rgb)
    for index in range(frames):
        box = _shot(photo, index / frames, turns, start, size)
        yield np.asarray(picture.resize(size, image.BILINEAR, box=box))


def _shot(
    photo: Photo, progress: float, turns: float, start: float, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """Where the camera looks: a box of that shape inside the photo, in pixels."""
    height, width = photo.rgb.shape[:2]
    scale = (0.9 - 0.5 * progress) * min(width / size[0], height / size[1])
    box_width, box_height = size[0] * scale, size[1] * scale
    angle = 2 * math.pi * (start + turns * progress)
    left = (width - box_width) * (0.5 + 0.5 * math.cos(angle))
    top = (height - box_height) * (0.5 + 0.5 * math.sin(angle))
    return left, top, left + box_width, top + box_height


def _can_encode(av: Any, codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except ValueError:
        return False
    return True
