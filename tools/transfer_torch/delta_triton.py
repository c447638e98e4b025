"""The gated delta rule of delta_torch.py as Triton kernels, a literal translation.

Three kernels forward (inside a chunk; the walk over chunks; outputs) and three backward (dP0; the
walk back; all gradients). Letters as in delta_torch.py, where the formulas are; W = R (beta e K)
and U = R (beta V), so that P = U - W S. Products take bfloat16 and sum in float32, the inverse
takes TF32; gates and the carried state are float32.

Shapes: q, k, v, o, W, P, dP [B, T, H, D]; g, beta [B, T, H] float32; R [B, N, H, C, C];
states [B, N, H, D, D]; T = N C. All contiguous. D and C are powers of two from 16 on.
"""

import os

import torch
import triton
import triton.language as tl

from .delta_torch import CHUNK

# Few long rows narrow the columns of S in one walk until there are so many programs.
PROGRAMS, FEWEST_COLUMNS = 96, 16
# Warps of the kernels over chunks, of the last kernel and of the two walks; columns of S in one
# walk. Compiled for sm_90 by Triton 3.6, the last spills registers at 4 warps and not at 8.
TUNING = {"warps": 4, "gradient_warps": 8, "walk_warps": 4, "columns": 32}
# The interpreter multiplies bfloat16 as if it were integers: there, round and use float32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b, DT: tl.constexpr):
    a, b = a.to(DT), b.to(DT)
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32")


@triton.jit
def _decays(g_ptr, gate, C: tl.constexpr):
    """e, f, D and exp(gl) of a chunk whose gates stand at the offsets `gate`."""
    i = tl.arange(0, C)
    G = tl.cumsum(tl.load(g_ptr + gate).to(tl.float32), 0)
    last = tl.sum(tl.where(i == C - 1, G, 0.0), 0)
    D = tl.exp(tl.where(i[:, None] >= i[None, :], G[:, None] - G[None, :], float("-inf")))
    return tl.exp(G), tl.exp(last - G), D, tl.exp(last)


