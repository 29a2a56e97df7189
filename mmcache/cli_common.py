"""What several commands share: options, sizes for people, progress bars, files that are written for --json."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from mmcache.errors import ConfigError, TransportError, UsageError

DEFAULT_URL = "mmcache://127.0.0.1:7600"
ADMINS_ONLY = "this server shows its counters to admin tokens only; give one: --connect 'URL?token_file=FILE'"
Url = Annotated[str, typer.Option("--connect", "-c", metavar="URL", help="The server to ask.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log every dropped connection.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]


def size_text(nbytes: int) -> str:
    """Bytes for people: '512 B', '64.0 KiB', '1.0 GiB'."""
    if nbytes < 1024:
        return f"{nbytes} B"
    power = min((nbytes.bit_length() - 1) // 10, 4)
    return f"{nbytes / 1024**power:,.1f} {'KMGT'[power - 1]}iB"


def printable(text: str) -> str:
    """Text that a client gave, for a terminal: whatever could move the cursor or begin a line is shown as an escape."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


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


def silence(silent: Mapping[str, str]) -> str:
    """Which shards were not asked, or not to the end, and why."""
    told = "; ".join(f"{printable(name)} ({printable(why)})" for name, why in silent.items())
    return f"not done, or not to the end, on {told}: run it again once what is there answers"


def all_answered(silent: Mapping[str, str]) -> None:
    """Raises TransportError if some did not."""
    if silent:
        raise TransportError(silence(silent))


def write_text(path: Path, text: str, mode: str = "w", option: str = "--json") -> None:
    """Write a file that `option` names. Raises ConfigError, with the remedy."""
    try:
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; give {option} a file that can be written") from None


def key_digest(text: str) -> bytes:
    """The 32 bytes of a key as Key.hex() prints it. Raises UsageError."""
    try:
        digest = bytes.fromhex(text)
        if len(digest) != 32:
            raise ValueError
    except ValueError:
        raise UsageError(f"{text!r} is not a key; a key has 64 hexadecimal digits, as Key.hex() prints") from None
    return digest
