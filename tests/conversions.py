"""What the converter's tests share: a source, its conversion, and ways to compare."""

import json
from pathlib import Path

import hydra_mlx
from hydra_mlx import reference
from hydra_mlx.config import HydraArgs
from hydra_mlx.convert import build_parser as parser
from hydra_mlx.convert import main, make_job

import mlx.core as mx
import numpy as np
import pytest

from .checkpoints import (
    write_spec,
)

TOKENS = mx.array(np.random.RandomState(5).randint(0, 71, (2, 20)))


def convert(*argv, code: int = 0):
    """Run the program in this process and check its exit code."""
    found = main([str(a) for a in argv])
    assert found == code, argv


def read(folder: Path) -> dict:
    """Every tensor of a folder as {name: mx.array}."""
    out = {}
    for file in sorted(folder.glob("model*.safetensors")):
        out.update(mx.load(str(file)))
    return out


def logits(folder: Path) -> mx.array:
    return hydra_mlx.load_model(folder)(TOKENS)


ORACLE: dict = {}  # by the config and a few weights, which the seed decides


def oracle(config: dict, weights: dict) -> np.ndarray:
    """Reference logits of weights in spec layout."""
    key = json.dumps([config, weights["model.embed_tokens.weight"][0, :4].tolist()])
    if key not in ORACLE:
        ORACLE[key] = _oracle(config, weights)
    return ORACLE[key]


def _oracle(config: dict, weights: dict) -> np.ndarray:
    weights = {n: np.array(x.astype(mx.float32)) for n, x in weights.items()}
    return reference.forward(HydraArgs.from_dict(config), weights, np.array(TOKENS))


def same_arrays(a: dict, b: dict, where: str = ""):
    assert set(a) == set(b), where
    for name in a:
        assert a[name].dtype == b[name].dtype, f"{where} {name}"
        assert mx.array_equal(a[name], b[name]).item(), f"{where} {name}"


def job_of(*argv):
    return make_job(parser().parse_args([str(a) for a in argv]))[0]


def leftovers(folder: Path) -> list:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


@pytest.fixture(scope="module")
def spec(tmp_path_factory) -> tuple:
    """(folder, config, weights) of a float32 HydraHead checkpoint with a tokenizer."""
    return write_spec(tmp_path_factory.mktemp("spec") / "source", tokenizer=True)


@pytest.fixture(scope="module")
def fused(spec, tmp_path_factory) -> Path:
    """The same model, fused, not quantised."""
    out = tmp_path_factory.mktemp("fused") / "model"
    convert("--hf-path", spec[0], "--mlx-path", out, "--quiet")
    return out
