"""The model inside the package: whole, small enough, and what programs take without --model."""

import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import hydra_mlx
from hydra_mlx import default_model, loading
from hydra_mlx.errors import UsageError
from hydra_mlx.manifest import MANIFEST, check_files

import pytest

ROOT = Path(__file__).parents[1]
FILE_BYTES, ALL_BYTES = 48_000_000, 100_000_000  # what the repository can take
SECTIONS = ("Use", "How it was made", "Perplexity", "Needles", "Beside its teacher", "Limits")


def files() -> list:
    """The model's files; pip compiles the shim, which is not one of them."""
    found = [p for p in default_model.PLACE.rglob("*") if p.is_file()]
    return [p for p in found if "__pycache__" not in p.parts]


# ---------------------------------------------------------------------------------- its files


def test_sizes():
    sizes = [p.stat().st_size for p in files()]
    assert sizes and max(sizes) < FILE_BYTES and sum(sizes) <= ALL_BYTES


def test_every_file_is_package_data():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = tool["package-data"]["hydra_mlx"]
    package = Path(hydra_mlx.__file__).parent
    for p in files():
        name = p.relative_to(package).as_posix()
        # A star in a pattern of setuptools does not cross folders.
        same = [x for x in patterns if x.count("/") == name.count("/")]
        assert any(fnmatch(name, x) for x in same), name


def test_as_it_was_converted():
    check_files(default_model.folder())
    listed = json.loads((default_model.PLACE / MANIFEST).read_text())["files"]
    assert {p.name for p in files()} == {*listed, MANIFEST, "README.md"}


def test_card():
    text = (default_model.PLACE / "README.md").read_text("utf-8")
    head = text.split("---\n")[1]
    assert "license: apache-2.0\n" in head and "base_model:" in head
    titles = [line.lstrip("#").strip() for line in text.splitlines() if line.startswith("#")]
    assert set(SECTIONS) <= set(titles) and "Licence" in titles
    assert "Apache-2.0" in text.split("## Licence")[1]


# ---------------------------------------------------------------------------------- it answers


def test_loads():
    model, tokenizer = hydra_mlx.load(lazy=True)
    args = model.args
    full = sum(map(len, args.full_attention_heads))
    assert 0 < full < args.num_hidden_layers * args.num_attention_heads  # a hybrid
    assert tokenizer.chat_template and tokenizer.eos_token_ids


def test_answers_offline_and_writes_nothing(tmp_path):
    before = {p: p.stat().st_mtime_ns for p in files()}
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_", "HYDRA_MLX_"))}
    env |= {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    prompt = ["--prompt", "What is the capital of France?", "--max-tokens", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "hydra_mlx.generate", *prompt, "--quiet"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and not done.stderr
    assert {p: p.stat().st_mtime_ns for p in files()} == before
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.stat().st_size > 10_000]


# ------------------------------------------------------------------------- with a small stand-in


def test_missing(monkeypatch, tmp_path, stdin, capsys):
    from hydra_mlx.__main__ import main

    monkeypatch.setattr(default_model, "PLACE", tmp_path)
    for find in (loading.resolve_path, lambda path: default_model.folder()):
        with pytest.raises(UsageError, match="not whole"):
            find(None)
    for argv in (["generate", "hello"], ["info"], ["needle"], ["bench"]):
        assert main(argv) == 2
        out, err = capsys.readouterr()
        assert not out and "Install hydra_mlx again" in err and len(err.splitlines()) == 2
    assert main(["doctor"]) == 1
    assert "fail  model" in capsys.readouterr().out


def test_a_part_is_missing(monkeypatch, tmp_path, tiny_model_dir):
    for p in tiny_model_dir.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    monkeypatch.setattr(default_model, "PLACE", tmp_path)
    assert default_model.folder() == tmp_path
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "gone"}}')
    with pytest.raises(UsageError, match="not whole"):
        default_model.folder()


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "hello", "-m", "2", "--quiet"],
        ["info", "--json"],
        ["needle", "--lengths", "256", "--depths", "0.5", "--quiet"],
        ["bench", "--lengths", "8", "--decode", "2", "--runs", "1", "--quiet"],
        ["doctor", "--deadline", "0.001"],
        ["cache", "read", "text.txt", "--out", "text.safetensors", "--quiet"],
    ],
    ids=lambda argv: argv[0],
)
def test_programs_take_it(argv, monkeypatch, tmp_path, tiny_model_dir, stdin, capsys):
    from hydra_mlx.__main__ import main

    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("A short text.")
    monkeypatch.setattr(default_model, "PLACE", tiny_model_dir)
    assert main(argv) == 0, capsys.readouterr().err
