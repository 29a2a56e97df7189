"""`mmcache bench serve`: how soon OpenAI-compatible servers answer requests whose images and texts come back."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from mmcache.cli_common import progress_bar
from mmcache.cli_workloads import HtmlTo, JsonTo, check_files, write_report
from mmcache.errors import ConfigError
from mmcache.private_file import read_private

bench_serve_app = typer.Typer(rich_markup_mode="markdown")


@bench_serve_app.command(
    "serve",
    epilog="Examples: **mmcache bench serve --url http://127.0.0.1:8000/v1** · **mmcache bench serve --url "
    "http://plain:8000/v1 --url http://cached:8000/v1 --name plain --name cached --workload chat --html serve.html** · "
    "**mmcache bench serve --url URL --rate 4 --requests 200** · **--images 0 --text-tokens 2000** (models of text)",
)
def bench_serve(
    url: Annotated[list[str], typer.Option(metavar="URL", help="An OpenAI-compatible API; twice: compare two.")],
    name: Annotated[list[str] | None, typer.Option(help="What the report calls each URL, in order.")] = None,
    workload: Annotated[str, typer.Option(help="captioning: questions about the same images and frames; or chat.")] = (
        "captioning"
    ),
    requests: Annotated[int, typer.Option(help="How many, to each URL.")] = 60,
    questions: Annotated[int, typer.Option(help="About the same images, or turns of a conversation.")] = 4,
    images: Annotated[int, typer.Option(help="In a prompt; in a chat at most so many; 0: text alone.")] = 2,
    image_size: Annotated[str, typer.Option(metavar="WxH", help="Of each image, in pixels.")] = "448x336",
    text_tokens: Annotated[int, typer.Option(help="About so many before the question, by the model's count.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="To generate, at most.")] = 32,
    rate: Annotated[float, typer.Option(help="Requests a second, at random moments; inf: see --concurrency.")] = (
        math.inf
    ),
    concurrency: Annotated[int, typer.Option(help="Without --rate: askers with one request each under way.")] = 1,
    warm_up: Annotated[int, typer.Option(help="Requests of another seed before, not counted.")] = 2,
    timeout_s: Annotated[float, typer.Option(help="Of a whole answer.")] = 120.0,
    model: Annotated[str | None, typer.Option(help="Default: the first that GET URL/models lists.")] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable that holds the API key.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A file, closed to others, that holds the API key.")
    ] = None,
    extra_body: Annotated[
        str, typer.Option(metavar="JSON", help="More fields of each request, such as '{\"ignore_eos\": true}'.")
    ] = "{}",
    seed: Annotated[int, typer.Option(help="The same one asks the same again; another one starts cold.")] = 0,
    proxy: Annotated[bool, typer.Option("--proxy", help="Use the proxies that the environment names.")] = False,
    json_to: JsonTo = None,
    html_to: HtmlTo = None,
) -> None:
    """Ask running OpenAI-compatible servers (vLLM, SGLang, others) about real images, and measure their answers.

    Reports time to first token, inter-token latency, end to end, cached tokens as the server counts them, and errors.
    With two URLs both get the same requests in turns, and the report has ratios and whether their answers are the same.
    Exits 1 if a request failed.
    """
    from mmcache.bench.serving import ServeOptions, run

    options = ServeOptions(
        urls=url,
        names=name or (),
        workload=workload,
        requests=requests,
        questions=questions,
        images=images,
        image_size=_size(image_size),
        text_tokens=text_tokens,
        max_tokens=max_tokens,
        rate=rate,
        concurrency=concurrency,
        warm_up=warm_up,
        timeout_s=timeout_s,
        model=model,
        api_key=_api_key(api_key_env, api_key_file),
        extra_body=_object(extra_body),
        seed=seed,
        proxy=proxy,
    )
    check_files(json_to, html_to)
    with progress_bar("answers") as show:
        report = run(options, show)
    report.print(Console(stderr=json_to == "-"))
    write_report(report.to_dict(), json_to, html_to)
    if not report.ok:
        raise typer.Exit(1)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not found:
        raise ConfigError(f"--image-size {text!r} is no size; give such as 448x336")
    return int(found[1]), int(found[2])


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--extra-body is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError("--extra-body is no JSON object; give such as '{\"ignore_eos\": true}'")
    return found


def _api_key(variable: str | None, file: Path | None) -> str:
    """From one place or none; never from the command line, which others can see."""
    if variable is not None and file is not None:
        raise ConfigError("give --api-key-env or --api-key-file, not both")
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        where = f"the environment variable {variable}"
    elif file is not None:
        key, where = read_private(str(file), "API key file").decode(errors="replace").strip(), str(file)
    else:
        return ""
    if not re.fullmatch(r"[!-~]{1,4096}", key):
        raise ConfigError(f"{where} holds no API key: one word of printable ASCII characters")
    return key
