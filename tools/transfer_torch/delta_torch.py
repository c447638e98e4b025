"""The gated delta rule for training in plain PyTorch: forward and hand-written backward.

    S_t = alpha_t S_{t-1} + beta_t k_t (v_t - alpha_t S_{t-1}^T k_t)^T,   o_t = S_t^T q_t

S is [Dk, Dv] here, the transpose of the checkpoint's convention, so that tokens are rows all over.
Inside a chunk of C tokens, with G the running sum of g, gl its last value, e = exp(G),
f = exp(gl - G), D[i, j] = exp(G_i - G_j) for j <= i and A[i, j] = beta_i D[i, j] (k_i . k_j) for
j < i:

    R = (I + A)^-1,   X = beta (V - e (K S)),   P = R X          the values really written
    M = D * (Q K^T),  O = e (Q S) + M P,        S' = exp(gl) S + (f K)^T P

Backward, from dO and dS' (both known when the chunks are walked from the last to the first):

    dP = M^T dO + f (K dS'),   dX = R^T dP,   dA = -dX P^T (below),   dM = dO P^T (up to)
    dS = exp(gl) dS' + (e Q)^T dO - (e K)^T (beta dX)
    dV = beta dX,   dQ = e (dO S^T) + (dM * D) K
    dK = (dM * D)^T Q + f (P dS'^T) - e (dV S^T) + N K + N^T K,   N = beta (dA * D)
    dbeta = (dX . P) / beta
    dG = Q . dQ + K . (N K - e (dV S^T)) - K . (f (P dS'^T) + (dM * D)^T Q + N^T K)
    dgl = K . f (P dS'^T), summed over the chunk, + exp(gl) <S, dS>

dbeta is a sum over a row and follows from (I + A) P = X; dg is dG summed from the chunk's end,
plus dgl. (dG = dO . O - dV . V is shorter, but then terms that cancel are rounded apart: half
the digits of dg went in bfloat16.) Every decay is an exponential of a difference of running sums,
so g must be finite, which training's always is.
"""

import torch
from torch import Tensor

CHUNK = 64


def naive_delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """One token after the other, for tests. q, k, v: [B, T, H, D]; g, beta: [B, T, H]."""
    S = q.new_zeros(*q.shape[:1], q.shape[2], q.shape[3], v.shape[3])
    out = []
    for t in range(q.shape[1]):
        S = S * g[:, t, :, None, None].exp()
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", S, k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        out.append(torch.einsum("bhkv,bhk->bhv", S, q[:, t]))
    return torch.stack(out, 1)


