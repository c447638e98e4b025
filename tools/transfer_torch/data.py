"""Training batches: packed token files, a mixture by weight, retrieval tasks made on the fly.

A batch depends on (seed, step, rank) alone, so a run that is resumed sees what it would have seen.

usage: python -m tools.transfer_torch.data DIR

Decompresses every DIR/NAME.xz, and NAME.xz.00, .01, ... joined, to DIR/NAME.
"""

import argparse
import lzma
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .retrieval import Tasks, words_of

# Streams of packed documents: {name: (token files, lengths files)}. Of the teacher's text the
# last share HELD of each file's documents is kept for evaluation.
STREAMS = {
    "teacher": (("tokens-0", "tokens-1"), ("lengths-0", "lengths-1")),
    "long": (("long.tokens",), ("long.lengths",)),
    "heldout": (("heldout.tokens",), ("heldout.lengths",)),
}
HELD = 0.01
LABEL_PAD = 0


class Stream:
    """Documents end to end in memory-mapped files.

    Args:
        part: "train", "held" (what is kept for evaluation) or "all".
    """

    def __init__(self, folder: Path, name: str, part: str):
        self.files, self.spans = [], []
        for tokens, lengths in zip(*STREAMS[name], strict=True):
            ids = np.load(folder / f"{tokens}.npy", mmap_mode="r")
            ends = np.cumsum(np.load(folder / f"{lengths}.npy").astype(np.int64))
            starts = np.concatenate([[0], ends[:-1]])
            cut = 0 if part == "all" else len(starts) - max(1, int(HELD * len(starts)))
            if part == "train":
                ids, starts = ids[: starts[cut]], starts[:cut]
            else:
                ids, starts = ids[starts[cut] :], starts[cut:] - starts[cut]
            self.files.append(ids)
            self.spans.append(starts)
        self.sizes = np.array([len(f) for f in self.files], float)

    def window(self, rng, n: int, anywhere: float) -> np.ndarray:
        """n ids from the start of a document, or with chance `anywhere` from any token.

        Documents are drawn by their length, and what follows them follows in the window.
        """
        i = rng.choice(len(self.files), p=self.sizes / self.sizes.sum())
        ids, starts = self.files[i], self.spans[i]
        at = int(rng.integers(max(1, len(ids) - n)))
        if rng.random() >= anywhere:
            at = int(starts[np.searchsorted(starts, at, "right") - 1])
        piece = np.asarray(ids[at : at + n], np.int64)
        return np.resize(piece, n) if len(piece) < n else piece


