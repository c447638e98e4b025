"""Reading a long document into a cache that is to be kept, from the start or an older file."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import cache as caches
from .checkpoint_options import CheckpointOptions
from .config import is_hydra
from .errors import CacheError, UsageError
from .generation import check_kv_bits, prefill_step
from .kv_cache import kv_format
from .machine import machine
from .memory_plan import check, plan_of
from .prompt_cache import StoredCache, check_model, fingerprint, save_cache
from .rollback import common_prefix
from .sequence import CachedSequence
from .text import size


class Job:
    """One document on its way into a file.

    job = Job(model, label, ids, text, messages)
    job.start(None, CheckpointOptions(2**29))
    done = job.read(None, progress, should_stop)
    job.save(path, done)

    Attributes:
        kept: Tokens that an older file had. sequence: What was read so far, from start on.
    """

    def __init__(
        self,
        model: Any,
        label: str,
        ids: list,
        text: str,
        messages: list | None,
        bits: int | tuple | None = None,
        group_size: int = 64,
    ):
        """What is to be read.

        Args:
            label: The model in words. ids: Of `text`, all that is read. messages: The conversation
                whose last turn is open; None for plain text.
            bits: One number, or (of keys, of values); None keeps full precision.

        Raises:
            UsageError: Not a HydraHead model, or bits that it cannot have.
        """
        if not is_hydra(model):
            raise UsageError(
                "`cache read` keeps checkpoints, which only HydraHead models need and have.",
                "For this one use: hydra-mlx generate -m 0 --prompt-cache FILE @DOCUMENT",
            )
        self.model, self.label, self.ids, self.text = model, label, ids, text
        self.messages, self.group_size = messages, group_size
        if bits is not None:
            check_kv_bits(model, model.make_cache(), bits, group_size, 0)
        self.bits = (bits, bits) if isinstance(bits, int) else bits
        self.kept = self._room = 0

    def start(self, old: StoredCache | None, points: CheckpointOptions):
        """Take up an older file's cache, as far as it goes, or an empty one.

        Raises:
            CacheError: Of another model, or in another form. UsageError: See CheckpointOptions.
        """
        cache, tokens, kept = self.model.make_cache(), (), None
        if old is not None:
            self.check(old)
            cache, tokens, kept = old.cache, old.tokens, old.checkpoints
        kept = points.make(self.model, kept, cache)
        self.sequence = CachedSequence(self.model, kept, self._formed(cache), tokens, self._formed)
        if common_prefix(self.ids, tokens) < len(tokens):
            self.sequence.fit(self.ids)
        self.kept = len(self.sequence)

    def _formed(self, cache: list) -> list:
        """A cache in the form that was asked for, in place; while reading, with room for all."""
        caches.own_cache(cache, self._room)
        return caches.quantise_cache(cache, self.bits, self.group_size) if self.bits else cache

    def check(self, old: StoredCache):
        """Whether an older file is of this model, with keys and values as asked for.

        Raises:
            CacheError: It is not.
        """
        check_model(old, self.model)
        formats = {kv_format(c) for c in old.cache if hasattr(c, "offset")}
        if self.bits and formats != {(*self.bits, self.group_size)}:
            raise CacheError(
                f"{old.path} keeps keys and values in another form than --kv-bits asks for.",
                "Leave --kv-bits out to go on with it, or add --overwrite.",
            )
        found = formats.pop() if formats else None
        if found is not None:
            self.bits, self.group_size = found[:2], found[2]

    def plan(self, out: Path, step: int | None, note: Callable):
        """Say what a long document takes in memory.

        Args:
            step: As in read. note: Prints a line.

        Raises:
            UsageError: More memory or more of the disk than there is.
        """
        sequence, T = self.sequence, len(self.ids)
        few = (*self.bits, self.group_size) if self.bits else None
        points = sequence.checkpoints.most_bytes(self.model, T) if sequence.keeps_checkpoints else 0
        plan = plan_of(self.model, T, prefill_step(sequence, step), few, points)
        held = sum(caches.cache_bytes(sequence.cache))
        check(plan, machine(), T - self.kept, note, held)
        file, free = plan.kv + plan.state + points, shutil.disk_usage(out.resolve().parent).free
        if file > free:
            raise UsageError(
                f"The cache takes up to {size(file)}, but {size(free)} are free on its disk.",
                "Free some space, or use --kv-bits 4 or fewer --checkpoints.",
            )

    def read(self, step: int | None, progress: Callable, should_stop: Callable) -> int:
        """Read the rest.

        Args:
            step: Tokens a call at most; see CachedSequence.read.
            progress: Called with (tokens done, all) after each.
            should_stop: Asked before each; True ends the reading.

        Returns:
            Tokens held now; fewer than all only when stopped.
        """
        kept, T = self.kept, len(self.ids)
        self._room = T
        self._formed(self.sequence.cache)
        progress(kept, T)
        self.sequence.read(
            self.ids[kept:], step, lambda n, _: progress(kept + n, T), should_stop, mark=True
        )
        return len(self.sequence)

    def save(self, path: Path, done: int):
        """Write the file.

        Raises:
            CacheError: It cannot be written; an older one is as it was.
        """
        whole = done == len(self.ids)
        stored = StoredCache(
            self.sequence.cache,
            self.sequence.tokens,
            self.text if whole else "",
            done if whole else 0,
            self.messages if whole or self.messages is None else [],
            fingerprint(self.model),
            self.label,
            checkpoints=self.sequence.checkpoints,
            open_turn=whole and self.messages is not None,
            wanted=0 if whole else len(self.ids),
        )
        save_cache(path, stored)
