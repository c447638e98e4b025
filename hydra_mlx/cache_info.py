"""What is in a prompt cache file, from its header and the few bytes that are shown.

Fast: no array of the cache is read, and mlx_lm, whose import takes most of a second, is not loaded.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from .cache_file import AGAIN, CacheFile, own_metadata
from .errors import CacheError
from .text import count, first_line, printable, size

WORDS = 8  # first and last ones shown
EDGE = 400  # bytes of the text read for them
_KV = {  # class: state parts after keys, values and offset
    "KVCache": (),
    "QuantizedKVCache": ("group_size", "k_bits"),
    "HydraKVCache": ("k_bits", "v_bits", "group_size"),
}


@dataclass(frozen=True)
class CacheInfo:
    """A prompt cache file in figures; sizes in bytes.

    Attributes:
        tokens: Ids of all that was read. wanted: Of the document, if not all of it was read.
        model, fingerprint: Which model it belongs to. format: Of the file.
        kv: How keys and values are kept. kv_bytes, state_bytes, checkpoint_bytes: What they take.
        checkpoints: Positions of kept states. marked: Those that are turn boundaries.
        every, dtype: Tokens between checkpoints of the grid, and what they are kept as; or None.
        turns: Roles of the conversation; None for plain text. open_turn: Whether the last turn, a
            document, goes on with the next prompt.
        first, last: Words of the text. characters: Bytes of the text as UTF-8.
        checked: Whether every byte was compared with its checksum.
    """

    path: str
    nbytes: int
    format: int
    tokens: int
    wanted: int
    model: str
    fingerprint: str
    kv: str
    kv_bytes: int
    state_bytes: int
    checkpoint_bytes: int
    checkpoints: list
    marked: list
    every: int | None
    dtype: str | None
    turns: list | None
    open_turn: bool
    first: str
    last: str
    text_bytes: int
    checked: bool

    def as_json(self) -> str:
        """All fields as one line of JSON."""
        return json.dumps(asdict(self))

    def as_text(self) -> str:
        """A few lines for people."""
        whole = f", {self.wanted - self.tokens:,} of {self.wanted:,} are missing"
        lines = [
            f"file         {self.path}, {size(self.nbytes)}, format {self.format}; "
            + ("every byte as it was written" if self.checked else "header and length are right"),
            f"tokens       {self.tokens:,}{whole if self.wanted > self.tokens else ''}",
            f"model        {self.model or 'not named'} ({self.fingerprint[:12]})",
            f"keys/values  {size(self.kv_bytes)}, {self.kv}",
            f"states       {size(self.state_bytes)}",
            f"checkpoints  {self._checkpoints()}",
            f"text         {self._kind()}, {size(self.text_bytes)}",
        ]
        if self.text_bytes:
            lines += [
                f"begins       {printable(self.first)}",
                f"ends         {printable(self.last)}",
            ]
        return "\n".join(lines)

    def _checkpoints(self) -> str:
        if self.every is None:
            return "none: it can be continued, but not go back"
        at = [f"{n:,}{'*' if n in self.marked else ''}" for n in self.checkpoints]
        shown = at if len(at) <= 12 else [*at[:6], "...", *at[-5:]]
        where = f" at {', '.join(shown)}" if at else ""
        star = " (* turns)" if self.marked else ""
        return (
            f"{len(at)}{where}{star}, {size(self.checkpoint_bytes)} as {self.dtype}, "
            f"every {self.every:,} tokens"
        )

    def _kind(self) -> str:
        if self.turns is None:
            return "plain"
        if self.open_turn:
            return "document, a question may follow"
        return f"conversation of {count(len(self.turns), 'turn')}"


def read_info(path: Path, check: bool = False) -> CacheInfo:
    """Look into a file.

    Args:
        check: Compare every byte with its checksum.

    Raises:
        CacheError: Damaged, incomplete or no prompt cache of this format.
    """
    file = CacheFile(path)
    if check:
        file.check()
    try:
        return _info(file, check)
    except (ValueError, KeyError, TypeError, LookupError, AttributeError) as e:
        raise CacheError(f"{file.path} cannot be understood ({first_line(e)}).", AGAIN) from e


def _info(file: CacheFile, checked: bool) -> CacheInfo:
    own, classes, scalars = own_metadata(file)
    none = {name for name, kind in scalars if kind == "none"}
    n, named = len(classes), {name for name, _ in scalars}
    kv = state = kept = 0
    for name, e in file.entries.items():
        head = name.split(".")
        if head[0] == str(n):
            kept += e.nbytes if head[1] == "points" else 0
        elif name not in named:
            is_kv = classes[int(head[0])] != "ArraysCache"
            kv, state = kv + is_kv * e.nbytes, state + (not is_kv) * e.nbytes
    points, text = own["checkpoints"], file.entries[f"{n}.text"].nbytes
    held = points["held"] if points else []
    messages = json.loads(file.read(f"{n}.messages"))
    first = file.read(f"{n}.text", 0, EDGE).decode(errors="ignore")
    last = file.read(f"{n}.text", max(0, text - EDGE)).decode(errors="ignore")
    return CacheInfo(
        path=str(file.path),
        nbytes=file.nbytes,
        format=own["format"],
        tokens=file.entries[f"{n}.tokens"].shape[0],
        wanted=own["wanted"],
        model=file.metadata["0.model"],
        fingerprint=own["fingerprint"],
        kv=_kv_format(file, classes, none),
        kv_bytes=kv,
        state_bytes=state,
        checkpoint_bytes=kept,
        checkpoints=[h[0] for h in held],
        marked=[h[0] for h in held if h[2]],
        every=points and points["every"],
        dtype=points and points["dtype"],
        turns=messages and [m["role"] for m in messages],
        open_turn=own["open_turn"],
        first=_words(first, text > EDGE, 0),
        last=_words(last, text > EDGE, -1),
        text_bytes=text,
        checked=checked,
    )


def _words(text: str, cut: bool, end: int) -> str:
    found = re.findall(r"\S+", text)
    if cut and len(found) > 1:  # the one at the edge may be half
        found = found[:-1] if end == 0 else found[1:]
    return " ".join(found[:WORDS] if end == 0 else found[-WORDS:])


def _kv_format(file: CacheFile, classes: list, none: set) -> str:
    i = next((i for i, c in enumerate(classes) if c in _KV), None)
    if i is None:
        return "as " + (", ".join(sorted(set(classes) - {"ArraysCache"})) or "nothing")
    names = [f"{i}.{j}" for j in range(3, 3 + len(_KV[classes[i]]))]
    values = [
        None if x in none else int(np.frombuffer(file.read(x), np.int32)[0]) for x in names
    ]  # fmt: skip
    found = dict(zip(_KV[classes[i]], values, strict=True))
    bits = found.get("k_bits")
    if bits is None:
        return "full precision"
    other = found.get("v_bits", bits)
    words = f"{bits} bits" if other == bits else f"keys in {bits}, values in {other} bits"
    return f"{words}, groups of {found['group_size']}"