class Batches(Dataset):
    """Item s is the batch of step s: ids [rows, length + 1] and answer masks [rows, length].

    The mask marks the positions whose next token is a retrieval answer.
    """

    def __init__(self, folder: Path, mix: dict[str, float], rows: int, length: int, seed: int,
                 rank: int = 0, part: str = "train"):  # fmt: skip
        self.folder, self.rows, self.length = folder, rows, length
        self.names = [n for n in mix if mix[n] > 0]
        weights = np.array([mix[n] for n in self.names], float)
        self.weights, self.seed, self.rank, self.part = weights / weights.sum(), seed, rank, part
        self.streams, self.tasks = {}, None

    def _open(self):
        """Files and the tokenizer, in the process that reads them."""
        held = self.part != "train"
        long = "heldout" if held else "long"
        if (self.folder / f"{STREAMS[long][0][0]}.npy").exists():
            self.streams["long"] = Stream(self.folder, long, "all")
        if (self.folder / "tokens-0.npy").exists():
            self.streams["teacher"] = Stream(self.folder, "teacher", "held" if held else "train")
        if "retrieval" in self.names:
            from tokenizers import Tokenizer

            tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
            encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
            self.tasks = Tasks(encode, words_of(tokenizer.get_vocab()), self._fill)

    def _fill(self, rng, n: int) -> np.ndarray:
        """n ids of running text without special tokens, from pieces of 60 to 600."""
        names, pieces, got = sorted(self.streams), [], 0
        while got < n:
            stream = self.streams[names[rng.integers(len(names))]]
            piece = stream.window(rng, int(rng.integers(60, 600)), 0.5)
            pieces.append(piece[piece > 2])
            got += len(pieces[-1])
        return np.concatenate(pieces)[:n]

    def task_row(self, rng, kind: str = "", pad: bool = False):
        """Tasks up to length + 1 ids; with pad one task alone, then LABEL_PAD."""
        n, ids, marks = self.length + 1, [], []
        while sum(map(len, ids)) < n:
            left = n - sum(map(len, ids))
            # Long rows are mostly one long task; short ones in between keep the lengths mixed.
            size = left if left < 256 or rng.random() < 0.6 else int(rng.integers(200, left))
            task, mark = self.tasks.make(rng, max(size, 200), kind, True if pad else None)
            ids.append(task)
            marks.append(mark)
            if pad:
                ids.append(np.full(n - len(task), LABEL_PAD))
                marks.append(np.zeros(n - len(task), np.uint8))
        return np.concatenate(ids)[:n], np.concatenate(marks)[1:n]

    def __getitem__(self, step: int):
        if not self.streams:
            self._open()
        rng = np.random.default_rng([self.seed, step, self.rank, self.part != "train"])
        ids = np.zeros((self.rows, self.length + 1), np.int64)
        marks = np.zeros((self.rows, self.length), np.uint8)
        for r in range(self.rows):
            name = self.names[rng.choice(len(self.names), p=self.weights)]
            if name == "retrieval":
                ids[r], marks[r] = self.task_row(rng)
            else:
                anywhere = 0.5 if name == "long" else 0.1
                ids[r] = self.streams[name].window(rng, self.length + 1, anywhere)
        return ids, marks

    def needles(self, index: int, kind: str):
        """One batch of single padded tasks for evaluation, its own for every index."""
        if not self.streams:
            self._open()
        rng = np.random.default_rng([self.seed, index, 1 << 20, KIND_SEED[kind]])
        rows = [self.task_row(rng, kind, True) for _ in range(self.rows)]
        return np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])


class InTurn(Dataset):
    """Item s is that of `even` or of `odd`."""

    def __init__(self, even: Batches, odd: Batches):
        self.even, self.odd = even, odd

    def __getitem__(self, step: int):
        return (self.odd if step % 2 else self.even)[step]


KIND_SEED = {"single": 1, "multi": 2, "list": 3, "repeat": 4}


def loader(batches: Dataset, first: int, last: int, workers: int) -> DataLoader:
    """Batches of steps first .. last - 1 in order, made ahead by worker processes."""
    ahead = {"prefetch_factor": 4, "persistent_workers": True} if workers else {}
    return DataLoader(
        batches, batch_size=None, sampler=range(first, last), num_workers=workers,
        pin_memory=torch.cuda.is_available(), **ahead,
    )  # fmt: skip


def parse_mix(text: str) -> dict[str, float]:
    """{"teacher": 0.7, ...} of "teacher=0.7,long=0.15,retrieval=0.15"."""
    mix = {}
    for entry in text.split(","):
        found = re.fullmatch(r"(teacher|long|retrieval)=([0-9.]+)", entry)
        if not found:
            raise ValueError(f"{entry!r} is no part of a mixture such as teacher=0.8,long=0.2")
        mix[found[1]] = float(found[2])
    return mix


def expand(folder: Path) -> None:
    """Decompresses every .xz of the folder, joining split ones first."""
    whole: dict[Path, list[Path]] = {}
    for file in sorted(folder.glob("*.xz*")):
        name = re.sub(r"\.xz(\.\d+)?$", "", str(file))
        whole.setdefault(Path(name), []).append(file)

    def one(target: Path):
        if not target.exists():
            data = lzma.decompress(b"".join(f.read_bytes() for f in whole[target]))
            part = target.with_name(target.name + ".part")
            part.write_bytes(data)
            part.rename(target)

    with ThreadPoolExecutor() as pool:
        list(pool.map(one, whole))


def main(argv=None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    args = parser.parse_args(argv)
    expand(args.folder)
    for file in sorted(args.folder.glob("*.npy")):
        print(file.name, np.load(file, mmap_mode="r").shape)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