def merge_masks(C: int, device: torch.device) -> list[Tensor]:
    """Masks [C, C] of the lower-left blocks that joining b-row blocks fills, b = 1, 2, 4, ..."""
    i = torch.arange(C, device=device)
    i, j, masks, b = i[:, None], i[None], [], 1
    while b < C:
        masks.append((i // (2 * b) == j // (2 * b)) & (i // b % 2 == 1) & (j // b % 2 == 0))
        b *= 2
    return masks


def unit_lower_inverse(A: Tensor) -> Tensor:
    """(I + A)^-1 of strictly lower triangular A [..., C, C], C a power of two.

    Blocks of 1, 2, 4, ... rows are joined by R <- R - R M R. Neumann doubling would take fewer
    products and loses all digits on repeated keys.
    """
    C = A.shape[-1]
    R = torch.eye(C, dtype=A.dtype, device=A.device).expand(A.shape)
    for level, mask in enumerate(merge_masks(C, A.device)):
        M = A.masked_fill(~mask, 0)
        R = R - M if level == 0 else R - R @ M @ R
    return R


def _split(x: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] to [B, H, T / C, C, ...]"""
    B, T, H = x.shape[:3]
    return x.to(dtype).reshape(B, T // C, C, H, *x.shape[3:]).movedim(3, 1)


def _join(x: Tensor) -> Tensor:
    """The inverse of _split."""
    x = x.movedim(1, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _chunk_terms(k, g, beta):
    """e, f, D, exp(gl) and A of every chunk. k [.., C, Dk]; g and beta [.., C]"""
    C = g.shape[-1]
    G = g.cumsum(-1)
    causal = torch.ones(C, C, dtype=torch.bool, device=g.device).tril()
    # Above the diagonal exp would overflow; -inf there gives 0 and no gradient is taken.
    D = (G[..., :, None] - G[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    A = (beta[..., None] * D * (k @ k.mT)).tril(-1)
    last = G[..., -1:]
    return G.exp()[..., None], (last - G).exp()[..., None], D, last.exp()[..., None], A


def chunk_forward(q, k, v, g, beta, chunk=CHUNK):
    """Returns o [B, T, H, Dv], the states at chunk starts [B, H, N, Dk, Dv] and R [B, H, N, C, C].

    T must be a multiple of the chunk. Runs in float64 if q is, else in float32.
    """
    C = _check(q, chunk)
    dtype = torch.promote_types(q.dtype, torch.float32)
    qc, kc, vc, gc, bc = (_split(x, C, dtype) for x in (q, k, v, g, beta))
    e, f, D, last, A = _chunk_terms(kc, gc, bc)
    R, M, bc = unit_lower_inverse(A), D * (qc @ kc.mT), bc[..., None]
    S, states, written = q.new_zeros(*qc.shape[:2], q.shape[-1], v.shape[-1], dtype=dtype), [], []
    for n in range(qc.shape[2]):
        states.append(S)
        P = R[:, :, n] @ (bc[:, :, n] * (vc[:, :, n] - e[:, :, n] * (kc[:, :, n] @ S)))
        S = last[:, :, n] * S + (f[:, :, n] * kc[:, :, n]).mT @ P
        written.append(P)
    states = torch.stack(states, 2)
    o = e * (qc @ states) + M @ torch.stack(written, 2)
    return _join(o).to(v.dtype), states, R


def chunk_backward(q, k, v, g, beta, states, R, do, chunk=CHUNK):
    """Returns dq, dk, dv, dg, dbeta, with the tensors of chunk_forward and dO."""
    C = _check(q, chunk)
    dtype = torch.promote_types(q.dtype, torch.float32)
    qc, kc, vc, gc, bc, doc = (_split(x, C, dtype) for x in (q, k, v, g, beta, do))
    S, R = states.to(dtype), R.to(dtype)
    e, f, D, last, _ = _chunk_terms(kc, gc, bc)
    M, b = D * (qc @ kc.mT), bc[..., None]
    P = R @ (b * (vc - e * (kc @ S)))
    W, dP0 = R @ (b * e * kc), M.mT @ doc
    # The walk back: dX = R^T dP and beta e K stand in W, so that only dS' is carried.
    dS, after = torch.zeros_like(S[:, :, 0]), []
    for n in reversed(range(qc.shape[2])):
        after.append(dS)
        dP = dP0[:, :, n] + f[:, :, n] * (kc[:, :, n] @ dS)
        dS = last[:, :, n] * dS + (e[:, :, n] * qc[:, :, n]).mT @ doc[:, :, n]
        dS = dS - W[:, :, n].mT @ dP
    dS1 = torch.stack(after[::-1], 2)
    dP = dP0 + f * (kc @ dS1)
    dX = R.mT @ dP
    dv = b * dX
    dMD = doc @ P.mT * D
    N = -b * ((dX @ P.mT) * D).tril(-1)
    dq = e * (doc @ S.mT) + dMD @ kc
    PdS = f * (P @ dS1.mT)
    row, column = N @ kc - e * (dv @ S.mT), PdS + dMD.mT @ qc + N.mT @ kc
    dk = row + column
    dbeta = (dX * P).sum(-1) / bc.clamp(min=1e-20)
    dG = (qc * dq + kc * (row - column)).sum(-1)
    dG[..., -1] += (kc * PdS).sum((-1, -2)) + last[..., 0, 0] * (S * dS1).sum((-1, -2))
    dg = dG.flip(-1).cumsum(-1).flip(-1)
    grads = (_join(x) for x in (dq, dk, dv, dg, dbeta))
    return tuple(x.to(y.dtype) for x, y in zip(grads, (q, k, v, g, beta), strict=True))


class ChunkDelta(torch.autograd.Function):
    """chunk_forward with chunk_backward as its gradient."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, chunk):
        o, states, R = chunk_forward(q, k, v, g, beta, chunk)
        ctx.save_for_backward(q, k, v, g, beta, states, R)
        ctx.chunk = chunk
        return o

    @staticmethod
    def backward(ctx, do):
        return *chunk_backward(*ctx.saved_tensors, do, ctx.chunk), None


def torch_delta_rule(q, k, v, g, beta, chunk=CHUNK):
    """o [B, T, H, Dv] of q, k, v [B, T, H, D], log decay g and beta [B, T, H]; differentiable."""
    return ChunkDelta.apply(q, k, v, g, beta, chunk)


def _check(q, chunk):
    if q.shape[1] % chunk or chunk & (chunk - 1):
        raise ValueError(f"{q.shape[1]} tokens are no multiple of the chunk, {chunk}, a power of 2")
    return chunk
