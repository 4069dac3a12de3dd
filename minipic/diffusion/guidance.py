"""Guidance: several predictions of one network at one point -> the prediction to follow."""


def combine(uncond, terms):
    """uncond + sum of weight * (prediction - uncond) over the (weight, prediction) pairs in `terms`.

    One pair is classifier-free guidance (2207.12598): weight 1 gives the prediction itself, weight 0 `uncond`.
    Weights are numbers or tensors that broadcast to the predictions.
    """
    return uncond + sum(weight * (prediction - uncond) for weight, prediction in terms)


def rescale(guided, cond, amount):
    """Bring the guided prediction's standard deviation towards that of `cond`, against overexposure.

    guided, cond [B,...]; amount 0 (leave) to 1 (equal per sample). 2305.08891, eq. 14-16.
    """
    axes = tuple(range(1, cond.ndim))
    ratio = cond.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return guided * (amount * ratio + 1 - amount)
