"""Every registered operator on tensors of the GPU as torch wants it, and the same bits under torch.compile."""

from __future__ import annotations

from typing import Any

import gpu_tier
import pytest
import torch
from gpu_tier import DEVICE, HEAD_BACKEND, each_backend, leaf, on_device, pick, same_bits
from test_compiled import eager_and_compiled, operator_calls
from test_head_operators import case, samples
from torch import Tensor
from torch.utils._pytree import tree_map

from rlhf_engine import ops
from rlhf_engine.ops.head_operators import SCHEMAS, TRITON_SCHEMAS

pytestmark = gpu_tier.marks(120)
TRITON = pytest.param(
    "rlhf_triton", marks=[gpu_tier.not_rehearsed("Triton compiles for GPUs alone"), gpu_tier.needs("gae", "triton")]
)
CPP = pytest.param("rlhf_engine", marks=gpu_tier.needs("gae", gpu_tier.LOSS_BACKENDS[0]))
HEAD = pick("rlhf_triton", "rlhf_engine")


@pytest.mark.parametrize("name, arguments", operator_calls(), ids=lambda x: x if isinstance(x, str) else "")
@pytest.mark.parametrize("namespace", [CPP, TRITON])
def test_loss_operators(namespace: str, name: str, arguments: tuple[Any, ...]) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    operator = getattr(getattr(torch.ops, namespace), name).default
    outcome = torch.library.opcheck(operator, tree_map(on_device, arguments), test_utils=tests)
    assert set(outcome.values()) == {"SUCCESS"}, outcome


@gpu_tier.needs("token_logprobs", HEAD_BACKEND)
@pytest.mark.parametrize("operator", pick(TRITON_SCHEMAS, SCHEMAS))
def test_head_operators(operator: str) -> None:
    for arguments in samples(operator, HEAD, DEVICE):
        torch.library.opcheck(getattr(getattr(torch.ops, HEAD), operator).default, arguments)


@each_backend
def test_losses_compiled_and_eager_have_the_same_bits(backend: str) -> None:
    if backend == "reference":
        pytest.skip("rehearsal: a compiler may fuse what the reference does, with other bits")
    same_bits(*eager_and_compiled(DEVICE, backend, pick("inductor", "aot_eager")))


@gpu_tier.needs("token_logprobs", HEAD_BACKEND)
def test_logprobs_compiled_and_eager_have_the_same_bits() -> None:
    logits, targets = (x.to(DEVICE) for x in case(9001))

    def both(x: Tensor, y: Tensor) -> Tensor:
        logprobs, entropy = ops.token_logprobs(x, y, temperature=0.7, backend=HEAD_BACKEND)
        return (logprobs * 0.5 + entropy).sum()

    results = []
    for function in (both, torch.compile(both, backend="aot_eager", fullgraph=True)):
        x = leaf(logits)
        value = function(x, targets)
        value.backward()
        results.append([("value", value.detach()), ("gradient", x.grad)])
    same_bits(*results)
