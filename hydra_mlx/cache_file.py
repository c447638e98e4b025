"""The container of a prompt cache file: safetensors whose every byte can be checked in no time.

    length (8 bytes) | header: JSON | arrays, one after the other | checksums of the blocks

The arrays are taken in blocks of BLOCK bytes, each with an XXH3-128 checksum in the last array. The
first entry of the header is one over the header and that array. So a header is checked without
reading the arrays, a part of an array by its blocks, and the whole by several threads at the speed
of memory. Any tool for safetensors reads such a file; what the arrays mean is in prompt_cache.py.
Importing this does not import mlx_lm, which takes most of a second.
"""

import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import xxhash

from .errors import CacheError
from .shards import ITEM_BYTES, MAX_HEADER
from .text import first_line

FORMAT = 2
OWN = "0.hydra"  # the metadata that is ours, as JSON
BLOCK = 4 << 20
PIECE = 1 << 20  # bytes read at a time: they stay in the processor's cache until they are summed
SUM = 16  # bytes of a checksum
SUMS = "checksums"  # the last array's name, after a number and a dot
START = b'{"__metadata__":{"0.check":"'
AGAIN = "Delete the file, or start anew with --prompt-cache-overwrite."
FOREIGN = "Take another file name; this file stays as it is."


@dataclass(frozen=True)
class Entry:
    """One array of a file: its safetensors dtype, shape, and its first byte and the one after."""

    dtype: str
    shape: tuple
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Its size."""
        return self.stop - self.start


class CacheFile:
    """An open file whose header is as it was written.

    Attributes:
        path: As given. metadata: Of the header, strings. entries: {name: Entry}, no checksums.
        nbytes: Size of the file.

    Raises:
        CacheError: Unreadable, damaged, incomplete, or no file of hydra_mlx.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser()
        self._handle = -1
        try:
            self._handle = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait
            self._stat = self._identity()
            self.nbytes = self._stat[0]
            self._read_header()
        except (OSError, ValueError) as e:
            why = getattr(e, "strerror", None) or first_line(e)
            raise CacheError(f"{self.path} cannot be read ({why}).") from e

    def __del__(self):
        if self._handle >= 0:
            os.close(self._handle)

    def _identity(self) -> tuple:
        s = os.fstat(self._handle)
        return s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev

    def _damaged(self, what: str) -> CacheError:
        return CacheError(f"{self.path} is damaged or incomplete: {what}.", AGAIN)

    def _foreign(self) -> CacheError:
        old = self.metadata.get("0.hydra_format")
        if old is None:
            what = f"{self.path} was not written by hydra_mlx: it has no checksums."
            return CacheError(what, FOREIGN)
        return CacheError(
            f"{self.path} has format {old}, of an earlier version of hydra_mlx.",
            "Read the document again, into another file, or add --prompt-cache-overwrite.",
        )

    def _read_header(self):
        length = int.from_bytes(self._bytes(0, 8), "little")
        if self.nbytes < 8 or length > min(MAX_HEADER, self.nbytes - 8):
            raise CacheError(
                f"{self.path} is no prompt cache, or its beginning is damaged.",
                f"{FOREIGN[:-1]}, unless you give it up with --prompt-cache-overwrite.",
            )
        header = self._bytes(8, 8 + length)
        try:
            found = json.loads(header)
            self.metadata = dict(found.pop("__metadata__", None) or {})
            if not header.startswith(START):
                raise self._foreign()
            known = self._parse(found, 8 + length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._damaged("its header cannot be understood") from None
        end = max((e.stop for e in known.values()), default=0)
        if end != self.nbytes:
            raise self._damaged(f"it has {self.nbytes:,} bytes, expected {end:,}")
        name = next((n for n in known if n.endswith("." + SUMS)), None)
        if name is None or known[name].stop != end:
            raise self._damaged("its checksums are missing")
        sums = known.pop(name)
        self.data = (8 + length, sums.start)
        self._sums = self._bytes(sums.start, sums.stop)
        at = len(START)
        blank = header[:at] + b"0" * 2 * SUM + header[at + 2 * SUM :]
        if header[at : at + 2 * SUM] != header_sum(blank, self._sums):
            raise self._damaged("the checksum of its header is wrong")
        if len(self._sums) != self.blocks * SUM:
            raise self._damaged("its checksums are not as many as its blocks")
        self.entries = known

    @staticmethod
    def _parse(found: dict, first: int) -> dict:
        entries, at = {}, first
        for name, e in found.items():
            a, b = e["data_offsets"]
            shape = tuple(e["shape"])
            if first + a != at or math.prod(shape) * ITEM_BYTES[e["dtype"]] != b - a:
                raise ValueError(name)  # written by us, arrays follow each other without gaps
            at = first + b
            entries[name] = Entry(e["dtype"], shape, first + a, at)
        return entries

    def _bytes(self, start: int, stop: int) -> bytes:
        data = bytearray()
        while len(data) < stop - start:
            piece = os.pread(
                self._handle, min(stop - start - len(data), 1 << 30), start + len(data)
            )
            if not piece:
                break
            data += piece
        return bytes(data)

    @property
    def blocks(self) -> int:
        """How many blocks the arrays take."""
        return -(-(self.data[1] - self.data[0]) // BLOCK)

    def _is_good(self, block: int, buffer: memoryview) -> bool:
        at = self.data[0] + block * BLOCK
        end = min(at + BLOCK, self.data[1])
        digest = xxhash.xxh3_128()
        while at < end:
            n = os.preadv(self._handle, [buffer[: end - at]], at)
            if n == 0:
                return False
            digest.update(buffer[:n])
            at += n
        return digest.digest() == self._sums[block * SUM : (block + 1) * SUM]

    def check(self, start: int | None = None, stop: int | None = None):
        """Compare the blocks between two bytes of the file with their checksums; None: all.

        Raises:
            CacheError: One of them is not as it was written, or cannot be read.
        """
        first = 0 if start is None else (start - self.data[0]) // BLOCK
        last = self.blocks if stop is None else -(-(stop - self.data[0]) // BLOCK)
        threads = min(8, os.cpu_count() or 1, max(1, (last - first) // 8))

        def some(blocks: range) -> int | None:
            buffer = memoryview(bytearray(PIECE))
            return next((b for b in blocks if not self._is_good(b, buffer)), None)

        try:
            with ThreadPoolExecutor(threads) as pool:
                found = list(
                    pool.map(some, (range(first + i, last, threads) for i in range(threads)))
                )
        except OSError as e:
            raise CacheError(f"{self.path} cannot be read ({e.strerror or e}).") from e
        bad = min((b for b in found if b is not None), default=None)
        if bad is not None:
            at = self.data[0] + bad * BLOCK
            raise self._damaged(f"the checksum of the block at byte {at:,} is wrong")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes of an array, checked.

        Raises:
            CacheError: Damaged.
        """
        e = self.entries[name]
        a, b = e.start + start, e.stop if stop is None else min(e.start + stop, e.stop)
        self.check(a, b)
        return self._bytes(a, b)

    def arrays(self) -> dict:
        """{name: lazy array}: MLX reads the bytes of each when it is first used.

        What they are made of is only sure if unchanged() is called after that.

        Raises:
            CacheError: Another file has this name by now.
        """
        try:
            found = mx.load(str(self.path), format="safetensors")
            s = os.stat(self.path)
        except (OSError, RuntimeError, ValueError) as e:
            raise CacheError(f"{self.path} cannot be read ({first_line(e)}).") from e
        if (s.st_ino, s.st_dev) != self._stat[2:]:
            raise CacheError(f"{self.path} was replaced while it was opened.", "Try again.")
        return {name: found[name] for name in self.entries}

    def unchanged(self):
        """Whether nobody has written into the file since it was opened.

        Raises:
            CacheError: Somebody has.
        """
        if self._identity() != self._stat:
            raise CacheError(f"{self.path} was changed while it was in use.", "Start again.")


def header_sum(header: bytes, sums: bytes) -> bytes:
    """Checksum, as hex, of a header with a blank one and of the checksums of the blocks."""
    digest = xxhash.xxh3_128(len(header).to_bytes(8, "little"))
    digest.update(header)
    digest.update(sums)
    return digest.hexdigest().encode()


def own_metadata(file: CacheFile) -> tuple:
    """(our part of a file's metadata, class names of the cache, its scalars).

    Raises:
        CacheError: Another format. ValueError, KeyError, TypeError: Not what save_cache writes.
    """
    own = json.loads(file.metadata[OWN])
    if own["format"] != FORMAT:
        raise CacheError(
            f"{file.path} has format {own['format']}, expected {FORMAT}.",
            "It was written by another version of hydra_mlx; use that one.",
        )
    n = sum(key.startswith("1.") for key in file.metadata)
    classes = [file.metadata[f"1.{i}"] for i in range(n)]
    m = sum(key.startswith("2.") for key in file.metadata) // 2  # the first, "", has no parts
    scalars = [[file.metadata[f"2.{i}.{k}"] for k in (0, 1)] for i in range(1, m + 1)]
    return own, classes, scalars
