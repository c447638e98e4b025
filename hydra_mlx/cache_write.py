"""Writing a prompt cache file, whole or not at all; its form is in cache_file.py."""

import contextlib
import fcntl
import glob
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import xxhash

from .cache_file import BLOCK, START, SUM, SUMS, header_sum
from .errors import CacheError
from .files import sync_folder
from .shards import MAX_HEADER
from .text import first_line, size

_ITEM = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.int8: "I8", mx.uint16: "U16", mx.int16: "I16",
    mx.uint32: "U32", mx.int32: "I32", mx.uint64: "U64", mx.int64: "I64", mx.float16: "F16",
    mx.bfloat16: "BF16", mx.float32: "F32",
}  # fmt: skip


class _Sums:
    """Checksums of a stream, block by block."""

    def __init__(self):
        self.done, self._digest, self._room = bytearray(), xxhash.xxh3_128(), BLOCK

    def update(self, data: memoryview):
        while data:
            piece, data = data[: self._room], data[self._room :]
            self._digest.update(piece)
            self._room -= len(piece)
            if self._room == 0:
                self._close()

    def _close(self):
        self.done += self._digest.digest()
        self._digest, self._room = xxhash.xxh3_128(), BLOCK

    def close(self) -> bytes:
        if self._room < BLOCK:
            self._close()
        return bytes(self.done)


def write_cache_file(
    path: Path, metadata: dict, arrays: list, sums_name: str, ready: Callable = lambda: None
):
    """Write a file beside `path`, then give it that name; one array at a time is made contiguous.

    Args:
        metadata: Strings. arrays: [(name, mx.array), ...]. sums_name: A prefix for SUMS that makes
            it the name of the last array. ready: Called before the file gets its name; may raise.

    Raises:
        CacheError: It cannot be written; an older file is as it was.
    """
    target = path.expanduser().resolve()
    known = [(n, _ITEM[x.dtype], x.shape, x.nbytes) for n, x in arrays]
    header, need = _header(metadata, known, sums_name)
    try:
        _sweep(target)
        free = shutil.disk_usage(target.parent).free
        if need > free:
            raise OSError(f"it takes {size(need)}, but only {size(free)} are free on this disk")
        with _beside(target) as (part, f):
            f.write(len(header).to_bytes(8, "little") + header)
            sums = _Sums()
            for _, x in arrays:
                data = _data(x)
                sums.update(data)
                f.write(data)
            table = sums.close()
            f.write(table)
            f.seek(8 + len(START))
            f.write(header_sum(header, table))
            f.flush()
            os.fsync(f.fileno())
            ready()
            part.replace(target)
        sync_folder(target.parent, files=False)
    except (OSError, RuntimeError, ValueError) as e:
        why = getattr(e, "strerror", None) or first_line(e)
        raise CacheError(
            f"The prompt cache {target} cannot be written ({why}).",
            "An older file there is unchanged.",
        ) from e


def _header(metadata: dict, arrays: list, sums_name: str) -> tuple:
    """(header with a blank checksum, bytes of the whole file)."""
    total = sum(a[3] for a in arrays)
    blocks = -(-total // BLOCK)
    table = (f"{sums_name}.{SUMS}", "U8", (blocks, SUM), blocks * SUM)
    entries, at = {"__metadata__": {"0.check": "0" * 2 * SUM, **metadata}}, 0
    for name, dtype, shape, nbytes in [*arrays, table]:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 64)
    if len(header) > MAX_HEADER:
        raise CacheError(f"The cache needs a header of {size(len(header))}, too much for a file.")
    return header, 8 + len(header) + at


def _data(x: mx.array) -> memoryview:
    if x.size == 0:
        return memoryview(b"")
    x = mx.contiguous(x).reshape(-1).view(mx.uint8)
    mx.eval(x)
    return memoryview(x)


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[tuple]:
    """(path, open file) of a file beside the target; it is gone afterwards unless renamed."""
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    with part.open("x+b") as f:
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells _sweep that we live
            yield part, f
        finally:
            part.unlink(missing_ok=True)


def _sweep(target: Path):
    """Remove what writers of this file left that were killed: nobody holds their lock."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with contextlib.suppress(OSError), part.open("r+b") as f:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
