"""The generate program: every flag's effect or error, output streams, signals."""

import json
import signal
import subprocess
import sys

from hydra_mlx.sampling import SamplingOptions

import pytest

RAW = "--ignore-chat-template"


def ok(result):
    code, out, err = result
    assert code == 0, err
    return out


def failed(result, *words):
    code, out, err = result
    assert code == 2 and not out, err
    assert 1 <= len(err.strip().splitlines()) <= 3 and "Traceback" not in err
    assert all(w in err for w in words), err


def stats(result):
    assert result[0] == 0, result[2]
    return json.loads(result[2].strip().splitlines()[-1])


def test_reply_on_stdout_all_else_on_stderr(program):
    code, out, err = program("generate", "Hello", "-m", 8, "--stats", "text")
    assert code == 0 and len(out) == 9 and out.endswith("\n")
    assert "prompt" in err and "8 tokens" in err and out.strip() not in err
    assert program("generate", "Hello", "-m", 8) == (0, out, "")
    assert ok(program("generate", "-p", "Hello", "--max-tokens", 8)) == out


def test_seeds(program):
    flags = ("generate", "Hello", "-m", 24, "--temp", 1.5, "--stats", "json")
    one = program(*flags, "--seed", 7)
    assert program(*flags, "--seed", 7)[1] == one[1] != ok(program(*flags, "--seed", 8))
    assert stats(one)["seed"] == 7
    free = program(*flags)
    assert ok(program(*flags, "--seed", stats(free)["seed"])) == free[1]
    greedy = program("generate", "Hello", "-m", 24, "--stats", "json")
    assert stats(greedy)["seed"] is None


@pytest.mark.parametrize(
    "flags",
    [
        ("--temp", 3),
        ("--temp", 3, "--top-p", 0.9, "--min-p", 0.01, "--min-tokens-to-keep", 2),
        ("--temp", 3, "--top-k", 50),
        ("--temp", 3, "--xtc-probability", 1, "--xtc-threshold", 0.05),
        ("--repetition-penalty", 3),
        ("--repetition-penalty", 3, "--repetition-context-size", 5),
        ("--presence-penalty", 9),
        ("--presence-penalty", 9, "--presence-context-size", 8),
        ("--frequency-penalty", 9, "--frequency-context-size", 30),
        ("--logit-bias", '{"60": 100}'),
    ],
)
def test_samplers_have_an_effect(program, flags):
    greedy = ok(program("generate", "Hello", "-m", 24))
    assert ok(program("generate", "Hello", "-m", 24, "--seed", 1, *flags)) != greedy


