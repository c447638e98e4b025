"""HydraKVCache: bits of keys and values, growth, forks, files, mlx-lm's own functions on it."""

import copy
import math

import hydra_mlx
from hydra_mlx.cache import as_stock, describe, kv_bytes_per_token, own_cache, quantise_cache
from hydra_mlx.kernels import fa_decode
from hydra_mlx.kv_cache import HydraKVCache, in_words, kv_format
from hydra_mlx.ops import attention
from hydra_mlx.ops.attention import streamed_attention

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

from .test_model_kernels import make_model, tokens_of
from .tolerance import REL_RMS, assert_close, to_numpy

FORMATS = [None, (8, 8), (8, 4), (4, 8), (3, 6)]


def pair(n, seed=0, B=1, H=2, Dk=64, Dv=32, dtype=mx.float32):
    rng = np.random.RandomState(seed)
    return tuple(mx.array(rng.randn(B, H, n, D).astype(np.float32), dtype) for D in (Dk, Dv))


def new(few, **options):
    return HydraKVCache(*(few or ()), group_size=32, **options)


def plain(cache):
    """Keys and values as float64."""
    out = []
    for x, bits in zip(cache.keys_and_values(), (cache.k_bits, cache.v_bits), strict=True):
        x = x if bits is None else mx.dequantize(*x, cache.group_size, bits)
        out.append(to_numpy(x))
    return out


def exact(x, bits):
    """What a cache keeps of x, in float64: MLX's rounding of every group of 32."""
    if bits is None:
        return to_numpy(x)
    w, s, b = mx.quantize(x, 32, bits)
    return to_numpy(mx.dequantize(w, s, b, 32, bits))


@pytest.mark.parametrize("few", FORMATS, ids=str)
@pytest.mark.parametrize("sizes", [(1,), (300, 1, 1, 255), (7, 600, 33)], ids=str)
@pytest.mark.parametrize("reserved", [0, 300, 2000])
def test_holds_what_came(few, sizes, reserved):
    cache, all_k, all_v = new(few), [], []
    cache.reserve(reserved)
    for i, n in enumerate(sizes):
        k, v = pair(n, i)
        got = cache.update_and_fetch(k, v)
        all_k.append(k)
        all_v.append(v)
        first = got[0] if few is None else got[0][0]
        assert first.shape[2] == cache.offset == cache.size() == sum(sizes[: i + 1])
    k_bits, v_bits = few or (None, None)
    out = plain(cache)
    assert np.array_equal(out[0], exact(mx.concatenate(all_k, 2), k_bits))
    assert np.array_equal(out[1], exact(mx.concatenate(all_v, 2), v_bits))
    assert cache.allocated >= reserved and cache.allocated % 256 == 0


def test_growth_is_bounded_and_rare():
    """At most a quarter and a step of room; copies at 20 lengths of 16384, where stock has 64."""
    cache, grown, before = new(None), 0, 0
    k, v = pair(64)
    for _ in range(256):
        cache.update_and_fetch(k, v)
        mx.eval(cache.keys, cache.values)
        grown += cache.allocated != before
        before = cache.allocated
        assert cache.allocated <= cache.offset * 1.25 + 256
    assert grown <= 20
    cache = new((8, 4))
    cache.reserve(1000)
    buffers = set()
    for _ in range(15):
        cache.update_and_fetch(*pair(64))
        buffers.add(cache.allocated)
    assert buffers == {1024}
    cache.reserve(1025)
    assert cache.allocated == 1280 and cache.offset == 960


def test_no_full_precision_copy_at_any_time():
    """While 4-bit keys and values come in pieces, memory is theirs and one piece's."""
    cache = HydraKVCache(4, 4, 64)
    cache.reserve(8192)
    piece = pair(256, Dk=64, Dv=64, H=4)
    mx.eval(piece)
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(32):
        cache.update_and_fetch(*piece)
        mx.eval([x for whole in cache.state[:2] for x in whole])
    grew = mx.get_peak_memory() - held
    assert cache.nbytes == 8192 * 4 * 128 * (0.5 + 8 / 64)
    one = cache.nbytes // 2  # a buffer of zeros and the first written one, at the worst
    assert grew <= cache.nbytes + one + 4 * sum(x.nbytes for x in piece)
    assert grew < 8192 * 4 * 128 * 4 / 2


