"""A language-model head that scores tokens and computes policy losses without ever making all logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rlhf_engine import ops


class LinearPolicyHead(nn.Linear):
    """Takes the place of a model's `lm_head`: `model.lm_head = LinearPolicyHead.borrow(model.lm_head)`.

    It is the linear layer it replaces, with the same parameters under the same names, so checkpoints, generation, tied
    embeddings and optimisers notice nothing; given targets it calls `ops.linear_logprobs`, and with a token_loss
    `ops.linear_policy_loss`. It does so inside its forward, where FSDP2 and ZeRO-3 have gathered weights that they
    shard, if the head is a unit of its own (`fully_shard(model.lm_head)`).

    Args:
        in_features, out_features, bias, device, dtype: as in torch.nn.Linear.
        softcap, logit_scale: what the model does to logits besides (see `ops.linear_logprobs`). Without targets the
            forward leaves that to the model.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.softcap, self.logit_scale = softcap, logit_scale

    @classmethod
    def borrow(
        cls, linear: nn.Linear, *, softcap: float | None = None, logit_scale: float | None = None
    ) -> LinearPolicyHead:
        """A head that shares the parameters of a linear layer, whatever else they are tied to. What is not given of
        softcap and logit_scale is that of the layer, if it is a LinearPolicyHead, else None and 1.

        Raises:
            TypeError: something else than a linear layer, such as a LoRA adapter around one: merge it first.
        """
        if type(linear) is not nn.Linear and not isinstance(linear, LinearPolicyHead):
            raise TypeError(
                f"LinearPolicyHead.borrow: needs a torch.nn.Linear, got {type(linear).__name__}; an adapter's own part "
                "of the logits would be lost, so merge or unload it first"
            )
        if isinstance(linear, LinearPolicyHead):
            softcap = linear.softcap if softcap is None else softcap
            logit_scale = linear.logit_scale if logit_scale is None else logit_scale
        head = cls(
            linear.in_features, linear.out_features, linear.bias is not None, softcap=softcap,
            logit_scale=1.0 if logit_scale is None else logit_scale, device="meta",
        )  # fmt: skip
        head.weight = linear.weight
        if linear.bias is not None:
            head.bias = linear.bias
        return head.train(linear.training)

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, token_loss: ops.TokenLoss | None = None, **options: Any
    ) -> Any:
        """Raw logits (..., V) of hidden (..., H); with targets (...) the result of ops.linear_logprobs, and with a
        token_loss that of ops.linear_policy_loss. `options` are theirs."""
        if targets is None:
            if token_loss is not None or options:
                raise ValueError("LinearPolicyHead: targets is missing; without it there are logits alone")
            return super().forward(hidden)
        options = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale} | options
        if token_loss is None:
            return ops.linear_logprobs(hidden, self.weight, targets, **options)
        return ops.linear_policy_loss(hidden, self.weight, targets, token_loss, **options)
