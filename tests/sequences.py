"""A sequence with its cache and checkpoints, and the calls that a fresh run of it would make."""

from dataclasses import dataclass, replace

import hydra_mlx  # noqa: F401  (before mlx)
from hydra_mlx.cache import own_cache, quantise_cache
from hydra_mlx.checkpoints import Checkpoints
from hydra_mlx.config import HydraArgs
from hydra_mlx.forms import fuse_layer
from hydra_mlx.model import Model
from hydra_mlx.rollback import append, fork_cache, rollback
from hydra_mlx.sequence import CachedSequence

import mlx.core as mx
import numpy as np
import pytest

from .golden import weights as gold
from .test_forms import map_layers
from .tolerance import rel_rms

V = 31
BASE = {
    "model_type": "hydrahead",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": V,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "full_attention_heads": [[0], [1]],
}
VARIANTS = {
    "mixed": {},
    "one of each": {"num_hidden_layers": 3, "full_attention_heads": [[0, 1], [], [1]]},
    "no conv": {"la_conv_kernel": 0},
    "all LA": {"full_attention_heads": [[], []]},
    "all FA": {"full_attention_heads": [[0, 1]] * 2, "fa_rope": True},
    "fused": {"weights_form": "fused"},
    "8 bit": {"head_dim": 32},
    "4 bit": {"head_dim": 32, "fa_kv": "mha_own"},
    "8,4 bit": {"head_dim": 32},
}
BITS = {"8 bit": 8, "4 bit": 4, "8,4 bit": (8, 4)}
OWN = ("one of each", "fused", "all LA")  # in HydraKVCaches; other full precision in mlx-lm's
MODELS = {}


def model_of(name: str) -> Model:
    if name not in MODELS:
        config = {**BASE, **VARIANTS[name]}
        form = config.pop("weights_form", "spec")
        args = HydraArgs.from_dict(config)
        weights = {k: mx.array(v) for k, v in gold.make_weights(config, len(MODELS)).items()}
        if form == "fused":
            weights = map_layers(args, weights, fuse_layer)
            args = replace(args, weights_form="fused")
        MODELS[name] = Model(args)
        MODELS[name].load_weights(list(weights.items()), strict=True)
    return MODELS[name]


def new_cache(name: str) -> list:
    cache = model_of(name).make_cache()
    if name in OWN:
        own_cache(cache, 20)
    return quantise_cache(cache, BITS[name], 32) if name in BITS else cache


def sequence(name: str, tokens: list = ()) -> CachedSequence:
    """A CachedSequence with dense checkpoints that has read tokens, in the variant's format."""

    def kv(cache):
        if name in BITS:
            quantise_cache(cache, BITS[name], 32)

    s = CachedSequence(model_of(name), Checkpoints(every=8, most=8), new_cache(name), kv=kv)
    s.read(tokens)
    return s


def broken_step(monkeypatch, batch, tokens: list):
    """A step of a batch that an error in the last layer breaks off."""
    last = type(batch.model.layers[-1].mlp)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(last, "__call__", lambda self, x: 1 / 0)
        batch.step(mx.array(tokens))


def some(n: int, seed: int = 0) -> list:
    return np.random.RandomState(seed).randint(0, V, n).tolist()


def contents(cache: list) -> list:
    """All that is visible in a cache: offsets, rows up to them, tails and states."""
    out = []
    for c in cache:
        if not hasattr(c, "offset"):
            out += [x for x in c.cache if x is not None]
        elif c.offset:
            for x in c.keys_and_values():
                out += x if isinstance(x, tuple | list) else [x]
    return [mx.array(c.offset) for c in cache if hasattr(c, "offset")] + out


def difference(a: list, b: list) -> float:
    """Largest relative RMS difference of two caches; 0 only when every bit is equal."""
    a, b = contents(a), contents(b)
    assert [(x.shape, x.dtype) for x in a] == [(x.shape, x.dtype) for x in b]
    unequal = [(x, y) for x, y in zip(a, b, strict=True) if not mx.array_equal(x, y)]
    return max((rel_rms(x, y) for x, y in unequal), default=0.0)


@dataclass
class Run:
    """A sequence under test, and the calls that a fresh run would make."""

    name: str
    cache: list
    points: Checkpoints
    calls: list  # token lists, one a call

    @property
    def tokens(self) -> list:
        return [t for call in self.calls for t in call]

    def call(self, tokens: list, mark: bool = False):
        model_of(self.name)(mx.array([tokens]), cache=self.cache)
        self.points.note(self.cache, mark)
        self.calls.append(tokens)

    def append(self, tokens: list, step: int, mark: bool = False):
        a = len(self.tokens)
        append(model_of(self.name), self.cache, self.points, tokens, step, mark)
        N = self.points.grid.every
        while tokens:
            n = min(step - a % step, N - a % N, len(tokens))
            self.calls.append(tokens[:n])
            a, tokens = a + n, tokens[n:]

    def cut(self, position: int):
        kept, calls = 0, []
        for call in self.calls:
            calls.append(call[: position - kept])
            kept += len(calls[-1])
        self.calls = [c for c in calls if c]

    def back(self, position: int) -> int:
        bound = self.points.bound(position, max(map(len, self.calls), default=0))
        n = rollback(model_of(self.name), self.cache, self.points, self.tokens, position)
        assert n <= bound
        self.cut(position)
        return n

    def fork(self) -> "Run":
        return Run(self.name, fork_cache(self.cache), self.points.fork(), list(self.calls))

    def check(self):
        fresh = new_cache(self.name)
        for call in self.calls:
            model_of(self.name)(mx.array([call]), cache=fresh)
        assert difference(self.cache, fresh) == 0, [len(c) for c in self.calls]
        assert self.points.calls.end == len(self.tokens)


def start(name: str, **options) -> Run:
    return Run(name, new_cache(name), Checkpoints(**options), [])