@pytest.mark.parametrize("few", FORMATS, ids=str)
def test_trim_keeps_the_buffer_and_forks_are_apart(few):
    cache = new(few)
    cache.update_and_fetch(*pair(40))
    mx.eval(cache.keys, cache.values)
    fork, before = cache.fork(), plain(cache)
    room, nbytes = cache.allocated, cache.nbytes
    assert cache.is_trimmable() and cache.trim(15) == 15 and cache.offset == 25
    assert (cache.allocated, cache.nbytes) == (room, nbytes)
    cache.update_and_fetch(*pair(3, 9))
    for a, b in zip(plain(fork), before, strict=True):
        assert np.array_equal(a, b)
    fork.update_and_fetch(*pair(5, 8))
    assert np.array_equal(plain(cache)[0][:, :, 25:], exact(pair(3, 9)[0], (few or [None])[0]))
    assert cache.trim(99) == 28 and cache.offset == 0 and cache.allocated == room
    twin = copy.deepcopy(fork)
    twin.update_and_fetch(*pair(1))
    assert fork.offset == 45 and twin.offset == 46


@pytest.mark.parametrize("few", FORMATS, ids=str)
def test_files_of_mlx_lm(few, tmp_path):
    hydra_mlx.register()
    cache = [new(few), new(few)]
    cache[0].reserve(4096)
    cache[0].update_and_fetch(*pair(40))
    cache[0].trim(3)
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, cache)
    assert (tmp_path / "cache.safetensors").stat().st_size < 2 * 40 * 2 * 96 * 4  # not the room
    one, empty = load_prompt_cache(path)
    assert type(one) is HydraKVCache and one.offset == 37 and kv_format(one) == kv_format(cache[0])
    assert empty.empty() and kv_format(empty) == kv_format(cache[1])
    for c in (cache[0], one):
        c.update_and_fetch(*pair(2, 5))
    for a, b in zip(plain(one), plain(cache[0]), strict=True):
        assert np.array_equal(a, b)


def test_as_mlx_lms_own_classes():
    for few, kind in ((None, KVCache), ((8, 8), QuantizedKVCache), ((8, 4), HydraKVCache)):
        cache = new(few)
        cache.reserve(999)
        cache.update_and_fetch(*pair(40, Dv=64))
        stock = as_stock([cache])[0]
        assert type(stock) is kind and stock.offset == 40
        back = own_cache([stock])[0]
        assert type(back) is HydraKVCache and kv_format(back) == kv_format(cache)
        back.update_and_fetch(*pair(1, 3, Dv=64))
        assert stock.offset == 40 or kind is HydraKVCache
        for a, b in zip(plain(back), plain(cache), strict=True):
            assert np.array_equal(a[:, :, :40], b[:, :, :40])
    assert type(as_stock([new(None)])[0]) is KVCache


def test_what_mlx_lm_looks_for():
    caches = [new(None), new(None)]
    for i, c in enumerate(caches):
        c.update_and_fetch(*pair(5 + i, i))
    batch = HydraKVCache.merge(caches)
    assert batch.left_padding.tolist() == [1, 0] and batch.size() == 6
    assert np.array_equal(to_numpy(batch.extract(0).keys), plain(caches[0])[0])
    assert caches[0].make_mask(1) is None and caches[0].make_mask(2) == "causal"
    assert caches[0].make_mask(2, return_array=True).shape == (2, 7)
    assert can_trim_prompt_cache(caches) and trim_prompt_cache(caches, 2) == 2
    with pytest.raises(ValueError, match="batching"):
        HydraKVCache.merge([new((4, 4))])
    few = caches[0].to_quantized(32, (8, 4))
    assert kv_format(few) == (8, 4, 32) and few.to_quantized(32, 2) is few
    assert describe([few]).startswith("kv-bits 8,4: 1/1") and in_words(4, 4) == "4"


def test_models_of_mlx_lm_take_it():
    """mlx-lm's attention reads `bits` from the cache: a Llama gives what its own classes give."""
    from mlx_lm.models import llama

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5}
    model = llama.Model(llama.ModelArgs.from_dict({"model_type": "llama", **sizes, **heads}))
    tokens = tokens_of(9) % 40
    for own, stock in ((new(None), KVCache), (new((8, 8)), lambda: QuantizedKVCache(32, 8))):
        ours, theirs = [own, own.fork()], [stock(), stock()]
        for a, b in ((0, 6), (6, 9)):
            out, ref = model(tokens[:, a:b], cache=ours), model(tokens[:, a:b], cache=theirs)
            assert_close(out, ref, 1e-6)
    assert not hasattr(new(None), "bits") and not hasattr(new((8, 4)), "bits")


