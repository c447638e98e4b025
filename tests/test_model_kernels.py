"""The model with its kernels, executed by the host runtime, against the model on operations."""

from collections import Counter

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx import first_use, kv_cache
from hydra_mlx.batch import Batch
from hydra_mlx.cache import own_cache, quantise_cache
from hydra_mlx.config import HydraArgs
from hydra_mlx.kernels import dispatch
from hydra_mlx.kernels.dispatch import Backend, Trust
from hydra_mlx.model import Model
from hydra_mlx.rollback import fork_cache
from hydra_mlx.sequence import CachedSequence
from hydra_mlx.trial import Trial

import mlx.core as mx
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from .kernel_host import host_run
from .metal_host.testing import needs_metal_host
from .tolerance import assert_close

pytestmark = needs_metal_host

CONFIG = {
    "model_type": "hydrahead",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 50,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "full_attention_heads": [[0, 1, 3], [], [0, 1, 2, 3]],
    "tie_word_embeddings": True,
    "la_qk_norm": True,
    "fa_qk_norm": True,
    "weights_form": "fused",
}


def make_model(dtype: mx.Dtype = mx.float32, **changes) -> Model:
    """A random model in evaluation mode."""
    mx.random.seed(5)
    model = Model(HydraArgs.from_dict({**CONFIG, **changes}))

    def fill(name, x):
        if name.endswith("A_log"):
            return mx.log(mx.random.uniform(0.5, 8.0, x.shape))
        if x.ndim == 1:
            return 1.0 + 0.2 * mx.random.normal(x.shape)
        return mx.random.normal(x.shape) * (1.0 if "embed" in name else x.shape[-1] ** -0.5)

    model.update(tree_map_with_path(fill, model.parameters()))
    if dtype != mx.float32:
        model.set_dtype(dtype, lambda d: mx.issubdtype(d, mx.floating))
    mx.eval(model.parameters())
    model.eval()
    return model


class Counting:
    """A Backend of the host runtime that counts launches by kernel."""

    def __init__(self, route: str = "metal"):
        self.launches = Counter()
        self.backend = Backend(route, self.run, 4)

    def run(self, launch):
        self.launches[launch.kernel.name] += 1
        return host_run(launch)[0]


@pytest.fixture
def host(monkeypatch):
    """Kernels run on the host runtime inside the test, with nothing checked before."""
    monkeypatch.setattr(dispatch, "TRUST", Trust())
    monkeypatch.setattr(first_use, "TRUST", dispatch.TRUST)
    counting = Counting()
    with dispatch.substitute(counting.backend):
        yield counting


def steps(model, tokens, sizes, bits=None) -> tuple:
    """Logits of all tokens given in pieces, and the cache."""
    cache = make_prompt_cache(model)
    if bits is not None:
        quantise_cache(cache, bits, 32)
    out, at = [], 0
    for n in sizes:
        out.append(model(tokens[:, at : at + n], cache=cache))
        mx.eval(out[-1])
        at += n
    return mx.concatenate(out, axis=1), cache


def tokens_of(n: int, B: int = 1) -> mx.array:
    return mx.random.randint(0, CONFIG["vocab_size"], (B, n), key=mx.random.key(9))


@pytest.mark.parametrize("bits", [None, 8, 4, (8, 4)], ids=["plain", "8bit", "4bit", "8,4bit"])
@pytest.mark.parametrize("sizes", [(70, 1, 3, 1), (9, 8, 1, 1)], ids=str)
def test_model_equals_operations(host, sizes, bits):
    model, tokens = make_model(), tokens_of(sum(sizes))
    with dispatch.substitute(None):
        ref, ref_cache = steps(model, tokens, sizes, bits)
    out, cache = steps(model, tokens, sizes, bits)
    assert not dispatch.TRUST.failed
    assert_close(out, ref, 1e-4, f"logits {sizes} bits={bits}")
    for a, b in zip(cache, ref_cache, strict=True):
        for x, y in zip(leaves(a.state), leaves(b.state), strict=True):
            assert_close(x, y, 1e-4, f"{type(a).__name__} {sizes} bits={bits}")


