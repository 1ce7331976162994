"""Log-probability of one chosen token per row, and the row's entropy, without storing a log-softmax.

    d_v = (x_v - m) / T,  m = max_v x_v;   s = sum_v exp d_v;   ls = log s;   p_v = exp(d_v - ls);   mu = sum_v p_v d_v
    logprob = min(0, d_y - ls)        entropy = ls - mu        (everything relative to m: lse itself loses the digits)
    dx_v = (g_l ([v = y] - p_v) + g_e p_v (mu - d_v)) / T      (0 * inf counts as 0: banned tokens have logits of -inf)

One read of the logits forward, one read and one write backward; no atomics. A program owns a row (backward: a block of
it). Blocks depend on V alone, lane j adds up its own column of them in order, and the lanes meet in a fixed tree: a
row's bits depend neither on other rows nor on strides and alignment, which decide the order inside a plain tl.sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tree_sum(x, STEPS: tl.constexpr):
    for _ in tl.static_range(STEPS):
        x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2]), 0)
    return tl.sum(x, 0)


@triton.jit
def _forward(
    X, Y, LOGPROB, ENTROPY, M, LS, MU, stride_b, stride_t, T, V, inv_t, ignore, BLOCK: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)  # int64: n * V passes 2**31 at 16k tokens of a 152k vocabulary
    y = tl.load(Y + n).to(tl.int64)
    m, logprob, entropy, ls, mu = 0.0, 0.0, 0.0, 0.0, 0.0
    if y != ignore:
        row = X + (n // T) * stride_b + (n % T) * stride_t
        m = float("-inf")
        s_lanes = tl.zeros([BLOCK], tl.float32)  # per lane: sum of exp d, d relative to the running maximum
        u_lanes = tl.zeros([BLOCK], tl.float32)  # per lane: sum of d exp d
        for start in range(0, V, BLOCK):
            v = start + tl.arange(0, BLOCK)
            x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, tl.max(x, 0))
            d = tl.where(x == float("-inf"), x, (x - m_new) * inv_t)  # -inf stays -inf even where m_new is -inf too
            shift = tl.where(m == float("-inf"), 0.0, (m - m_new) * inv_t)
            scale, e = tl.exp(shift), tl.exp(d)
            u_lanes = scale * (u_lanes + shift * s_lanes) + tl.where(d == float("-inf"), 0.0, d * e)
            s_lanes = scale * s_lanes + e
            m = m_new
        s = _tree_sum(s_lanes, STEPS)
        known = (y >= 0) & (y < V)  # any other target makes the whole row NaN: never a plausible number
        ls = tl.where(known, tl.log(s), float("nan"))
        mu = _tree_sum(u_lanes, STEPS) / s
        x_y = tl.load(row + y, mask=known, other=0.0).to(tl.float32)
        logprob = (x_y - m) * inv_t - ls
        logprob = tl.where(logprob > 0.0, 0.0, logprob)  # a GPU's log is approximate; tl.minimum may drop a NaN
        entropy = ls - mu
    tl.store(LOGPROB + n, logprob)
    tl.store(ENTROPY + n, entropy)
    tl.store(M + n, m)
    tl.store(LS + n, ls)
    tl.store(MU + n, mu)


@triton.jit
def _backward(
    G_LOGPROB, G_ENTROPY, X, Y, M, LS, MU, DX, stride_b, stride_t, T, V, inv_t, ignore, BLOCK: tl.constexpr
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(Y + n).to(tl.int64)
    dx = tl.zeros([BLOCK], tl.float32)
    if y != ignore:
        x = tl.load(X + (n // T) * stride_b + (n % T) * stride_t + v, mask=v < V, other=0.0).to(tl.float32)
        d = (x - tl.load(M + n)) * inv_t
        p = tl.exp(d - tl.load(LS + n))
        d = tl.where(d == float("-inf"), 0.0, d)
        hit = tl.where(v == y, 1.0, 0.0)
        dx = tl.load(G_LOGPROB + n) * (hit - p) + tl.load(G_ENTROPY + n) * p * (tl.load(MU + n) - d)
    tl.store(DX + n * V + v, dx * inv_t, mask=v < V)


def _block(V: int) -> int:
    return min(4096, max(128, triton.next_power_of_2(V)))


def _checked(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(B, R, V) logits with unit last stride, contiguous targets. Rows may be strided; only the last axis is copied."""
    if logits.ndim not in (2, 3) or targets.shape != logits.shape[:-1] or logits.shape[-1] == 0:
        raise ValueError(
            f"token_logprobs: logits {tuple(logits.shape)} must be (N, V) or (B, T, V) with V > 0, and targets "
            f"{tuple(targets.shape)} their leading shape"
        )
    if not temperature > 0:
        raise ValueError(f"token_logprobs: temperature must be greater than 0, got {temperature}")
    if logits.stride(-1) != 1:
        logits = logits.contiguous()
    return logits if logits.ndim == 3 else logits[None], targets.contiguous()


def forward(
    logits: Tensor, targets: Tensor, *, temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, entropy, m, ls, mu), each float32 of the targets' shape; the last three are for `backward`.

    Args:
        logits: (N, V) or (B, T, V), float16, bfloat16 or float32; leading strides are free.
        targets: int32 or int64. Rows where it is ignore_index are not read and give 0; another target outside [0, V)
            gives a row of NaN.
        temperature: greater than 0; divides the logits.
        ignore_index: the target of rows that do not count.
    """
    x, y = _checked(logits, targets, temperature)
    logprobs, entropy, m, ls, mu = (torch.empty(targets.shape, dtype=torch.float32, device=x.device) for _ in range(5))
    V, block = x.shape[-1], _block(x.shape[-1])
    if y.numel():
        with torch.cuda.device_of(x):
            _forward[(y.numel(),)](
                x, y, logprobs, entropy, m, ls, mu, x.stride(0), x.stride(1), x.shape[1], V, 1 / temperature,
                ignore_index, BLOCK=block, STEPS=block.bit_length() - 1, num_warps=8 if block > 1024 else 4
            )  # fmt: skip
    return logprobs, entropy, m, ls, mu


def backward(
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    targets: Tensor,
    m: Tensor,
    ls: Tensor,
    mu: Tensor,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Gradient of the logits: contiguous, of their shape and dtype. Arguments as in `forward`, which made m, ls, mu."""
    x, y = _checked(logits, targets, temperature)
    dx = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    V, block = x.shape[-1], _block(x.shape[-1])
    if y.numel():
        with torch.cuda.device_of(x):
            _backward[(y.numel(), triton.cdiv(V, block))](
                grad_logprobs.float().contiguous(), grad_entropy.float().contiguous(), x, y, m, ls, mu, dx, x.stride(0),
                x.stride(1), x.shape[1], V, 1 / temperature, ignore_index, BLOCK=block,
                num_warps=8 if block > 1024 else 4
            )  # fmt: skip
    return dx
