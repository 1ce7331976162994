"""Dropout at a random byte an element: torch on CPUs draws a number for each, slower than the layers around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ByteDropout(nn.Module):
    """nn.Dropout with `p` rounded to 1/256; what is kept is scaled by the rounded p, so means stay exact."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {p}")
        self.dropped = min(round(256 * p), 255)  # bytes out of 256

    def forward(self, x: Tensor) -> Tensor:
        """(...) float -> the same shape; the identity in eval mode and for p = 0."""
        if not self.training or self.dropped == 0:
            return x
        if not x.is_cpu:
            return F.dropout(x, self.dropped / 256)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.dropped
        return x * kept * (256 / (256 - self.dropped))
