"""What gpu_check moves: paged memory in every layout, of sizes as engines have them, and whether it was moved right."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mmcache_kernels import TorchMover, TritonMover, describe, reference

LAYOUTS = {  # of layers, blocks, heads, tokens, content
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}


FORMS: tuple[dict[str, int], ...] = (
    {}, {"heads": 1}, {"tokens": 5, "content": 6}, {"layers": 1, "count": 1}, {"tokens": 64}
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Paged memory of int16 words, one view a layer `[blocks, heads, tokens, content]`, and blocks to move."""

    name: str
    views: list[torch.Tensor]
    ids: torch.Tensor

    @property
    def page_nbytes(self) -> int:
        """Bytes of one layer's share of a block."""
        return int(self.views[0][0].nbytes)


def memory(
    device: torch.device, layout: str, *, layers: int = 3, blocks: int = 40, heads: int = 2, tokens: int = 16,
    content: int = 64, count: int = 7, name: str = "",
) -> Case:  # fmt: skip
    """Random words, and `count` blocks in random order, block 0 never among them."""
    random = torch.Generator(device=device).manual_seed(1)
    order = LAYOUTS[layout]
    sizes = (layers, blocks, heads, tokens, content)
    flat = torch.randint(-32768, 32768, [sizes[i] for i in order], dtype=torch.int16, device=device, generator=random)
    whole = flat.permute([order.index(i) for i in range(5)])
    ids = 1 + torch.randperm(blocks - 1, device=device, generator=random)[:count]
    return Case(name or layout, list(whole.unbind(0)), ids)


def cases(device: torch.device) -> Iterator[Case]:
    """What is timed: pages of 16, 32 and 64 KiB (tokens x heads x content of real models), few blocks and many."""
    for tokens, heads, content in ((16, 2, 256), (16, 4, 256), (16, 8, 256)):
        page = tokens * heads * content * 2
        for count in (64, 4096):
            layers = 28 if count == 64 else 8
            name = f"{count} blocks x {layers} layers of {page >> 10} KiB"
            yield memory(
                device, "LBHNC", layers=layers, blocks=2 * count, heads=heads, tokens=tokens, content=content,
                count=count, name=name,
            )  # fmt: skip


def check_all(device: torch.device) -> list[str]:
    """What was moved wrong, in words; nothing if all is right."""
    wrong = []
    for layout in LAYOUTS:
        for form in FORMS if layout in ("LBHNC", "LBNHC") else FORMS[:2]:
            case = memory(device, layout, **form, name=f"{layout} {form or ''}")
            wrong += [f"{case.name}: {what}" for what in _wrong(case)]
    return wrong


def _wrong(case: Case) -> Iterator[str]:
    views, ids = case.views, case.ids
    shape = (len(ids), len(views), *views[0].shape[1:])
    frames = [torch.zeros(shape, dtype=torch.int16, device=ids.device) for _ in range(2)]
    TritonMover(views).gather(ids, frames[0])
    TorchMover(views).gather(ids, frames[1])
    if not torch.equal(*frames):
        yield "gather"
    targets = [[torch.zeros_like(view) for view in views] for _ in range(2)]
    TritonMover(targets[0]).scatter(ids, frames[0])
    TorchMover(targets[1]).scatter(ids, frames[0])
    if not all(map(torch.equal, *targets)):
        yield "scatter"
    yield from _wrong_numbers(case)
    yield from _wrong_streams(case)  # the last: it writes to the case's own memory, as copies would be laid out anew


