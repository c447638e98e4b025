"""Token streams for calibration and training: text files, folders, and packed token files.

A packed file holds documents end to end as uint16 or uint32 (`tokens*.npy`, or `.npy.xz`); the file
beside it whose name says `lengths` instead of `tokens` holds the length of each document, and
without it the file is one document. Which tokens batch number n holds depends on the seed and on n
alone, so a position in the data is one number.
"""

import io
import lzma
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .errors import UsageError
from .text import decode, first_line

PACKED = (".npy", ".npy.xz")
TEXT = (".txt", ".md", ".rst", ".text")


@dataclass(frozen=True)
class Documents:
    """Documents as token ids.

    Attributes:
        parts: Arrays of token ids, one a file. part, start, length: [n] for the n documents:
            the array a document is in, where it begins there, and its tokens.
    """

    parts: list
    part: np.ndarray
    start: np.ndarray
    length: np.ndarray

    @property
    def total(self) -> int:
        """Tokens in all."""
        return int(self.length.sum())

    def fingerprint(self) -> str:
        """Changes when any token or length does; reads everything once."""
        crc = zlib.crc32(np.ascontiguousarray(self.length, np.int64))
        for x in self.parts:
            crc = zlib.crc32(np.ascontiguousarray(x), crc)
        return f"{self.total}-{len(self.length)}-{crc:08x}"


def read_documents(paths: Sequence, vocab: int, tokenizer: Callable | None) -> Documents:
    """Every document of some files and folders, in a fixed order.

    Args:
        paths: Text files, packed files, or folders of either. vocab: Ids must be below it.
        tokenizer: Called without arguments once text is met; gives something with `encode` and
            `eos_token_id`. Each text file is one document and ends with that token.

    Raises:
        UsageError: Nothing there, unreadable, or token ids the model does not have.
    """
    parts, lengths, opened = [], [], None
    for path in [f for p in paths for f in _files(Path(p).expanduser())]:
        if path.name.endswith(PACKED):
            tokens, sizes = _read_packed(path)
        else:
            opened = opened or _require(tokenizer, path)
            tokens = _encode(path, opened)
            sizes = np.array([len(tokens)])
        if len(tokens) and int(tokens.max()) >= vocab:
            raise UsageError(
                f"{path} holds token {int(tokens.max())}; the model knows {vocab}.",
                "It was packed with another model's tokenizer.",
            )
        parts.append(tokens)
        lengths.append(sizes.astype(np.int64))
    part = np.repeat(np.arange(len(parts)), [len(n) for n in lengths])
    start = [np.cumsum(n) - n for n in lengths]
    docs = Documents(parts, part, np.concatenate(start), np.concatenate(lengths))
    if docs.total < 2:
        raise UsageError("There are no tokens in the text.", "Give files or folders with more.")
    return docs


def _files(path: Path) -> list:
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        packed = [p for p in names if p.name.endswith(PACKED) and "lengths" not in p.name]
        found = [p for p in names if p.suffix in TEXT] if not packed else packed
        if not found:
            raise UsageError(
                f"{path} holds neither packed tokens ({', '.join(PACKED)}) nor text "
                f"({', '.join(TEXT)}).",
                "Give another folder, or the files by name.",
            )
        return found
    if not path.is_file():
        raise UsageError(f"{path} does not exist.", "Give a text file, a packed file or a folder.")
    return [path]


def _load(path: Path) -> np.ndarray:
    try:
        if path.name.endswith(".xz"):
            with lzma.open(path) as f:
                x = np.load(io.BytesIO(f.read()), allow_pickle=False)
        else:
            x = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, lzma.LZMAError) as e:
        raise UsageError(f"{path} cannot be read as an array ({first_line(e)}).") from None
    if x.ndim != 1 or x.dtype.kind not in "ui":
        raise UsageError(f"{path} holds {x.dtype} {list(x.shape)}, expected a list of integers.")
    return x


def _read_packed(path: Path) -> tuple:
    tokens = _load(path)
    if tokens.dtype not in (np.uint16, np.uint32):
        raise UsageError(f"{path} holds {tokens.dtype}, expected uint16 or uint32 token ids.")
    beside = path.with_name(path.name.replace("tokens", "lengths"))
    if beside == path or not beside.is_file():
        return tokens, np.array([len(tokens)])
    lengths = _load(beside).astype(np.int64)
    if lengths.sum() != len(tokens) or (lengths < 0).any():
        raise UsageError(
            f"{beside} adds up to {lengths.sum():,} tokens, {path.name} holds {len(tokens):,}."
        )
    return tokens, lengths


def _require(tokenizer: Callable | None, path: Path):
    if tokenizer is None:
        raise UsageError(f"{path} is text, and there is no tokenizer.", "Give packed tokens.")
    return tokenizer()


def _encode(path: Path, tokenizer) -> np.ndarray:
    try:
        text = decode(path.read_bytes(), str(path))
    except OSError as e:
        raise UsageError(f"{path} cannot be read ({e.strerror or first_line(e)}).") from None
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    return np.array([*ids, tokenizer.eos_token_id], np.uint32)


def write_packed(folder: Path, documents: Sequence, name: str = "") -> Path:
    """Write documents (sequences of ids) as tokens{name}.npy and lengths{name}.npy.

    Returns:
        The path of the tokens.
    """
    flat = np.concatenate([np.asarray(d, np.uint32) for d in documents])
    small = flat.max(initial=0) < 1 << 16
    path = folder / f"tokens{name}.npy"
    np.save(path, flat.astype(np.uint16) if small else flat)
    np.save(folder / f"lengths{name}.npy", np.array([len(d) for d in documents], np.uint32))
    return path


class Batches:
    """Windows of T + 1 tokens that overlap by one, shuffled twice: documents, then windows.

    An epoch lays all documents end to end in a new order and cuts that into windows, T apart; the
    last ones are dropped when they are short.

    Args:
        documents: What to draw from. width: T. seed: Decides both orders of every epoch.

    Raises:
        UsageError: Less text than one window.
    """

    def __init__(self, documents: Documents, width: int, seed: int):
        self.documents, self.width, self.seed = documents, width, seed
        self.windows = (documents.total - 1) // width
        if self.windows < 1:
            raise UsageError(
                f"The text has {documents.total:,} tokens, one sequence needs {width + 1:,}.",
                "Give more text or a smaller --length.",
            )
        self._epoch = -1

    def take(self, first: int, count: int) -> np.ndarray:
        """Windows number `first` to `first + count - 1` of an endless run, [count, T + 1] int32."""
        return np.stack([self._window(n) for n in range(first, first + count)])

    def _window(self, n: int) -> np.ndarray:
        epoch, i = divmod(n, self.windows)
        if epoch != self._epoch:
            rng = np.random.RandomState([self.seed % 2**32, epoch])
            self._order = rng.permutation(len(self.documents.length))
            self._ends = np.cumsum(self.documents.length[self._order])
            self._shuffle = rng.permutation(self.windows)
            self._epoch = epoch
        begin = int(self._shuffle[i]) * self.width
        return self._span(begin, begin + self.width + 1)

    def _span(self, begin: int, end: int) -> np.ndarray:
        docs, out = self.documents, []
        j = int(np.searchsorted(self._ends, begin, "right"))
        while begin < end:
            d = self._order[j]
            skip = begin - int(self._ends[j] - docs.length[d])
            at = int(docs.start[d]) + skip
            n = min(int(docs.length[d]) - skip, end - begin)
            out.append(docs.parts[docs.part[d]][at : at + n].astype(np.int32))
            begin, j = begin + n, j + 1
        return np.concatenate(out)
