"""Problems of problems.py as the compact products take them: kept weights in slots."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from problems import Problem, effective_weight

from lottery_sparse.ops import compact_conv2d, compact_linear
from lottery_sparse.ops.compact.kept import KeptLists

SPARE = 3


@dataclass
class Arguments:
    """A problem as the compact ops take it. Spare slots hold NaN."""

    problem: Problem
    values: torch.Tensor
    kept: KeptLists
    effective: torch.Tensor
    zero: bool

    @classmethod
    def of(cls, p: Problem, spare: int = SPARE) -> Arguments:
        mask = p.mask.flatten(1 - p.rank)
        lists = KeptLists.of(mask)
        lists = KeptLists.of(mask, lists.columns.shape[-1] + spare)
        values = torch.full(lists.columns.shape, torch.nan, dtype=p.x.dtype)
        for slots, w, m in zip(*(cls._each(t, p) for t in (values, p.weight, p.mask)), strict=True):
            slots[: int(m.sum())] = w[m]
        effective = effective_weight(p).to(p.x.dtype)
        return cls(p, values, lists, effective, p.frozen is None)

    @staticmethod
    def _each(t: torch.Tensor, p: Problem) -> list[torch.Tensor]:
        return list(t) if p.mask.dim() > p.rank else [t]

    def call(self, x, values, bias):
        op = compact_conv2d if self.problem.options else compact_linear
        p = self.problem
        return op(x, values, self.kept, self.effective, bias, self.zero, **p.options)

    def run(self) -> list[torch.Tensor]:
        """[y, dx, dw, db] as `Problem.run` gives them; checks that spare slots get nothing."""
        p = self.problem
        inputs = [t.detach().requires_grad_() for t in (p.x, self.values, p.bias)]
        y = self.call(*inputs)
        dx, dv, db = torch.autograd.grad(y, inputs, p.dy)
        return [y.detach(), dx, self.dense(dv), db]

    def dense(self, slots: torch.Tensor) -> torch.Tensor:
        p, each = self.problem, []
        for v, m in zip(self._each(slots, p), self._each(p.mask, p), strict=True):
            kept = int(m.sum())
            assert (v[kept:] == 0).all(), "spare slots get no gradient"
            each.append(torch.zeros(m.shape, dtype=v.dtype).masked_scatter(m, v[:kept]))
        return torch.stack(each) if p.mask.dim() > p.rank else each[0]
