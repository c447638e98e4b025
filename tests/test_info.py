"""hydra-mlx info: figures of loaded models, kernel paths of real layers, broken folders."""

import json
import random
import subprocess
import sys
import time

import hydra_mlx
from hydra_mlx import facts, info, loading
from hydra_mlx.__main__ import main
from hydra_mlx.cache import cache_bytes
from hydra_mlx.config import HydraArgs
from hydra_mlx.convert import main as convert
from hydra_mlx.errors import HydraError
from hydra_mlx.kernel_paths import layer_paths
from hydra_mlx.kernels import dispatch

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from .bad_cases import (
    CONFIG as BAD_CONFIG,
)
from .bad_cases import (
    WEIGHTS,
    as_json,
    conflicting_configs,
    flipped_headers,
    good,
    header_size,
    truncated,
    wrong_configs,
    wrong_indexes,
    wrong_tensors,
)
from .checkpoints import SPEC, write_base, write_spec
from .metal_host.testing import needs_metal_host
from .test_bad_inputs import packed_cases, write
from .test_model_kernels import host, make_model, steps, tokens_of  # noqa: F401


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A spec folder (bfloat16) and what the converter makes of it in 4 bits."""
    spec, *_ = write_spec(tmp_path_factory.mktemp("info") / "spec", dtype="bfloat16")
    made = spec.parent / "made"
    argv = ["--hf-path", spec, "--mlx-path", made, "-q", "--q-group-size", "32", "--quiet"]
    assert convert([str(a) for a in argv]) == 0
    return spec, made


def shown(capsys, *argv) -> str:
    assert main(["info", *map(str, argv)]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("which", [0, 1], ids=["spec", "4bit"])
def test_figures_are_those_of_the_loaded_model(folders, which, capsys):
    said = json.loads(shown(capsys, folders[which], "--json"))
    model = hydra_mlx.load_model(folders[which], lazy=True, dtype="bfloat16")
    held = tree_flatten(model.parameters())
    plain = hydra_mlx.load_model(folders[which], lazy=True, dtype="auto")
    if loading.on_cpu():  # then "auto" unpacks every matrix
        assert said["parameters"] == sum(x.size for _, x in tree_flatten(plain.parameters()))
    assert said["quantised"] == ({"4-bit, groups of 32": 14} if which else {})
    assert said["weight_bytes"] == sum(x.nbytes for _, x in held)
    cache = model.make_cache()
    model(mx.zeros((1, 256), mx.int32), cache=cache)
    kv, state = cache_bytes(cache)
    assert said["kv_bytes_per_token"]["none"] * 256 == kv and said["state_bytes"] == state
    assert said["full_attention_heads"] == SPEC["full_attention_heads"]


def test_fits(folders):
    f = facts.read(folders[1])
    for bits in (None, 8, 4):
        n = f.fits(16, bits)
        used = f.nbytes + f.state_bytes + 2**30 + n * f.kv_bytes(bits)
        assert used <= 16 * 2**30 * 2 / 3 < used + f.kv_bytes(bits)
    assert f.fits(64) > 4 * f.fits(16)
    assert facts.replace(f, nbytes=20 * 2**30).fits(16) == 0


@pytest.mark.parametrize("kind, shards", [("llama", 1), ("qwen3", 3)])
def test_plain_models(kind, shards, tmp_path, capsys):
    folder, config, weights, _ = write_base(tmp_path / "m", kind, shards=shards, head_dim=32)
    said = json.loads(shown(capsys, folder, "--json"))
    assert said["parameters"] == sum(x.size for x in weights.values())
    assert said["kv_bytes_per_token"]["none"] == 2 * 2 * 2 * 32 * 4  # L, k and v, Hk, D, float32
    assert said["full_attention_heads"] == [[0, 1, 2, 3]] * 2 and said["state_bytes"] == 0
    assert "mlx-lm's own layers" in shown(capsys, folder)


def test_quantised_plain_model(tmp_path, capsys):
    """As mlx_lm.convert writes one: names, packed matrices, quantization in the config."""
    folder, config, weights, model = write_base(tmp_path / "m", head_dim=32)
    nn.quantize(model, 32, 4)
    packed = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / WEIGHTS), packed)
    config["quantization"] = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    for kind in ("llama", "qwen2"):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        said = json.loads(shown(capsys, folder, "--json"))
        assert said["parameters"] == sum(x.size for x in weights.values())
        assert said["weight_bytes"] == sum(x.nbytes for x in packed.values())
        assert sum(said["quantised"].values()) == sum(n.endswith(".scales") for n in packed)


def test_windows_are_not_plain(tmp_path, capsys):
    folder, config, *_ = write_base(tmp_path / "m", "qwen3")
    for changes, known in (
        ({"sliding_window": 64}, False),
        ({"sliding_window": 64, "use_sliding_window": False}, True),
        ({"sliding_window": None}, True),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        said = json.loads(shown(capsys, folder, "--json"))
        assert (said["kv_bytes_per_token"]["none"] is not None) == known, changes


def test_other_types_of_mlx_lm(tmp_path, capsys):
    folder, config, weights, _ = write_base(tmp_path / "m")
    for kind, line in (("gemma2", "not known"), ("qwen2", "tokens of one sequence")):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        out = shown(capsys, folder)
        assert line in out and f"{sum(x.size for x in weights.values()):,}" in out
    for kind in ("gpt5", "no such", "../x", "cache"):
        (folder / "config.json").write_text(json.dumps({**config, "model_type": kind}))
        if kind != "cache":
            assert main(["info", str(folder)]) == 2
            assert "mlx-lm" in capsys.readouterr().err


def test_in_well_under_a_second(folders):
    code = (
        "import sys; from hydra_mlx.__main__ import main\n"
        f"main(['info', {str(folders[1])!r}])\n"
        "print(sorted({'mlx_lm', 'transformers', 'huggingface_hub', 'rich'} & set(sys.modules)))"
    )
    best = 9.0
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        best = min(best, time.perf_counter() - start)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr
    assert best < 2  # 0.2 s of work; the machine may be shared


def test_picture(monkeypatch):
    heads, kv = [[0, 3], [0, 3], [], [1]], [2, 2, 0, 1]
    assert info.picture(heads, 4, kv, 2, False, 80) == [
        "0-1 # . . #   2 FA on 2 of 2 key/value heads",
        "  2 . . . .   0 FA",
        "  3 . # . .   1 FA on 1 of 2 key/value heads",
    ]
    assert all(len(x) <= 40 for x in info.picture(heads, 4, kv, 2, False, 40))
    narrow = info.picture([list(range(64))], 64, [8], 8, False, 30)
    assert [len(x.strip("0 ")) for x in narrow] == [28, 28, 8]
    coloured = info.picture(heads, 4, kv, 2, True, 80)[0]
    assert coloured.count("\x1b[48;5;209m") == 2 and coloured.count("\x1b[48;5;24m") == 2


def in_terminal(argv: list, columns: int = 90, **env) -> str:
    """What a program writes to a pseudo-terminal."""
    import fcntl
    import os
    import pty
    import struct
    import termios

    main_fd, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color", **env}
    process = subprocess.Popen(argv, stdout=other, stderr=other, stdin=other, env=env)
    os.close(other)
    out = b""
    while True:
        try:
            part = os.read(main_fd, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        out += part
    os.close(main_fd)
    assert process.wait() == 0, out.decode()
    return out.decode()


def test_colours_only_on_a_terminal_that_wants_them(folders, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    argv = [sys.executable, "-m", "hydra_mlx", "info", str(folders[1])]
    assert "\x1b[48;5;209m" in in_terminal(argv)
    plain = in_terminal(argv, NO_COLOR="1")
    assert "\x1b" not in plain and "1 # . # #" in plain
    piped = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in piped and "1 # . # #" in piped


def test_a_pipe_that_closes(folders):
    done = subprocess.run(
        f"{sys.executable} -m hydra_mlx info {folders[1]} | head -1",
        shell=True, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.startswith("model ") and not done.stderr


def test_png(folders, tmp_path, capsys):
    shown(capsys, folders[0], "--png", tmp_path / "h.png")
    assert (tmp_path / "h.png").read_bytes().startswith(b"\x89PNG")
    assert main(["info", str(folders[0]), "--png", str(tmp_path / "no" / "h.png")]) == 2


def test_hub_cache(tmp_path, monkeypatch, folders):
    """A snapshot as huggingface_hub lays it out, and an interrupted one."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    import importlib

    module = importlib.import_module("huggingface_hub._snapshot_download")
    monkeypatch.setattr(module.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--owner--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc123")
    snapshot = repo / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for p in folders[0].iterdir():
        (snapshot / p.name).write_bytes(p.read_bytes())
    assert facts.read(facts.find("owner/name")).parameters > 0
    (snapshot / WEIGHTS).unlink()
    with pytest.raises(HydraError, match="no model"):
        facts.read(facts.find("owner/name"))
    with pytest.raises(HydraError, match="hf download owner/other"):
        facts.find("owner/other")


# ------------------------------------------------------------------------------ broken folders


def refused(folder, name: str):
    """read() must raise a HydraError of one or two lines."""
    try:
        facts.read(folder)
    except HydraError as e:
        assert 1 <= len(str(e).splitlines()) <= 2, f"{name}: {e}"
    except Exception as e:
        raise AssertionError(f"{name}: {type(e).__name__}: {e}") from e
    else:
        raise AssertionError(f"{name}: was taken")


@pytest.mark.filterwarnings("ignore:config.json has keys")
@pytest.mark.parametrize(
    "group",
    [truncated, flipped_headers, wrong_tensors, wrong_configs, conflicting_configs, wrong_indexes],
    ids=lambda g: g.__name__,
)
def test_what_the_loader_refuses_info_refuses(group, tmp_path):
    folder = tmp_path / "m"
    for case in group():
        if case.loader:
            refused(write(folder, {**good(), **case.files}), case.name)


def test_quantised_folders(folders, tmp_path):
    config = json.loads((folders[1] / "config.json").read_text())
    arrays = mx.load(str(folders[1] / WEIGHTS))
    for name, keys, changes in packed_cases():
        tensors = {n: changes.get(n, lambda x: x)(x) for n, x in arrays.items()}
        write(tmp_path / "m", {"config.json": as_json({**config, **keys})})
        kept = {n: x for n, x in tensors.items() if x is not None}
        mx.save_safetensors(str(tmp_path / "m" / WEIGHTS), kept)
        refused(tmp_path / "m", name)


@pytest.mark.parametrize(
    "files, words",
    [
        ({"config.json": None}, "no config.json"),
        ({"config.json": b"{"}, "not valid JSON"),
        ({WEIGHTS: None}, r"no model\*.safetensors"),
        ({WEIGHTS: good()[WEIGHTS][:-8]}, "does not fit the file"),
        ({"config.json": as_json({**BAD_CONFIG, "model_type": "hydrahed"})}, "neither 'hydrahead'"),
        ({"config.json": as_json({**BAD_CONFIG, "model_type": None})}, "expected a name"),
        ({"config.json": as_json({**BAD_CONFIG, "num_hidden_layers": 3})}, "3"),
        ({"config.json": as_json({**BAD_CONFIG, "intermediate_size": 64})}, "shape"),
        (
            {"model.safetensors.index.json": as_json({"weight_map": {"a": "gone.safetensors"}})},
            "1 of 1 shards are missing, first gone.safetensors",
        ),
    ],
)
def test_clear_words(files, words, tmp_path):
    with pytest.raises(HydraError, match=words):
        facts.read(write(tmp_path / "m", {**good(), **files}))


@pytest.mark.filterwarnings("ignore:config.json has keys")
def test_fuzz(tmp_path, capsys):
    """Random damage of config and header: figures or one or two lines, never anything else."""
    rng, taken, base = random.Random(7), 0, json.loads(good()["config.json"])
    kinds = ["hydrahead", "llama", "qwen3", "mistral", "qwen2", "gemma2", "mamba"]
    values = [None, 0, -1, 1, 3, 2**40, 1.5, "x", True, [], {}, [[]], "hydrahead", {"type": "yarn"}]
    for i in range(250):
        raw, config = bytearray(good()[WEIGHTS]), dict(base)
        for _ in range(rng.randint(0, 2)):
            at = rng.randrange(header_size())
            raw[at] = rng.randrange(256)
        for _ in range(rng.randint(0, 3)):
            config[rng.choice([*config, "quantization", "rope_scaling"])] = rng.choice(values)
        if rng.random() < 0.4:
            config["model_type"] = rng.choice(kinds)
        text = bytearray(as_json(config))
        if rng.random() < 0.3:
            text[rng.randrange(len(text))] = rng.randrange(256)
        folder = write(tmp_path / "m", {"config.json": bytes(text), WEIGHTS: bytes(raw)})
        code = main(["info", str(folder)])
        out, err = capsys.readouterr()
        assert code in (0, 2), f"{i}: {err}"
        if code == 2:
            lines = err.strip().splitlines()
            assert not out and 1 <= len(lines) <= 2 and "not expected" not in err, f"{i}: {err}"
        taken += code == 0
    assert 5 < taken < 200


# -------------------------------------------------------------------------------- kernel paths

CASES = [
    {},
    {"weights_form": "spec"},
    {"head_dim": 32},
    {"full_attention_heads": [[0, 1, 2, 3]] * 3},
    {"full_attention_heads": [[]] * 3},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "la_rope": False},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "la_conv_kernel": 0},
]


