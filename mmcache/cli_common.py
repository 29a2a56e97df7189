"""What several commands share: sizes for people, progress bars, files that are written for --json."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from mmcache.errors import ConfigError


def size_text(nbytes: int) -> str:
    """Bytes for people: '512 B', '64.0 KiB', '1.0 GiB'."""
    if nbytes < 1024:
        return f"{nbytes} B"
    power = min((nbytes.bit_length() - 1) // 10, 4)
    return f"{nbytes / 1024**power:,.1f} {'KMGT'[power - 1]}iB"


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """Shows (done, total) as a bar on stderr from the first call on; shows nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    with Progress(console=Console(stderr=True), transient=True) as bar:

        def show(done: int, total: int) -> None:
            task = bar.task_ids[0] if bar.task_ids else bar.add_task(what)
            bar.update(task, completed=done, total=total)

        yield show


def write_text(path: Path, text: str, mode: str = "w", option: str = "--json") -> None:
    """Write a file that `option` names. Raises ConfigError, with the remedy."""
    try:
        with path.open(mode) as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; give {option} a file that can be written") from None
