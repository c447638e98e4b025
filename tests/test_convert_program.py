"""The converter's report, plan and refusals: what it says and what it never does."""

import fcntl
import json
import os
import re

import hydra_mlx
from hydra_mlx import converter
from hydra_mlx.convert import main
from hydra_mlx.manifest import MANIFEST, check_files, file_digest
from hydra_mlx.registry import SHIM, SHIM_NAME
from hydra_mlx.shards import read_headers

import mlx.core as mx
import numpy as np
import pytest

from .checkpoints import (
    HEAD_MAP,
    SPEC,
    write_base,
    write_checkpoint,
    write_gguf,
    write_spec,
)
from .conversions import (  # noqa: F401  (spec and fused are fixtures)
    TOKENS,
    _oracle,
    convert,
    fused,
    job_of,
    leftovers,
    logits,
    oracle,
    read,
    same_arrays,
    spec,
)
from .tolerance import assert_close


def test_report_of_every_key(tmp_path, capsys):
    source, config, weights, model = write_base(tmp_path / "s", tie_word_embeddings=True)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones(8),
        "model.layers.1.self_attn.rotary_emb.inv_freq": mx.ones(8),
        "lm_head.weight": weights["model.embed_tokens.weight"],
    }
    write_checkpoint(source, config, {**weights, **extra})
    flags = ("--hf-path", source, "--mlx-path", tmp_path / "o", "--head-map", "identity")
    report = job_of(*flags).source.report
    assert sorted(n for n, _ in report.mapped) == sorted(weights)
    assert sorted(report.dropped) == sorted(extra) and not report.missing + report.unexpected
    convert(*flags)
    err = capsys.readouterr().err
    assert f"{len(weights)} tensors mapped, 3 dropped, 0 missing, 0 unexpected" in err
    assert all(f"dropped: {n}" in err for n in extra)
    keys = json.loads((tmp_path / "o" / MANIFEST).read_text())["keys"]
    assert keys["mapped"] == len(weights) and sorted(keys["dropped"]) == sorted(extra)
    assert_close(logits(tmp_path / "o"), model(TOKENS), 1e-5)

    lost = "model.layers.1.mlp.up_proj.weight"
    for change, word in (({lost: None}, "misses"), ({"model.extra.weight": 1}, "unexpected")):
        both = {**weights, **{n: mx.ones(3) for n in change}}
        both = {n: x for n, x in both.items() if change.get(n, 0) is not None}
        write_checkpoint(source, config, both)
        convert(*flags, "--overwrite", code=2)
        err = capsys.readouterr().err
        assert word in err and next(iter(change)) in err and "1 " + word[:4] in err


TARGETS = [
    ("spec", []),
    ("spec", ["--no-fuse"]),
    ("spec", ["-q"]),
    ("spec", ["-q", "--q-mode", "mxfp4"]),
    ("spec", ["-q", "--recipe", "mixed_3_6", "--dtype", "bfloat16"]),
    ("spec", ["--dtype", "float16"]),
    ("half", []),
    ("half", ["-q", "--protect", "lm_head"]),
    ("packed", []),
    ("packed", ["--dtype", "bfloat16"]),
    ("packed", ["-q", "--q-bits", "3"]),
    ("fused", ["--to-hf"]),
    ("fused", ["--to-hf", "--dtype", "float16"]),
    ("llama", ["--head-map", "identity"]),
    ("llama", ["--head-map", "heads", "-q", "--q-group-size", "32"]),
    ("gguf", ["--head-map", "identity"]),
    ("gguf", ["--head-map", "heads"]),
    ("gguf", ["--head-map", "heads", "--dtype", "bfloat16"]),
    ("gguf", ["--head-map", "identity", "-q", "--q-group-size", "32", "--q-bits", "8"]),
]


