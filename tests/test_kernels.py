"""kernels/token_logprobs.py against PyTorch in float64, without a GPU; kernel_script.py says how."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import kernel_script
import pytest
import torch
from kernel_script import check_close
from torch import Tensor

VOCABULARIES = (1, 2, 127, 128, 129, 1000, 9001)  # the last: more than one block forward, and a ragged one
DTYPES = ("float32", "bfloat16")


def truth(logits: Tensor, targets: Tensor, temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """numerics.md section 1 in eager PyTorch: entries of -inf add nothing to the entropy, in value or gradient."""
    logp = (logits.to(dtype) / temperature).log_softmax(-1)
    finite = logp.where(logp != -torch.inf, 0.0)
    return logp.gather(-1, targets[..., None]).squeeze(-1), -(finite * logp.exp()).sum(-1)


def truth_gradient(logits: Tensor, targets: Tensor, temperature: float, grads: tuple, dtype: torch.dtype) -> Tensor:
    leaf = logits.detach().to(dtype).requires_grad_()
    outputs = truth(leaf, targets, temperature, dtype)
    return torch.autograd.grad(outputs, leaf, [g.to(dtype) for g in grads])[0]


def compare(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> None:
    """Forward and backward against float64; PyTorch's own float32 error on the same input is the yardstick."""
    from rlhf_engine.kernels import token_logprobs as kernel

    logprobs, entropy, m, ls, mu = kernel.forward(logits, targets, temperature=temperature)
    exact, float32 = (truth(logits, targets, temperature, dtype) for dtype in (torch.float64, torch.float32))
    # exp and log of the interpreter and of PyTorch differ by an ulp or so of values of size 1 to 10
    check_close("logprob", logprobs, exact[0], float32[0], 2e-6)
    check_close("entropy", entropy, exact[1], float32[1], 2e-6)
    assert (logprobs <= 0).all()

    grads = torch.randn(targets.shape), torch.randn(targets.shape)
    ours = kernel.backward(*grads, logits, targets, m, ls, mu, temperature=temperature)
    assert ours.dtype == logits.dtype and ours.shape == logits.shape and ours.is_contiguous()
    exact_grad = truth_gradient(logits, targets, temperature, grads, torch.float64)
    torchs = truth_gradient(logits, targets, temperature, grads, torch.float32).to(logits.dtype)
    check_close("gradient", ours, exact_grad, torchs, 2e-6)