@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4bit"])
def test_tokens_taken_back(host, bits):
    """A pass over 8 tokens of which some are taken back, by kernels and by operations; the states
    are made again by one dispatch a layer."""
    model, tokens = make_model(), tokens_of(20)
    given = tokens[0, 11:19].tolist()
    found = []
    for route in (host.backend, None):
        with dispatch.substitute(route):
            _, cache = steps(model, tokens, (11,), bits)
            trial = Trial(model, cache, given)
            for n in (8, 5, 1):
                before = sum(host.launches.values())
                trial.keep(n)
                mx.eval([c.state for c in cache])
                if route is not None and n == 1:  # by now the kernel is trusted
                    assert sum(host.launches.values()) - before == 2  # layers with LA heads
                out = [model(tokens[:, -1:], cache=fork_cache(cache))]
                found.append(
                    out + [x for c in cache if isinstance(c, ArraysCache) for x in c.cache]
                )
    assert not dispatch.TRUST.failed
    for a, b in zip(found[:3], found[3:], strict=True):
        for x, y in zip(a, b, strict=True):
            assert_close(x, y, 1e-4, f"bits={bits}")


def leaves(tree) -> list:
    """The arrays of floats in a cache's state."""
    if isinstance(tree, (list, tuple)):
        return [x for y in tree for x in leaves(y)]
    is_array = isinstance(tree, mx.array) and mx.issubdtype(tree.dtype, mx.floating)
    return [tree] if is_array else []


def test_two_dispatches_a_layer_in_decode(host):
    model = make_model(full_attention_heads=[[0, 3], [1], [0, 1, 2]])
    tokens = tokens_of(14)
    _, cache = steps(model, tokens[:, :12], (12,))
    model(tokens[:, 12:13], cache=cache)  # with its first-use checks
    host.launches.clear()
    mx.eval(model(tokens[:, 13:], cache=cache))
    assert host.launches == {"hydra_decode": 3, "hydra_combine": 3}


def test_training_and_ops_use_no_kernel(host):
    model = make_model()
    with dispatch.substitute(None):
        steps(model, tokens_of(12), (11, 1))
    model.train()
    steps(model, tokens_of(12), (11, 1))
    assert not host.launches


def test_wrong_kernel_is_dropped_loudly(host, capsys):
    model, tokens = make_model(), tokens_of(13)
    with dispatch.substitute(None):
        ref, _ = steps(model, tokens, (12, 1))
    good = host.run

    def wrong(launch):
        out = good(launch)
        return [out[0] * 1.1, *out[1:]] if launch.kernel.name == "hydra_combine" else out

    with dispatch.substitute(Backend("metal", wrong, 4)):
        out, _ = steps(model, tokens, (12, 1))
        steps(model, tokens, (12, 1))
    assert_close(out, ref, 1e-4)
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and "differs from its twin by 0.1" in said[0]
    assert model.layers[0].self_attn.kernels.paths["decode"][0] == "operations"


def test_kernel_that_does_not_compile(host, capsys):
    model, tokens = make_model(), tokens_of(13)

    def broken(launch):
        raise RuntimeError("error: unknown type name 'flaot'")

    with dispatch.substitute(None):
        ref, _ = steps(model, tokens, (12, 1))
    with dispatch.substitute(Backend("metal", broken, 4)):
        out, _ = steps(model, tokens, (12, 1))
    assert_close(out, ref, 1e-6)
    assert "flaot" in capsys.readouterr().err


def test_replaced_weights_are_noticed(host):
    model, tokens = make_model(), tokens_of(14)
    steps(model, tokens, (12, 1, 1))
    mixer = model.layers[0].self_attn
    mixer.A_log = mixer.A_log + 1.0
    out, _ = steps(model, tokens, (12, 1, 1))
    with dispatch.substitute(None):
        ref, _ = steps(model, tokens, (12, 1, 1))
    assert_close(out, ref, 1e-4)


def test_batch_with_padding_takes_operations(host):
    from mlx_lm.models.cache import ArraysCache, BatchKVCache

    model = make_model()
    cache = [
        BatchKVCache([2, 0]) if hasattr(c, "offset") else ArraysCache(2, left_padding=[2, 0])
        for c in model.make_cache()
    ]
    tokens = tokens_of(6, B=2)
    out = model(tokens, cache=cache)
    with dispatch.substitute(None):
        ref = model(tokens[:1, 2:], cache=model.make_cache())
    assert_close(out[:1, 2:], ref, 1e-4, "padded row")
    assert "operations" in model.layers[0].self_attn.kernels.paths["decode"]