def test_narrow_samplers_are_greedy(program):
    greedy = ok(program("generate", "Hello", "-m", 12))
    for flags in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert ok(program("generate", "Hello", "-m", 12, "--temp", 2, *flags)) == greedy


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--temp", -1), "--temp is -1"),
        (("--temp", "nan"), "finite"),
        (("--temp", 1, "--top-p", 0), "above 0"),
        (("--temp", 1, "--top-p", 1.1), "at most 1"),
        (("--temp", 1, "--min-p", 2), "from 0 to 1"),
        (("--temp", 1, "--top-k", -1), "0 or more"),
        (("--temp", 1, "--top-k", 260), "below 260"),
        (("--temp", 1, "--xtc-probability", 2), "from 0 to 1"),
        (("--temp", 1, "--xtc-probability", 1, "--xtc-threshold", 0.6), "from 0 to 0.5"),
        (("--temp", 1, "--min-p", 0.1, "--min-tokens-to-keep", 0), "1 or more"),
        (("--repetition-penalty", 0), "above 0"),
        (("--presence-penalty", 1, "--presence-context-size", 0), "1 or more"),
        (("--seed", -1), "from 0"),
        (("--top-p", 0.5), "no effect at --temp 0"),
        (("--xtc-threshold", 0.2), "without --xtc-probability"),
        (("--frequency-context-size", 5), "without --frequency-penalty"),
        (("--logit-bias", "[1]"), "JSON"),
        (("--logit-bias", '{"a": 1}'), "JSON"),
        (("--logit-bias", '{"260": 1}'), "token 260"),
        (("--temp", "warm"), "invalid float"),
        (("--kv-bits", 4), "--kv-group-size 32"),
        (("--kv-bits", 9), "expected one of"),
        (("--kv-group-size", 32), "without --kv-bits"),
        (("--quantized-kv-start", 3), "without --kv-bits"),
        (("--quantized-kv-start", -3, "--kv-bits", 4), "whole number of 0 or more"),
        (("--prefill-step-size", 0), "1 or more"),
        (("--max-tokens", -2), "-1 or more"),
        (("--stop", ""), "--stop is empty"),
        (("--extra-eos-token", "nope"), "not a token"),
        (("--max-kv-size", 4), "not supported"),
        (("--draft-model", "/nowhere"), "does not exist"),
        (("--num-draft-tokens", 3), "no effect without --draft-model or --prompt-lookup"),
        (("--prompt-lookup", "--num-draft-tokens", 8), "expected 1 to 7"),
        (("--prompt-lookup", "--draft-model", "x"), "exclude each other"),
        (("--trust-remote-code",), "not supported"),
        (("--prompt-cache-ro",), "without --prompt-cache"),
        (("--prompt-cache-overwrite",), "without --prompt-cache"),
        (("--verbose", "True", "--stats", "json"), "contradicts"),
        (("--verbose", "maybe"), "invalid choice"),
        (("--dtype", "int8"), "invalid choice"),
        (("--adapter-path", "/nowhere"), "adapter_config.json"),
        (("--model", "/nowhere"), "does not exist"),
        (("--max-context", 30), "24 tokens; with --max-tokens 512"),
        (("--max-context", 24, "-m", -1), "--max-context 24"),
        (("--max-tok", 3), "unrecognized"),
        (("-m", 0, "--prefill-response", "x"), "no effect"),
    ],
)
def test_flags_that_cannot_be_honoured(program, flags, words):
    failed(program("generate", "Hello", *flags), words)


def test_options_can_be_used_from_python():
    assert SamplingOptions().temp == 0 and SamplingOptions(temp=0.7, top_p=0.9).top_p == 0.9


# --------------------------------------------------------------------------------- other flags


def test_lengths(program):
    whole = ok(program("generate", "Hello", "-m", 30))
    assert program("generate", "Hello", "-m", 0)[:2] == (0, "")
    assert ok(program("generate", "Hello", "-m", -1, "--max-context", 54)) == whole
    assert ok(program("generate", "Hello", "-m", 30, "--max-context", 54)) == whole


def test_stops(program):
    whole = ok(program("generate", "Hello", "-m", 30))
    stop = whole[10:13]
    expected = whole[: whole.index(stop)] + "\n"
    result = program(
        "generate", "Hello", "-m", 30, "--stop", "###", "--stop", stop, "--stats", "json"
    )
    assert result[1] == expected and stats(result)["finish_reason"] == "stop"
    ended = ok(program("generate", "Hello", "-m", 30, "--extra-eos-token", whole[10]))
    assert ended == whole[: whole.index(whole[10])] + "\n"


def test_kv_bits_and_stats(program):
    flags = ("generate", "Hello", "-m", 6, "--stats", "json")
    full = stats(program(*flags))
    small = stats(program(*flags, "--kv-bits", 4, "--kv-group-size", 32))
    assert small["kv_bytes"] * 16 == full["kv_bytes"] * 3  # 32 bits; 4 + 2 * 32 / 32
    assert small["state_bytes"] == full["state_bytes"] > 0
    assert "kv-bits 4: 2/2" in small["kv"] and "full precision" in full["kv"]
    late = program(*flags, "--kv-bits", 4, "--kv-group-size", 32, "--quantized-kv-start", 999)
    assert "had no effect" in late[2] and stats(late)["kv_bytes"] == full["kv_bytes"]


