"""mlx-lm's own programs on a converted HydraHead folder: in this process, and as stock commands."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import hydra_mlx
from hydra_mlx.convert import main as convert

import mlx.core as mx
import numpy as np
import pytest

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model, converted (fused form, 4 bit)."""
    out = tmp_path_factory.mktemp("converted") / "model"
    assert convert(["--hf-path", str(tiny_model_dir), "--mlx-path", str(out), "-q", "--quiet"]) == 0
    return out


@pytest.fixture(scope="module")
def plain(tiny_model_dir, tmp_path_factory) -> Path:
    """The tiny model, converted without quantisation."""
    out = tmp_path_factory.mktemp("converted") / "plain"
    assert convert(["--hf-path", str(tiny_model_dir), "--mlx-path", str(out), "--quiet"]) == 0
    return out


@pytest.fixture(autouse=True)
def registered():
    hydra_mlx.register()


def run_main(monkeypatch, module: str, *argv):
    """Run main() of mlx_lm.<module> in this process with these arguments."""
    import importlib

    monkeypatch.setattr(sys, "argv", [module, *map(str, argv)])
    importlib.import_module(f"mlx_lm.{module}").main()


def test_registering_twice_is_harmless():
    hydra_mlx.register()
    hydra_mlx.register()
    assert sys.modules["mlx_lm.models.hydrahead"].Model is hydra_mlx.Model


def test_load_gives_the_same_logits(plain):
    from mlx_lm import load

    theirs, _ = load(str(plain))
    ours = hydra_mlx.load_model(plain)
    tokens = mx.array([[1, 2, 3, 4, 5]])
    assert np.array_equal(np.array(theirs(tokens)), np.array(ours(tokens)))


def test_generate(monkeypatch, folder, capsys):
    run_main(monkeypatch, "generate", "--model", folder, "-p", PROMPT, "-m", "8", "--temp", "0")
    assert "Generation: 8 tokens" in capsys.readouterr().out


def test_generate_kv_bits(monkeypatch, folder, capsys):
    args = ("--model", folder, "-p", PROMPT, "-m", "8", "--kv-bits", "8", "--kv-group-size", "32")
    run_main(monkeypatch, "generate", *args, "--quantized-kv-start", "0")
    assert "Generation: 8 tokens" in capsys.readouterr().out


def test_cache_prompt_then_generate(monkeypatch, folder, tmp_path, capsys):
    cache = tmp_path / "cache.safetensors"
    run_main(
        monkeypatch, "cache_prompt", "--model", folder, "--prompt", PROMPT,
        "--prompt-cache-file", cache,
    )  # fmt: skip
    assert cache.is_file()
    run_main(
        monkeypatch, "generate", "--model", folder, "--prompt-cache-file", cache, "-p", "there",
        "-m", "5",
    )  # fmt: skip
    assert "Generation: 5 tokens" in capsys.readouterr().out


def test_chat(monkeypatch, folder, capsys):
    lines = iter(["hello", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    run_main(monkeypatch, "chat", "--model", folder, "--max-tokens", "6")
    out = capsys.readouterr().out
    assert "mlx_lm.chat" in out and "bye" in out and "6 tok" in out, out


def test_convert_quantises_and_protects(monkeypatch, plain, tmp_path):
    """Stock mlx_lm.convert on our unquantised folder: gates stay as they are."""
    out = tmp_path / "again"
    run_main(
        monkeypatch, "convert", "--hf-path", plain, "--mlx-path", out, "-q", "--q-bits", "8",
        "--q-group-size", "32",
    )  # fmt: skip
    names = set(mx.load(str(out / "model.safetensors")))
    assert "model.layers.1.self_attn.in_proj.scales" in names
    assert not any("ab_proj.scales" in n or "conv" in n and "scales" in n for n in names)
    weights = mx.load(str(out / "model.safetensors"))
    assert weights["model.layers.1.self_attn.A_log"].dtype == mx.float32
    tokens = mx.array([[5, 6, 7, 8, 9, 10]])
    a, b = hydra_mlx.load_model(out)(tokens), hydra_mlx.load_model(plain)(tokens)
    assert mx.abs(a - b).max().item() < 0.1 * mx.abs(b).max().item()


def test_benchmark(monkeypatch, folder, capsys):
    run_main(
        monkeypatch, "benchmark", "--model", folder, "-p", "32", "-g", "4", "-n", "1", "-b", "2"
    )
    assert "Averages" in capsys.readouterr().out


def test_perplexity(folder, capsys):
    """Its main() needs a data set from the hub; what it computes is this."""
    from mlx_lm import load
    from mlx_lm.perplexity import eval_ppl

    model, _ = load(str(folder))
    tokens = mx.random.randint(0, 256, (4, 40), key=mx.random.key(0))
    ppl, error = eval_ppl(model, tokens, batch_size=2)
    logits = np.array(hydra_mlx.load_model(folder)(tokens[:, :-1]), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    losses = (
        np.log(np.exp(shifted).sum(-1))
        - np.take_along_axis(shifted, np.array(tokens)[:, 1:, None], -1)[..., 0]
    )
    assert abs(np.log(ppl) - losses.mean()) < 1e-3 and error > 0


def test_lora(monkeypatch, folder, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "valid", "test"):
        lines = [json.dumps({"text": f"{PROMPT} there was a {i}."}) for i in range(8)]
        (data / f"{name}.jsonl").write_text("\n".join(lines))
    adapters = tmp_path / "adapters"
    run_main(
        monkeypatch, "lora", "--model", folder, "--train", "--data", data, "--iters", "3",
        "--batch-size", "2", "--num-layers", "3", "--adapter-path", adapters,
        "--steps-per-report", "1", "--val-batches", "1",
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "mlx_lm.lora" in out and (adapters / "adapters.safetensors").is_file(), out
    moved = mx.load(str(adapters / "adapters.safetensors"))
    assert any(mx.abs(x).max().item() > 0 for n, x in moved.items() if n.endswith("lora_b"))


def environment(tmp_path) -> dict:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}


def test_stock_command_with_trust_remote_code(folder, tmp_path):
    """No entry point of ours: the model_file in the folder is enough."""
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(folder)]
    command += ["-p", PROMPT, "-m", "4"]
    env = environment(tmp_path)
    refused = subprocess.run(command, capture_output=True, text=True, env=env)
    assert refused.returncode and "trust_remote_code" in refused.stderr
    allowed = subprocess.run(
        [*command, "--trust-remote-code"], capture_output=True, text=True, env=env
    )
    assert allowed.returncode == 0, allowed.stderr
    assert "Generation: 4 tokens" in allowed.stdout


def test_server(folder, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = "import hydra_mlx, mlx_lm.server as s; hydra_mlx.register(); s.main()"
    server = subprocess.Popen(
        [sys.executable, "-c", code, "--model", str(folder), "--port", str(port)],
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 5, "temperature": 0}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(request, timeout=60) as reply:
                    answer = json.load(reply)
                break
            except OSError:
                assert server.poll() is None, "the server died"
                time.sleep(0.25)
        assert answer["usage"]["completion_tokens"] == 5
    finally:
        server.kill()
        server.wait()