@triton.jit
def _place(pid, H, C: tl.constexpr, D: tl.constexpr):
    """Where one chunk of one head lies: first token and gate, first tile [., .] in units of one
    tile (64 bits), and the offsets from there of tokens [C, D] and gates [C] (32 bits)."""
    chunk, h = (pid // H).to(tl.int64), pid % H
    rows = tl.arange(0, C) * H
    return chunk * C * H + h, chunk * H + h, rows[:, None] * D + tl.arange(0, D)[None, :], rows


@triton.jit
def _tile(N: tl.constexpr, M: tl.constexpr):
    """Offsets of an [N, M] tile."""
    return tl.arange(0, N)[:, None] * M + tl.arange(0, M)[None, :]


@triton.jit
def _inside_kernel(k, v, g, beta, R_out, W_out, U_out, H, C: tl.constexpr, D: tl.constexpr,
                   LEVELS: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    """R, W and U of one chunk."""
    first, tile, tokens, gate = _place(tl.program_id(0), H, C, D)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    e, _, decay, _ = _decays(g + first, gate, C)
    b = tl.load(beta + first + gate).to(tl.float32)
    K = tl.load(k + first * D + tokens)
    A = tl.where(i > j, b[:, None] * decay * _dot(K, tl.trans(K), DT), 0.0)
    joined = (i // 2 == j // 2) & (i % 2 == 1) & (j % 2 == 0)
    R = tl.where(i == j, 1.0, 0.0) - tl.where(joined, A, 0.0)
    for level in tl.static_range(1, LEVELS):
        w = 1 << level
        joined = (i // (2 * w) == j // (2 * w)) & (i // w % 2 == 1) & (j // w % 2 == 0)
        M = tl.where(joined, A, 0.0)
        R -= tl.dot(tl.dot(R, M, input_precision="tf32"), R, input_precision="tf32")
    W = _dot(R, (b * e)[:, None] * K.to(tl.float32), DT)
    U = _dot(R, b[:, None] * tl.load(v + first * D + tokens).to(tl.float32), DT)
    tl.store(R_out + tile * C * C + _tile(C, C), R.to(R_out.dtype.element_ty))
    tl.store(W_out + first * D + tokens, W.to(W_out.dtype.element_ty))
    tl.store(U_out + first * D + tokens, U.to(U_out.dtype.element_ty))


@triton.jit
def _walk_kernel(k, g, W_in, UP, S_out, N, H, C: tl.constexpr, D: tl.constexpr,
                 BV: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    """States at chunk starts, BV columns of one head; U becomes P in place."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    cols = tl.program_id(1) * BV + tl.arange(0, BV)
    i, d = tl.arange(0, C), tl.arange(0, D)
    S = tl.zeros((D, BV), tl.float32)
    for n in range(0, N):
        first, tile, tokens, gate = _place((b * N + n) * H + h, H, C, D)
        part = gate[:, None] * D + cols[None, :]
        at = d[:, None] * D + cols[None, :]
        tl.store(S_out + tile * D * D + at, S.to(S_out.dtype.element_ty))
        G = tl.cumsum(tl.load(g + first + gate).to(tl.float32), 0)
        last = tl.sum(tl.where(i == C - 1, G, 0.0), 0)
        P = tl.load(UP + first * D + part).to(tl.float32)
        P -= _dot(tl.load(W_in + first * D + tokens), S, DT)
        tl.store(UP + first * D + part, P.to(UP.dtype.element_ty))
        fK = tl.exp(last - G)[:, None] * tl.load(k + first * D + tokens).to(tl.float32)
        S = tl.exp(last) * S + _dot(tl.trans(fK), P, DT)


@triton.jit
def _output_kernel(q, k, g, P_in, S_in, o, H, C: tl.constexpr, D: tl.constexpr,
                   DT: tl.constexpr):  # fmt: skip
    """O = e (Q S) + M P of one chunk."""
    first, tile, tokens, gate = _place(tl.program_id(0), H, C, D)
    e, _, decay, _ = _decays(g + first, gate, C)
    Q = tl.load(q + first * D + tokens)
    M = decay * _dot(Q, tl.trans(tl.load(k + first * D + tokens)), DT)
    out = e[:, None] * _dot(Q, tl.load(S_in + tile * D * D + _tile(D, D)), DT)
    out += _dot(M, tl.load(P_in + first * D + tokens), DT)
    tl.store(o + first * D + tokens, out.to(o.dtype.element_ty))


@triton.jit
def _inside_back_kernel(q, k, g, do, dP_out, H, C: tl.constexpr, D: tl.constexpr,
                        DT: tl.constexpr):  # fmt: skip
    """dP0 = M^T dO of one chunk."""
    first, tile, tokens, gate = _place(tl.program_id(0), H, C, D)
    _, _, decay, _ = _decays(g + first, gate, C)
    M = decay * _dot(tl.load(q + first * D + tokens), tl.trans(tl.load(k + first * D + tokens)), DT)
    dP = _dot(tl.trans(M), tl.load(do + first * D + tokens), DT)
    tl.store(dP_out + first * D + tokens, dP.to(dP_out.dtype.element_ty))


@triton.jit
def _walk_back_kernel(q, k, g, do, W_in, dP, dS_out, N, H, C: tl.constexpr, D: tl.constexpr,
                      BV: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    """dS' of every chunk, BV columns of one head; dP0 becomes dP in place."""
    b, h = tl.program_id(0) // H, tl.program_id(0) % H
    cols = tl.program_id(1) * BV + tl.arange(0, BV)
    i, d = tl.arange(0, C), tl.arange(0, D)
    dS = tl.zeros((D, BV), tl.float32)
    for m in range(0, N):
        n = N - 1 - m
        first, tile, tokens, gate = _place((b * N + n) * H + h, H, C, D)
        part = gate[:, None] * D + cols[None, :]
        at = d[:, None] * D + cols[None, :]
        tl.store(dS_out + tile * D * D + at, dS.to(dS_out.dtype.element_ty))
        G = tl.cumsum(tl.load(g + first + gate).to(tl.float32), 0)
        last = tl.sum(tl.where(i == C - 1, G, 0.0), 0)
        KdS = tl.exp(last - G)[:, None] * _dot(tl.load(k + first * D + tokens), dS, DT)
        dP_new = tl.load(dP + first * D + part).to(tl.float32) + KdS
        tl.store(dP + first * D + part, dP_new.to(dP.dtype.element_ty))
        eQ = tl.exp(G)[:, None] * tl.load(q + first * D + tokens).to(tl.float32)
        dS = tl.exp(last) * dS + _dot(tl.trans(eQ), tl.load(do + first * D + part), DT)
        dS -= _dot(tl.trans(tl.load(W_in + first * D + tokens)), dP_new, DT)


@triton.jit
def _gradient_kernel(q, k, g, beta, do, S_in, R_in, P_in, dP, dS_in, dq, dk, dv, dg, dbeta,
                     H, C: tl.constexpr, D: tl.constexpr, DT: tl.constexpr):  # fmt: skip
    """dQ, dK, dV, dg and dbeta of one chunk."""
    first, tile, tokens, gate = _place(tl.program_id(0), H, C, D)
    i, j = tl.arange(0, C)[:, None], tl.arange(0, C)[None, :]
    e, f, decay, last = _decays(g + first, gate, C)
    b = tl.load(beta + first + gate).to(tl.float32)
    K, P = tl.load(k + first * D + tokens), tl.load(P_in + first * D + tokens)
    dX = _dot(
        tl.trans(tl.load(R_in + tile * C * C + _tile(C, C))), tl.load(dP + first * D + tokens), DT
    )
    tl.store(dbeta + first + gate, tl.sum(dX * P.to(tl.float32), 1) / tl.maximum(b, 1e-20))
    dV = b[:, None] * dX
    tl.store(dv + first * D + tokens, dV.to(dv.dtype.element_ty))
    N = tl.where(i > j, -b[:, None] * decay * _dot(dX, tl.trans(P), DT), 0.0)
    S, dS = tl.load(S_in + tile * D * D + _tile(D, D)), tl.load(dS_in + tile * D * D + _tile(D, D))
    row = _dot(N, K, DT) - e[:, None] * _dot(dV, tl.trans(S), DT)
    PdS = f[:, None] * _dot(P, tl.trans(dS), DT)
    Q, dO = tl.load(q + first * D + tokens), tl.load(do + first * D + tokens)
    dMD = decay * _dot(dO, tl.trans(P), DT)
    column = PdS + _dot(tl.trans(dMD), Q, DT) + _dot(tl.trans(N), K, DT)
    tl.store(dk + first * D + tokens, (row + column).to(dk.dtype.element_ty))
    dQ = e[:, None] * _dot(dO, tl.trans(S), DT) + _dot(dMD, K, DT)
    tl.store(dq + first * D + tokens, dQ.to(dq.dtype.element_ty))
    K = K.to(tl.float32)
    dG = tl.sum(Q.to(tl.float32) * dQ + K * (row - column), 1)
    kept = tl.sum(tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1), 0)
    dlast = last * kept + tl.sum(tl.sum(K * PdS, 1), 0)
    tl.store(dg + first + gate, dlast + tl.cumsum(dG, 0, reverse=True))


def _sizes(q, chunk):
    B, T, H, D = q.shape
    if T % chunk:
        raise ValueError(f"{T} tokens are no multiple of the chunk, {chunk}")
    DT = tl.bfloat16 if q.dtype == torch.bfloat16 else tl.float32
    columns = min(TUNING["columns"], D)
    while columns > FEWEST_COLUMNS and B * H * D // columns < PROGRAMS:
        columns //= 2
    return B, T // chunk, H, D, DT, columns


@torch.library.custom_op("hydra::delta_forward", mutates_args=())
def delta_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, C: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns o, states, R, W, P."""
    B, N, H, D, DT, BV = _sizes(q, C)
    q, k, v, g, beta = (x.contiguous() for x in (q, k, v, g, beta))
    R = q.new_empty(B, N, H, C, C)
    S = q.new_empty(B, N, H, D, D)
    W, P, o = torch.empty_like(k), torch.empty_like(v), torch.empty_like(v)
    grid, warps, walk = (B * N * H,), TUNING["warps"], TUNING["walk_warps"]
    levels = C.bit_length() - 1
    _inside_kernel[grid](k, v, g, beta, R, W, P, H, C, D, levels, DT, num_warps=warps)
    _walk_kernel[(B * H, D // BV)](k, g, W, P, S, N, H, C, D, BV, DT, num_warps=walk)
    _output_kernel[grid](q, k, g, P, S, o, H, C, D, DT, num_warps=warps)
    return o, S, R, W, P


@delta_forward.register_fake
def _(q, k, v, g, beta, C):
    B, T, H, D = q.shape
    S, R = q.new_empty(B, T // C, H, D, D), q.new_empty(B, T // C, H, C, C)
    o, W, P = (x.new_empty(x.shape) for x in (v, k, v))
    return o, S, R, W, P


@torch.library.custom_op("hydra::delta_backward", mutates_args=())
def delta_backward(
    q: torch.Tensor, k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, S: torch.Tensor,
    R: torch.Tensor, W: torch.Tensor, P: torch.Tensor, do: torch.Tensor, C: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns dq, dk, dv, dg, dbeta."""
    B, N, H, D, DT, BV = _sizes(q, C)
    q, k, g, beta, do = (x.contiguous() for x in (q, k, g, beta, do))
    dP, dS = torch.empty_like(P), torch.empty_like(S)
    dq, dk, dv, dg, db = (torch.empty_like(x) for x in (q, k, P, g, beta))
    grid, warps, walk = (B * N * H,), TUNING["warps"], TUNING["walk_warps"]
    _inside_back_kernel[grid](q, k, g, do, dP, H, C, D, DT, num_warps=warps)
    _walk_back_kernel[(B * H, D // BV)](q, k, g, do, W, dP, dS, N, H, C, D, BV, DT, num_warps=walk)
    _gradient_kernel[grid](
        q, k, g, beta, do, S, R, P, dP, dS, dq, dk, dv, dg, db, H, C, D, DT,
        num_warps=TUNING["gradient_warps"],
    )  # fmt: skip
    return dq, dk, dv, dg, db


@delta_backward.register_fake
def _(q, k, g, beta, S, R, W, P, do, C):
    return tuple(x.new_empty(x.shape) for x in (q, k, P, g, beta))


class TritonDelta(torch.autograd.Function):
    """delta_forward with delta_backward as its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, chunk):
        o, S, R, W, P = delta_forward(q, k, v, g, beta, chunk)
        ctx.save_for_backward(q, k, g, beta, S, R, W, P)
        ctx.chunk = chunk
        return o

    @staticmethod
    def backward(ctx, do):
        return *delta_backward(*ctx.saved_tensors, do, ctx.chunk), None


def triton_delta_rule(q, k, v, g, beta, chunk=CHUNK):
    """torch_delta_rule by these kernels: g and beta in float32."""
    return TritonDelta.apply(q, k, v, g, beta, chunk)
