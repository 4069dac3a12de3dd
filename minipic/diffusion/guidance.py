"""Guidance: several predictions of one network at one point -> the prediction to follow."""

from collections.abc import Iterable

import torch


def combine(uncond: torch.Tensor,
            terms: Iterable[tuple[float | torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """uncond + sum of weight * (prediction - uncond) over the pairs (weight, prediction).

    One pair is classifier-free guidance (2207.12598): weight 1 gives the prediction itself, weight
    0 gives `uncond`. Weights are numbers or tensors that broadcast to the predictions.
    """
    return uncond + sum(weight * (prediction - uncond) for weight, prediction in terms)


def rescale(guided: torch.Tensor, cond: torch.Tensor, amount: float) -> torch.Tensor:
    """Bring the guided prediction's standard deviation towards `cond`'s, against overexposure.

    guided, cond [B,...]; amount 0 (leave) to 1 (equal for each sample). 2305.08891, eq. 14-16.
    """
    axes = tuple(range(1, cond.ndim))
    ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (amount * ratio + 1 - amount)
