"""Buffers in guarded memory and the call into a compiled kernel.

The structures mirror runtime/runtime.h.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import threading
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from .counts import BufferCounts, LaunchCounts
from .errors import FAULT_KINDS, KernelFault, MetalHostError

PAGE = 4096
MAX_BUFFERS = 64
STACK_BYTES = 64 * 1024
CHECK, COUNT, EXITED_LANES_OK, NATURAL_ALIGNMENT = 1, 2, 4, 8
INPUT, OUTPUT, FILLED_OUTPUT = 0, 1, 2
_NO_OWNER = 255
_PROT_NONE = 0
# Below this many threads a second worker costs more than it brings.
_THREADS_FOR_WORKERS = 4096


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("item_bytes", ctypes.c_uint32),
        ("kind", ctypes.c_uint32),
        ("name", ctypes.c_char * 48),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("group", ctypes.c_uint32 * 3),
        ("workers", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("order", ctypes.c_uint32),
        ("timeout_ms", ctypes.c_uint32),
        ("stack_bytes", ctypes.c_uint32),
        ("group_item_bytes", ctypes.c_uint32),
        ("buffer_count", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("args", ctypes.POINTER(ctypes.c_void_p)),
        ("arena", ctypes.c_void_p),
        ("arena_bytes", ctypes.c_uint64),
        ("owner", ctypes.c_void_p),
        ("touched", ctypes.c_void_p),
    ]


class _Report(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("threadgroups", ctypes.c_uint64),
        ("threads", ctypes.c_uint64),
        ("simdgroups", ctypes.c_uint64),
        ("threadgroup_memory", ctypes.c_uint64),
        ("atomics", ctypes.c_uint64),
        ("switches", ctypes.c_uint64),
        ("ops", ctypes.c_uint64 * 64),
        ("buffers", ctypes.c_uint64 * 2 * MAX_BUFFERS),
        ("group_memory", ctypes.c_uint64 * 2),
        ("message", ctypes.c_char * 1024),
    ]


@dataclass(frozen=True)
class Slot:
    """A buffer to be laid out: its name, address space, size, element size and kind."""

    name: str
    space: str
    bytes: int
    item_bytes: int
    kind: int


@dataclass(frozen=True)
class Options:
    """How a launch runs; see `MetalKernel.__call__`."""

    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    check: bool
    count: bool
    order: int
    workers: int | None
    timeout: float
    exited_lanes_ok: bool
    natural_alignment: bool
    threadgroup_item_bytes: int

    @property
    def watched(self) -> bool:
        return self.check or self.count


class Arena:
    """One shared mapping for all buffers, with an inaccessible page before and after each.

    A buffer starts at a multiple of 16 and ends within 15 bytes of the page behind it.
    """

    def __init__(self, slots: list[Slot]):
        self.slots = slots
        owner: list[np.ndarray] = []
        guards, offsets = [0], []
        page = 1
        for index, slot in enumerate(slots):
            pages = max(1, -(-slot.bytes // PAGE))
            offsets.append(page * PAGE + (pages * PAGE - slot.bytes) // 16 * 16)
            owner.append(np.full(pages + 1, index, np.uint8))
            owner[-1][-1] = _NO_OWNER
            page += pages + 1
            guards.append(page - 1)
        self.owner = np.concatenate([np.full(1, _NO_OWNER, np.uint8), *owner])
        self.bytes = page * PAGE
        self._map = mmap.mmap(-1, self.bytes)
        self.memory = np.frombuffer(self._map, np.uint8)
        self.base = self.memory.ctypes.data
        for guard in guards:
            _protect(self.base + guard * PAGE)
        self.views = [
            self.memory[at : at + slot.bytes] for at, slot in zip(offsets, slots, strict=True)
        ]
        self.addresses = [self.base + at for at in offsets]


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def _protect(address: int) -> None:
    if _libc().mprotect(address, PAGE, _PROT_NONE):
        raise MetalHostError(f"mprotect failed: {os.strerror(ctypes.get_errno())}")


@functools.cache
def _library(path: Path) -> ctypes.CDLL:
    # Kernels call expf and its like, and are linked with nothing: libm must be visible to them.
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    library.mh_run.argtypes = [ctypes.POINTER(_Launch), ctypes.POINTER(_Report)]
    library.mh_op_name.argtypes = [ctypes.c_uint32]
    library.mh_op_name.restype = ctypes.c_char_p
    return library


# A library holds the state of one launch.
_one_launch = threading.Lock()


def run(library_path: Path, kernel_name: str, arena: Arena, options: Options) -> LaunchCounts:
    """Executes a compiled kernel on the buffers of the arena and counts what it did.

    Raises:
        KernelFault: the kernel failed, or in checked mode did something forbidden.
        MetalHostError: the system refused a worker process.
    """
    library = _library(library_path)
    buffers = (_Buffer * len(arena.slots))()
    for at, slot, address in zip(buffers, arena.slots, arena.addresses, strict=True):
        at.data, at.bytes, at.item_bytes, at.kind = (
            address,
            slot.bytes,
            slot.item_bytes,
            slot.kind,
        )
        at.name = slot.name.encode()[:47]
    args = (ctypes.c_void_p * len(arena.addresses))(*arena.addresses)
    touched_map = mmap.mmap(-1, 2 * arena.bytes) if options.watched else None
    touched = np.frombuffer(touched_map, np.uint8) if touched_map is not None else None
    request = _Launch(
        grid=options.grid,
        group=tuple(min(t, g) for t, g in zip(options.threadgroup, options.grid, strict=True)),
        workers=_workers(options),
        flags=(CHECK if options.check else 0)
        | (COUNT if options.count else 0)
        | (EXITED_LANES_OK if options.exited_lanes_ok else 0)
        | (NATURAL_ALIGNMENT if options.natural_alignment else 0),
        order=options.order,
        timeout_ms=max(1, int(options.timeout * 1000)),
        stack_bytes=STACK_BYTES,
        group_item_bytes=options.threadgroup_item_bytes,
        buffer_count=len(arena.slots),
        buffers=buffers,
        args=args,
        arena=arena.base,
        arena_bytes=arena.bytes,
        owner=arena.owner.ctypes.data,
        touched=touched.ctypes.data if touched is not None else None,
    )
    report = _Report()
    with _one_launch:
        status = library.mh_run(ctypes.byref(request), ctypes.byref(report))
    if status:
        raise MetalHostError(f"no worker process: {os.strerror(status)}")
    if report.code:
        message = f"kernel {kernel_name}: {report.message.decode(errors='replace')}"
        raise KernelFault(FAULT_KINDS[report.code], message)
    return _counts(library, report, arena, touched)


def _workers(options: Options) -> int:
    # Checks follow one thread after the other, so they need all threadgroups in one process.
    if options.check:
        return 1
    if options.workers is not None:
        return max(1, options.workers)
    threads = prod(options.grid)
    if threads < _THREADS_FOR_WORKERS:
        return 1
    return max(1, min(len(os.sched_getaffinity(0)), threads // prod(options.threadgroup)))


def _counts(
    library: ctypes.CDLL, report: _Report, arena: Arena, touched: np.ndarray | None
) -> LaunchCounts:
    operations = {}
    for op, count in enumerate(report.ops):
        if count:
            operations[library.mh_op_name(op).decode()] = count
    buffers = None
    if touched is not None:
        buffers = {}
        for index, (slot, address) in enumerate(zip(arena.slots, arena.addresses, strict=True)):
            at = address - arena.base
            unique_read = touched[at : at + slot.bytes]
            unique_written = touched[arena.bytes + at : arena.bytes + at + slot.bytes]
            buffers[slot.name] = BufferCounts(
                slot.space,
                slot.bytes,
                *report.buffers[index],
                int(np.count_nonzero(unique_read)),
                int(np.count_nonzero(unique_written)),
            )
    return LaunchCounts(
        threads=report.threads,
        simdgroups=report.simdgroups,
        threadgroups=report.threadgroups,
        threadgroup_memory=report.threadgroup_memory,
        operations=operations,
        atomics=report.atomics,
        buffers=buffers,
        threadgroup_bytes_read=report.group_memory[0] if buffers is not None else None,
        threadgroup_bytes_written=report.group_memory[1] if buffers is not None else None,
        fiber_switches=report.switches,
    )