def random_rows(dtype: str, V: int, rows: int = 3, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    return (torch.randn(rows, V) * scale).to(getattr(torch, dtype)), torch.randint(0, V, (rows,))


def case_random(dtype: str, V: int) -> None:
    compare(*random_rows(dtype, V), temperature=0.7)  # the other cases are at 1


def case_confident(dtype: str) -> None:
    """The target stands out by 30 to 1000: probability 1 to the last bit, and large numbers to lose digits in."""
    logits, targets = random_rows(dtype, 129)
    for row, lead in enumerate((30.0, 100.0, 1000.0)):
        logits[row, targets[row]] += lead
    compare(logits, targets)
    compare(logits, (targets + 1) % 129)  # and the unlikely target beside it
    compare(logits + 1000, targets)


def case_banned(dtype: str) -> None:
    """Logits of -inf, a whole first block of them, the target among them."""
    logits, targets = random_rows(dtype, 9001)
    logits[0, :5000] = -torch.inf
    logits[1, ::2] = -torch.inf
    logits[2, 3:] = -torch.inf
    targets[:] = torch.tensor([6000, 0, 1])
    compare(logits, targets)


def case_ignored_rows(dtype: str) -> None:
    """Rows to ignore hold NaN in logits and incoming gradients; nothing of it arrives anywhere."""
    from rlhf_engine.kernels import token_logprobs as kernel

    logits, targets = random_rows(dtype, 129, rows=4)
    for ignore_index in (-100, 1):
        poisoned, holes, grad = logits.clone(), targets.clone().clamp_min(2), torch.randn(4)
        keep = torch.tensor([True, False, True, False])
        clean = kernel.forward(logits, holes)
        poisoned[~keep], grad[~keep], holes[~keep] = torch.nan, torch.nan, ignore_index
        outputs = kernel.forward(poisoned, holes, ignore_index=ignore_index)
        for ours, unpoisoned in zip(outputs, clean, strict=True):
            assert torch.equal(ours[keep], unpoisoned[keep]) and (ours[~keep] == 0).all()
        dx = kernel.backward(grad, grad, poisoned, holes, *outputs[2:], ignore_index=ignore_index)
        assert dx.isfinite().all() and (dx[~keep] == 0).all() and (dx[keep] != 0).any(-1).all()


def case_visible_mistakes() -> None:
    """A NaN logit, a row of -inf and a target outside the vocabulary give NaN in that row alone."""
    from rlhf_engine.kernels import token_logprobs as kernel

    logits, targets = random_rows("float32", 129, rows=6)
    logits[1, 7], logits[2], targets[3], targets[4] = torch.nan, -torch.inf, 129, -1
    logprobs, entropy, m, ls, mu = kernel.forward(logits, targets)
    dx = kernel.backward(torch.ones(6), torch.ones(6), logits, targets, m, ls, mu)
    wrong = torch.tensor([False, True, True, True, True, False])
    for out in (logprobs, entropy, dx.isnan().any(-1).float().where(~dx.isnan().any(-1), torch.nan)):
        assert torch.equal(out.isnan(), wrong), out


def case_strides_and_company() -> None:
    """The same row gives the same bits alone, in a batch, in a (B, T, V) slice and beside unused columns."""
    from rlhf_engine.kernels import token_logprobs as kernel

    wide = torch.randn(2, 5, 150)
    view, targets = wide[:, 1:-1, :129], torch.randint(0, 129, (2, 3), dtype=torch.int32)
    before = wide.clone()
    flat = kernel.forward(view.reshape(6, 129).contiguous(), targets.reshape(6).long())
    sliced = kernel.forward(view, targets)
    alone = kernel.forward(view[1, 2][None], targets[1, 2][None])
    columns_first = kernel.forward(view.transpose(1, 2).contiguous().transpose(1, 2), targets)
    for a, b, c, d in zip(flat, sliced, alone, columns_first, strict=True):
        assert b.shape == (2, 3) and torch.equal(a, b.flatten()) and torch.equal(a[-1:], c) and torch.equal(b, d)
    grad = torch.ones(1, 1).expand(2, 3)  # stride 0, as the gradient of a sum is
    dx = kernel.backward(grad, grad, view, targets, *sliced[2:])
    ones = torch.ones(6)
    assert torch.equal(dx.view(6, 129), kernel.backward(ones, ones, view.reshape(6, 129), targets.flatten(), *flat[2:]))
    assert torch.equal(wide, before)


def case_empty_and_wrong() -> None:
    from rlhf_engine.kernels import token_logprobs as kernel

    none, no_targets = torch.empty(0, 7), torch.empty(0, dtype=torch.long)
    outputs = kernel.forward(none, no_targets)
    assert all(out.shape == (0,) for out in outputs)
    assert kernel.backward(outputs[0], outputs[1], none, no_targets, *outputs[2:]).shape == (0, 7)
    wrong: list[tuple[Tensor, Tensor, float]] = [
        (torch.zeros(3, 7), torch.zeros(4, dtype=torch.long), 1.0),
        (torch.zeros(3, 0), torch.zeros(3, dtype=torch.long), 1.0),
        (torch.zeros(3, 7), torch.zeros(3, dtype=torch.long), 0.0),
    ]
    for logits, targets, temperature in wrong:
        with pytest.raises(ValueError, match="token_logprobs"):
            kernel.forward(logits, targets, temperature=temperature)


def compile_for_gpu(capability: int, dtype: str, aligned: bool) -> None:
    """Both kernels at the block of a real vocabulary; registers must not spill to memory."""
    from rlhf_engine.kernels import token_logprobs as kernel

    V, first = (152064, 0) if aligned else (152063, 1)
    logits = torch.empty(2 * V + first, dtype=getattr(torch, dtype))[first:].view(2, V)
    targets, ones = torch.zeros(2, dtype=torch.long), torch.ones(2)
    with kernel_script.compiling_for(capability) as compiled:
        kernel.forward(logits, targets)
        kernel.backward(ones, ones, logits, targets, ones, ones, ones)
    assert len(compiled) == 2
    for each in compiled:
        kernel_script.check_resources(each, f"sm_{capability} {dtype} {aligned=}")


INTERPRETED: dict[str, Callable[[], None]] = {
    **{f"random-{dtype}-{V}": partial(case_random, dtype, V) for dtype in DTYPES for V in VOCABULARIES},
    **{f"confident-{dtype}": partial(case_confident, dtype) for dtype in DTYPES},
    **{f"banned-{dtype}": partial(case_banned, dtype) for dtype in DTYPES},
    **{f"ignored-rows-{dtype}": partial(case_ignored_rows, dtype) for dtype in DTYPES},
    "visible-mistakes": case_visible_mistakes,
    "strides-and-company": case_strides_and_company,
    "empty-and-wrong": case_empty_and_wrong,
}
COMPILED: dict[str, Callable[[], None]] = {
    f"sm_{capability}-{dtype}-{'aligned' if aligned else 'unaligned'}": partial(
        compile_for_gpu, capability, dtype, aligned
    )
    for capability, dtype, aligned in (
        (80, "bfloat16", True),
        (90, "bfloat16", True),
        (90, "bfloat16", False),
        (90, "float32", True),
    )
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return kernel_script.run(__file__, "interpret", tmp_path_factory.mktemp("interpret"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return kernel_script.run(__file__, "compile", tmp_path_factory.mktemp("compile"))


@pytest.mark.parametrize("case", INTERPRETED)
def test_in_the_interpreter(case: str, interpreted: dict[str, str]) -> None:
    assert not interpreted[case], interpreted[case]


@pytest.mark.parametrize("case", COMPILED)
def test_ahead_of_time(case: str, compiled: dict[str, str]) -> None:
    assert not compiled[case], compiled[case]


if __name__ == "__main__":
    kernel_script.main(INTERPRETED, COMPILED)
