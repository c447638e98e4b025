"""The Python API: stream_generate, generate, stop strings, interrupts, key/value quantisation."""

import hydra_mlx
from hydra_mlx import cache as caches
from hydra_mlx.errors import UsageError
from hydra_mlx.generation import check_kv_bits, held_tokens
from hydra_mlx.kv_cache import kv_format
from hydra_mlx.sampling import SamplingOptions
from hydra_mlx.text import StopMatcher, printable, size

import mlx.core as mx
import pytest

PROMPT = "The quick brown fox"


def parts_of(tiny, prompt=PROMPT, **options):
    return list(hydra_mlx.stream_generate(*tiny, prompt, **options))


def text_of(parts):
    return "".join(p.text for p in parts)


def ids_of(parts):
    return [p.token for p in parts if p.token is not None]


@pytest.fixture(scope="module")
def plain(tiny):
    """40 greedy tokens of PROMPT."""
    return parts_of(tiny, max_tokens=40)


def test_parts_and_timings(tiny, plain):
    last, n = plain[-1], len(PROMPT)
    assert len(ids_of(plain)) == 40 and len(text_of(plain)) == 40
    assert [p.finish_reason for p in plain[:-1]] == [None] * 39 and last.finish_reason == "length"
    t = last.timings
    assert (t.prompt_tokens, t.cached_tokens, t.processed_tokens, t.generated_tokens) == (
        n,
        0,
        n,
        40,
    )
    assert t.prompt_tps == pytest.approx(n / t.ttft_s)
    assert t.generation_tps == pytest.approx(39 / t.generation_s)
    assert t.kv_bytes > 0 and t.peak_memory_bytes > 0
    assert t.state_bytes == caches.state_bytes(tiny[0].args, 4)


def test_generate_equals_the_stream(tiny, plain):
    assert hydra_mlx.generate(*tiny, PROMPT, max_tokens=40) == text_of(plain)
    ids = tiny[1].encode(PROMPT)
    assert hydra_mlx.generate(*tiny, mx.array(ids), max_tokens=5) == text_of(plain)[:5]


def test_generate_stays_a_function(tiny, plain):
    import hydra_mlx.generate as module

    assert callable(module.main) and hydra_mlx.generate is module
    assert hydra_mlx.generate(*tiny, PROMPT, max_tokens=4) == text_of(plain)[:4]


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("start", [0, 5, 20])
def test_stop_strings(tiny, plain, start, length):
    text = text_of(plain)
    stop = text[start : start + length]
    parts = parts_of(tiny, max_tokens=40, stop=[stop, "never seen"])
    assert text_of(parts) == text[: text.index(stop)]
    assert parts[-1].finish_reason == "stop"


def test_a_stop_string_that_does_not_come(tiny, plain):
    text = text_of(plain)
    parts = parts_of(tiny, max_tokens=40, stop=text[38:] + "!")
    assert text_of(parts) == text and parts[-1].finish_reason == "length"


def test_stop_matcher_by_hand():
    m = StopMatcher(["</s>", "s>x"])
    assert m.push("a<") == ("a", False)
    assert m.push("/s") == ("", False)
    assert m.push(" b") == ("</s b", False)
    assert m.push("</") == ("", False)
    assert m.push("s>x") == ("", True)


def test_end_token(tiny, plain):
    model, tokenizer = tiny
    token = ids_of(plain)[6]
    first = ids_of(plain).index(token)
    saved = set(tokenizer.eos_token_ids)
    try:
        tokenizer.add_eos_token(str(token))
        parts = parts_of(tiny, max_tokens=40)
    finally:
        tokenizer.eos_token_ids = saved
    assert ids_of(parts) == ids_of(plain)[: first + 1] and parts[-1].finish_reason == "stop"
    assert text_of(parts) == text_of(plain)[:first]


def uncached(tiny, ids, cache):
    """Logits of the next token after a cache, and after reading the same ids anew."""
    model = tiny[0]
    probe = mx.array([[5]])
    fresh = model.make_cache()
    model(mx.array([ids]), fresh)
    return model(probe, cache)[0, -1], model(probe, fresh)[0, -1]


@pytest.mark.parametrize("stop_after", [0, 1, 7])
def test_interrupt_leaves_prompt_and_reply(tiny, stop_after):
    cache, seen = tiny[0].make_cache(), []
    stream = hydra_mlx.stream_generate(
        *tiny,
        PROMPT,
        prompt_cache=cache,
        should_stop=lambda: len(seen) >= max(stop_after, 1),
    )
    for part in stream:
        seen.append(part)
    assert part.finish_reason == "interrupt" and part.token is None
    ids = tiny[1].encode(PROMPT) + ids_of(seen)
    assert held_tokens(cache) == len(ids)
    a, b = uncached(tiny, ids, cache)
    assert mx.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("reason", ["length", "stop", "closed"])
def test_cache_holds_what_was_yielded(tiny, plain, reason):
    cache = tiny[0].make_cache()
    stop = text_of(plain)[9:12] if reason == "stop" else ()
    stream = hydra_mlx.stream_generate(*tiny, PROMPT, 12, prompt_cache=cache, stop=stop)
    seen = []
    for part in stream:
        seen.append(part)
        if reason == "closed" and len(seen) == 5:
            stream.close()
    assert held_tokens(cache) == len(PROMPT) + len(ids_of(seen))


