"""What cases of kernels/head.py share: how it is called, the truth in eager PyTorch, and how near they have to be.

The yardstick of an error is PyTorch's own in float32 on the same input: ours may be half as large again, and two units
in the last place of the largest number beside, since exp and log of NumPy and of PyTorch differ in theirs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import kernel_script
import torch
from torch import Tensor

STATISTICS = ("logprob", "entropy", "m", "ls", "mu", "z_y", "top", "p2")
DEAD = -100


def module() -> ModuleType:
    from rlhf_engine.kernels import head

    return head


def options(**changes: Any) -> list[Any]:
    """The arguments between targets and start: none of the tensors, and plain logits, but for the changes."""
    defaults = dict(
        bias=None, temperature=None, target_logits=None, logit_scale=1.0, softcap=0.0, inverse_temperature=1.0
    )  # fmt: skip
    assert changes.keys() <= defaults.keys()
    return list((defaults | changes).values())


def score(x: Tensor, y: Tensor, *, extras: bool = True, ignore_index: int = DEAD, **changes: Any) -> Tensor:
    parts = module().head_fold(x, y, *options(**changes), 0, ignore_index, extras)
    return module().head_combine(parts, y, 0, x.shape[-1], ignore_index)


def gradient(
    x: Tensor, y: Tensor, statistics: Tensor, grads: tuple, out: Tensor | None = None, start: int = 0, **changes: Any
) -> Tensor:
    out = torch.empty_like(x) if out is None else out
    module().head_gradient(x, y, statistics, *grads, *options(**changes), start, DEAD, out)
    return out


def truth(x: Tensor, y: Tensor, dtype: torch.dtype, **changes: Any) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """(statistics, leaf, d) in eager PyTorch; logprob and entropy are differentiable in the leaf, which are logits."""
    bias, temperature, exact, scale, cap, inverse = options(**changes)
    leaf = x.detach().to(dtype, copy=True)
    if exact is not None:
        leaf.scatter_(1, y[:, None], exact[:, None].to(dtype))
    leaf.requires_grad_()
    z = leaf if bias is None else leaf + bias.to(dtype)
    z = z * scale
    if cap:
        z = torch.where(z == -torch.inf, z, cap * torch.tanh(z / cap))
    z = z / (1 / inverse if temperature is None else temperature[:, None].to(dtype))
    m = z.detach().amax(-1)
    d = z - m[:, None]
    ls = d.exp().sum(-1).log()
    p = (d - ls[:, None]).exp()
    mu = (p * torch.where(d == -torch.inf, 0.0, d)).sum(-1)
    z_y = z.gather(1, y[:, None].long()).squeeze(1)
    statistics = (z_y - m) - ls, ls - mu, m, ls, mu, z_y, z.argmax(-1).to(dtype), p.square().sum(-1)
    return statistics, leaf, d


def close(what: str, ours: Tensor, exact: Tensor, float32: Tensor, largest: float = 1.0) -> None:
    """`largest`: that of the numbers on the way, where it is not the result."""
    finite = exact[exact.isfinite()].abs()
    largest = max(largest, finite.max().item()) if finite.numel() else largest
    kernel_script.check_close(what, ours, exact, float32, 2.0**-22 * largest, times=1.5)


def true_statistics(x: Tensor, y: Tensor, **changes: Any) -> list[Tensor]:
    """(8, R) in float64 and in float32."""
    found = (truth(x, y, dtype, **changes)[0] for dtype in (torch.float64, torch.float32))
    return [torch.stack(statistics).detach() for statistics in found]


def true_gradient(x: Tensor, y: Tensor, grads: tuple, **changes: Any) -> list[Tensor]:
    found = []
    for dtype in (torch.float64, torch.float32):
        (logprob, entropy, *_), leaf, d = truth(x, y, dtype, **changes)
        g_l, g_e = (torch.zeros(()) if g is None else g for g in grads)
        (dx,) = torch.autograd.grad((logprob * g_l.to(dtype) + entropy * g_e.to(dtype)).sum(), leaf)
        found.append(dx.where(d != -torch.inf, 0.0))  # a banned target has a gradient of its own in PyTorch
    return found


def close_statistics(ours: Tensor, exact: Tensor, float32: Tensor, largest: float = 1.0) -> None:
    for name, *values in zip(STATISTICS, ours, exact, float32, strict=False):
        close(name, *values, largest)
    assert (ours[0] <= 0).all()


def close_gradient(ours: Tensor, exact: Tensor, float32: Tensor, largest: float = 1.0) -> None:
    close("gradient", ours, exact, float32.to(ours.dtype), largest)


def compare(x: Tensor, y: Tensor, largest: float = 1.0, **changes: Any) -> None:
    statistics = score(x, y, **changes)
    close_statistics(statistics, *true_statistics(x, y, **changes), largest)
    grads = torch.randn(len(y)), torch.randn(len(y))
    ours = gradient(x, y, statistics, grads, **changes)
    close_gradient(ours, *true_gradient(x, y, grads, **changes), largest)
    banned = torch.isneginf(x if changes.get("bias") is None else x + changes["bias"])
    assert not ours[banned].any()


def random_rows(dtype: str, V: int, rows: int = 3, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    return (torch.randn(rows, V) * scale).to(getattr(torch, dtype)), torch.randint(0, V, (rows,))


def fenced(x: Tensor, aligned: bool) -> tuple[Tensor, Tensor]:
    """(x, all of it) in memory full of NaN, each row at a multiple of 16 bytes or none of them."""
    wide = torch.full((len(x) + 2, (x.shape[1] + 15) // 16 * 16 + 32), torch.nan, dtype=x.dtype)
    first = 16 if aligned else 17
    view = wide[1:-1, first : first + x.shape[1]]
    view.copy_(x)
    assert (view.data_ptr() % 16 == 0) == aligned
    return view, wide


def every_option(rows: int, V: int, banned: bool = True) -> dict[str, Any]:
    bias = torch.randn(V)
    if banned:
        bias[::7] = -torch.inf
    return dict(
        bias=bias, temperature=torch.rand(rows) + 0.5, target_logits=torch.randn(rows) * 3, logit_scale=1.3,
        softcap=8.0, inverse_temperature=0.3,
    )  # fmt: skip


def poisoned(x: Tensor, kept: Tensor) -> Tensor:
    return x.where(kept.view(-1, *[1] * (x.ndim - 1)), torch.nan)


def every_result(x: Tensor, y: Tensor, grads: tuple, **changes: Any) -> tuple[Tensor, ...]:
    statistics = score(x, y, **changes)
    return statistics, gradient(x, y, statistics, grads, **changes).reshape(-1, x.shape[-1])
