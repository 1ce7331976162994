"""Which rows a head op scores, as far as the host knows.

A CPU's mask is read, and so is one on the CPU for tensors on a GPU: work is then proportional to the rows that count. A
mask on a GPU is not read unless asked to, since that waits for the device: all rows go through the matrix products,
the dead ones as zeros, and the kernels leave them at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DEAD = torch.iinfo(torch.int64).min  # the target of rows that do not count


@dataclass(frozen=True, slots=True)
class Rows:
    """n rows out of N."""

    index: Tensor  # (n,) int64
    targets: Tensor  # (n,) int64, DEAD where a row turns out not to count
    active: Tensor | None  # (n,) bool, where the host does not know; else all n count

    def __len__(self) -> int:
        return self.index.shape[0]

    def count(self) -> int | Tensor:
        return len(self) if self.active is None else self.active.sum()

    def only(self, kept: Tensor) -> Rows:
        """Those numbered `kept` (m,)."""
        active = None if self.active is None else self.active[kept]
        return Rows(self.index[kept], self.targets[kept], active)

    def pick(self, x: Tensor | None) -> Tensor | None:
        """x (..., one number a row) -> (n,) float32."""
        return None if x is None else x.detach().reshape(-1)[self.index].float()


def host_knows(x: Tensor) -> bool:
    return x.device.type == "cpu"


def find(targets: Tensor, mask: Tensor | None, ignore_index: int, rows: Tensor | None, sync: bool) -> Rows:
    """`rows` (n,) are taken as they are. Otherwise rows of the mask whose target is not ignore_index."""
    flat = targets.reshape(-1)
    if rows is not None:
        return Rows(rows, flat[rows].long(), None)
    active = flat != ignore_index
    if mask is not None and mask.device != flat.device:
        index = mask.reshape(-1).nonzero().squeeze(1).to(flat.device, non_blocking=True)
        active = active[index]
    else:
        index = torch.arange(flat.shape[0], device=flat.device)
        active = active if mask is None else active & mask.reshape(-1)
    if sync or host_knows(flat):
        index = index[active]
        return Rows(index, flat[index].long(), None)
    return Rows(index, torch.where(active, flat[index].long(), DEAD), active)
