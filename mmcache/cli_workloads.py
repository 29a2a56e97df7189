"""`mmcache bench media`, `chat`, `diffusion`, `transfer`: what runs against a real cache and checks what it reads."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from mmcache.cli_common import progress_bar, write_text

if TYPE_CHECKING:
    from mmcache.bench.report import Report
    from mmcache.bench.run import Options, Progress

workloads_app = typer.Typer(rich_markup_mode="markdown")

JsonTo = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Write JSON to FILE, or - for stdout.")]
HtmlTo = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Write a report with plots for a browser to FILE.")
]
Url = Annotated[str | None, typer.Option("--connect", "-c", metavar="URL", help="A running server; default: its own.")]
Memory = Annotated[
    str, typer.Option(metavar="SIZE", help="Of its own server: a size, a share of the working set, or auto.")
]
Scale = Annotated[str, typer.Option(help="full or quick.")]
Inject = Annotated[str | None, typer.Option(help="Damage stored entries: wrong or corrupt.", metavar="KIND")]
Verify = Annotated[bool, typer.Option(help="Verify what is read.")]
Seed = Annotated[int, typer.Option(help="Of the values, the order of requests and the damage; 0 or more.")]


@workloads_app.command(
    "media",
    epilog="Examples: **mmcache bench media** · **mmcache bench media --memory 10% --html media.html** · "
    "**mmcache bench media --inject corrupt** (must be caught) · **--inject wrong --no-verify** (must show as wrong)",
)
def bench_media(
    url: Url = None,
    memory: Memory = "auto",
    scale: Scale = "full",
    questions: Annotated[
        int | None, typer.Option(help="Questions about each photo and video, 1 to 6; default: full 4, quick 3.")
    ] = None,
    inject: Inject = None,
    verify: Verify = True,
    seed: Seed = 0,
    json_to: JsonTo = None,
    html_to: HtmlTo = None,
) -> None:
    """Ask questions about photos and videos, and compare every value that comes back with a recomputation.

    The photos are those scikit-image ships; the videos are camera moves over them, really encoded to mp4 and decoded.
    Reports the hit rate of each kind beside the ideal (an endless cache) and an exact LRU, bytes and latencies. Exits 1
    if anything wrong was read, if damage that was planted did not show, or if the server stopped answering.
    """
    from mmcache.bench.media import MediaOptions, run

    common = _common(url, memory, scale, inject, verify, seed)
    _run(run, MediaOptions(questions=questions, **common), json_to, html_to)


@workloads_app.command(
    "chat",
    epilog="Examples: **mmcache bench chat** · **mmcache bench chat --memory 25% --html chat.html** · "
    "**mmcache bench chat --connect mmcache://127.0.0.1:7600 --json -**",
)
def bench_chat(
    url: Url = None,
    memory: Memory = "auto",
    scale: Scale = "full",
    inject: Inject = None,
    verify: Verify = True,
    seed: Seed = 0,
    json_to: JsonTo = None,
    html_to: HtmlTo = None,
) -> None:
    """Many users in conversations about photos: every turn begins with all that was said before, photos come back.

    Reports and exits as `media` does: hit rates beside the ideal and an exact LRU, every value compared.
    """
    from mmcache.bench.chat import run
    from mmcache.bench.run import Options

    _run(run, Options(**_common(url, memory, scale, inject, verify, seed)), json_to, html_to)


@workloads_app.command(
    "diffusion",
    epilog="Examples: **mmcache bench diffusion** · **mmcache bench diffusion --memory 25% --html diffusion.html** · "
    "**mmcache bench diffusion --inject wrong --no-verify** (must show as wrong)",
)
def bench_diffusion(
    url: Url = None,
    memory: Memory = "auto",
    scale: Scale = "full",
    inject: Inject = None,
    verify: Verify = True,
    seed: Seed = 0,
    json_to: JsonTo = None,
    html_to: HtmlTo = None,
) -> None:
    """Pictures drawn from prompts, seeds and init images that repeat: prompt embeddings, encoded images and latents.

    A picture goes on from the latent with the most steps done that the cache has. Reports and exits as `media` does.
    """
    from mmcache.bench.diffusion import run
    from mmcache.bench.run import Options

    _run(run, Options(**_common(url, memory, scale, inject, verify, seed)), json_to, html_to)


@workloads_app.command(
    "transfer",
    epilog="Examples: **mmcache bench transfer** · **mmcache bench transfer --quick --json -** · "
    "**mmcache bench transfer --transport shm --clients 4** · **mmcache bench transfer --html transfer.html**",
)
def bench_transfer(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer rows and rounds: seconds instead of a minute.")] = False,
    transports: Annotated[
        list[str] | None,
        typer.Option("--transport", metavar="NAME", help="shm, unix, tcp or nixl; may repeat; default: all but nixl."),
    ] = None,
    clients: Annotated[
        list[int] | None,
        typer.Option("--clients", metavar="N", help="Processes at once, 1 to 16; may repeat; default: 1 and 2."),
    ] = None,
    verify: Verify = True,
    copy_threads: Annotated[int, typer.Option(help="Of a client, for large batches from shared memory.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the values; 0 or more.")] = 0,
    json_to: JsonTo = None,
    html_to: HtmlTo = None,
) -> None:
    """How fast values move between a client and a server in another process, beside memcpy in the same process.

    Over shared memory, unix sockets, TCP and NIXL; get, put and acquire (no copy); 64 KiB to 16 MiB, alone and in
    batches, by one client and several. CPU time at both ends; small gets while another client streams. What was
    delivered is compared after each timing; exits 1 if any of it was wrong, or if the server worked too long without
    a break.
    """
    from mmcache.bench.transfer import CLIENTS, USUAL, TransferOptions, run

    options = TransferOptions(
        quick=quick,
        transports=tuple(transports or USUAL),
        clients=tuple(clients or CLIENTS),
        verify=verify,
        copy_threads=copy_threads,
        seed=seed,
    )
    check_files(json_to, html_to)
    with progress_bar("measurements") as show:
        report = run(options, show)
    report.print(Console(stderr=json_to == "-"))
    write_report(report.to_dict(), json_to, html_to)
    if not report.ok:
        raise typer.Exit(1)


def _common(
    url: str | None, memory: str, scale: str, inject: str | None, verify: bool, seed: int
) -> dict[str, Any]:  # run.Options checks them
    return {"connect": url, "memory": memory, "scale": scale, "inject": inject, "verify": verify, "seed": seed}


def _run(run: Callable[[Any, Progress], Report], options: Options, json_to: str | None, html_to: Path | None) -> None:
    """Run a workload, print its report, write what was asked for; exit 1 if it is not as it must be."""
    check_files(json_to, html_to)
    with progress_bar("requests") as show:
        report = run(options, show)
    report.print(Console(stderr=json_to == "-"))
    write_report(report.to_dict(), json_to, html_to)
    if not report.ok:
        raise typer.Exit(1)


def check_files(json_to: str | None, html_to: Path | None) -> None:
    """Find out now, not after the run, whether the files can be written."""
    if json_to not in (None, "-"):
        write_text(Path(json_to), "", "a")
    if html_to is not None:
        write_text(html_to, "", "a", "--html")


def write_report(found: Mapping[str, Any], json_to: str | None, html_to: Path | None) -> None:
    """Write what was asked for of a report's `to_dict()`."""
    from mmcache.bench.page import page

    if html_to is not None:
        command = shlex.join(["mmcache", *sys.argv[1:]])
        write_text(html_to, page(found, command), option="--html")
    if json_to is not None:
        text = json.dumps(found) + "\n"
        if json_to == "-":
            print(text, end="")
        else:
            write_text(Path(json_to), text)
