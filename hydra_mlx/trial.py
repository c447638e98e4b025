"""A forward pass of which the last tokens can be taken back, exactly and at once.

Keys and values are cut. A recurrent state cannot be cut, but it can be made again: the pass leaves
behind the projections that every layer's linear-attention heads read, a few rows for a few tokens,
and from the state before the pass they give the state after any number of them. Nothing else of
the model runs again: no weight is read but those of the convolution.
"""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import ArraysCache

from .cache import CONV, STATE, cached_tokens
from .kernels.dispatch import backend
from .step import Step


class Trial:
    """One pass of a single sequence, run when made.

    trial = Trial(model, cache, tokens)
    ...trial.logits...
    trial.keep(3)                  # as if only three tokens had been given

    Attributes:
        tokens: Ids of the pass, a list of T. logits: [1, T, V]. kept: How many the cache holds.
    """

    def __init__(self, model: Any, cache: list, tokens: Sequence):
        self.tokens, self.kept = list(tokens), len(tokens)
        self._cache, self._offset = cache, cached_tokens(cache)
        ids = mx.array(np.asarray(self.tokens, np.int32))[None]
        self._slots = [
            (c, c[CONV], c[STATE]) if isinstance(c, ArraysCache) else None for c in cache
        ]
        self._inputs = []
        if any(self._slots):
            h = model.model(ids, cache, kept=self._inputs)
            self.logits = model.head(h)
        else:
            self.logits = model(ids, cache=cache)

    def keep(self, n: int):
        """Take back all but the first n tokens, 0 <= n <= kept; the cache is then what it was
        with these, up to the rounding of a pass over fewer tokens."""
        if n == self.kept:
            return
        for c in self._cache:
            if not isinstance(c, ArraysCache):
                c.trim(self.kept - n)
        for c, tail, state in filter(None, self._slots):
            c[CONV], c[STATE] = tail, state
        if n and self._inputs:
            step = Step(self._offset, None, None, backend())
            for mixer, arrays, inputs in self._inputs:
                mixer.advance(inputs, n, step, arrays)
        self.kept = n
