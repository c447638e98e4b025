"""The name tables against the modules they describe."""

import random

import hydra_mlx  # noqa: F401  (before mlx: it chooses the BLAS library)
from hydra_mlx.config import CHOICES, HydraArgs
from hydra_mlx.layouts import model_shapes
from hydra_mlx.model import Model

import pytest
from mlx.utils import tree_flatten


def random_args(seed: int) -> HydraArgs:
    """A small config with every switch drawn; ragged heads, some layers of one kind."""
    rng = random.Random(seed)
    H = rng.choice((2, 4, 6))
    layers = [sorted(rng.sample(range(H), rng.randint(0, H))) for _ in range(2)]
    chosen = {k: rng.choice(v) for k, v in CHOICES.items()}
    flags = ("tie_word_embeddings", "attention_bias", "fa_qk_norm", "la_qk_norm", "fusion_scale")
    return HydraArgs(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=H,
        num_key_value_heads=rng.choice((1, 2)),
        head_dim=8,
        vocab_size=17,
        full_attention_heads=[*layers, [], list(range(H))],
        **chosen,
        **{f: rng.random() < 0.5 for f in flags},
    )


@pytest.mark.parametrize("seed", range(24))
def test_shapes_are_the_models(seed):
    args = random_args(seed)
    built = {n: tuple(x.shape) for n, x in tree_flatten(Model(args).parameters())}
    assert model_shapes(args) == built, args