def _wrong_streams(case: Case) -> Iterator[str]:
    """To the host and back as connectors do it: on streams of their own, in the order of the engine's work."""
    device = importlib.import_module("mmcache_connectors.device")
    views, ids = case.views, case.ids.cpu().numpy()
    blocks, cuda = device.DeviceBlocks(views, TritonMover(views)), case.ids.device.type == "cuda"
    shape = (len(ids), len(views), *views[0].shape[1:])
    host = torch.zeros(shape, dtype=torch.int16, pin_memory=cuda)
    truth = torch.stack([view[case.ids] for view in case.views], 1).cpu()
    _busy(case.ids.device)
    for view in views:
        view.add_(1)  # the engine's last work on these blocks
    copy = blocks.gather(ids, host)
    for view in views:
        view.zero_()  # and its next: the blocks are used again
    copy.synchronize()
    if not torch.equal(host, truth + 1):
        yield "gather to the host while the engine works"
    for by_layer in (False, True):
        _busy(case.ids.device)
        for view in views:
            view.fill_(3)
        after = blocks.mark()
        scattered = blocks.scatter_by_layer(ids, host, after) if by_layer else [blocks.scatter(ids, host, after)]
        scattered[-1].synchronize()
        if not torch.equal(torch.stack([view[case.ids] for view in views], 1).cpu(), host):
            yield f"scatter from the host while the engine works{', by layer' if by_layer else ''}"


def _busy(device: torch.device) -> None:
    """Give the engine's stream some milliseconds of work, so that what does not wait for it comes too early."""
    if device.type == "cuda":
        matrix = torch.ones(4096, 4096, device=device)
        for _ in range(20):
            matrix = matrix @ matrix


def _wrong_numbers(case: Case) -> Iterator[str]:
    """Quantised and split: words as bfloat16, so some rows hold NaN and infinities."""
    quantize = importlib.import_module("mmcache_kernels.quantize")
    planes = importlib.import_module("mmcache_kernels.planes")
    numbers = [view.view(torch.bfloat16).unflatten(-1, (2, -1)) for view in case.views]
    paged, ids, device = describe(numbers), case.ids, case.ids.device
    blocks = torch.stack([view[ids] for view in numbers], 1)
    shape, each = blocks.shape, blocks[0].numel()
    values = torch.zeros(shape, dtype=torch.uint8, device=device)
    scales = torch.zeros(shape[:-1], device=device)
    rows = torch.arange(len(ids), device=device)
    tables = rows * each + values.data_ptr(), rows * scales[0].nbytes + scales.data_ptr()
    for mode, truth in (("fp8", reference.quantize_fp8), ("int8", reference.quantize_int8)):
        quantize.move(paged, *tables, ids, values_per_scale=shape[-1], mode=mode, to_frames=True)
        wanted, wanted_scales = truth(blocks)
        same = torch.equal(values, wanted.view(torch.uint8))
        if not (same and torch.equal(scales.nan_to_num(-1), wanted_scales.nan_to_num(-1))):
            yield f"quantise to {mode}"
        target = [torch.zeros_like(view) for view in numbers]
        quantize.move(describe(target), *tables, ids, values_per_scale=shape[-1], mode=mode, to_frames=False)
        restore = reference.dequantize_fp8 if mode == "fp8" else reference.dequantize_int8
        right = restore(values if mode == "fp8" else values.view(torch.int8), scales, torch.bfloat16)
        back = torch.stack([view[ids] for view in target], 1)
        if not torch.equal(back.nan_to_num(7.0), right.nan_to_num(7.0)) or not torch.equal(back.isnan(), right.isnan()):
            yield f"restore from {mode}"
    frames = torch.zeros(len(ids), 2, each, dtype=torch.uint8, device=device)
    table = rows * frames[0].nbytes + frames.data_ptr()
    planes.move(paged, table, ids, to_frames=True)
    if not torch.equal(frames, torch.stack([part.flatten(1) for part in reference.split_planes(blocks)], 1)):
        yield "split into planes"
    target = [torch.zeros_like(view) for view in numbers]
    planes.move(describe(target), table, ids, to_frames=False)
    back = torch.stack([view[ids] for view in target], 1)
    if not torch.equal(back.view(torch.int16), blocks.view(torch.int16)):
        yield "join planes"
