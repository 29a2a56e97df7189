"""What HiCache asks of a device, on the CPU: events that are always done, and copies between the two tiers' layouts.

`host` pools are [page, layer, token of the page, head, dim] (page_first_direct) or [page, head, token of the page,
layer, dim] (page_head), `device` pools one [token, head, dim] a layer. Indices are tokens'. Parameters are named as
SGLang passes them.
"""

from __future__ import annotations

import builtins
import ctypes
import time
from typing import Any

import torch


class Event:
    """A device event that has happened as soon as it is recorded."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.time_s = 0.0

    def record(self, stream: object = None) -> None:
        self.time_s = time.perf_counter()

    def query(self) -> bool:
        return True

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    synchronize = wait

    def elapsed_time(self, other: Event) -> float:
        return (other.time_s - self.time_s) * 1e3


class Runtime:
    """Registering host memory with a GPU, where there is none."""

    def cudaHostRegister(self, *args: object) -> int:
        return 0

    def cudaHostUnregister(self, *args: object) -> int:
        return 0


def _nothing(*args: object, **kwargs: object) -> None:
    """A stream of the CPU is always up to date."""


def transfer_kv_direct(src_layers: Any, dst_layers: Any, src_indices: Any, dst_indices: Any, page_size: int) -> None:
    """Copy tokens between pools of one layout."""
    for source, destination in zip(src_layers, dst_layers, strict=True):
        destination[dst_indices] = source[src_indices]


def transfer_kv_per_layer_direct_pf_lf(
    src_ptrs: Any, dst_ptrs: Any, src_indices: Any, dst_indices: Any, layer_id: int, page_size: int
) -> None:
    """Copy one layer of whole pages from the host to the device."""
    pages = src_indices[::page_size] // page_size
    for host, device in zip(src_ptrs, dst_ptrs, strict=True):
        device[dst_indices] = host[pages, layer_id].flatten(0, 1)


def transfer_kv_all_layer_direct_lf_pf(
    src_ptrs: Any, dst_ptrs: Any, src_indices: Any, dst_indices: Any, page_size: int
) -> None:
    """Copy every layer of whole pages from the device, all layers of K before those of V, to the host."""
    layers = len(src_ptrs) // len(dst_ptrs)
    pages = dst_indices[::page_size] // page_size
    for place, device in enumerate(src_ptrs):
        tokens = device[src_indices].unflatten(0, (len(pages), page_size))
        dst_ptrs[place // layers][pages, place % layers] = tokens


def transfer_kv_per_layer_ph_lf(
    src_k: Any, dst_k: Any, src_v: Any, dst_v: Any, src_indices: Any, dst_indices: Any, layer_id: int, **more: Any
) -> None:
    """Copy one layer of whole pages from a host whose pages are cut by heads to the device."""
    size = more["page_size"]
    pages = src_indices[::size] // size
    for host, device in ((src_k, dst_k), (src_v, dst_v)):
        device[dst_indices] = host[pages][:, :, :, layer_id].transpose(1, 2).flatten(0, 1)


def transfer_kv_all_layer_lf_ph(
    src_k_layers: Any, dst_k: Any, src_v_layers: Any, dst_v: Any, src_indices: Any, dst_indices: Any, **more: Any
) -> None:
    """Copy every layer of whole pages from the device, known by its layers' addresses, to a host cut by heads."""
    size, nbytes = more["page_size"], more["item_size"]
    pages = dst_indices[::size] // size
    rows = int(src_indices.max()) + 1
    for addresses, host in ((src_k_layers, dst_k), (src_v_layers, dst_v)):
        for layer, address in enumerate(addresses.tolist()):
            memory = (ctypes.c_uint8 * (rows * nbytes)).from_address(address)
            device = torch.frombuffer(memory, dtype=host.dtype).view(rows, host.shape[1], host.shape[4])
            host[pages, :, :, layer] = device[src_indices].unflatten(0, (len(pages), size)).transpose(1, 2)


def _unpinned(make: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return call


def install() -> None:
    """Put all of it where SGLang looks: torch.cpu, torch.cuda, and, for names it imports on a GPU only, builtins."""
    torch.cpu.Event = Event
    for name in ("synchronize", "record_event", "wait_event", "wait_stream"):
        setattr(torch.cpu.Stream, name, _nothing)
    torch.cuda.cudart = Runtime
    for name in ("empty", "zeros", "tensor", "full"):
        setattr(torch, name, _unpinned(getattr(torch, name)))
    for function in (
        transfer_kv_direct,
        transfer_kv_per_layer_direct_pf_lf,
        transfer_kv_all_layer_direct_lf_pf,
        transfer_kv_per_layer_ph_lf,
        transfer_kv_all_layer_lf_ph,
    ):
        setattr(builtins, function.__name__, function)