def batch_steps(model, bits, share: bool, backend) -> list:
    """Logits of three steps of a batch of three rows: forks of one document, two of which share.

    What they read before is read by operations: a rounding to few bits may fall either way.
    """

    def kv(cache):
        if bits is not None:
            quantise_cache(cache, bits, 32)

    base = CachedSequence(model, kv=kv)
    kv(base.cache)
    with dispatch.substitute(None):
        base.read(tokens_of(40)[0].tolist())
        rows = [base.fork(share), base.fork(share), base.fork()]
        for n, row in zip((3, 12, 1), rows, strict=True):
            row.read(tokens_of(n)[0].tolist())
        rows[2].back_to(0)
        rows[2].read(tokens_of(17)[0].tolist())
    batch = Batch(model)
    batch.put(rows)
    with dispatch.substitute(backend):
        out = [batch.step(mx.array([1, 2, 3 + i])) for i in range(3)]
        mx.eval(out)
    batch.take(rows)
    assert rows[0].tokens[-3:] == [1, 1, 1]
    return out


@pytest.mark.parametrize("share", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("bits", [None, 8, 4, (8, 4)], ids=["plain", "8bit", "4bit", "8,4bit"])
def test_batches_equal_operations(host, monkeypatch, bits, share):
    monkeypatch.setattr(kv_cache, "SHARED", 8)
    model = make_model()
    ref = batch_steps(model, bits, share, None)
    out = batch_steps(model, bits, share, host.backend)
    assert not dispatch.TRUST.failed
    for i, (x, y) in enumerate(zip(out, ref, strict=True)):
        assert_close(x, y, 1e-4, f"step {i}")
    way, why = model.layers[0].self_attn.kernels.paths["decode FA"]
    if bits is None and not share:
        assert (way, why) == ("operations", "a plain batch: MLX's own attention")
        return
    assert way == "kernels"
    # Two layers have FA heads: a launch for own rows, one for what is shared, one joins them.
    host.launches.clear()
    batch_steps(model, bits, share, host.backend)
    assert host.launches["fa_decode"] == 6 * (1 + share) and host.launches["fa_combine"] == 6


def test_many_rows_share_in_several_calls(host, monkeypatch):
    """More rows than fit into one launch (32 heads)."""
    monkeypatch.setattr(kv_cache, "SHARED", 8)
    model = make_model()

    def logits():
        base = CachedSequence(model)
        base.read(tokens_of(20)[0].tolist())
        rows = [base.fork(share=True) for _ in range(11)]  # of 4 heads: 8 and 3
        batch = Batch(model)
        batch.put(rows)
        return batch.step(mx.arange(11))

    with dispatch.substitute(None):
        ref = logits()
    assert_close(logits(), ref, 1e-4)
    assert model.layers[2].self_attn.kernels.paths["decode FA"][0] == "kernels"


@pytest.mark.parametrize("bits", [None, (8, 4)], ids=["plain", "8,4bit"])
def test_several_tokens_over_shared_keys(host, monkeypatch, bits):
    """Drafts and short questions of a fork: kernels up to 8 tokens, operations beyond."""
    monkeypatch.setattr(kv_cache, "SHARED", 8)
    model = make_model()

    def logits(T):
        cache = own_cache(model.make_cache())
        if bits is not None:
            quantise_cache(cache, bits, 32)
        model(tokens_of(30), cache=cache)
        return model(tokens_of(T), cache=fork_cache(cache, share=True))

    for T, way in ((1, "kernels"), (5, "kernels"), (9, "operations")):
        with dispatch.substitute(None):
            ref = logits(T)
        assert_close(logits(T), ref, 1e-4, f"{T} tokens")
        assert model.layers[0].self_attn.kernels.paths["decode FA"][0] == way


def test_a_wrong_batch_kernel_is_dropped(host, monkeypatch, capsys):
    """Its first use finds out; the reply is that of the operations."""
    monkeypatch.setattr(kv_cache, "SHARED", 8)
    model = make_model()

    def wrong(launch):
        out = host.run(launch)
        return [out[0] * 1.1, *out[1:]] if launch.kernel.name == "fa_combine" else out

    out = batch_steps(model, 8, True, Backend("metal", wrong, 4))
    assert_close(out[-1], batch_steps(model, 8, True, None)[-1], 1e-4)
    assert "fa_shared" in capsys.readouterr().err


def test_path_is_of_the_last_step(host):
    model, tokens = make_model(), tokens_of(14)
    _, cache = steps(model, tokens, (12, 1))
    paths = model.layers[0].self_attn.kernels.paths
    paths["decode"] = ("operations", "an earlier batch")
    model(tokens[:, 13:], cache=cache)
    assert paths["decode"] == ("kernels", "T <= 8")
