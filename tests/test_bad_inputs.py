"""Hundreds of damaged checkpoints, configs, head maps and paths, for the converter and the loader.

Each must end in a HydraError (exit code 2, one or two lines), write nothing and leave its source
as it was. A case is a set of files to write over those of a good folder; all are made from fixed
seeds, and all must fail.
"""

import json
import os
import random
from pathlib import Path

import hydra_mlx
from hydra_mlx.convert import main
from hydra_mlx.errors import HydraError

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from .bad_cases import (
    WEIGHTS,
    as_json,
    conflicting_configs,
    flipped_data,
    flipped_headers,
    good,
    truncated,
    wrong_configs,
    wrong_indexes,
    wrong_tensors,
)
from .checkpoints import BASE, base_model, gguf_content, write_base
from .test_gguf import gguf_bytes

GROUPS = [truncated, flipped_headers, flipped_data, wrong_tensors, wrong_configs]
GROUPS += [conflicting_configs, wrong_indexes]

# --------------------------------------------------------------------------------- the checking


class Checker:
    """Runs bad inputs; `check` fails with the name of the first that gets through."""

    def __init__(self, folder: Path, capsys):
        self.capsys, self.folder = capsys, folder
        self.out = folder / "out"
        self.out.mkdir()

    def converter(self, name: str, *argv, target: Path | None = None):
        """The converter must refuse these arguments and write nothing."""
        before = snapshot(self.folder)
        target = self.out / "model" if target is None else target
        code = main(["--mlx-path", str(target), "--quiet", *map(str, argv)])
        out, err = self.capsys.readouterr()
        lines = err.strip().splitlines()
        assert code == 2, f"{name}: exit code {code}"
        assert not out and 1 <= len(lines) <= 2 and lines[0].startswith("error: "), f"{name}: {err}"
        assert "Traceback" not in err and "not expected" not in err, f"{name}: {err}"
        assert snapshot(self.folder) == before, f"{name}: files have changed"

    def loader(self, name: str, folder: Path):
        """load_model must raise a HydraError of one or two lines."""
        before = snapshot(self.folder)
        try:
            hydra_mlx.load_model(folder)
        except HydraError as e:
            assert 1 <= len(str(e).splitlines()) <= 2, f"{name}: {e}"
        except Exception as e:
            raise AssertionError(f"{name}: the loader raised {type(e).__name__}: {e}") from e
        else:
            raise AssertionError(f"{name}: was loaded")
        assert snapshot(self.folder) == before, f"{name}: files have changed"


def snapshot(folder: Path) -> dict:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.fixture
def checker(tmp_path, capsys) -> Checker:
    return Checker(tmp_path, capsys)


def write(folder: Path, files: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for p in folder.iterdir():
        p.unlink()
    for name, raw in files.items():
        if raw is not None:
            (folder / name).write_bytes(raw)
    return folder


def test_the_good_folder_is_good(tmp_path):
    folder = write(tmp_path / "model", good())
    hydra_mlx.load_model(folder)
    assert main(["--hf-path", str(folder), "--mlx-path", str(tmp_path / "o"), "--quiet"]) == 0


@pytest.mark.filterwarnings("ignore:config.json has keys")
@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.__name__)
def test_folders(group, checker, tmp_path):
    for case in group():
        folder = write(tmp_path / "model", {**good(), **case.files})
        checker.converter(case.name, "--hf-path", folder, *case.flags)
        if case.loader:
            checker.loader(case.name, folder)


