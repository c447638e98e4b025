"""Drafts in stream_generate and in the generate program."""

import json

import hydra_mlx
from hydra_mlx.drafts import LookupDrafts, ModelDrafts
from hydra_mlx.errors import UsageError
from hydra_mlx.generation import held_tokens
from hydra_mlx.sampling import SamplingOptions
from hydra_mlx.sequence import CachedSequence

import pytest

PROMPT = "The quick brown fox. The quick brown fox. "


def drafts_of(kind: str, tiny: tuple):
    return LookupDrafts() if kind == "lookup" else ModelDrafts(CachedSequence(tiny[0]), 4)


def parts_of(tiny, prompt=PROMPT, **options):
    return list(hydra_mlx.stream_generate(*tiny, prompt, **options))


def seen(parts: list) -> tuple:
    return [(p.text, p.token, p.finish_reason) for p in parts]


@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_parts_are_those_of_plain_decoding(tiny, kind):
    plain = parts_of(tiny, max_tokens=30)
    text = "".join(p.text for p in plain)
    for options in ({}, {"stop": text[9:12]}, {"prefill_step_size": 5}, {"max_tokens": 0}):
        options = {"max_tokens": 30, **options}
        cache = tiny[0].make_cache()
        found = parts_of(tiny, drafts=drafts_of(kind, tiny), prompt_cache=cache, **options)
        assert seen(found) == seen(parts_of(tiny, **options))
        reply = [p.token for p in found if p.token is not None]
        assert held_tokens(cache) == len(PROMPT) + len(reply)
        assert found[-1].timings.passes <= len(reply)
    rest = [*tiny[1].encode(PROMPT), *reply]
    assert hydra_mlx.generate(*tiny, "abc", 9, prompt_cache=cache) == hydra_mlx.generate(
        *tiny, [*rest, *tiny[1].encode("abc")], 9
    )


def test_a_model_that_drafts_for_itself_saves_passes(tiny):
    last = parts_of(tiny, max_tokens=30, drafts=drafts_of("model", tiny))[-1].timings
    assert last.passes < 15 and last.accepted_tokens == last.drafted_tokens > 15
    assert "tokens a pass" in last.as_text()


def test_an_end_token_within_a_draft(tiny, tiny_model_dir):
    """The reply ends there, and the cache with it."""
    model = tiny[0]
    reply = [p.token for p in parts_of(tiny, max_tokens=12)]
    again = hydra_mlx.load(tiny_model_dir)[1]
    end = next(t for t in reply[4:] if t not in reply[:4])
    again.add_eos_token(str(end))
    for kind in ("lookup", "model"):
        cache = model.make_cache()
        options = {"prompt_cache": cache, "drafts": drafts_of(kind, tiny)}
        parts = list(hydra_mlx.stream_generate(model, again, PROMPT, 12, **options))
        assert parts[-1].finish_reason == "stop" and parts[-1].token == end
        assert held_tokens(cache) == len(PROMPT) + reply.index(end) + 1


@pytest.mark.parametrize("kind", ["lookup", "model"])
def test_interrupts(tiny, kind):
    for stop_after in (1, 4, 7):
        cache, found = tiny[0].make_cache(), []
        options = {"drafts": drafts_of(kind, tiny), "prompt_cache": cache}
        for part in hydra_mlx.stream_generate(
            *tiny, PROMPT, should_stop=lambda n=stop_after, f=found: len(f) >= n, **options
        ):
            found.append(part)
        assert part.finish_reason == "interrupt"
        assert held_tokens(cache) == len(PROMPT) + stop_after
    done, cache = [], tiny[0].make_cache()
    (part,) = hydra_mlx.stream_generate(
        *tiny,
        PROMPT,
        drafts=drafts_of(kind, tiny),
        prompt_cache=cache,
        prefill_step_size=4,
        progress=lambda n, total: done.append(n),
        should_stop=lambda: done[-1:] == [8],
    )
    assert part.finish_reason == "interrupt" and held_tokens(cache) == 8
    done, cache, n = [], tiny[0].make_cache(), len(PROMPT)
    (part,) = hydra_mlx.stream_generate(  # while a draft model would read
        *tiny,
        PROMPT,
        drafts=drafts_of(kind, tiny),
        prompt_cache=cache,
        progress=lambda n, total: done.append(n),
        should_stop=lambda: done[-1:] == [n - 1],
    )
    assert part.finish_reason == "interrupt" and held_tokens(cache) == n - 1


