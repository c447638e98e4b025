"""Writes or checks the golden fixtures: python -m tests.golden.make_fixtures [--check]

fixtures.json holds configs, seeds and tokens (weights and operator inputs come from the seed),
fixtures.npz the results, computed in float64 and stored as float32:
    logits/<model name>                            [B, T, V]
    out/<operator name>, state/<operator name>     see operator_results
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from .weights import OPTIONS, complete_config, make_operator_inputs, make_tokens, make_weights

HERE = Path(__file__).parent
TOLERANCE = 1e-6
VOCAB = 61

# fmt: off
# (name, batch, tokens, config changes). H, kv and D stand for the long names, fa for the head map.
MODELS = [
    ("defaults", 1, 130, {"H": 6, "kv": 3, "D": 64, "fa": [[1, 4], [], [3]]}),
    ("base_all_fa", 2, 37, {
        "H": 4, "kv": 2, "D": 64, "fa": [[0, 1, 2, 3]] * 2, "fa_rope": True, "fa_gate": None,
        "fa_logit_scale": None, "fusion_norm": None, "fusion_scale": False}),
    ("all_la", 1, 130, {"H": 3, "kv": 3, "D": 128, "fa": [[], []]}),
    ("neg_eigval_short_scale", 1, 130, {
        "H": 6, "kv": 2, "D": 64, "fa": [[0], [1, 2, 5]], "la_allow_neg_eigval": True,
        "fa_logit_scale": {"type": "log_length", "a": 20}, "rms_norm_eps": 1e-3}),
    ("headwise_post_norm", 2, 37, {
        "H": 6, "kv": 2, "D": 64, "fa": [[2, 3], [0, 1, 2, 3, 4, 5]], "fa_gate": "headwise",
        "fa_gate_position": "post_norm", "la_output_gate": "sigmoid", "hidden_size": 48}),
    ("headwise_no_norm", 1, 70, {
        "H": 4, "kv": 4, "D": 64, "fa": [[1], [0, 3]], "fa_gate": "headwise", "fusion_norm": None}),
    ("elementwise_post_norm", 1, 70, {
        "H": 4, "kv": 2, "D": 128, "fa": [[3], [0, 1]], "fa_gate_position": "post_norm",
        "fusion_norm": "rms_no_weight", "tie_word_embeddings": True}),
    ("no_conv_no_rope", 1, 70, {
        "H": 4, "kv": 2, "D": 64, "fa": [[0], [], [1, 2]], "la_conv_kernel": 0, "la_rope": False,
        "la_output_gate": None}),
    ("no_conv_rope_no_qk_norm", 1, 70, {
        "H": 3, "kv": 1, "D": 64, "fa": [[2], [0]], "la_conv_kernel": 0, "la_qk_norm": False,
        "fa_qk_norm": False, "rope_theta": 500.0}),
    ("keep_all", 1, 37, {
        "H": 6, "kv": 3, "D": 64, "fa": [[5], [0, 4]], "fa_kv": "keep_all", "fa_rope": True,
        "la_qk_norm": False, "hidden_size": 48}),
    ("mha_own", 1, 37, {
        "H": 6, "kv": 2, "D": 64, "fa": [[0, 1, 4], [5]], "fa_kv": "mha_own", "fa_gate": None,
        "fa_qk_norm": False, "tie_word_embeddings": True}),
    ("head_dim_32", 1, 70, {
        "H": 8, "kv": 4, "D": 32, "fa": [[0, 6, 7], [3]], "fusion_scale": False}),
]
# fmt: on
RANDOM_SEEDS = (901, 902, 903, 904)

# Where stride is above 1 only out[..., ::stride] and state[..., ::stride, ::stride] are stored.
OPERATORS = [
    {"name": "dk64_dv96_h3", "B": 1, "T": 33, "Hl": 3, "Dk": 64, "Dv": 96, "stride": 1},
    {"name": "dk64_dv96_h7", "B": 1, "T": 65, "Hl": 7, "Dk": 64, "Dv": 96, "stride": 5},
    {"name": "dk32_dv16_h7", "B": 1, "T": 65, "Hl": 7, "Dk": 32, "Dv": 16, "stride": 1},
    {"name": "dk32_dv16_h3_b2", "B": 2, "T": 33, "Hl": 3, "Dk": 32, "Dv": 16, "stride": 1},
]


def base_config(changes):
    """Returns a config.json dict; keys of the table that are left to their default are absent."""
    changes = dict(changes)
    fa = changes.pop("fa")
    config = {
        "model_type": "hydrahead", "architectures": ["HydraHeadForCausalLM"],
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": len(fa),
        "num_attention_heads": changes.pop("H"), "num_key_value_heads": changes.pop("kv"),
        "head_dim": changes.pop("D"), "rms_norm_eps": 1e-6, "vocab_size": VOCAB,
        "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": False,
        "max_position_embeddings": 512, "hidden_act": "silu", "attention_bias": False,
        "torch_dtype": "float32", "full_attention_heads": fa,
        # Their default depends on the base model, so these two are always written out.
        "la_qk_norm": True, "fa_qk_norm": True,
    }  # fmt: skip
    config.update(changes)
    return config


def random_model(seed):
    """Returns a MODELS row with every choice drawn from the seed."""
    rng = np.random.RandomState(seed)

    def pick(values):
        return values[rng.randint(len(values))]

    H, kv = pick([(4, 4), (6, 3), (6, 2)])
    changes = {"H": H, "kv": kv, "D": pick([64, 128])}
    changes["fa"] = [[h for h in range(H) if rng.rand() < 0.4] for _ in range(2)]
    changes.update({key: pick(values) for key, values in OPTIONS.items()})
    changes["fa_logit_scale"] = pick([{"type": "log_length", "a": 50}, None])
    changes["tie_word_embeddings"] = pick([False, True])
    return f"random_{seed}", pick([1, 2]), pick([37, 70]), changes


def build_cases():
    """Returns the document of fixtures.json."""
    models = []
    for seed, row in enumerate([*MODELS, *map(random_model, RANDOM_SEEDS)], start=100):
        name, batch, length, changes = row
        config = base_config(changes)
        tokens = make_tokens(config, seed, batch, length).tolist()
        models.append({"name": name, "seed": seed, "config": config, "tokens": tokens})
    operators = [
        {**case, "seed": 700 + i, "neg_eigval": i % 2 == 1} for i, case in enumerate(OPERATORS)
    ]
    return {"models": models, "operators": operators}


def uncovered(models):
    """Returns the option values that no model uses, as text."""
    configs = [complete_config(m["config"]) for m in models]
    options = {**OPTIONS, "tie_word_embeddings": (False, True), "head_dim": (32, 64, 128)}
    gaps = [f"{k}={v}" for k, values in options.items() for v in values
            if v not in [c[k] for c in configs]]  # fmt: skip
    groups = {c["num_attention_heads"] // c["num_key_value_heads"] for c in configs}
    gaps += [f"group={n}" for n in {1, 2, 3} - groups]
    return gaps


def model_logits(case):
    """Returns float64 logits [B, T, V] of one model case."""
    import torch

    from .torch_hydrahead import forward

    weights = make_weights(case["config"], case["seed"])
    weights = {name: torch.from_numpy(x) for name, x in weights.items()}
    return forward(case["config"], weights, torch.tensor(case["tokens"])).numpy()


def operator_results(case):
    """Returns float64 out [B, T, Hl, Dv] and state [B, Hl, Dv, Dk], thinned by stride."""
    import torch

    from .torch_hydrahead import gated_delta_rule

    inputs = {n: torch.from_numpy(x).double() for n, x in make_operator_inputs(case).items()}
    out, state = gated_delta_rule(**inputs)
    stride = case["stride"]
    return out[..., ::stride].numpy(), state[..., ::stride, ::stride].numpy()


def compute(cases):
    """Returns {array name: float64 array} of every case."""
    arrays = {f"logits/{case['name']}": model_logits(case) for case in cases["models"]}
    for case in cases["operators"]:
        out, state = operator_results(case)
        arrays[f"out/{case['name']}"], arrays[f"state/{case['name']}"] = out, state
    return arrays


def write(folder, cases, arrays):
    """Writes both fixture files, one model or operator a line in the JSON."""
    parts = []
    for key, rows in cases.items():
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        parts.append(f'"{key}": [\n{lines}\n]')
    (folder / "fixtures.json").write_text("{" + ",\n".join(parts) + "}\n")
    stored = {name: x.astype(np.float32) for name, x in arrays.items()}
    np.savez_compressed(folder / "fixtures.npz", **stored)


def check(folder, cases, arrays):
    """Prints the largest difference of each array; returns False if any is above TOLERANCE."""
    ok = json.loads((folder / "fixtures.json").read_text()) == cases
    if not ok:
        print("fixtures.json differs from the cases in make_fixtures.py")
    with np.load(folder / "fixtures.npz") as stored:
        for name in sorted({*stored.files, *arrays}):
            if name not in stored.files or name not in arrays:
                print(f"{name}: only in {'the file' if name in stored.files else 'the cases'}")
                ok = False
                continue
            found, expected = stored[name], arrays[name]
            same = found.shape == expected.shape
            error = np.abs(found - expected).max() if same else np.inf
            print(f"{name:40} {found.shape!s:20} {error:.1e}")
            ok = ok and bool(error <= TOLERANCE)  # a NaN fails
    return ok


def main(argv=None):
    parser = argparse.ArgumentParser(description="Write the golden fixtures, or check them.")
    parser.add_argument("--check", action="store_true", help="recompute and compare, write nothing")
    args = parser.parse_args(argv)
    try:
        import torch
    except ImportError:
        print("torch is missing; type: pip install -e '.[golden]'", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    cases = build_cases()
    gaps = uncovered(cases["models"])
    if gaps:
        print(f"no model covers: {', '.join(gaps)}", file=sys.stderr)
        return 1
    missing = [f for f in ("fixtures.json", "fixtures.npz") if not (HERE / f).exists()]
    if args.check and missing:
        print(f"{' and '.join(missing)} missing; run without --check to write", file=sys.stderr)
        return 1
    arrays = compute(cases)
    if args.check:
        ok = check(HERE, cases, arrays)
        print("fixtures match" if ok else f"fixtures differ by more than {TOLERANCE}")
        return 0 if ok else 1
    write(HERE, cases, arrays)
    size = sum((HERE / f"fixtures.{kind}").stat().st_size for kind in ("json", "npz"))
    print(f"{len(arrays)} arrays, {size / 1000:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
