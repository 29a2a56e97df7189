"""Paged KV memory of an engine <-> the tensors that are stored: one canonical tensor a block, whatever the layout.

An engine keeps the KV of one block spread over its layers, in one of several physical orders. What is stored is always
`[layers, heads, tokens, content]`, contiguous, so that engines of another layout read the same bytes. Shared by the
connectors: it knows torch and mmcache, no engine. Host memory is copied here; a GPU's by device.py, the same bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mmcache.errors import TensorError
from mmcache.frame import DTYPES
from mmcache.tensors import Labelled, Pieces, as_dtype
from mmcache_connectors.device import Copy, DeviceBlocks, Ended
from mmcache_connectors.registered import MappedMemory

_WORDS: Final[dict[int, Any]] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE_NBYTES: Final = 256 << 10  # gathered from one layer at once: numpy's copy in between stays in the CPU's cache
NULL_BLOCK: Final = 0  # engines point at it where a block is not kept: it holds nobody's tokens


class BlockSpec(NamedTuple):
    """One stored block: its shape, the name of its dtype in a frame, its bytes."""

    shape: tuple[int, int, int, int]
    dtype: str
    nbytes: int


class PagedGroup:
    """The paged KV memory of one KV group in one worker. Stateless but for its views: any thread may use it, as long as
    nobody else writes the blocks it reads, or touches the blocks it writes.

    `layers` are logical views `[num_blocks * ratio, heads, block_tokens / ratio, content]`, with any strides; a ratio
    above 1 is an engine whose kernels use smaller blocks than its block table (vLLM: `group_kernel_blocks`).
    Raises TensorError, with the remedy, for caches that have no such form.
    """

    def __init__(self, layers: Sequence[torch.Tensor], *, num_blocks: int, block_tokens: int) -> None:
        _check_layers(layers, num_blocks, block_tokens)
        first = layers[0]
        rows, heads, tokens, content = first.shape
        self.num_blocks = num_blocks
        self.device = first.device
        self.dtype = first.dtype
        self.shape = (len(layers), heads, block_tokens, content)  # of one block, in elements of `dtype`
        self._ratio = rows // num_blocks
        self._split = (len(layers), heads, self._ratio, tokens, content)
        self._word = _WORDS[first.element_size()]  # not every operation knows every dtype: words are moved, not numbers
        self._views = [_split_blocks(layer.detach().view(self._word), self._ratio) for layer in layers]
        on_host = self.device.type == "cpu"
        self._device = None if on_host else DeviceBlocks(self._views)
        self._rows = [_as_rows(view) for view in self._views] if on_host else []
        self._grid = _as_grid(layers, self._rows)

    @property
    def on_device(self) -> bool:
        """Whether the blocks are in a device's memory, not the host's."""
        return self._device is not None

    @property
    def pins(self) -> bool:
        """Whether host memory that blocks are copied to and from should be page-locked."""
        return bool(self.device.type == "cuda")

    def spec(self) -> BlockSpec:
        """How a block is stored. A dtype that frames have no name for is stored as its bytes: uint8, content wider.

        So the KV dtype must be a fact of the namespace: the stored one does not tell every dtype from another.
        """
        name, itemsize = str(self.dtype).removeprefix("torch."), self.dtype.itemsize
        layers, heads, tokens, content = self.shape
        nbytes = layers * heads * tokens * content * itemsize
        if name in DTYPES:
            return BlockSpec(self.shape, name, nbytes)
        return BlockSpec((layers, heads, tokens, content * itemsize), "uint8", nbytes)

    def gather(self, block_ids: Sequence[int] | NDArray[Any], out: torch.Tensor) -> Copy | None:
        """Copy blocks into `out`: contiguous host memory `[len(block_ids), *shape]` of `dtype`, page-locked for a GPU.
        A block may come twice. `out` is filled once the returned copy is synchronized; the blocks themselves may change
        as soon as the engine's stream goes on. None: too many copies are under way, and nothing was done.

        Raises ValueError before anything is written: for block 0 (the engine's null block), an id outside
        1 .. num_blocks - 1, and an `out` of another form.
        """
        ids = self._checked(block_ids, out)
        words = out.detach().view(self._word)
        if not len(ids):
            return Ended()
        if self._device is not None:
            return self._device.gather(ids, self._as_frames(words))
        places = self._by_layer(words)
        step = max(1, _PIECE_NBYTES * len(places) // self.spec().nbytes)
        for start in range(0, len(ids), step):
            some = ids[start : start + step]
            for rows, target in zip(self._rows, places, strict=True):
                target[start : start + step] = rows[some]
        return Ended()

    def scatter(self, block_ids: Sequence[int] | NDArray[Any], staged: torch.Tensor, after: Any = None) -> None:
        """Copy `staged`, as `gather` filled it, into the blocks, and wait until they hold it; no other block changes.
        On a GPU the copy begins once the engine has reached `after` (see `mark`).

        Raises ValueError before anything is written: as `gather`, and for an id that comes twice.
        """
        for copy in self._scattering(block_ids, staged, after, by_layer=False):
            copy.synchronize()

    def scatter_by_layer(
        self, block_ids: Sequence[int] | NDArray[Any], staged: torch.Tensor, after: Any = None
    ) -> list[Copy]:
        """As `scatter`, without waiting: a copy for each layer, in order. `staged` stays until the last has ended."""
        return self._scattering(block_ids, staged, after, by_layer=True)

    def _scattering(
        self, block_ids: Sequence[int] | NDArray[Any], staged: torch.Tensor, after: Any, *, by_layer: bool
    ) -> list[Copy]:
        ids = self._checked(block_ids, staged)
        _check_unique(ids)
        ended: list[Copy] = [Ended()] * self.shape[0]
        if not len(ids):
            return ended
        words = staged.detach().view(self._word)
        if self._device is None:
            for rows, source in zip(self._rows, self._by_layer(words), strict=True):
                rows[ids] = source
            return ended
        if by_layer:
            return self._device.scatter_by_layer(ids, self._as_frames(words), after)
        return [self._device.scatter(ids, self._as_frames(words), after)]

    def reading(self, arena: MappedMemory) -> AbstractContextManager[bool]:
        """Whether, inside the `with`, `scatter_from` can take frames that lie in this server's memory."""
        return self._device.reading(arena) if self._device is not None else nullcontext(False)

    def scatter_from(self, block_ids: Sequence[int], addresses: Sequence[int], after: Any = None) -> None:
        """As `scatter`, from stored blocks at these addresses (multiples of 16) in memory that is being read.

        What lies there must have the form of `spec`, and stay until this returns: the caller holds the leases.
        """
        assert self._device is not None
        ids = self._checked_ids(block_ids)
        _check_unique(ids)
        if len(ids):
            self._device.scatter_from(ids, addresses, after).synchronize()

    def mark(self) -> Any:
        """What the engine's stream has to do until now: loads begin after it. None for blocks in host memory."""
        return self._device.mark() if self._device is not None else None

    def _as_frames(self, words: torch.Tensor) -> torch.Tensor:
        return words.view(len(words), *self._split)

    def rows(self, staged: torch.Tensor) -> list[Labelled]:
        """The blocks of `staged`, each a value for `Client.put` and a destination for `Client.get_into`.

        They are views: what is read into them is in `staged`. Raw words with a label cost a third of what the
        client pays for a torch tensor.
        """
        self._check_staged(staged, len(staged))
        shape, dtype, _ = self.spec()
        as_stored = staged.detach().view(self._word if dtype != "uint8" else torch.uint8)
        return [as_dtype(block, dtype) for block in as_stored.numpy().reshape(len(staged), *shape)]

    @property
    def lies_in_place(self) -> bool:
        """Whether `in_place` has an answer."""
        return self._grid is not None

    def in_place(self, block_ids: Sequence[int] | NDArray[Any]) -> list[Pieces] | None:
        """The blocks where they lie, each a destination for `Client.get_into`: no staging, no scatter. None where they
        do not lie so: on a device, or in a layout that cuts a layer's block up. Raises ValueError as `scatter`.
        """
        grid = self._grid
        if grid is None:
            return None
        ids = self._checked_ids(block_ids)
        _check_unique(ids)
        shape, dtype, _ = self.spec()
        return [Pieces(grid[block], dtype, shape) for block in ids]

    def _by_layer(self, words: torch.Tensor) -> list[NDArray[Any]]:
        """Views of staged blocks, for each layer of the form of its rows."""
        flat, layers = words.numpy().reshape(-1), len(self._rows)
        views = []
        for layer, rows in enumerate(self._rows):
            views.append(flat.view(rows.dtype).reshape(len(words), layers, *rows.shape[1:])[:, layer])
        return views

    def _checked(self, block_ids: Sequence[int] | NDArray[Any], staged: torch.Tensor) -> NDArray[np.int64]:
        ids = self._checked_ids(block_ids)
        self._check_staged(staged, len(ids))
        return ids

    def _checked_ids(self, block_ids: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
        given = np.asarray(block_ids)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise TensorError(f"block_ids: expected a flat list of integers, got {given.dtype} of shape {given.shape}")
        ids = given.astype(np.int64)
        if len(ids) and not NULL_BLOCK < ids.min() <= ids.max() < self.num_blocks:
            bad = next(int(block) for block in given if not NULL_BLOCK < block < self.num_blocks)
            what = "the null block, which holds nobody's tokens" if bad == NULL_BLOCK else f"none of {self.num_blocks}"
            raise TensorError(f"block id {bad} is {what}; pass only blocks 1 .. {self.num_blocks - 1}")
        return ids

    def _check_staged(self, staged: torch.Tensor, count: int) -> None:
        wanted = (count, *self.shape)
        if staged.device.type != "cpu" or staged.dtype != self.dtype or tuple(staged.shape) != wanted:
            found = f"{staged.dtype}{list(staged.shape)} on {staged.device}"
            raise TensorError(
                f"staged blocks must be {self.dtype}{list(wanted)} in host memory, not {found}; allocate that"
            )
        if not staged.is_contiguous():
            raise TensorError("the staged blocks are not contiguous; pass the leading blocks of one allocation")


def _check_layers(layers: Sequence[Any], num_blocks: int, block_tokens: int) -> None:
    """Raise TensorError unless every layer is a plain strided tensor, all of one form, that holds these blocks."""
    if not layers:
        raise TensorError("no layers: the KV group is empty; build a PagedGroup for groups that have layers only")
    for place, layer in enumerate(layers):
        if not isinstance(layer, torch.Tensor):
            raise TensorError(
                f"layer {place} is a {type(layer).__name__}, not one tensor: state caches (Mamba) have no blocks of "
                "tokens; leave their KV group out"
            )
        if layer.is_meta or layer.layout is not torch.strided or layer.is_quantized or layer.is_nested:
            raise TensorError(
                f"layer {place} has no plain memory ({layer.layout}, {layer.device}); pass the real cache"
            )
        if layer.dim() != 4:
            raise TensorError(
                f"layer {place} has shape {list(layer.shape)}; pass the logical view [blocks, heads, tokens, content]"
            )
        if (layer.shape, layer.dtype, layer.device) != (layers[0].shape, layers[0].dtype, layers[0].device):
            raise TensorError(
                f"layer {place} is {layer.dtype}{list(layer.shape)} on {layer.device}, layer 0 is {layers[0].dtype}"
                f"{list(layers[0].shape)} on {layers[0].device}; make one PagedGroup for each form"
            )
        if _may_overlap(layer):
            raise TensorError(
                f"layer {place} has strides {layer.stride()} for shape {list(layer.shape)}: elements share memory; "
                "pass the cache itself, not an expanded view"
            )
    places = {layer.data_ptr() for layer in layers}
    if len(places) != len(layers):
        raise TensorError("two layers are the same memory (layers that share KV); pass each cache once")
    rows, _, tokens, _ = layers[0].shape
    if num_blocks < 2 or rows % num_blocks or rows // num_blocks * tokens != block_tokens or not layers[0].numel():
        raise TensorError(
            f"a cache of shape {list(layers[0].shape)} does not hold {num_blocks} blocks of {block_tokens} tokens; "
            "pass the engine's own number of blocks and its block size"
        )
    if layers[0].element_size() not in _WORDS:
        raise TensorError(
            f"{layers[0].dtype} elements have {layers[0].element_size()} bytes; only 1, 2, 4, 8 are known"
        )


def _check_unique(ids: NDArray[np.int64]) -> None:
    if len(np.unique(ids)) != len(ids):
        raise TensorError("a block id comes twice in block_ids, and only one block's bytes would stay; pass it once")


def _may_overlap(layer: torch.Tensor) -> bool:
    """Whether two elements could be one place in memory: false for every permuted, sliced or padded dense tensor."""
    reach = 0  # the farthest element that the dimensions so far reach
    for stride, size in sorted(zip(layer.stride(), layer.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _split_blocks(layer: torch.Tensor, ratio: int) -> torch.Tensor:
    """A view `[blocks, heads, ratio, tokens, content]` of `[blocks * ratio, heads, tokens, content]`."""
    return layer.unflatten(0, (-1, ratio)).permute(0, 2, 1, 3, 4)


def _as_rows(view: torch.Tensor) -> NDArray[Any]:
    """The view as numpy elements of the longest runs that lie together, both there and in a stored block.

    `[blocks, ...]` without the dimensions that are inside a run. numpy moves such an element by one memcpy, on this
    thread. torch's index_copy_ moves numbers, which takes twice as long, and on several threads both it and
    index_select wait for OpenMP at every layer: 2 ms on free cores, 70 to 290 on cores an engine keeps busy.
    """
    run, kept = 1, view.dim()
    while kept > 1 and (view.shape[kept - 1] == 1 or view.stride(kept - 1) == run):
        kept -= 1
        run *= view.shape[kept]
    runs = view.as_strided((*view.shape[:kept], run), (*view.stride()[:kept], 1))
    words: NDArray[Any] = runs.numpy()
    return words.view(np.dtype((np.void, run * view.element_size())))[..., 0]


def _as_grid(layers: Sequence[torch.Tensor], rows: Sequence[NDArray[Any]]) -> NDArray[np.uint8] | None:
    """uint8 `[blocks, layers, nbytes]` over the layers' memory, which must lie in one allocation, equally far apart,
    each layer's block in one run. None if it does not."""
    if not rows or any(one.ndim != 1 or one.strides != rows[0].strides for one in rows):
        return None
    places = [layer.data_ptr() for layer in layers]
    pitches = {after - before for before, after in itertools.pairwise(places)}
    memory = {layer.untyped_storage().data_ptr() for layer in layers}
    if len(pitches) > 1 or len(memory) > 1 or min(pitches, default=0) < 0:
        return None
    storage = layers[0].untyped_storage()
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    shape = (len(rows[0]), len(layers), rows[0].dtype.itemsize)
    strides = (rows[0].strides[0], next(iter(pitches), 0), 1)
    grid: NDArray[np.uint8] = whole.as_strided(shape, strides, places[0] - storage.data_ptr()).numpy()
    return grid