@needs_metal_host
@pytest.mark.parametrize("bits", [None, 4], ids=["plain", "4bit"])
@pytest.mark.parametrize("changes", CASES, ids=str)
def test_paths_are_what_layers_do(changes, bits, host, monkeypatch):  # noqa: F811
    """The same kernels and reasons as after a prefill and a step of the model itself."""
    from hydra_mlx import kernel_paths, layer_kernels

    if bits and changes.get("head_dim") == 32:
        monkeypatch.setattr(kernel_paths, "PROMPT", 70)
    for module in (layer_kernels, kernel_paths):  # the context here is short
        monkeypatch.setattr(module, "PLAIN_FROM", {"metal": 64, "cuda": None})
    monkeypatch.setattr(kernel_paths, "PROMPT", 70)
    model = make_model(**changes)
    args = HydraArgs.from_dict(vars(model.args))
    _, cache = steps(model, tokens_of(70), (70,), bits)
    prefill = [dict(layer.self_attn.kernels.paths) for layer in model.layers]
    for layer in model.layers:
        layer.self_attn.kernels.paths.clear()
    mx.eval(model(tokens_of(1), cache=cache))
    decode = [layer.self_attn.kernels.paths for layer in model.layers]
    for i in range(3):
        said = layer_paths(args, i, "metal", "F32", bits, bits and 32)
        for p in said:
            if p.step == "prefill":
                real = prefill[i][f"prefill {p.heads}"]
            elif p.heads == "FA and LA":
                real = decode[i]["decode"]
            elif p.runs == "la_prefill" or "la_decode" in p.reason:
                real = decode[i]["prefill LA"]
            else:
                real = decode[i][f"decode {p.heads}"]
            what = "operations" if p.runs == "operations" else "kernels"
            assert (what, real[1]) == (real[0], p.reason.split("; not la_decode")[0]), p
        kinds = {p.heads for p in said if p.step == "prefill"}
        assert {f"prefill {k}" for k in kinds} == {k for k in prefill[i] if "prefill" in k}
    assert not dispatch.TRUST.failed
