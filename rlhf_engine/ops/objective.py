"""The loss of a policy as a function of its tokens' log-probs and entropies: what linear_policy_loss differentiates in
its forward."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf_engine import reference
from rlhf_engine.ops.rows import Rows
from rlhf_engine.reference import TokenLoss


class Objective:
    """sum(weights * token losses) / denom. A token_loss with a method `reduced`, as ops.ppo_token_loss returns, does
    the sum itself, in one operator."""

    def __init__(self, token_loss: TokenLoss, rows: Rows, weights: Tensor | None, denom: float | Tensor | None) -> None:
        self.token_loss, self.rows, self.weights = token_loss, rows, weights
        self.denom = rows.count() if denom is None else denom
        self.checked = False
        self.metrics: dict[str, Tensor] = {}  # of all rows

    def __call__(self, logprobs: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of the rows in `part`."""
        index = self.rows.index[part]
        active = None if self.rows.active is None else self.rows.active[part]
        reduced = getattr(self.token_loss, "reduced", None)
        if reduced is not None:
            return reduced(logprobs, entropy, index, active, self.weights, self.denom)
        return reference.reduce_loss(
            self.token_loss(logprobs, entropy, index), index, self.weights, self.denom, active=active
        )

    def gradients(self, logprobs: Tensor, entropy: Tensor, part: slice) -> tuple[Tensor, Tensor | None]:
        """(n,) each: of the loss in log-probs and entropies; None where it does not depend on the entropies."""
        leaves = [x.detach().requires_grad_() for x in (logprobs, entropy)]
        with torch.enable_grad():
            loss, _ = self(leaves[0], leaves[1], part)
        if not loss.requires_grad:
            return torch.zeros_like(logprobs), None
        if not self.checked:
            _refuse_foreign(loss, leaves)
            self.checked = True
        g_l, g_e = torch.autograd.grad(loss, leaves, allow_unused=True)
        if self.rows.active is not None:  # what a formula makes of a dead row may be NaN times zero
            active = self.rows.active[part]
            g_l, g_e = (None if g is None else torch.where(active, g, 0) for g in (g_l, g_e))
        return torch.zeros_like(logprobs) if g_l is None else g_l, g_e


def _refuse_foreign(loss: Tensor, leaves: list[Tensor]) -> None:
    """Only log-probs and entropies get a gradient; another that is asked for would be lost without a word."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is leaf for leaf in leaves):
            raise ValueError(
                f"linear_policy_loss: token_loss uses a tensor {tuple(variable.shape)} that requires grad, and only "
                "logprobs and entropy get a gradient here; detach it, or add what depends on it to the loss outside"
            )
        left += [next_node for next_node, _ in node.next_functions]
