"""Whether vLLM and SGLang make the same embedding of a picture: the same pixels, order of tokens and numbers?

    .engines/vllm/bin/python -m benchmarks.cross_engine_embeddings \
        [--sglang .engines/sglang/bin/python] [--models qwen2-vl ...] [--dtypes float32 bfloat16] [--json FILE|-]

Runs in vLLM's environment; `--sglang` is the interpreter of SGLang's. Tiny models with random weights, each loaded by
both real engines on this machine's CPU, and by transformers in float32 with its own processor, which is the truth. A
line for each model, dtype and picture: whether the towers were shown the same pixels (bytes) and grid, whether the
order of tokens is the same, and how far the embeddings are from each other and from the truth. Exits 1 if the engines
disagree about any model but those named `-bare`: in one of these, or by more than BAR.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from mmcache_connectors.shared_embeddings import Normalisation, pixels_of
from tests.engines.cross.harness import SGLangEncoder, vllm_encode
from tests.engines.cross.kept import Kept
from tests.engines.cross.models import MODELS, truths, write_model, write_pictures
from tests.engines.vllm.harness import Engine, Settings

BAR: Final = 2.0  # the engines may differ by so many times the larger of their own distances from the truth
DRIVER: Final = "tests.engines.cross.vllm_driver"
HEADER: Final = (
    f"{'':<43}{'the same':<12}{'relative distance':^30}{'of both':^22}\n"
    f"{'model':<15}{'dtype':<9}{'picture':<8}{'shape':<11}px  grd order "
    f"{'of both':>8} {'vLLM':>9} {'SGLang':>9} {'largest':>8} {'cosine':>8} {'equal':>6}"
)


class Distance(NamedTuple):
    """Of two embeddings `[tokens, width]`: relative (of norms), largest of an element, smallest cosine of a token."""

    relative: float
    largest: float
    cosine: float


def distance(found: Any, truth: Any) -> Distance:
    """How far `found` is from `truth`."""
    one, other = found.double(), truth.double()
    cosine = torch.nn.functional.cosine_similarity(one, other).min()
    difference = one - other
    return Distance(float(difference.norm() / other.norm()), float(difference.abs().max()), float(cosine))


def same_order(found: Any, truth: Any) -> bool:
    """Whether no token of `found` is nearer to another one of `truth` than to its own, but for rounding: some pictures
    are of one colour, and so are their tokens."""
    apart = torch.cdist(found.double(), truth.double())
    rounding = 4 * torch.finfo(found.dtype).eps * truth.double().norm(dim=1)
    return bool((apart.diagonal() <= apart.min(dim=1).values + rounding).all())


def measure(model: Path, dtype: str, pictures: list[Path], sglang: Path) -> list[dict[str, Any]]:
    """One model in one dtype: a row for each picture."""
    more = {"mm_processor_cache_gb": 0, "limit_mm_per_prompt": {"image": 1, "video": 0}, "dtype": dtype}
    with Engine(Settings(str(model), more), None, worker=DRIVER) as engine:
        vllm, _ = vllm_encode(engine, pictures)
    with SGLangEncoder(model, dtype, python=sglang) as encoder:
        ours, _ = encoder.encode(pictures)
    truth = truths(model, pictures)
    norm = Normalisation.of_processor(json.loads((model / "preprocessor_config.json").read_text()))
    return [compared(vllm[path.stem], ours[path.stem], truth[path.stem], norm) | {
        "model": model.name, "dtype": dtype, "picture": path.stem,
    } for path in pictures]  # fmt: skip


def compared(vllm: Kept, sglang: Kept, truth: Any, norm: Normalisation | None) -> dict[str, Any]:
    """What is the same, and how far apart the rest is."""
    pixels = None if norm is None else pixels_of(sglang.pixels, norm)
    between, *own = (
        distance(vllm.embedding, sglang.embedding), distance(vllm.embedding, truth), distance(sglang.embedding, truth)
    )  # fmt: skip
    return {
        "shape": list(vllm.embedding.shape),
        "same_shape_and_dtype": (vllm.embedding.shape, vllm.embedding.dtype)
        == (sglang.embedding.shape, sglang.embedding.dtype),
        "given": [str(one.pixels.dtype).removeprefix("torch.") for one in (vllm, sglang)],
        "same_pixels": pixels is not None and torch.equal(pixels, vllm.pixels),
        "same_grid": torch.equal(vllm.grid, sglang.grid),
        "same_order": same_order(vllm.embedding, sglang.embedding),
        "identical_share": float((vllm.embedding == sglang.embedding).double().mean()),
        "between": between._asdict(),
        "vllm": own[0]._asdict(),
        "sglang": own[1]._asdict(),
        "agree": between.relative <= BAR * max(one.relative for one in own),
    }


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    marks = " ".join("yes" if row[name] else "NO " for name in ("same_pixels", "same_grid", "same_order"))
    numbers = [row["between"]["relative"], row["vllm"]["relative"], row["sglang"]["relative"]]
    return (
        f"{row['model']:<15}{row['dtype']:<9}{row['picture']:<8}{row['shape']!s:<10} {marks:<12}"
        + " ".join(f"{number:9.1e}" for number in numbers)
        + f" {row['between']['largest']:8.1e} {row['between']['cosine']:.6f} {row['identical_share']:6.1%}"
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """The worst of one model in one dtype."""
    same = all(row[name] for row in rows for name in ("same_shape_and_dtype", "same_pixels", "same_grid", "same_order"))
    apart, vllm, sglang = (max(row[who]["relative"] for row in rows) for who in ("between", "vllm", "sglang"))
    return (
        f"{rows[0]['model']} in {rows[0]['dtype']}, {len(rows)} pictures: pixels, grids and order "
        f"{'are the same' if same else 'are NOT all the same'}; at most {apart:.1e} from each other, "
        f"vLLM {vllm:.1e} and SGLang {sglang:.1e} from the truth\n"
    )


def main() -> None:
    """Measure, print, and say whether they agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sglang", type=Path, default=Path(".engines/sglang/bin/python"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[n for n in MODELS if "retrained" not in n])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", help="a file, or - for stdout instead of the table")
    arguments = parser.parse_args()
    rows = []
    if arguments.json != "-":
        print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder, "pictures"))
        for name in arguments.models:
            model = write_model(Path(folder), name)
            for dtype in arguments.dtypes:
                found = measure(model, dtype, pictures, arguments.sglang)
                rows += found
                if arguments.json != "-":
                    print(*map(line, found), summary(found), sep="\n", flush=True)
    if arguments.json:
        text = json.dumps(rows, indent=1)
        print(text) if arguments.json == "-" else Path(arguments.json).write_text(text)
    sys.exit(any(not fine(row) for row in rows if not row["model"].endswith("-bare")))


def fine(row: dict[str, Any]) -> bool:
    """Whether what one engine made may be used by the other."""
    return all(row[name] for name in ("same_shape_and_dtype", "same_pixels", "same_grid", "same_order", "agree"))


if __name__ == "__main__":
    main()
