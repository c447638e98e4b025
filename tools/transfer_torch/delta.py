"""Which form of the gated delta rule training uses, and the check that decides it.

Triton on a GPU if its gradients agree with float64 PyTorch there, else the PyTorch form; Triton
3.4 to 3.7 is known to compile some chunked backward kernels wrongly for Hopper, so nothing is
taken on trust.
"""

import torch
from torch.nn import functional as F

from .delta_torch import CHUNK, naive_delta_rule, torch_delta_rule

BACKENDS = ("triton", "torch")
NAMES = ("o", "dq", "dk", "dv", "dg", "dbeta")
# Largest relative error (2-norm) that passes, with bfloat16 products over 1024 tokens.
TOLERANCE = 0.05
# Two warps keep Triton off the Hopper-only matrix instructions, should those be compiled wrongly.
TUNINGS = ((4, 8, 4, 32), (8, 8, 8, 64), (2, 2, 2, 32))
_backend = "torch"


def set_backend(name: str) -> None:
    """Chooses "triton" or "torch" for the calls that are traced from now on."""
    global _backend
    if name not in BACKENDS:
        raise ValueError(f"no delta rule called {name!r}; there are {BACKENDS}")
    _backend = name


def delta_rule(q, k, v, g, beta):
    """o [B, T, H, Dv] of q, k, v [B, T, H, D], log decay g and beta [B, T, H] in float32."""
    if _backend == "triton":
        from .delta_triton import triton_delta_rule

        return triton_delta_rule(q, k, v, g, beta, CHUNK)
    return torch_delta_rule(q, k, v, g, beta, CHUNK)


def check_inputs(B: int, T: int, H: int, D: int, device: str, alike: float = 0.5) -> list:
    """q, k, v, g, beta as training has them: unit keys with a common part, mixed decays."""
    draw = torch.Generator("cpu").manual_seed(0)
    unit = torch.randn(2, B, T, H, D, generator=draw)
    unit = F.normalize(F.normalize(unit, dim=-1) + alike * F.normalize(unit[:, :, :1], dim=-1))
    q, k = F.normalize(unit, dim=-1)
    v = torch.randn(B, T, H, D, generator=draw)
    rate = torch.rand(H, generator=draw).mul(-7).exp()  # 1 to 0.001, one per head
    g, beta = -torch.rand(B, T, H, generator=draw) * rate, torch.rand(B, T, H, generator=draw)
    wide = [(x.to(device, torch.bfloat16)).requires_grad_() for x in (q / D**0.5, k, v)]
    return wide + [x.to(device).requires_grad_() for x in (g, beta)]


def relative_errors(rule, inputs: list, reference) -> dict[str, float]:
    """|got - wanted| / |wanted| of the output and every gradient; wanted in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted, got = reference(*exact), rule(*inputs)
    do = torch.randn(got.shape, generator=torch.Generator("cpu").manual_seed(1)).to(got)
    wanted = [wanted, *torch.autograd.grad(wanted, exact, do.double())]
    got = [got, *torch.autograd.grad(got, inputs, do)]
    pairs = zip(NAMES, got, wanted, strict=True)
    return {n: ((a.double() - b).norm() / b.norm()).item() for n, a, b in pairs}


def choose_backend(device: str, say=print, tuning: tuple = TUNINGS[0]) -> str:
    """Sets and returns the fastest form that is right on this device; says what it found.

    Args:
        tuning: What to try first: the values of delta_triton.TUNING.
    """
    if not device.startswith("cuda"):
        set_backend("torch")
        return "torch"
    from . import delta_triton

    # The PyTorch form is itself held to the plain recurrence, on a short text.
    inputs = check_inputs(1, 128, 2, 64, device)
    say("check torch  " + _line(relative_errors(torch_delta_rule, inputs, naive_delta_rule)))
    inputs = check_inputs(2, 1024, 7, 64, device)
    for choice in dict.fromkeys([tuning, *TUNINGS]):
        delta_triton.TUNING.update(zip(delta_triton.TUNING, choice, strict=True))
        name = f"check triton {','.join(map(str, choice))}:"
        try:
            errors = relative_errors(delta_triton.triton_delta_rule, inputs, torch_delta_rule)
        except Exception as error:  # a compiler that fails is as bad as one that errs
            say(f"{name} {type(error).__name__}: {str(error)[:300]}")
            continue
        good = all(e < TOLERANCE for e in errors.values())
        say(f"{name} {_line(errors)} {'good' if good else 'WRONG'}")
        if good:
            set_backend("triton")
            return "triton"
    say("WARNING: the Triton kernels are WRONG on this device: training with PyTorch, slower")
    set_backend("torch")
    return "torch"


def _line(errors: dict[str, float]) -> str:
    return " ".join(f"{n} {e:.1e}" for n, e in errors.items())
