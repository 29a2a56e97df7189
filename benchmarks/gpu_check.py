"""The kernels on a GPU: right first, then how fast, beside the ceilings of the same card in the same run.

    scripts/gpu-check [--dry-run] [--json FILE]

Exits 1 if anything moved wrong. Rates are medians over repetitions; a device rate counts bytes read and written, a host
rate the bytes that crossed the link. Ceilings: a device-to-device copy and a page-locked host copy each way, of as many
bytes. Beside them torch's index_select, and vLLM's own block copy where vLLM is installed. `--dry-run` builds small
inputs, runs the reference and Triton's interpreter on the processor, and times nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import mmap
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_cases import LAYOUTS, Case, cases, check_all, memory

REPEAT = 11
WARM_UP = 3


@dataclass(frozen=True)
class Row:
    """One line of the table. `share` is of the ceiling; `bar` what the project asks for, 0 for none."""

    what: str
    gbps: float
    share: float
    bar: float = 0.0


def timed(move: Callable[[], object], nbytes: int) -> float:
    """GB/s of `move`, the median, by events on its stream."""
    for _ in range(WARM_UP):
        move()
    seconds = []
    for _ in range(REPEAT):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        move()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return float(nbytes / statistics.median(seconds) / 1e9)


def device_rows(case: Case) -> Iterator[Row]:
    """Gather and scatter inside the device, plain, by torch, and quantised."""
    quantize = importlib.import_module("mmcache_kernels.quantize")
    mover_module = importlib.import_module("mmcache_kernels.mover")
    views, ids = case.views, case.ids
    mover, plain = mover_module.TritonMover(views), mover_module.TorchMover(views)
    frames = torch.empty((len(ids), len(views), *views[0].shape[1:]), dtype=views[0].dtype, device=views[0].device)
    other, nbytes = torch.empty_like(frames), frames.nbytes
    ceiling = timed(lambda: other.copy_(frames), 2 * nbytes)
    yield Row(f"{case.name}: device copy (ceiling)", ceiling, 1.0)
    for name, moves in (("triton", mover), ("torch index_select / index_copy", plain)):
        bar = 0.9 if name == "triton" and case.page_nbytes >= 16384 else 0.0
        gbps = timed(lambda moves=moves: moves.gather(ids, frames), 2 * nbytes)  # type: ignore[misc]
        yield Row(f"{case.name}: gather, {name}", gbps, gbps / ceiling, bar)
        gbps = timed(lambda moves=moves: moves.scatter(ids, frames), 2 * nbytes)  # type: ignore[misc]
        yield Row(f"{case.name}: scatter, {name}", gbps, gbps / ceiling, bar)
    numbers = [view.view(torch.bfloat16).unflatten(-1, (2, -1)) for view in views]
    each = frames.numel() // len(ids)
    values = torch.empty(len(ids), each, dtype=torch.uint8, device=frames.device)
    scales = torch.empty(len(ids), each // numbers[0].shape[-1], dtype=torch.float32, device=frames.device)
    paged = mover_module.describe(numbers)
    rows = torch.arange(len(ids), device=frames.device)
    tables = [rows * part[0].nbytes + part.data_ptr() for part in (values, scales)]
    gather = timed(lambda: mover.gather(ids, frames), 2 * nbytes)
    moved = nbytes + values.nbytes + scales.nbytes
    for to_frames, verb in ((True, "quantise to fp8"), (False, "restore from fp8")):
        gbps = timed(
            lambda to_frames=to_frames: quantize.move(  # type: ignore[misc]
                paged, *tables, ids, values_per_scale=numbers[0].shape[-1], mode="fp8", to_frames=to_frames
            ),
            moved,
        )
        yield Row(f"{case.name}: {verb}, beside the gather's rate", gbps, gbps / gather, 0.9 if to_frames else 0.0)


def host_rows(case: Case) -> Iterator[Row]:
    """To page-locked host memory and back: as connectors do it, and by the kernels alone."""
    device_module = importlib.import_module("mmcache_connectors.device")
    blocks = device_module.DeviceBlocks(case.views)
    views, ids = case.views, case.ids.cpu().numpy()
    shape = (len(ids), len(views), *views[0].shape[1:])
    host = torch.empty(shape, dtype=views[0].dtype, pin_memory=True)
    held, nbytes = torch.empty(shape, dtype=views[0].dtype, device=views[0].device), host.nbytes
    down = timed(lambda: host.copy_(held, non_blocking=True), nbytes)
    up = timed(lambda: held.copy_(host, non_blocking=True), nbytes)
    yield Row(f"{case.name}: device to pinned host (ceiling)", down, 1.0)
    yield Row(f"{case.name}: pinned host to device (ceiling)", up, 1.0)
    gbps = waited(lambda: blocks.gather(ids, host), nbytes)
    yield Row(f"{case.name}: gather to pinned host, staged, streams", gbps, gbps / down, 0.95)
    gbps = waited(lambda: blocks.scatter(ids, host), nbytes)
    yield Row(f"{case.name}: scatter from pinned host, staged, streams", gbps, gbps / up, 0.95)
    gbps = timed(lambda: blocks.mover.gather(case.ids, host), nbytes)
    yield Row(f"{case.name}: gather to pinned host, by the kernel alone", gbps, gbps / down)
    gbps = timed(lambda: blocks.mover.scatter(case.ids, host), nbytes)
    yield Row(f"{case.name}: scatter from pinned host, by the kernel alone", gbps, gbps / up)


def waited(move: Callable[[], Any], nbytes: int) -> float:
    """GB/s of a copy that ends on streams of its own: by the clock, until it is synchronized."""
    seconds = []
    for number in range(WARM_UP + REPEAT):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        move().synchronize()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - begin)
    return nbytes / statistics.median(seconds) / 1e9


def held_up_us(case: Case) -> int:
    """Microseconds that the engine's stream is held up by a gather to the host: what a kernel behind it is late by."""
    device_module = importlib.import_module("mmcache_connectors.device")
    blocks = device_module.DeviceBlocks(case.views)
    ids = case.ids.cpu().numpy()
    shape = (len(ids), len(case.views), *case.views[0].shape[1:])
    host = torch.empty(shape, dtype=case.views[0].dtype, pin_memory=True)
    seconds = []
    for number in range(WARM_UP + REPEAT):
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.cuda.set_sync_debug_mode("error" if number >= WARM_UP else "default")  # the host waits for nothing
        copy = blocks.gather(ids, host)
        torch.cuda.set_sync_debug_mode("default")
        end.record()
        end.synchronize()
        copy.synchronize()
        if number >= WARM_UP:
            seconds.append(begin.elapsed_time(end) / 1e3)
    return int(statistics.median(seconds) * 1e6)


