"""From the base model to an initialised HydraHead model (definition section 4, "migrate")."""

import math

import torch
from torch import Tensor

from .model import Student, Teacher, attention_shapes, layer_heads

HYDRA_KEYS = {
    "model_type": "hydrahead", "architectures": ["HydraHeadForCausalLM"],
    "fa_kv": "gqa_shared", "fa_rope": False, "fa_logit_scale": {"type": "log_length", "a": 500},
    "fa_gate": "elementwise", "fa_gate_position": "pre_norm", "la_conv_kernel": 4, "la_rope": True,
    "la_qk_norm": False, "fa_qk_norm": False, "la_output_gate": "silu",
    "la_allow_neg_eigval": False, "fusion_norm": "rms", "fusion_scale": True,
}  # fmt: skip
# SiLU is 1 here: a new LA gate starts open instead of shut.
SILU_ONE = 1.2784645
NOISE = 0.002
SILENT = 1e-5  # an RMS below which a head is not scaled up further


def student_config(base: dict, heads: list[list[int]], fusion_norm: str | None = "rms") -> dict:
    """The student's config.json; heads holds the FA heads of each layer."""
    if len(heads) != base["num_hidden_layers"]:
        raise ValueError(f"{len(heads)} lists of heads for {base['num_hidden_layers']} layers")
    config = {k: v for k, v in base.items() if k not in ("model_type", "architectures")}
    config |= HYDRA_KEYS | {"fusion_norm": fusion_norm}
    return config | {"full_attention_heads": [sorted(set(h)) for h in heads]}


@torch.no_grad()
def calibrate(teacher: Teacher, tokens: Tensor) -> list[dict[str, Tensor]]:
    """Per layer on calibration text [B, T]: RMS of every head's output [H], and the vector w [E]
    with w . h nearest to 1 over the layer's normed inputs h, by ridge regression."""
    from .blocks import rms_norm

    out, x = [], teacher.start(tokens)
    for i in range(teacher.layers):
        heads = teacher.heads(i, x).float()
        h = rms_norm(x, teacher.norms[i], teacher.eps).flatten(0, 1).double()
        second, mean = h.mT @ h / len(h), h.mean(0)
        ridge = 0.01 * second.diagonal().mean() * torch.eye(len(mean), device=h.device)
        constant = torch.linalg.solve(second + ridge.double(), mean)
        rms = heads.square().mean((0, 1, 3)).sqrt()
        out.append({"rms": rms.cpu(), "constant": constant.float().cpu()})
        x = teacher.layer(i, x)
    return out


def migrate(
    base: dict[str, Tensor], config: dict, statistics: list[dict[str, Tensor]] | None, seed: int
) -> dict[str, Tensor]:
    """The student's tensors in float32 on the CPU, the same for the same arguments.

    Args:
        statistics: From calibrate: gamma starts at the RMS of the head and LA gates at 1;
            None: gamma 1 and LA gates near 0. Without the fusion norm see initial_weights.
    """
    draw = torch.Generator("cpu").manual_seed(seed)
    out = {n: t.clone() for n, t in base.items() if ".self_attn." not in n}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}.self_attn."
        new = _layer(base, p, config, i, statistics[i] if statistics else None, draw)
        out |= {p + n: t for n, t in new.items()}
    return out


@torch.no_grad()
def initial_weights(
    base: dict[str, Tensor], config: dict, teacher: Teacher, tokens: Tensor, seed: int
) -> dict[str, Tensor]:
    """What training starts from: the student's tensors, calibrated on tokens [B, T].

    Every head starts at the scale of the teacher's. The fusion norm makes that gamma = RMS of the
    teacher's head; without it gamma is that over the RMS of the new head on the same inputs.
    """
    statistics = calibrate(teacher, tokens)
    out = migrate(base, config, statistics, seed)
    if config["fusion_norm"] is not None:
        return out
    on_device = {n: t.to(tokens.device) for n, t in out.items()}
    student, x = Student(config, on_device, teacher.dtype, False), teacher.start(tokens)
    for i in range(teacher.layers):
        raw = student.heads(i, x).float().square().mean((0, 1, 3)).sqrt().cpu()
        gamma = statistics[i]["rms"] / raw.clamp(min=SILENT)
        out[f"model.layers.{i}.self_attn.head_scale"] = gamma
        x = teacher.layer(i, x)
    return out


def _layer(base, prefix, config, i, statistics, draw) -> dict[str, Tensor]:
    """The tensors below self_attn of one layer."""
    D, shapes = config["head_dim"], attention_shapes(config, i)
    fa, la, kv = layer_heads(config, i)
    group = config["num_attention_heads"] // config["num_key_value_heads"]

    def rows(name, heads):
        w = base[f"{prefix}{name}_proj.weight"]
        return w.view(-1, D, w.shape[1])[heads].flatten(0, 1).clone()

    out = {"o_proj.weight": base[f"{prefix}o_proj.weight"].clone()}
    if fa:
        out |= {"fa.q_proj.weight": rows("q", fa)}
        out |= {f"fa.{n}_proj.weight": rows(n, kv) for n in "kv"}
    if la:
        own = [h // group for h in la]
        out |= {"la.q_proj.weight": rows("q", la)}
        out |= {f"la.{n}_proj.weight": rows(n, own) for n in "kv"}
        out["la.A_log"] = torch.rand(len(la), generator=draw).mul(16).clamp(min=0.01).log()
        low, high = math.log(1e-3), math.log(0.1)
        dt = (low + (high - low) * torch.rand(len(la), generator=draw)).exp()
        out["la.dt_bias"] = dt + torch.log(-torch.expm1(-dt))  # softplus of it is dt
    for name, shape in shapes.items():
        if name in out:
            continue
        if name.endswith(("norm.weight", "gate_proj.bias", "head_scale")):
            out[name] = torch.ones(shape)
        elif name.endswith("conv1d.weight"):
            out[name] = torch.zeros(shape)
            out[name][..., -1] = 1.0
        else:  # gates, a and b
            out[name] = NOISE * torch.randn(shape, generator=draw)
    if statistics:
        out["head_scale"] = statistics["rms"].clone()
        if la:
            out["la.gate_proj.weight"] += SILU_ONE * statistics["constant"]
    return {n: out[n] for n in shapes}
