"""Prompt cache files: what the model has read, kept so that it need not be read again.

A file is what mlx_lm.models.cache.save_prompt_cache writes (and load_prompt_cache reads), with
more metadata: the token ids, the text and the conversation they stand for, a fingerprint of the
model, and a SHA-256 of the whole file. A file is replaced in one step or not at all.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cache as stock

from .cache import as_stock
from .errors import CacheError, UsageError
from .kv_cache import HydraKVCache
from .prompts import SAME
from .text import first_line

FORMAT = "1"
MAX_HEADER = 100_000_000  # the limit of the safetensors format
SAMPLES = 16  # values of each parameter that go into a model's fingerprint
_DIGEST = re.compile(rb'"0\.hydra_sha256":\s*"([0-9a-f]{64})"')
_AGAIN = "Delete the file, or start anew with --prompt-cache-overwrite."


@dataclass
class StoredCache:
    """What a prompt cache file holds.

    Attributes:
        cache: The model's cache. tokens: Ids of all that it has read.
        text: What the first `text_tokens` ids stand for. Less than all of them only after an
            interrupt while the prompt was read.
        messages: The conversation up to and with the last reply; None for plain text.
        fingerprint: See fingerprint(). label: The model in words, for messages.
    """

    cache: list
    tokens: list
    text: str
    text_tokens: int
    messages: list | None
    fingerprint: str
    label: str = ""
    path: Path = field(default_factory=Path)

    def match(self, text: str, whole: list, encode_rest: Callable) -> tuple:
        """Fit a new prompt to what is stored.

        Args:
            text: The new prompt. whole: Its ids when encoded in one go.
            encode_rest: Encodes what follows the stored text.

        Returns:
            (ids of the whole prompt, how many of them the cache holds, why none of them).
        """
        n = len(self.tokens)
        ids = whole
        if whole[:n] != self.tokens and self.text and text.startswith(self.text):
            # The model's own tokens stay, even where its text would be encoded another way.
            ids = self.tokens[: self.text_tokens] + encode_rest(text[len(self.text) :])
        if ids[:n] != self.tokens:
            return whole, 0, "it begins differently"
        if len(ids) == n:
            return whole, 0, SAME
        return ids, n, ""


def fingerprint(model: Any) -> str:
    """SHA-256 over the config, and name, shape, dtype and a few values of each parameter."""
    digest = hashlib.sha256()
    args = getattr(model, "args", None)
    if args is not None:
        digest.update(json.dumps(vars(args), sort_keys=True, default=str).encode())
    taken = []
    for name, x in sorted(tree_flatten(model.parameters())):
        digest.update(f"{name}{x.shape}{x.dtype}".encode())
        taken.append(x.reshape(-1)[:: max(1, x.size // SAMPLES)][:SAMPLES].astype(mx.float32))
    digest.update(np.array(mx.concatenate(taken)).tobytes())
    return digest.hexdigest()


def check_target(path: str | os.PathLike):
    """Before any work: can a file be written there?

    Raises:
        CacheError: The path is a folder, or its folder is missing or read-only.
    """
    path = Path(path).expanduser()
    folder = path.resolve().parent
    if path.is_dir():
        raise CacheError(f"The prompt cache {path} is a folder, expected a file.")
    if not folder.is_dir():
        raise CacheError(f"The prompt cache's folder {folder} does not exist.", "Create it first.")
    if not os.access(folder, os.W_OK):
        raise CacheError(f"The prompt cache's folder {folder} cannot be written.")


def save_cache(path: str | os.PathLike, stored: StoredCache):
    """Write a prompt cache file; an older one is replaced only when the new one is whole.

    Raises:
        CacheError: It cannot be written; an older file is as it was.
    """
    target = Path(path).expanduser().resolve()
    part = target.with_name(f".{target.name}.{os.getpid()}.safetensors")
    metadata = {
        "hydra_format": FORMAT,
        "hydra_sha256": "0" * 64,
        "hydra_fingerprint": stored.fingerprint,
        "hydra_tokens": json.dumps(stored.tokens),
        "hydra_text": json.dumps([stored.text_tokens, stored.text]),
        "hydra_messages": json.dumps(stored.messages),
        "model": stored.label,  # this and the next are for mlx_lm.generate
        "tokenizer_config": "{}",
    }
    try:
        stock.save_prompt_cache(str(part), as_stock(stored.cache), metadata)
        digest, where = _digest(part)
        if where is None:
            raise CacheError("The header has no place for the checksum.")
        with part.open("r+b") as f:
            f.seek(where)
            f.write(digest.encode())
            f.flush()
            os.fsync(f.fileno())
        part.replace(target)
        _sync_folder(target.parent)
    except (OSError, RuntimeError, ValueError, CacheError) as e:
        raise CacheError(
            f"The prompt cache {target} cannot be written ({first_line(e)}).",
            "An older file there is unchanged.",
        ) from e
    finally:
        part.unlink(missing_ok=True)


def _sync_folder(folder: Path):
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read_header(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(MAX_HEADER, size - 8):
            raise CacheError(f"{path} is no prompt cache, or its beginning is damaged.", _AGAIN)
        return f.read(length)


def _digest(path: Path) -> tuple:
    """SHA-256 of a file with its own checksum taken as zeros; (hex, offset of the checksum)."""
    header = _read_header(path)
    found = _DIGEST.search(header)
    if found is None:
        return "", None
    digest = hashlib.sha256()
    a, b = found.span(1)
    with path.open("rb") as f:
        digest.update(f.read(8))
        f.read(len(header))
        digest.update(header[:a] + b"0" * 64 + header[b:])
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest(), 8 + a


def load_cache(path: str | os.PathLike, model: Any = None) -> StoredCache:
    """Read a prompt cache file whose every byte is as it was written.

    Args:
        model: Checked against the file when given; see check_model.

    Raises:
        CacheError: Unreadable, damaged, no file of hydra_mlx, or of another model.
    """
    path = Path(path).expanduser()
    try:
        digest, where = _digest(path)
        if where is None:
            raise CacheError(
                f"{path} was not written by hydra_mlx: it has no checksum and no token ids.",
                "Take another file name; this file stays as it is.",
            )
        header = _read_header(path)
        if header[where - 8 : where + 56].decode() != digest:
            raise CacheError(f"{path} is damaged or incomplete: its checksum is wrong.", _AGAIN)
        metadata = {
            k[2:]: v for k, v in json.loads(header)["__metadata__"].items() if k.startswith("0.")
        }
        if metadata["hydra_format"] != FORMAT:
            raise CacheError(
                f"{path} has format {metadata['hydra_format']}, expected {FORMAT}.", _AGAIN
            )
        text_tokens, text = json.loads(metadata["hydra_text"])
        stored = StoredCache(
            cache=_load_arrays(path),
            tokens=json.loads(metadata["hydra_tokens"]),
            text=text,
            text_tokens=text_tokens,
            messages=json.loads(metadata["hydra_messages"]),
            fingerprint=metadata["hydra_fingerprint"],
            label=metadata["model"],
            path=path,
        )
    except OSError as e:
        raise CacheError(f"{path} cannot be read ({e.strerror or first_line(e)}).") from e
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError) as e:
        raise CacheError(f"{path} cannot be understood ({first_line(e)}).", _AGAIN) from e
    if model is not None:
        check_model(stored, model)
    return stored


def _load_arrays(path: Path) -> list:
    # As stock.load_prompt_cache does, which insists on the file name's ending.
    arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    _, classes, scalars = tree_unflatten(list(metadata.items()))
    for name, kind in scalars[1:]:
        if kind == "string":
            arrays[name] = "".join(map(chr, arrays[name].tolist()))
        else:
            arrays[name] = None if kind == "none" else arrays[name].item()
    states = tree_unflatten(list(arrays.items()))
    own = {"HydraKVCache": HydraKVCache}
    kinds = [own.get(c) or getattr(stock, c) for c in classes]
    cache = [kind.from_state(s) for kind, s in zip(kinds, states, strict=True)]
    mx.eval([c.state for c in cache])
    return cache


def check_model(stored: StoredCache, model: Any):
    """Whether a stored cache was made with this very model.

    Raises:
        CacheError: Other weights, another dtype, another adapter, or a cache that does not fit.
    """
    if stored.fingerprint != fingerprint(model):
        made = f" It was made with {stored.label}." if stored.label else ""
        raise CacheError(
            f"{stored.path} belongs to another model, --dtype or adapter.{made}",
            "Use that model, another file name, or --prompt-cache-overwrite.",
        )
    fresh = stock.make_prompt_cache(model)
    same = len(fresh) == len(stored.cache) and all(
        type(a) is type(b) or isinstance(b, stock.QuantizedKVCache | HydraKVCache)
        for a, b in zip(fresh, stored.cache)  # noqa: B905 (same length)
    )
    offsets = {int(c.offset) for c in stored.cache if hasattr(c, "offset")}
    if not same or offsets - {len(stored.tokens)}:
        raise CacheError(f"{stored.path} contradicts itself: its parts do not fit.", _AGAIN)


def open_cache(args: Any, chat: bool) -> StoredCache | None:
    """The stored prompt cache that --prompt-cache names, or None where a new one is to be made.

    Raises:
        UsageError, CacheError: It cannot be used; the file is as it was.
    """
    if args.prompt_cache is None:
        return None
    path = Path(args.prompt_cache).expanduser()
    if not args.prompt_cache_ro:
        check_target(path)
    if args.prompt_cache_overwrite or not path.exists():
        if args.prompt_cache_ro:
            raise UsageError(f"{path} does not exist.", "Leave out --prompt-cache-ro to make it.")
        return None
    stored = load_cache(path)
    if chat and stored.messages is None:
        raise UsageError(
            f"{path} holds plain text, not a conversation.",
            "Add --ignore-chat-template, or take another file.",
        )
    if not chat and stored.messages is not None and not args.prompt_cache_ro:
        raise UsageError(
            f"{path} holds a conversation, which a run without chat template would lose.",
            "Leave out --ignore-chat-template, or add --prompt-cache-ro.",
        )
    return stored