@pytest.fixture(scope="module")
def sources(spec, fused, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("sources")
    write_spec(folder / "half", dtype="float16")
    write_base(folder / "llama", dtype="bfloat16")
    gguf, *_ = write_gguf(folder / "m.gguf", quantised=True, vocab_size=258)
    convert("--hf-path", spec[0], "--mlx-path", folder / "packed", "-q", "--quiet")
    (folder / "heads.json").write_text(json.dumps(HEAD_MAP))
    names = {n: folder / n for n in ("half", "llama", "packed")}
    return {**names, "spec": spec[0], "fused": fused, "gguf": gguf, "heads": folder / "heads.json"}


@pytest.mark.parametrize("source, flags", TARGETS, ids=lambda x: "".join(x).replace("--", "+"))
def test_plan_says_what_is_written(source, flags, sources, tmp_path, capsys):
    flags = [sources["heads"] if f == "heads" else f for f in flags]
    if "--to-hf" in flags:
        at = flags.index("--to-hf") + 1
        argv = ["--mlx-path", sources[source], *flags[:at], tmp_path / "o", *flags[at:]]
    else:
        argv = ["--hf-path", sources[source], "--mlx-path", tmp_path / "o", *flags]
    convert(*argv, "--plan")
    out = capsys.readouterr().out
    assert "weights" in out and "memory" in out and "disk" in out
    assert not list(tmp_path.iterdir())
    said = converter.plan(job_of(*argv), tmp_path / "o")
    convert(*argv, "--quiet")
    headers = read_headers(tmp_path / "o")
    assert said.weights == sum(i.nbytes for i in headers.values())
    count = sum(x.size for x in read(tmp_path / "o").values() if x.dtype != mx.uint32)
    assert said.parameters >= count * 0.9
    assert hydra_mlx.load_model(tmp_path / "o")


def test_too_little_room_is_said_before(spec, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(converter, "memory_bytes", lambda: 10**6)
    for flag in ((), ("--plan",)):
        convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--quiet", *flag, code=2)
        assert "of memory" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", ["quick", "full"])
def test_verify_prints_figures(level, spec, tmp_path, capsys):
    flags = ("--hf-path", spec[0], "--verify", level)
    convert(*flags, "--mlx-path", tmp_path / "a")
    err = capsys.readouterr().err
    assert f"compared on {128 if level == 'quick' else 1024} tokens" in err
    assert "KL" in err and "100.0 %" in err and "perplexity" not in err
    convert(*flags, "--mlx-path", tmp_path / "b", "-q", "--q-bits", "8")
    ratio = re.search(r"perplexity [\d.]+ -> [\d.]+, ratio ([\d.]+)", capsys.readouterr().err)
    assert 0.9 < float(ratio[1]) < 1.1


def test_verify_without_tokenizer_has_no_perplexity(tmp_path, capsys):
    source, *_ = write_spec(tmp_path / "s")
    convert("--hf-path", source, "--mlx-path", tmp_path / "o", "-q", "--verify", "quick")
    err = capsys.readouterr().err
    assert "compared on 128 tokens" in err and "perplexity" not in err


def test_verify_that_fails_leaves_nothing(spec, tmp_path, monkeypatch, capsys):
    from hydra_mlx import verify

    def broken(tokens):
        return mx.full((*tokens.shape, 260), mx.nan)

    monkeypatch.setattr(verify, "load_model", lambda folder: broken)
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--verify", "quick", code=2)
    assert "NaN" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- what is written


def test_manifest_and_shim(spec, fused):
    config = json.loads((fused / "config.json").read_text())
    assert config["model_file"] == SHIM_NAME and (fused / SHIM_NAME).read_text() == SHIM
    assert config["eos_token_id"] == 257 and config["weights_form"] == "fused"
    data = json.loads((fused / MANIFEST).read_text())
    assert data["source"] == "source" and data["hydra_mlx_version"] == hydra_mlx.__version__
    assert set(data["files"]) == {p.name for p in fused.iterdir()} - {MANIFEST}
    for name, entry in data["files"].items():
        assert entry["bytes"] == (fused / name).stat().st_size
        assert entry["sha256"] == file_digest(fused / name)
    assert "tokenizer.json" in data["files"]
    check_files(fused)
    assert oct(fused.stat().st_mode)[-3:] == "755"


def test_manifest_notices_changes(spec, tmp_path):
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--quiet")
    file = tmp_path / "o" / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert hydra_mlx.load_model(tmp_path / "o") is not None, "not checked unless asked for"
    with pytest.raises(hydra_mlx.errors.CheckpointError, match="content has changed"):
        hydra_mlx.load_model(tmp_path / "o", check=True)
    file.write_bytes(raw)
    hydra_mlx.load_model(tmp_path / "o", check=True)
    file.unlink()
    with pytest.raises(hydra_mlx.errors.CheckpointError, match="missing"):
        check_files(tmp_path / "o")
    (tmp_path / "o" / MANIFEST).unlink()
    with pytest.raises(hydra_mlx.errors.CheckpointError, match="has no hydra_manifest"):
        check_files(tmp_path / "o")


def test_existing_target(spec, tmp_path, capsys):
    out = tmp_path / "o"
    flags = ("--hf-path", spec[0], "--mlx-path", out, "--quiet")
    convert(*flags)
    (out / "mine.txt").write_text("x")
    before = (out / "model.safetensors").stat().st_ino
    convert(*flags, "-q", code=2)
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "model.safetensors").stat().st_ino == before
    convert(*flags, "-q", "--overwrite")
    assert not (out / "mine.txt").exists() and any("scales" in n for n in read(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o"]


def test_overwrite_deletes_models_only(spec, tmp_path, capsys):
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("papers", "file"):
        flags = ("--mlx-path", tmp_path / name, "--overwrite")
        convert("--hf-path", spec[0], *flags, code=2)
        assert "not a model folder" in capsys.readouterr().err
    assert (tmp_path / "papers" / "thesis.txt").is_file() and (tmp_path / "file").is_file()
    (tmp_path / "empty").mkdir()
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "empty", "--overwrite", "--quiet")


def test_source_is_never_the_target(tmp_path, capsys, monkeypatch):
    source, *_ = write_spec(tmp_path / "outer" / "s")
    (tmp_path / "outer" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)
    monkeypatch.chdir(source)
    before = {p.name: p.read_bytes() for p in source.iterdir()}
    for target in (source, tmp_path / "link", source / ".." / "s", ".", tmp_path / "outer"):
        for flag in ((), ("--overwrite",)):
            convert("--hf-path", source, "--mlx-path", target, *flag, code=2)
            err = capsys.readouterr().err
            assert "same" in err or "lies inside" in err, target
    convert("--hf-path", source, "--mlx-path", tmp_path / "o", "--quiet")
    convert("--mlx-path", tmp_path / "o", "--to-hf", tmp_path / "o", "--overwrite", code=2)
    assert {p.name: p.read_bytes() for p in source.iterdir()} == before


def test_target_through_a_link(spec, tmp_path):
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--quiet")
    (tmp_path / "link").symlink_to(tmp_path / "o")
    flags = ("--mlx-path", tmp_path / "link", "-q", "--overwrite", "--quiet")
    convert("--hf-path", spec[0], *flags)
    assert (tmp_path / "link").is_symlink() and any("scales" in n for n in read(tmp_path / "o"))
    assert not leftovers(tmp_path)


USELESS = [
    ["--q-bits", "4"],
    ["--q-group-size", "64"],
    ["--q-mode", "affine"],
    ["--recipe", "mixed_3_6"],
    ["--protect", "lm_head"],
    ["--seed", "1"],
    ["--head-map", "identity"],
    ["-q", "--protect", "no_such_module"],
    ["-q", "--protect", "["],
    ["-q", "--q-mode", "mxfp4", "--q-bits", "8"],
    ["-q", "--q-mode", "mxfp4", "--recipe", "mixed_3_6"],
    ["-q", "--q-mode", "int4"],
    ["-q", "--q-bits", "7"],
    ["-q", "--q-group-size", "16"],
    ["-q", "--recipe", "mixed_9_9"],
    ["-q", "--protect", "."],
    ["--dtype", "float64"],
    ["--revision", "main"],
    ["--max-shard-size", "1"],
    ["--max-shard-size", "big"],
    ["--to-hf", "elsewhere"],
]


@pytest.mark.parametrize("flags", USELESS, ids=" ".join)
def test_flags_without_effect_are_errors(flags, spec, tmp_path, capsys):
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / "o", *flags, code=2)
    err = capsys.readouterr().err.strip().splitlines()
    assert 1 <= len(err) <= 2 and err[0].startswith("error: ") and "not expected" not in err[-1]
    assert not list(tmp_path.iterdir())


WITH_TO_HF = [
    ["-q"],
    ["--no-fuse"],
    ["--head-map", "identity"],
    ["--hf-path", "x"],
    ["--seed", "1"],
]


@pytest.mark.parametrize("flags", WITH_TO_HF, ids=" ".join)
def test_to_hf_flags(flags, fused, tmp_path, capsys):
    convert("--mlx-path", fused, "--to-hf", tmp_path / "o", *flags, code=2)
    assert len(capsys.readouterr().err.splitlines()) <= 2 and not list(tmp_path.iterdir())


def test_fused_source_cannot_be_unfused_by_no_fuse(fused, tmp_path, capsys):
    convert("--hf-path", fused, "--mlx-path", tmp_path / "o", "--no-fuse", code=2)
    assert "--to-hf" in capsys.readouterr().err


# --------------------------------------------------------- damage, partial folders and the lock

NAMES = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
NAMES += ["model.layers.2.self_attn.la.A_log", "model.layers.0.self_attn.la.b_proj.weight"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("flags", [[], ["-q"], ["-q", "--q-mode", "mxfp4"], ["--dtype", "float16"]])
def test_source_with_nan_is_refused(flags, value, tmp_path, capsys):
    source, config, weights = write_spec(tmp_path / "s")
    for name in NAMES:
        x = np.array(weights[name])
        x.flat[x.size // 2] = value
        write_checkpoint(source, config, {**weights, name: mx.array(x)})
        convert("--hf-path", source, "--mlx-path", tmp_path / "o", *flags, "--quiet", code=2)
        assert "NaN" in capsys.readouterr().err, name
        assert sorted(p.name for p in tmp_path.iterdir()) == ["s"], name


def test_float16_overflow_is_refused(tmp_path, capsys):
    source, config, weights = write_spec(tmp_path / "s")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1e6
    write_checkpoint(source, config, weights)
    flags = ("--mlx-path", tmp_path / "o", "--dtype", "float16")
    convert("--hf-path", source, *flags, code=2)
    assert "too large for float16" in capsys.readouterr().err
    assert not (tmp_path / "o").exists() and not leftovers(tmp_path)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(28, "No space left")])
def test_interruption_leaves_nothing(error, overwrite, spec, tmp_path, monkeypatch):
    out = tmp_path / "o"
    flags = ["--hf-path", spec[0], "--mlx-path", out, "--quiet"]
    if overwrite:
        convert(*flags)
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        flags.append("--overwrite")

    def fail(folder):
        raise error

    monkeypatch.setattr(converter, "sync_folder", fail)
    convert(*flags, "-q", code=130 if error is KeyboardInterrupt else 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == (["o"] if overwrite else [])
    if overwrite:
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_two_conversions_to_one_target(spec, tmp_path, capsys):
    out = tmp_path / "o"
    fd = os.open(tmp_path / ".o.lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    convert("--hf-path", spec[0], "--mlx-path", out, "--quiet", code=2)
    assert "Another conversion" in capsys.readouterr().err and not out.exists()
    assert (tmp_path / ".o.lock").exists()  # it is not ours to remove
    os.close(fd)
    convert("--hf-path", spec[0], "--mlx-path", out, "--quiet")
    assert not leftovers(tmp_path)


def test_a_second_conversion_while_one_runs(spec, tmp_path, capsys):
    job, codes = job_of("--hf-path", spec[0], "--mlx-path", tmp_path / "o"), []

    def progress(label, done, total):
        flags = ("--mlx-path", tmp_path / "o", "--overwrite", "--quiet")
        codes.append(main([str(a) for a in ("--hf-path", spec[0], *flags)]))

    converter.run(job, tmp_path / "o", False, progress)
    assert set(codes) == {2} and "Another conversion" in capsys.readouterr().err
    hydra_mlx.load_model(tmp_path / "o")


@pytest.mark.parametrize("name", ["model", "a [b] *?"])
def test_leftovers_of_a_killed_run_are_swept(name, spec, tmp_path):
    for left in (f".{name}.partial-abc", f".{name}.partial-xyz"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "part-00000.safetensors").write_bytes(b"half")
    (tmp_path / f".{name}.lock").touch()
    (tmp_path / ".other.partial-abc").mkdir()
    convert("--hf-path", spec[0], "--mlx-path", tmp_path / name, "--quiet")
    assert leftovers(tmp_path) == [".other.partial-abc"]


def test_kill_between_the_renames_of_an_overwrite(spec, tmp_path, capsys):
    flags = ("--hf-path", spec[0], "--mlx-path", tmp_path / "o", "--quiet")
    convert(*flags)
    (tmp_path / "o").rename(tmp_path / ".o.replaced")
    convert(*flags, code=2)  # the old model has its name back, and is not overwritten
    assert "exists already" in capsys.readouterr().err and not leftovers(tmp_path)
    hydra_mlx.load_model(tmp_path / "o")
    (tmp_path / "o").rename(tmp_path / ".o.replaced")
    convert(*flags, "-q", "--overwrite")
    assert any("scales" in n for n in read(tmp_path / "o")) and not leftovers(tmp_path)


def test_seed_decides_the_new_tensors(tmp_path):
    source, *_ = write_base(tmp_path / "s")
    (tmp_path / "h.json").write_text(json.dumps(HEAD_MAP))
    for n, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ("--head-map", tmp_path / "h.json", "--seed", seed, "--quiet")
        convert("--hf-path", source, "--mlx-path", tmp_path / n, *flags)
    same_arrays(read(tmp_path / "a"), read(tmp_path / "b"))
    a, c = read(tmp_path / "a"), read(tmp_path / "c")
    name = "model.layers.0.self_attn.A_log"
    assert not mx.array_equal(a[name], c[name]).item()


def test_spec_fixture_is_ragged():
    assert {len(h) for h in SPEC["full_attention_heads"]} == {0, 1, 3}