def test_stats_agree(program):
    result = program("generate", "Hello", "-m", 40, "--stats", "json")
    s = stats(result)
    assert len(result[2].strip().splitlines()) == 1
    assert s["prompt_tokens"] == s["processed_tokens"] == 24 and s["cached_tokens"] == 0
    assert s["generated_tokens"] == 40 == len(result[1]) - 1
    assert s["generation_tps"] == pytest.approx(39 / s["generation_s"], rel=1e-3)
    assert s["prompt_tps"] == pytest.approx(24 / s["ttft_s"], rel=1e-3)
    assert s["load_s"] > 0 and s["device"] and "float32" in s["weights"]
    assert s["finish_reason"] == "length"


def test_verbose_is_as_in_mlx_lm(program):
    assert "tok/s" in program("generate", "Hello", "-m", 2, "--verbose", "True")[2]
    assert program("generate", "Hello", "-m", 2, "--verbose", "F")[2] == ""


def test_dtype(program):
    flags = ("generate", "Hello", "-m", 2, "--stats", "json")
    half = stats(program(*flags, "--dtype", "bfloat16"))
    assert half["weights"].startswith("bfloat16")
    assert half["kv_bytes"] * 2 == stats(program(*flags, "--dtype", "float32"))["kv_bytes"]


def test_long_prompts_get_a_note(program, make_model_dir):
    folder = make_model_dir(max_position_embeddings=16)
    code, out, err = program("generate", "Hello", "--model", folder, "-m", 2)
    assert code == 0 and out and "24 tokens, more than the 16" in err
    assert program("generate", "Hello", "--model", folder, "-m", 2, "--quiet")[2] == ""


def test_adapters(program, tiny_model_dir, tmp_path):
    import hydra_mlx

    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers

    settings = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["mlp.down_proj"]}
    model = hydra_mlx.load_model(tiny_model_dir)
    linear_to_lora_layers(model, 3, settings)
    lora = {n: mx.ones(x.shape) for n, x in tree_flatten(model.parameters()) if "lora_" in n}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), lora)
    config = {"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    flags = ("generate", "Hello", "-m", 12)
    assert ok(program(*flags, "--adapter-path", tmp_path)) != ok(program(*flags))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), {"odd": mx.ones(2)})
    failed(program(*flags, "--adapter-path", tmp_path), "do not fit")


# ---------------------------------------------------------------------------- processes


def start(folder, *argv, **options):
    command = [sys.executable, "-m", "hydra_mlx.generate", "--model", str(folder), *map(str, argv)]
    pipes = {n: subprocess.PIPE for n in ("stdin", "stdout", "stderr")}
    # No buffer: communicate would lose what a read before it took too much of.
    return subprocess.Popen(command, **{**pipes, "bufsize": 0, **options})


def test_pipe_and_prompt_in_a_process(tiny_model_dir, program):
    process = start(tiny_model_dir, "ask", "-m", 6)
    out, err = process.communicate("päip".encode(), timeout=60)
    assert process.returncode == 0 and err == b""
    assert out.decode() == ok(program("generate", "päip\n\nask", "-m", 6))


def test_ctrl_c_keeps_the_cache(tiny_model_dir, program, tmp_path):
    file = tmp_path / "c.safetensors"
    argv = ("Hello", "-m", 100000, "--prompt-cache", file, "--stats", "json", RAW)
    process = start(tiny_model_dir, *argv, stdin=subprocess.DEVNULL)
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    said = (begun + out).decode()
    assert said.endswith("\n") and b"Interrupted after" in err and b"Traceback" not in err
    figures = json.loads(err.decode().strip().splitlines()[-1])
    assert figures["finish_reason"] == "interrupt"
    assert figures["generated_tokens"] == len(said) - 1
    more = ("generate", "Hello" + said[:-1] + " more", "-m", 12, RAW)
    resumed = program(*more, "--prompt-cache", file, "--stats", "json")
    assert stats(resumed)["cached_tokens"] == 5 + len(said) - 1
    assert resumed[1] == ok(program(*more))


def test_a_reader_that_leaves(tiny_model_dir, tmp_path):
    file = tmp_path / "c.safetensors"
    argv = ("Hello", "-m", 100000, "--prompt-cache", file)
    process = start(tiny_model_dir, *argv, stdin=subprocess.DEVNULL)
    process.stdout.read(5)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 141 and b"Traceback" not in err and b"Broken" not in err
    assert file.is_file()
