"""Safetensors files: headers checked before any weight is trusted, shards written beside.

MLX reads the bytes; this module decides whether they may be read. A truncated or damaged file is
an error with a name in it, never a crash or wrong numbers.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .errors import CheckpointError

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "U32": 4,
    "I32": 4,
    "U64": 8,
    "I64": 8,
    "F16": 2,
    "BF16": 2,
    "F32": 4,
    "F64": 8,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}
FLOATS = ("F32", "BF16", "F16", "F64")
MAX_HEADER = 100_000_000  # the limit of the safetensors format


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a header describes it.

    Attributes:
        name, file: Where it is. dtype: Safetensors name ("BF16"). shape: Row-major.
        nbytes: Size in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple
    nbytes: int


def read_header(path: Path) -> dict:
    """The tensors of one safetensors file, from its header alone.

    Returns:
        {name: TensorInfo}.

    Raises:
        CheckpointError: Truncated, not safetensors, or a header that contradicts the file.
    """

    def bad(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: {what}.", "The file is damaged or incomplete; fetch or convert it again."
        )

    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            if len(start) < 8:
                raise bad(f"{size} bytes is too short for a safetensors file")
            (length,) = struct.unpack("<Q", start)
            if length > min(MAX_HEADER, size - 8):
                raise bad(f"the header says {length} bytes, the file has {size - 8} after it")
            header = json.loads(f.read(length).decode("utf-8"), object_pairs_hook=_no_repeats)
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror or e}).") from None
    except KeyError as e:
        raise bad(f"the header names {e.args[0]!r} twice") from None
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise bad("the header is not valid JSON") from None
    if not isinstance(header, dict):
        raise bad("the header is not an object")
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        info, span = _entry(path, name, entry, size - 8 - length, bad)
        tensors[name] = info
        spans.append(span)
    spans.sort()
    for (_, end, one), (start, _, other) in zip(spans, spans[1:]):  # noqa: B905
        if start < end:
            raise bad(f"tensors {one!r} and {other!r} overlap")
    if sum(e - s for s, e, _ in spans) != size - 8 - length:
        raise bad("the tensors do not fill the file")
    return tensors


def _no_repeats(pairs: list) -> dict:
    out: dict = {}
    for name, value in pairs:
        if name in out:
            raise KeyError(name)
        out[name] = value
    return out


def _entry(path: Path, name: str, entry: Any, room: int, bad) -> tuple:
    try:
        dtype, shape = entry["dtype"], entry["shape"]
        start, end = entry["data_offsets"]
        ok = (
            dtype in ITEM_BYTES
            and all(type(n) is int and 0 <= n < 2**40 for n in (*shape, start, end))
            and start <= end <= room
            and math.prod(shape) * ITEM_BYTES[dtype] == end - start
        )
    except (TypeError, KeyError, ValueError):
        ok = False
    if not ok:
        raise bad(f"the header entry of {name!r} does not fit the file")
    return TensorInfo(name, path, dtype, tuple(shape), end - start), (start, end, name)


def read_headers(folder: Path) -> dict:
    """All tensors of a checkpoint folder, one or many files.

    Returns:
        {name: TensorInfo}.

    Raises:
        CheckpointError: No weights, a shard of the index is missing, a name stands twice, or a
            file is damaged.
    """
    index = folder / "model.safetensors.index.json"
    files = sorted(folder.glob("model*.safetensors"))
    if index.is_file():
        try:
            names = json.loads(index.read_text("utf-8"))["weight_map"]
            wanted = sorted(set(names.values()))
            bad_name = [
                n for n in wanted if "/" in n or "\\" in n or not n.endswith(".safetensors")
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CheckpointError(f"{index}: not a valid shard index.") from None
        if bad_name:
            raise CheckpointError(f"{index}: names the file {bad_name[0]!r} outside the folder.")
        try:
            gone = [n for n in wanted if not (folder / n).is_file()]
        except (OSError, ValueError):  # too long for a file system, or a NUL in it
            raise CheckpointError(f"{index}: names a file that no folder can hold.") from None
        if gone:
            raise CheckpointError(
                f"{folder}: {len(gone)} of {len(wanted)} shards are missing, first {gone[0]}.",
                "Download the checkpoint again.",
            )
        files = [folder / n for n in wanted]
    if not files:
        raise CheckpointError(
            f"{folder}: no model*.safetensors in it.",
            "Give a folder with a converted model, or convert one with `hydra-mlx convert`.",
        )
    tensors = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{name} stands in {tensors[name].file.name} and {file.name}."
                )
            tensors[name] = info
    if index.is_file():
        lost = sorted(set(names) - set(tensors))
        if lost:
            raise CheckpointError(f"{index}: names {lost[0]!r}, which is in no shard.")
    return tensors


def load_arrays(path: Path) -> dict:
    """Lazy arrays of one file whose header was checked; nothing is read before use."""
    try:
        return mx.load(str(path))
    except (RuntimeError, ValueError) as e:
        raise CheckpointError(f"{path}: MLX cannot read it ({e}).") from None


class ShardWriter:
    """Collects tensors and writes them as safetensors shards of bounded size into a folder.

    Memory: at most one shard of `limit` bytes is held.

    Args:
        folder: An existing folder that nobody reads yet. limit: Bytes of a shard.
        format: What the files' metadata call their origin: "mlx" or "pt".
    """

    def __init__(self, folder: Path, limit: int, format: str = "mlx"):
        self.folder, self.limit, self.format = folder, limit, format
        self.pending: dict = {}
        self.pending_bytes = 0
        self.total_bytes = 0
        self.shards: list = []  # list of name lists

    def add(self, tensors: dict):
        """Evaluate and keep {name: array}; writes a shard first when the room is not enough."""
        mx.eval(list(tensors.values()))
        size = sum(x.nbytes for x in tensors.values())
        if self.pending and self.pending_bytes + size > self.limit:
            self._flush()
        self.pending.update(tensors)
        self.pending_bytes += size
        self.total_bytes += size

    def _flush(self):
        path = self.folder / f"part-{len(self.shards):05d}.safetensors"
        mx.save_safetensors(str(path), self.pending, {"format": self.format})
        self.shards.append(sorted(self.pending))
        self.pending, self.pending_bytes = {}, 0
        mx.clear_cache()

    def close(self) -> list:
        """Write what is left, give the shards their final names and write the index.

        Returns:
            Names of the files written.
        """
        if self.pending:
            self._flush()
        n = len(self.shards)
        weight_map, files = {}, []
        for i, names in enumerate(self.shards):
            final = "model.safetensors" if n == 1 else f"model-{i + 1:05d}-of-{n:05d}.safetensors"
            (self.folder / f"part-{i:05d}.safetensors").rename(self.folder / final)
            files.append(final)
            weight_map.update({name: final for name in names})
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(
            json.dumps(index, indent=1, sort_keys=True), "utf-8"
        )
        return [*files, "model.safetensors.index.json"]