def packed_cases() -> list:
    """Changes to a quantised folder: (name, {config key: value}, {tensor: array or None})."""
    q = {"bits": 4, "group_size": 32, "mode": "affine"}
    bad = [None, [], 3, "x", {}, {"bits": 4}, {"group_size": 32}]
    bad += [{**q, "bits": b} for b in (8, 3, 0, -4, 7, None, "4", 10**9)]
    bad += [{**q, "group_size": g} for g in (64, 16, 0, -32, None, "32")]
    bad += [{**q, "mode": m} for m in ("mxfp4", "nvfp4", "", None, [])]
    out = [(f"quantization {x}", {"quantization": x, "quantization_config": x}, {}) for x in bad]
    own = {**q, "lm_head": {"bits": 8, "group_size": 32}}
    out.append(("lm_head 8 bit", {"quantization": own, "quantization_config": own}, {}))
    for part in ("weight", "scales", "biases"):
        name = f"lm_head.{part}"
        for what, f in {
            "missing": lambda x: None,
            "half": lambda x: x[: x.shape[0] // 2],
            "narrow": lambda x: x[:, :1] if x.shape[1] > 1 else mx.concatenate([x, x], 1),
            "flat": lambda x: x.flatten(),
            "int8": lambda x: x.astype(mx.int8),
        }.items():
            out.append((f"{name} {what}", {}, {name: f}))
    return out


def test_quantised_folders(checker, tmp_path):
    source = write(tmp_path / "model", good())
    made = tmp_path / "made"
    argv = ["--hf-path", source, "--mlx-path", made, "-q", "--q-group-size", "32", "--quiet"]
    assert main([str(a) for a in argv]) == 0
    config = json.loads((made / "config.json").read_text())
    arrays = mx.load(str(made / WEIGHTS))
    for name, keys, changes in packed_cases():
        tensors = {n: changes.get(n, lambda x: x)(x) for n, x in arrays.items()}
        tensors = {n: x for n, x in tensors.items() if x is not None}
        write(source, {"config.json": as_json({**config, **keys})})
        mx.save_safetensors(str(source / WEIGHTS), tensors)
        checker.loader(name, source)
        checker.converter(name, "--hf-path", source)
        checker.converter(name, "--hf-path", source, "--dtype", "float32")


def head_maps() -> list:
    """(name, bytes of the file) for a base model of 2 layers and 4 heads."""
    fine = {"full_attention_heads": [[1], [0, 2]]}
    bad = [None, 3, "x", {}, [], [[]], [[], [], []], [[1], 2], [[2, 1], []], [[1, 1], []]]
    bad += [[[4], []], [[-1], []], [["1"], []], [[1.0], []], [[True], []], [[None], []]]
    bad += [{"full_attention_heads": x} for x in bad]
    changes = [
        *(
            {"heads": []},
            {"hidden_size": 64},
            {"num_attention_heads": 2},
            {"weights_form": "fused"},
        ),
        *({"fa_kv": "x"}, {"fa_rope": 1}, {"la_conv_kernel": 3}, {"fusion_norm": 0}, {"": 1}),
        *({"fa_logit_scale": {"type": "log_length", "a": 0}}, {"model_type": "hydrahead"}),
        *({"fa_qk_norm": None}, {"la_output_gate": "tanh"}, {"rope_theta": 5}, {"fa_gates": None}),
    ]
    out = [(json.dumps(x)[:60], as_json(x)) for x in [*bad, *({**fine, **c} for c in changes)]]
    out += [("empty", b""), ("cut", as_json(fine)[:-3]), ("binary", bytes(range(256)))]
    out += [("text", b"0: 1 2"), ("deep", b"[" * 100_000), ("utf-16", as_json(fine)[:9] + b"\xff")]
    return out


def test_head_maps(checker, tmp_path):
    source, *_ = write_base(tmp_path / "base")
    heads = tmp_path / "heads.json"
    for name, raw in head_maps():
        heads.write_bytes(raw)
        checker.converter(f"head map {name}", "--hf-path", source, "--head-map", heads)
    for path in (tmp_path / "gone.json", tmp_path, "", "Identity", "a\0b", "x" * 5000):
        checker.converter(f"head map at {path}", "--hf-path", source, "--head-map", path)


def base_cases() -> list:
    """Changes to a plain Llama's config that keep it from being migrated."""
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    changes = [{k: v} for k in sizes for v in (None, 0, -1, 2**40, "4", 1.5, [], True)]
    changes += [{"model_type": x} for x in (None, "gpt2", "qwen2", 3, [], "qwen3")]
    changes += [{"mlp_bias": True}, {"attention_bias": True}, {"head_dim": 8}, {"head_dim": 17}]
    changes += [{"tie_word_embeddings": "x"}, {"hidden_act": "gelu"}, {"rope_scaling": "linear"}]
    changes += [{"model_type": "mistral", "sliding_window": 64}, {"rms_norm_eps": 0}]
    changes += [{"rope_scaling": {"rope_type": "llama3"}}, {"intermediate_size": 100}]
    return changes


def test_base_models(checker, tmp_path):
    source, config, *_ = write_base(tmp_path / "base")
    for change in base_cases():
        (source / "config.json").write_bytes(as_json({**config, **change}))
        checker.converter(f"base {change}", "--hf-path", source, "--head-map", "identity")
    (source / "config.json").write_bytes(as_json(config))
    checker.converter("no head map", "--hf-path", source)


def ggufs() -> list:
    """(name, bytes) of damaged GGUF files, all of which must fail."""
    rng = random.Random(3)
    model = base_model({"model_type": "llama", **BASE})
    meta, tensors = gguf_content(BASE, dict(tree_flatten(model.parameters())), False)
    whole = gguf_bytes(meta, tensors)
    cuts = [0, 4, 8, 23, 24, 200, len(whole) - 33, *(rng.randrange(len(whole)) for _ in range(20))]
    out = [(f"cut to {n}", whole[:n]) for n in cuts]
    out += [("magic", b"GGML" + whole[4:]), ("version", whole[:4] + b"\x09" + whole[5:])]
    out += [("text", b"GGUF is what this is not" * 9), ("zero", bytes(1000))]
    for key in sorted(meta):
        values = [0, "x"] if key in HARMLESS else [0, "x", 3, 2**31]
        values = ["mamba", 5] if isinstance(meta[key], str) else values
        out += [(f"{key} = {v}", gguf_bytes({**meta, key: v}, tensors)) for v in values]
    for name in ("blk.1.ffn_up.weight", "token_embd.weight", "blk.0.attn_norm.weight"):
        rest = {n: t for n, t in tensors.items() if n != name}
        (rows, *more), kind, raw = tensors[name]
        out.append((f"no {name}", gguf_bytes(meta, rest)))
        out.append((f"{name} renamed", gguf_bytes(meta, {**rest, f"x{name}": tensors[name]})))
        row = len(raw) // rows
        short = ((rows - 1, *more), kind, raw[row:])
        if name != "token_embd.weight":  # that one decides the vocabulary's size
            out.append((f"{name} short", gguf_bytes(meta, {**rest, name: short})))
        nan = np.frombuffer(raw, "<f4").copy()
        nan[3] = np.nan
        out.append(
            (f"{name} NaN", gguf_bytes(meta, {**rest, name: ((rows, *more), kind, nan.tobytes())}))
        )
    return out


# Values that some keys of a GGUF may have: they change the model, and do not contradict it.
HARMLESS = {
    "llama.context_length",
    "llama.rope.freq_base",
    "llama.attention.layer_norm_rms_epsilon",
}


def test_ggufs(checker, tmp_path):
    path = tmp_path / "model.gguf"
    for name, raw in ggufs():
        path.write_bytes(raw)
        checker.converter(f"gguf {name}", "--hf-path", path, "--head-map", "identity")


def test_paths(checker, tmp_path):
    source = write(tmp_path / "model", good())
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    bad = [
        "gone",
        "gone/deeper",
        "file",
        "empty",
        "file/below",
        "loop",
        "dangling",
        "a\0b",
        "y" * 300,
    ]
    for name in bad:
        path = tmp_path / name
        checker.converter(f"source {name}", "--hf-path", path)
        if name != "file":
            checker.loader(f"source {name}", path)
    checker.converter("no source")
    checker.converter("an empty source", "--hf-path", "")
    for name in ("file", "file/below", "file/below/more", "loop/x", "z" * 300, "a\0b"):
        path = tmp_path / name
        checker.converter(f"target {name}", "--hf-path", source, target=path)
        checker.converter(f"target {name}, plan", "--hf-path", path, "--plan", target=path)
    (source / WEIGHTS).unlink()
    (source / WEIGHTS).mkdir()
    checker.converter("weights are a folder", "--hf-path", source)
    checker.loader("weights are a folder", source)
    (source / WEIGHTS).rmdir()
    (source / "config.json").unlink()
    (source / "config.json").mkdir()
    checker.converter("config.json is a folder", "--hf-path", source)
    checker.loader("config.json is a folder", source)


def test_unreadable(tmp_path):
    source = write(tmp_path / "model", good())
    uid = os.geteuid()
    for name, mode in (("config.json", 0), (WEIGHTS, 0), (".", 0o100)):
        kept = (source / name).stat().st_mode
        (source / name).chmod(mode)
        try:
            (source / name).read_bytes() if name != "." else list(source.iterdir())
        except OSError:
            # Not checker.loader: it would read the files itself, to see that they stay as they are.
            with pytest.raises(HydraError) as caught:
                hydra_mlx.load_model(source)
            assert 1 <= len(str(caught.value).splitlines()) <= 2, name
        else:
            assert uid == 0  # root reads everything
        finally:
            (source / name).chmod(kept)


def test_there_are_hundreds():
    counts = {g.__name__: len(g()) for g in GROUPS}
    counts.update(packed=len(packed_cases()), heads=len(head_maps()), base=len(base_cases()))
    counts.update(gguf=len(ggufs()))
    print(sum(counts.values()), "bad inputs:", counts)
    assert sum(counts.values()) >= 300, counts
