"""What `mmcache bench serve` found, in words and cells that its terminal report and its page share. PURE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from mmcache.units import count

TIMES: Final = {
    "ttft_s": "time to first token",
    "itl_s": "inter-token latency",
    "longest_gap_s": "longest gap between tokens",
    "total_s": "end to end",
}
TOKENS: Final = ("prompt_tokens", "completion_tokens", "cached_tokens")


def title(work: Mapping[str, Any]) -> str:
    """What was asked, in a line."""
    size = "{} x {}".format(*work["image_size"]) if work["images"] else ""
    images = f"{count(work['images'], 'image')} of {size}"
    text = f"text of about {work['text_tokens']:,} tokens"
    arrive = f"{work['rate']:g} a second" if work["rate"] else count(work["concurrency"], "asker")
    if work["name"] == "captioning":
        about = f"{count(work['questions'], 'question')} about the same {images + ' and ' if size else ''}{text}"
    else:
        turns = count(work["questions"], "turn")
        about = f"{turns} a conversation, {'at most ' + images + ', ' if size else ''}begun with {text}"
    return f"{count(work['requests'], 'request')}, {about}; {arrive}, seed {work['seed']}"


def spread_cells(spread: Mapping[str, Any] | None) -> list[str]:
    """Milliseconds for a table: how many, quartiles, percentiles; a dash where there are too few for one."""
    if spread is None:
        return ["0", *["–"] * 5]
    cuts = [spread[name] for name in ("q1", "median", "q3", "p90", "p99")]
    few = " (few)" if spread["few"] else ""
    return [f"{spread['count']:,}{few}", *("–" if cut is None else milliseconds(cut) for cut in cuts)]


def token_cells(server: Mapping[str, Any]) -> list[str]:
    """Tokens of all answers, the cached share, and errors."""
    share = server["cached_share"]
    told = {name: "–" if server[name] is None else f"{server[name]:,}" for name in TOKENS}
    return [
        told["prompt_tokens"],
        told["cached_tokens"],
        "not reported" if share is None else f"{share:.1%}",
        told["completion_tokens"],
        f"{sum(server['errors'].values()):,}",
    ]


def pair_lines(pairs: Mapping[str, Any] | None, names: Sequence[str]) -> list[str]:
    """The second server beside the first, in sentences."""
    if pairs is None:
        return []
    lines = []
    for name, what in TIMES.items():
        if ratio := pairs[name]:
            pairs_of = count(ratio["pairs"], "pair")
            lines.append(
                f"{what}, {names[1]} / {names[0]}: {ratio['of_medians']:.3f} (medians); of {pairs_of} "
                f"{ratio['median']:.3f}, quartiles {ratio['q1']:.3f} and {ratio['q3']:.3f}"
            )
    return [*lines, f"same answers: {pairs['same_answers']:,} of {pairs['compared_answers']:,}"]


def reasons(errors: Mapping[str, int]) -> str:
    """Why requests failed, in a line: the first few reasons there were, how often each where there are several."""
    if len(errors) == 1:
        return next(iter(errors))
    told = [f"{times:,} x {reason}" for reason, times in errors.items()]
    return "; ".join([*told[:3], *(["..."] if len(told) > 3 else [])])


def milliseconds(seconds: float) -> str:
    """A time for people: with a digit after the point where it is short."""
    return f"{1e3 * seconds:,.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"
