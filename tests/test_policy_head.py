"""LinearPolicyHead in the place of a model's own head, alone and sharded."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_lm
from torch import Tensor, nn

import rlhf_engine as rl
from rlhf_engine import ops

H, V, N = 24, 301, 40


def linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(H, V, bias=bias)


def rows() -> tuple[Tensor, Tensor, ops.TokenLoss]:
    g = torch.Generator().manual_seed(1)
    hidden, targets = torch.randn(N, H, generator=g), torch.randint(V, (N,), generator=g)
    old, advantages = torch.randn(N, generator=g) - 5, torch.randn(N, generator=g)
    return hidden, targets, ops.ppo_token_loss(old, advantages, entropy_coef=0.1)


@pytest.mark.parametrize("bias", [False, True])
def test_it_calls_the_ops_with_its_own_parameters(bias: bool) -> None:
    plain = linear(bias)
    head = rl.LinearPolicyHead.borrow(plain, softcap=3.0, logit_scale=0.5)
    hidden, targets, token_loss = rows()
    options = {"bias": plain.bias, "softcap": 3.0, "logit_scale": 0.5, "temperature": 0.7}
    for got, want in zip(
        head(hidden, targets, temperature=0.7),
        ops.linear_logprobs(hidden, plain.weight, targets, **options),
        strict=True,
    ):
        assert torch.equal(got, want)
    loss, metrics = head(hidden, targets, token_loss, temperature=0.7)
    want_loss, want_metrics = ops.linear_policy_loss(hidden, plain.weight, targets, token_loss, **options)
    assert torch.equal(loss, want_loss) and metrics == want_metrics
    loss.backward()
    assert plain.weight.grad is head.weight.grad and plain.weight.grad is not None
    assert bias == (plain.bias is not None and plain.bias.grad is not None)


def test_without_targets_it_is_the_layer_it_replaces() -> None:
    plain = linear()
    head = rl.LinearPolicyHead.borrow(plain.eval())
    hidden, _, token_loss = rows()
    assert torch.equal(head(hidden), plain(hidden)) and not head.training
    assert head.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="targets is missing"):
        head(hidden, token_loss=token_loss)
    with pytest.raises(ValueError, match="targets is missing"):
        head(hidden, temperature=2.0)


def test_an_adapter_is_refused() -> None:
    class Adapted(nn.Linear):
        pass

    with pytest.raises(TypeError, match="got Adapted; an adapter's own part"):
        rl.LinearPolicyHead.borrow(Adapted(H, V))


def test_a_head_that_is_borrowed_again_keeps_what_it_does_to_logits() -> None:
    first = rl.LinearPolicyHead(H, V, softcap=5.0, logit_scale=0.5)
    again, other = rl.LinearPolicyHead.borrow(first), rl.LinearPolicyHead.borrow(first, softcap=3.0)
    assert again.weight is first.weight and (again.softcap, again.logit_scale) == (5.0, 0.5)
    assert (other.softcap, other.logit_scale) == (3.0, 0.5)


def test_in_a_model_with_tied_embeddings() -> None:
    """Generation, the state dict and the tie stay; a loss reaches the embeddings through both."""
    model = tiny_lm("gemma2")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    tokens = torch.randint(3, model.config.vocab_size, (2, 9))
    before, names = model(tokens).logits, set(model.state_dict())
    model.lm_head = rl.LinearPolicyHead.borrow(model.lm_head, softcap=model.config.final_logit_softcapping)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model(tokens).logits, before) and set(model.state_dict()) == names
    hidden = model.model(tokens).last_hidden_state
    loss, _ = model.lm_head(hidden[:, :-1], tokens[:, 1:], lambda logprobs, entropy, rows: -logprobs)
    want = nn.functional.cross_entropy(before[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, want)
    grads = [torch.autograd.grad(x, model.get_input_embeddings().weight)[0] for x in (loss, want)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def sharded(rank: int, port: int) -> None:
    """What each of two ranks does: shard the head, score and train on its half, and compare with one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo")
    hidden, targets, _ = rows()
    mine = slice(rank * N // 2, (rank + 1) * N // 2)
    old, advantages = torch.full((N,), -5.0), torch.linspace(-1, 1, N)
    whole = rl.LinearPolicyHead.borrow(linear())
    loss, _ = whole(hidden, targets, ops.ppo_token_loss(old, advantages, entropy_coef=0.1), denom=float(N))
    loss.backward()
    head = fully_shard(rl.LinearPolicyHead.borrow(linear()), mesh=init_device_mesh("cpu", (2,)))
    assert head.weight.to_local().shape[0] < V  # a shard
    with torch.no_grad():
        logprobs, _ = head(hidden, targets)
        assert torch.equal(logprobs, whole(hidden, targets)[0])
    for name in ("linear_policy_loss", "linear_logprobs"):
        head.zero_grad()
        token_loss = ops.ppo_token_loss(old[mine], advantages[mine], entropy_coef=0.1)
        # FSDP averages over ranks, and the loss is a sum over both.
        if name == "linear_policy_loss":
            part, _ = head(hidden[mine], targets[mine], token_loss, denom=N / 2)
        else:  # the weight is gone after the forward and comes back for the backward
            logprobs, entropy = head(hidden[mine], targets[mine])
            part, _ = ops.ppo_loss(
                logprobs, old[mine], advantages[mine], torch.ones(N // 2, dtype=torch.bool), entropy=entropy,
                entropy_coef=0.1, denom=N / 2,
            )  # fmt: skip
        part.backward()
        torch.testing.assert_close(head.weight.grad.full_tensor(), whole.weight.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(head.bias.grad.full_tensor(), whole.bias.grad, rtol=1e-4, atol=1e-7)
    dist.destroy_process_group()
    print("same")


def test_sharded_by_fsdp2_on_two_ranks() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": env}
    ranks = [subprocess.Popen([*command, str(rank), str(port)], **pipes) for rank in range(2)]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0 and out.endswith("same\n"), err


if __name__ == "__main__":
    sharded(int(sys.argv[1]), int(sys.argv[2]))
