"""Prompt cache files: what the model has read, kept so that it need not be read again.

A file holds the cache, its checkpoints, the token ids, the text and the conversation they stand
for, and a fingerprint of the model. It is checked byte by byte when it is opened (cache_file.py),
its arrays are read when they are first used, and it is replaced in one step or not at all.

Where all parts of the cache are mlx-lm's own classes and the name ends in .safetensors,
mlx_lm.models.cache.load_prompt_cache reads it too: it passes over what comes after the cache.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import cache as stock

from .cache_file import AGAIN, FORMAT, CacheFile, own_metadata
from .cache_parts import pack, pack_checkpoints, unpack, unpack_checkpoints
from .cache_write import write_cache_file
from .checkpoints import Checkpoints
from .errors import CacheError, HydraError, UsageError
from .kv_cache import HydraKVCache
from .rollback import common_prefix
from .text import first_line

KV = (HydraKVCache, stock.QuantizedKVCache)  # what may stand where a model makes a KVCache
SAMPLES = 16  # values of each parameter that go into a model's fingerprint


@dataclass
class StoredCache:
    """What a prompt cache file holds.

    Attributes:
        cache: The model's cache. tokens: Ids of all that it has read.
        text: What the first `text_tokens` ids stand for. Less than all of them only after an
            interrupt while the prompt was read.
        messages: The conversation up to and with the last reply; None for plain text.
        fingerprint: See fingerprint(). label: The model in words, for messages.
        checkpoints: Beside the cache; None where none were kept.
        open_turn: Whether the last message, the user's, goes on with the next prompt: a document
            that is to be followed by a question.
        wanted: Tokens of the document that was to be read; 0 if it is whole.
        session: How a chat came about, JSON; None in files of other programs. See session_file.py.
        file: Where the arrays come from; see read().
    """

    cache: list
    tokens: list
    text: str
    text_tokens: int
    messages: list | None
    fingerprint: str
    label: str = ""
    path: Path = field(default_factory=Path)
    checkpoints: Checkpoints | None = None
    open_turn: bool = False
    wanted: int = 0
    session: dict | None = None
    file: CacheFile | None = None

    def match(self, text: str, whole: list, encode_rest: Callable) -> tuple:
        """Fit a new prompt to what is stored.

        Args:
            text: The new prompt. whole: Its ids when encoded in one go.
            encode_rest: Encodes what follows the stored text.

        Returns:
            (ids of the whole prompt, how many of them are also the first stored ones).
        """
        ids = whole
        if whole[: len(self.tokens)] != self.tokens and self.text and text.startswith(self.text):
            # The model's own tokens stay, even where its text would be encoded another way.
            ids = self.tokens[: self.text_tokens] + encode_rest(text[len(self.text) :])
        return ids, common_prefix(ids, self.tokens)

    def read(self):
        """Have the arrays of the cache in memory, as they were when the file was checked.

        Those of a checkpoint follow when it is used; see Checkpoint.read.

        Raises:
            CacheError: The file has changed since.
        """
        mx.eval([c.state for c in self.cache])
        if self.file is not None:
            self.file.unchanged()


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
        CacheError: It cannot be written, or its checkpoints are not of this moment; an older file
            is as it was.
    """
    arrays, classes, scalars, ours = pack(stored.cache)
    n, points, values = len(classes), stored.checkpoints, None
    ids = np.asarray(stored.tokens, np.int32)
    parts = {
        "tokens": ids,
        "text": _raw(stored.text),
        "messages": _raw(json.dumps(stored.messages)),
    }
    if stored.session is not None:
        parts["session"] = _raw(json.dumps(stored.session))
    more = [(name, mx.array(x)) for name, x in parts.items()]
    if points is not None:
        if points.calls.end != len(ids) or points.moved(stored.cache)[0]:
            raise CacheError(
                f"The checkpoints go to {points.calls.end}, but {len(ids)} tokens are to be saved.",
                "Call note after each forward call.",
            )
        kept, values = pack_checkpoints(points)
        more += [(f"points.{name}", x) for name, x in kept]
    own = {
        "format": FORMAT,
        "fingerprint": stored.fingerprint,
        "text_tokens": stored.text_tokens,
        "open_turn": stored.open_turn,
        "wanted": stored.wanted,
        "checkpoints": values,
        "ours": ours,
    }
    # The last two are for mlx_lm.generate.
    mine = {"hydra": json.dumps(own), "model": stored.label, "tokenizer_config": "{}"}
    metadata = dict(tree_flatten([mine, classes, ["", *scalars]]))

    def ready():
        stored.read()
        for c in () if points is None else points.held:
            c.read()

    # After the cache's n entries, where mlx-lm's loader does not look.
    arrays += [(f"{n}.{name}", x) for name, x in more]
    arrays.sort(key=lambda a: a[1].nbytes)  # what `cache info` reads is in the first block then
    write_cache_file(Path(path), metadata, arrays, str(n), ready)


def _raw(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def _session(file: CacheFile, name: str) -> dict | None:
    return json.loads(file.read(name)) if name in file.entries else None


def load_cache(path: str | os.PathLike, model: Any = None) -> StoredCache:
    """Open a prompt cache file whose every byte is as it was written; arrays stay on the disk.

    Args:
        model: Checked against the file when given; see check_model.

    Raises:
        CacheError: Unreadable, damaged, no file of hydra_mlx, or of another model.
    """
    file = CacheFile(path)
    file.check()
    try:
        own, classes, scalars = own_metadata(file)
        n, arrays = len(classes), file.arrays()
        first = f"{n}."
        cache = unpack(
            {k: x for k, x in arrays.items() if not k.startswith(first)},
            classes,
            scalars,
            own["ours"],
        )
        points, values = f"{n}.points.", own["checkpoints"]
        kept = {k[len(points) :]: x for k, x in arrays.items() if k.startswith(points)}
        stored = StoredCache(
            cache=cache,
            tokens=np.frombuffer(file.read(f"{n}.tokens"), np.int32).tolist(),
            text=file.read(f"{n}.text").decode(),
            text_tokens=own["text_tokens"],
            messages=json.loads(file.read(f"{n}.messages")),
            fingerprint=own["fingerprint"],
            label=file.metadata["0.model"],
            path=file.path,
            checkpoints=values and unpack_checkpoints(kept, values, cache, file.unchanged),
            open_turn=own["open_turn"],
            wanted=own["wanted"],
            session=_session(file, f"{n}.session"),
            file=file,
        )
    except CacheError as e:
        if str(file.path) in e.message:
            raise
        raise CacheError(f"{file.path} cannot be used: {e.message}", AGAIN) from e
    except (HydraError, ValueError, TypeError, RuntimeError, LookupError, AttributeError) as e:
        raise CacheError(f"{file.path} cannot be understood ({first_line(e)}).", AGAIN) from e
    if model is not None:
        check_model(stored, model)
    return stored


def check_model(stored: StoredCache, model: Any):
    """Whether a stored cache was made with this very model; then its arrays are read.

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
        type(a) is type(b) or (type(a) is stock.KVCache and isinstance(b, KV))
        for a, b in zip(fresh, stored.cache)  # noqa: B905 (same length)
    )
    offsets = {int(c.offset) for c in stored.cache if hasattr(c, "offset")}
    if not same or offsets - {len(stored.tokens)}:
        raise CacheError(f"{stored.path} contradicts itself: its parts do not fit.", AGAIN)
    stored.read()


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