def test_what_it_cannot_be():
    for bits in ((7, 4), (4, None), (None, 8), (16, 16)):
        with pytest.raises(ValueError):
            HydraKVCache(*bits)
    with pytest.raises(ValueError, match="Groups of 16"):
        HydraKVCache(4, 4, 16)


# ----------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("few", [None, (8, 4), (4, 8), (3, 6)], ids=str)
@pytest.mark.parametrize("B,Hq,Hk,T,S", [(1, 4, 2, 7, 700), (2, 6, 3, 1, 529), (1, 3, 3, 65, 65)])
def test_streamed_attention(few, B, Hq, Hk, T, S):
    """Against float64; several blocks of 256 keys, the last ones masked."""
    rng = np.random.RandomState(1)
    q = mx.array(rng.randn(B, Hq, T, 64).astype(np.float32))
    k, v = pair(S, 2, B, Hk)
    keys, values = (
        x if few is None else mx.quantize(x, 32, n)
        for x, n in zip((k, v), few or "..", strict=True)
    )
    k, v = (exact(x, few and few[i]) for i, x in enumerate((k, v)))
    s = np.einsum("bhtd,bhsd->bhts", to_numpy(q), np.repeat(k, Hq // Hk, 1)) * 0.2
    visible = np.arange(S) <= np.arange(S - T, S)[:, None]
    s = np.where(visible, s, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    ref = p / p.sum(-1, keepdims=True) @ np.repeat(v, Hq // Hk, 1)
    few = few and (*few, 32)
    array = mx.array(visible)
    masks = ["causal", array, mx.where(array, 0.0, -math.inf)[None, None]]
    for mask in masks if T > 1 else [None, "causal"]:
        y = streamed_attention(q, keys, values, 0.2, mask, few)
        assert y.shape == ref.shape and y.dtype == q.dtype
        assert_close(y, ref, REL_RMS["float32"], f"{few} {type(mask)}")


def test_streamed_attention_has_bounded_memory(monkeypatch):
    monkeypatch.setattr(attention, "SCORES", 2**16)
    q = mx.random.normal((1, 2, 128, 32))
    grew = []
    for S in (4096, 32768):
        k = mx.random.normal((1, 2, S, 32))
        mx.eval(q, k)
        mx.clear_cache()
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(streamed_attention(q, k, k, 0.1, "causal"))
        grew.append(mx.get_peak_memory() - held)
    assert grew[1] < 1.1 * grew[0] < 128 * 32768 * 4


@pytest.mark.parametrize("few", [(8, 4), (4, 8), (3, 3)], ids=str)
def test_model_by_operations_on_few_bits(few):
    """Prompt in pieces and single tokens over the cache equal one call, but for its rounding."""
    model, tokens = make_model(), tokens_of(40)
    cache = quantise_cache(model.make_cache(), few, 32)
    out = [model(tokens[:, a:b], cache=cache) for a, b in ((0, 30), (30, 39), (39, 40))]
    whole = model(tokens, cache=quantise_cache(model.make_cache(), few, 32))
    assert_close(mx.concatenate(out, 1), whole, 1e-4)
    full = model(tokens)
    error = (mx.square(whole - full).sum() / mx.square(full).sum()).item() ** 0.5
    assert 1e-4 < error < 0.5
    held = sum(c.nbytes for c in cache if isinstance(c, HydraKVCache))
    mean = sum(n / 8 + 8 / 32 for n in few) / 2
    assert held == 256 * kv_bytes_per_token(model.args, mean)


def test_kernels_say_why_they_do_not_take_odd_bits():
    cache = HydraKVCache(3, 4, 64)
    cache.update_and_fetch(*pair(9, Dv=64))
    why = fa_decode.check_cache(fa_decode.KeyValues.of(cache), 2)
    assert why == "cache of 3 and 4 bits in groups of 64"
    cache = HydraKVCache(8, 4, 64)
    cache.update_and_fetch(*pair(9, Dv=64))
    assert fa_decode.check_cache(fa_decode.KeyValues.of(cache), 2) == ""
