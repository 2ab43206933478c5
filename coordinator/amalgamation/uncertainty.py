"""How much each teacher's hints count, learnt while they are.

Kendall, Gal and Cipolla (CVPR 2018, "Multi-task learning using uncertainty to weigh losses"): what a
student can only half tell of a teacher is noise to it, of a variance that is learnt beside the weights,
and counts by its inverse. With p_i the weight of teacher i in the selection, L_i its hint loss and s_i the
logarithm of its variance, the s_i descend

    1/2 sum_i p_i (exp(-s_i) L_i + s_i)        from s_i = 0

and the student descends sum_i w_i L_i, w_i = p_i exp(-s_i) / sum_j p_j exp(-s_j). At first the weights are
those of the selection. They sum to 1 as those do: in Kendall's form hints that are learnt well would at last
outweigh everything else in the loss, whatever `aggregation.hint_pooled` says.

The s_i are stepped with the student: at its rate, by a gradient that `aggregation.hint_pooled` or `hint_maps`
scales like the rest of its hints, and under its weight decay, which holds them towards 0 and so the weights
towards the selection's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_MOST_PULL = 1.0
"""A batch that is far off must not carry a variance away for good."""


class Uncertainty(nn.Module):
    """The logarithm of the variance of one teacher's hints of one kind."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))


def weighed(
    losses: Mapping[str, Tensor],
    prior: Mapping[str, float],
    uncertainties: Mapping[str, Uncertainty],
) -> Tensor:
    """sum_i w_i L_i of scalar losses by teacher; its gradient reaches the uncertainties too."""
    # Tensors throughout: a number would have every step wait for the device, once for every teacher.
    hints = torch.stack(list(losses.values()))
    p = hints.new_tensor([prior[name] for name in losses])
    s = torch.stack([uncertainties[name].log_variance for name in losses])
    precision = torch.exp(-s.detach())
    raw = p * precision
    value = (raw / raw.sum() * hints).sum()
    pull = (1 - precision * hints.detach()).clamp(-_MOST_PULL, _MOST_PULL)
    descent = (p / 2 * pull * s).sum()
    # Of value zero: what is reported is the loss of the student.
    return value + (descent - descent.detach())


@torch.no_grad()
def shares(
    prior: Mapping[str, float], uncertainties: Mapping[str, Uncertainty]
) -> dict[str, float]:
    """w_i of those that have an uncertainty; they sum to 1."""
    raw = {n: prior[n] * float(torch.exp(-u.log_variance)) for n, u in uncertainties.items()}
    whole = sum(raw.values())
    return {name: value / whole for name, value in raw.items()}