def test_quantised_caches(tiny):
    options = {"max_tokens": 30, "kv_bits": 8, "kv_group_size": 32}
    for start in (0, 50):
        plain = parts_of(tiny, quantized_kv_start=start, **options)
        drafted = parts_of(
            tiny, quantized_kv_start=start, drafts=drafts_of("model", tiny), **options
        )
        assert seen(drafted) == seen(plain)
        assert "kv-bits 8: 2/2" in drafted[-1].timings.kv


def test_penalties_and_known_caches(tiny):
    sampler, processors = SamplingOptions(presence_penalty=50.0).make(tiny[1])
    options = {"max_tokens": 8, "sampler": sampler, "logits_processors": processors}
    whole = seen(parts_of(tiny, **options))
    ids = tiny[1].encode(PROMPT)
    for kind in ("lookup", "model"):
        cache = tiny[0].make_cache()
        parts_of(tiny, ids[:10], max_tokens=0, prompt_cache=cache)
        drafts = drafts_of(kind, tiny)
        known = {"prompt_cache": cache, "cached_tokens": ids[:10], "drafts": drafts}
        assert seen(parts_of(tiny, ids[10:], **known, **options)) == whole


def test_a_cache_of_unknown_tokens(tiny):
    ids, wanted = tiny[1].encode(PROMPT), seen(parts_of(tiny, max_tokens=8))
    for kind in ("lookup", "model"):
        cache = tiny[0].make_cache()
        parts_of(tiny, ids[:10], max_tokens=0, prompt_cache=cache)
        options = {"prompt_cache": cache, "drafts": drafts_of(kind, tiny), "max_tokens": 8}
        if kind == "lookup":
            assert seen(parts_of(tiny, ids[10:], **options)) == wanted
        else:
            with pytest.raises(UsageError, match="not known"):
                parts_of(tiny, ids[10:], **options)


# ------------------------------------------------------------------------------------ program


def test_flags(program, make_model_dir):
    small = make_model_dir(num_hidden_layers=1, full_attention_heads=[[0, 1]], hidden_size=32)
    plain = program("generate", PROMPT, "-m", 24)
    assert plain[0] == 0
    for flags in (
        ("--prompt-lookup",),
        ("--prompt-lookup", "--num-draft-tokens", 1),
        ("--draft-model", small),
        ("--draft-model", small, "--num-draft-tokens", 7),
    ):
        code, out, err = program("generate", PROMPT, "-m", 24, "--stats", "json", *flags)
        assert (code, out) == (0, plain[1]), err
        figures = json.loads(err.strip().splitlines()[-1])
        assert 1 <= figures["passes"] <= 24
        assert figures["passes"] + figures["accepted_tokens"] == 24
    hot = ("-m", 24, "--temp", 2, "--seed", 5, "--draft-model", small)
    first = program("generate", PROMPT, *hot)
    assert first[0] == 0 and program("generate", PROMPT, *hot) == first


def test_draft_models_that_cannot_be(program, tmp_path, tiny_model_dir):
    code, out, err = program("generate", "Hello", "--draft-model", tiny_model_dir)
    assert code == 2 and "100% of the model's" in err and not out
    other = tmp_path / "other"
    other.mkdir()
    for file in tiny_model_dir.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    words = json.loads((other / "tokenizer.json").read_text())
    words["model"]["vocab"] = {k[::-1]: 255 - v for k, v in words["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(words))
    code, out, err = program("generate", "Hello", "--draft-model", other)
    assert code == 2 and "has other tokens" in err and len(err.strip().splitlines()) == 2