def test_interrupt_during_the_prompt(tiny):
    cache, done = tiny[0].make_cache(), []
    stream = hydra_mlx.stream_generate(
        *tiny,
        PROMPT,
        prompt_cache=cache,
        prefill_step_size=4,
        progress=lambda n, total: done.append(n),
        should_stop=lambda: done[-1:] == [8],
    )
    (part,) = stream
    assert part.finish_reason == "interrupt" and part.timings.processed_tokens == 8
    assert held_tokens(cache) == 8 and done == [0, 4, 8] and part.timings.ttft_s is None
    ids = tiny[1].encode(PROMPT)
    rest = hydra_mlx.generate(*tiny, ids[8:], 10, prompt_cache=cache)
    assert rest == hydra_mlx.generate(*tiny, PROMPT, 10)


def test_no_tokens_reads_the_prompt(tiny, plain):
    cache = tiny[0].make_cache()
    (part,) = hydra_mlx.stream_generate(*tiny, PROMPT, 0, prompt_cache=cache)
    assert part.token is None and part.text == "" and part.timings.generated_tokens == 0
    assert held_tokens(cache) == len(PROMPT)


def test_characters_of_several_bytes_come_whole(tiny):
    model, tokenizer = tiny
    wanted = tokenizer.encode("aé漢b")
    script = iter([*wanted, 257])

    def sampler(logprobs):
        return mx.array([next(script, 257)])

    parts = parts_of(tiny, max_tokens=50, sampler=sampler)
    assert [p.text for p in parts if p.text] == ["a", "é", "漢", "b"]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("head_dim, group", [(32, 32), (128, 64)])
def test_kv_bits_shrink_the_cache(make_model_dir, bits, head_dim, group):
    model, tokenizer = hydra_mlx.load(make_model_dir(head_dim=head_dim))
    cache = model.make_cache()
    options = {"max_tokens": 4, "kv_bits": bits, "kv_group_size": group, "prompt_cache": cache}
    part = list(hydra_mlx.stream_generate(model, tokenizer, PROMPT, **options))[-1]
    # 256 slots; bits for each value, float32 scale and bias for each group
    itemsize = bits / 8 + 8 / group
    assert part.timings.kv_bytes == 256 * caches.kv_bytes_per_token(model.args, itemsize)
    assert f"kv-bits {bits}: 2/2" in part.timings.kv
    assert held_tokens(cache) == len(PROMPT) + 4


def test_kv_start_delays(tiny):
    cache = tiny[0].make_cache()
    options = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 22}
    for part in hydra_mlx.stream_generate(*tiny, PROMPT, 8, prompt_cache=cache, **options):
        assert part.token is not None
        kinds = {kv_format(c) is not None for c in cache if hasattr(c, "offset")}
        assert kinds in ({False}, {True})
    assert kinds == {True} and part.finish_reason == "length"


def test_kv_bits_that_cannot_be(tiny, make_model_dir):
    with pytest.raises(UsageError, match="group-size 32"):
        parts_of(tiny, kv_bits=4)
    with pytest.raises(UsageError, match="one of 2, 3"):
        parts_of(tiny, kv_bits=7, kv_group_size=32)
    model, tokenizer = hydra_mlx.load(make_model_dir(full_attention_heads=[[], [], []]))
    assert len(hydra_mlx.generate(model, tokenizer, PROMPT, 6)) == 6
    with pytest.raises(UsageError, match="no head"):
        hydra_mlx.generate(model, tokenizer, PROMPT, kv_bits=4, kv_group_size=32)
    from mlx_lm.models.cache import RotatingKVCache

    with pytest.raises(UsageError, match="RotatingKVCache"):
        check_kv_bits(tiny[0], [RotatingKVCache(8)], 4, 32, 0)


@pytest.mark.parametrize(
    "prompt, options",
    [
        ("", {}),
        ([300], {}),
        ([-1], {}),
        ([1.5], {}),
        ([[1, 2]], {}),
        (PROMPT, {"max_tokens": -2}),
        (PROMPT, {"stop": ""}),
        (PROMPT, {"prefill_step_size": 0}),
    ],
)
def test_wrong_arguments_fail_at_once(tiny, prompt, options):
    with pytest.raises(UsageError):
        hydra_mlx.stream_generate(*tiny, prompt, **options)


def test_prefill_steps_change_nothing(tiny, plain):
    assert text_of(parts_of(tiny, max_tokens=20, prefill_step_size=3)) == text_of(plain)[:20]


def test_penalties_see_cached_tokens(tiny):
    sampler, processors = SamplingOptions(presence_penalty=50.0).make(tiny[1])
    options = {"max_tokens": 8, "sampler": sampler, "logits_processors": processors}
    whole = text_of(parts_of(tiny, **options))
    cache, ids = tiny[0].make_cache(), tiny[1].encode(PROMPT)
    parts_of(tiny, ids[:10], max_tokens=0, prompt_cache=cache)
    resumed = parts_of(tiny, ids[10:], prompt_cache=cache, cached_tokens=ids[:10], **options)
    assert text_of(resumed) == whole and len(set(whole)) == 8


def test_text_helpers():
    assert (size(512), size(1536), size(3 * 2**40)) == ("512 B", "1.5 KiB", "3072.0 GiB")
    assert printable("a\x1b[2Jb\tc\n\x9b") == "a\ufffd[2Jb\tc\n\ufffd"
