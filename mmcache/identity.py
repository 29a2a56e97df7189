"""What a model directory or an adapter file IS: digests of file contents, for namespace facts. Reads files.

A path is no identity: other weights can be put under it, and the same weights lie under other paths elsewhere. So the
paths given here never enter a digest; only names inside the directory and contents do.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Final

from blake3 import blake3

from mmcache.encoding import digest, text_bytes
from mmcache.errors import KeyInputError

# What no engine reads: everything else in a model directory may change what it computes.
_DOCUMENT: Final = re.compile(
    r"(changelog|copying|licen[cs]e|notice|readme|use_policy)(\.txt)?"
    r"|.*\.(gif|jpeg|jpg|lock|md|pdf|png|rst|svg|webp)",
    re.IGNORECASE,
)
_BYTECODE_FOLDER: Final = "__pycache__"  # made from the .py files beside it, other bytes after each copy of them
MAX_FILES: Final = 100_000
_CHUNK_NBYTES: Final = 4 << 20
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def file_digest(path: str | os.PathLike[str]) -> str:
    """ "b3:" and 64 hexadecimal digits of BLAKE3 over one file's contents, such as a LoRA adapter's weights.

    Symbolic links are followed; name, path and times do not matter. Reads the whole file in 4 MiB steps. Raises
    KeyInputError if it cannot be read.
    """
    return "b3:" + digest("k1.file", _content_hash(Path(path))).hex()


def directory_digest(path: str | os.PathLike[str]) -> str:
    """ "b3:" and 64 hexadecimal digits over the files of a model directory.

    Every file below it counts, whatever its suffix, by its relative name and contents, links followed (a Hugging Face
    cache is links), except those that begin with a dot, documents and pictures, and __pycache__. Reads every byte, at
    the speed of the disk: call it once at start. Raises KeyInputError if it is no directory, holds no such file, or any
    of them cannot be read.
    """
    root = Path(path)
    if not root.is_dir():
        raise KeyInputError(f"{root} is no directory; pass the folder with config.json and the weights, or file_digest")
    files = _model_files(root)
    if not files:
        raise KeyInputError(f"{root} holds no configuration or weight file; check the path")
    fields = [field for name in sorted(files) for field in (name, _content_hash(files[name]))]
    return "b3:" + digest("k1.directory", *fields).hex()


def commit_identity(snapshot: Path) -> str | None:
    """ "repo@commit" if `snapshot` is one of the Hugging Face cache with nothing but links to its content-named files.

    Source: the cache's layout, models--OWNER--NAME/snapshots/COMMIT/FILE -> ../../blobs/CONTENT_HASH.
    """
    folder, name = snapshot.resolve(), snapshot.resolve().parent.parent.name
    if not (_COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots" and name.startswith("models--")):
        return None
    blobs = folder.parent.parent / "blobs"
    for place, _folders, files in os.walk(folder):
        for file in files:
            link = Path(place, file)
            if not link.is_symlink() or link.resolve().parent != blobs:
                return None  # put there by hand: only its contents say what it is
    return f"{name.removeprefix('models--').replace('--', '/')}@{folder.name}"


def _model_files(root: Path) -> dict[bytes, Path]:
    """Relative name in UTF-8, "/" between folders -> file. A link back to a folder above it raises KeyInputError."""
    found: dict[bytes, Path] = {}
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_unreadable):
        above = [root.joinpath(*parts) for parts in _prefixes(Path(folder).relative_to(root).parts)]
        if any(os.path.samefile(folder, other) for other in above):
            raise KeyInputError(f"{folder} is a symbolic link to a folder that holds it; remove the link")
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != _BYTECODE_FOLDER)
        for name in names:
            file = Path(folder, name)
            if not name.startswith(".") and not _DOCUMENT.fullmatch(name):
                found[text_bytes(file.relative_to(root).as_posix(), str(root))] = file
        if len(found) > MAX_FILES:
            raise KeyInputError(f"{root} holds more than {MAX_FILES} files; pass the folder of one model")
    return found


def _prefixes(parts: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [parts[:length] for length in range(len(parts))]


def _content_hash(path: Path) -> bytes:
    hasher = blake3()
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise KeyInputError(f"{path} is no regular file; pass the file itself, or directory_digest for a folder")
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_NBYTES):
                hasher.update(chunk)
    except OSError as error:
        raise _cannot_read(error) from None
    return hasher.digest()


def _unreadable(error: OSError) -> None:
    raise _cannot_read(error) from None


def _cannot_read(error: OSError) -> KeyInputError:
    return KeyInputError(f"cannot read {error.filename}: {error.strerror}; check that it exists and may be read")
