"""The model against logits of an independent PyTorch implementation (tests/golden)."""

import json
from pathlib import Path

from hydra_mlx import reference
from hydra_mlx.config import HydraArgs
from hydra_mlx.model import Model
from hydra_mlx.ops import gated_delta

import mlx.core as mx
import numpy as np
import pytest

from .golden import weights as gold
from .tolerance import LOGITS_FLOAT32, REL_RMS, STATE, assert_close

FOLDER = Path(__file__).parent / "golden"
CASES = json.loads((FOLDER / "fixtures.json").read_text())
MODELS = {c["name"]: c for c in CASES["models"]}
OPERATORS = {c["name"]: c for c in CASES["operators"]}


@pytest.fixture(scope="module")
def golden():
    return np.load(FOLDER / "fixtures.npz")


def hydra_args(case) -> HydraArgs:
    return HydraArgs.from_dict({"model_type": "hydrahead", **case["config"]})


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree(name, golden):
    case = MODELS[name]
    model = Model(hydra_args(case))
    tensors = gold.make_weights(case["config"], case["seed"])
    model.load_weights([(k, mx.array(v)) for k, v in tensors.items()], strict=True)
    logits = model(mx.array(case["tokens"]))
    assert_close(logits, golden[f"logits/{name}"], LOGITS_FLOAT32, name)


@pytest.mark.parametrize("name", [n for n, c in MODELS.items() if len(c["tokens"][0]) < 100])
def test_reference_agrees(name, golden):
    case = MODELS[name]
    tensors = gold.make_weights(case["config"], case["seed"])
    logits = reference.forward(hydra_args(case), tensors, case["tokens"])
    assert_close(logits, golden[f"logits/{name}"], REL_RMS["float32"], name)


@pytest.mark.parametrize("name", OPERATORS)
def test_gated_delta_agrees(name, golden):
    case = OPERATORS[name]
    inputs = gold.make_operator_inputs(case)
    names = ("q", "k", "v", "g", "beta", "state")
    out, state = gated_delta(*(mx.array(inputs[n].astype(np.float32)) for n in names))
    s = case["stride"]
    out, state = np.array(out)[..., ::s], np.array(state)[..., ::s, ::s]
    assert_close(out, golden[f"out/{name}"], REL_RMS["float32"], name)
    assert_close(state, golden[f"state/{name}"], STATE, name)