@dataclass(frozen=True)
class Mapped:
    """Shared memory as a client maps it."""

    data: Any


def registered(case: Case) -> str:
    """Whether blocks are loaded straight from a read-only map of shared memory, as the server's arena is; and right."""
    device_module = importlib.import_module("mmcache_connectors.device")
    blocks, reference = device_module.DeviceBlocks(case.views), [view.clone() for view in case.views]
    nbytes = sum(view[0].nbytes for view in case.views)
    fd = os.memfd_create("gpu-check", os.MFD_CLOEXEC)
    os.ftruncate(fd, 4 * nbytes)
    with mmap.mmap(fd, 4 * nbytes) as writable:
        writable[:] = np.random.default_rng(0).integers(0, 256, 4 * nbytes, np.uint8).tobytes()
    arena = np.frombuffer(mmap.mmap(fd, 4 * nbytes, prot=mmap.PROT_READ), np.uint8)
    mapped = Mapped(arena)
    for _ in range(100):
        with blocks.reading(mapped) as readable:
            if readable:
                break
        time.sleep(0.1)
    else:
        return "refused by the driver: blocks go through page-locked buffers"
    places = [int(arena.ctypes.data) + nbytes, int(arena.ctypes.data) + 3 * nbytes]
    blocks.scatter_from(np.array([2, 1]), places).synchronize()
    shape = (4, len(case.views), *case.views[0].shape[1:])
    truth = torch.from_numpy(arena.copy()).view(case.views[0].dtype).view(shape).to(case.views[0].device)
    for layer, (view, before) in enumerate(zip(case.views, reference, strict=True)):
        before[2], before[1] = truth[1, layer], truth[3, layer]
        assert torch.equal(view, before), "blocks loaded from a registered map are wrong"
    return "yes, and right"


def vllm_rows(case: Case) -> Iterator[Row]:
    """vLLM's own block copy inside the device, where vLLM is installed."""
    try:
        swap_blocks = importlib.import_module("vllm._custom_ops").swap_blocks
    except (ImportError, AttributeError, OSError):
        return
    source = case.views[0]
    target, pairs = torch.empty_like(source), torch.stack([case.ids.cpu(), case.ids.cpu()], 1)
    nbytes = 2 * source[0].nbytes * len(case.ids)
    gbps = timed(lambda: swap_blocks(source, target, source[0].nbytes, pairs), nbytes)
    ceiling = timed(lambda: target.copy_(source), 2 * source.nbytes)
    yield Row(f"{case.name}: vLLM swap_blocks, one layer", gbps, gbps / ceiling)


def _told(what: str, find: Callable[[], object]) -> str:
    try:
        return f"{what}: {find()}"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {error}"


def table(rows: list[Row]) -> list[str]:
    """Markdown."""
    lines = ["| | GB/s | of its ceiling | bar |", "|---|---|---|---|"]
    for row in rows:
        bar = f"{row.bar:.2f} {'met' if row.share >= row.bar else '**missed**'}" if row.bar else ""
        lines.append(f"| {row.what} | {row.gbps:.1f} | {row.share:.3f} | {bar} |")
    return lines


def main() -> int:
    """Check, time, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="no GPU: small inputs, reference and interpreter")
    parser.add_argument("--json", help="also write the rows there")
    arguments = parser.parse_args()
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    if not arguments.dry_run and not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no CUDA device; try scripts/gpu-check --dry-run", file=sys.stderr)
        return 2
    triton = importlib.import_module("triton")
    chip = "Triton's interpreter on the processor" if arguments.dry_run else torch.cuda.get_device_name()
    print(f"{chip}; torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}")
    if arguments.dry_run:
        np.seterr(over="ignore")  # the interpreter computes with numpy, which would tell of every overflow
    wrong = check_all(device)
    print("\n  ".join(["moved wrong:", *wrong]) if wrong else f"right: {len(LAYOUTS)} layouts, every form and mode")
    if wrong or arguments.dry_run:
        return 1 if wrong else 0
    print("\n".join(table([])))
    rows: list[Row] = []
    notes: list[str] = []
    for case in cases(device):
        for section in (device_rows, vllm_rows, host_rows):
            try:
                for row in section(case):
                    rows.append(row)
                    print(table([row])[-1], flush=True)
            except Exception as error:  # what follows is worth having all the same
                notes.append(f"{case.name}: {section.__name__} ended with {type(error).__name__}: {error}")
        what = f"{case.name}: us that a gather to the host holds up the engine"
        notes.append(_told(what, lambda case=case: held_up_us(case)))  # type: ignore[misc]
    notes.append(_told("loads straight from shared memory", lambda: registered(memory(device, "LBHNC"))))
    print("\n".join(notes))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"chip": chip, "rows": [asdict(row) for row in rows], "notes": notes}, file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
