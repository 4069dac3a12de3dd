"""Scores of predicted pictures and maps against the world's exact truth. Every function takes (prediction, truth)."""

import torch
import torch.nn.functional as F


def depth_errors(depth, truth):
    """AbsRel (mean |d - d*| / d*) and delta1 (share with max(d/d*, d*/d) < 1.25) where the truth is finite."""
    known = truth.isfinite()
    d, t = depth[known].clamp_min(1e-6), truth[known]
    return {"abs_rel": ((d - t).abs() / t).mean().item(),
            "delta1": (torch.maximum(d / t, t / d) < 1.25).float().mean().item()}


def mean_iou(labels, truth):
    """Mean over the truth's classes of intersection over union; labels and truth are integer maps of one shape."""
    shares = [((labels == c) & (truth == c)).sum() / ((labels == c) | (truth == c)).sum() for c in truth.unique()]
    return torch.stack(shares).mean().item()


def edge_f1(edge, truth, slack=1):
    """F1 of edge pixels (bool [B,H,W]), where `slack` pixels off still count (Martin et al. 2004)."""
    grow = lambda e: F.max_pool2d(e[:, None].float(), 2 * slack + 1, 1, slack)[:, 0] > 0
    precision = (edge & grow(truth)).sum() / edge.sum().clamp_min(1)
    recall = (truth & grow(edge)).sum() / truth.sum().clamp_min(1)
    return (2 * precision * recall / (precision + recall).clamp_min(1e-9)).item()


def psnr(images, truth):
    """Peak signal-to-noise ratio in dB of pictures in [-1,1]: over 10 log10(4 / MSE) of each, the mean."""
    error = (images - truth).square().flatten(1).mean(1).clamp_min(1e-12)      # 120 dB at most
    return (10 * (4 / error).log10()).mean().item()


def normal_angle(normals, truth):
    """Mean angle in degrees between normals [B,3,H,W], where the truth has one."""
    known = truth.norm(dim=1) > 0
    cosine = F.cosine_similarity(normals, truth, dim=1)[known].clamp(-1, 1)
    return cosine.acos().rad2deg().mean().item()


def camera_from_plucker(rays):
    """The point [B,3] nearest to all rays of Pluecker maps [B,6,H,W] (moment, direction), by least squares.

    A ray with direction d and moment m = c x d passes the camera centre c: the centre solves
    sum (I - d d^T) c = sum d x m.
    """
    moment, toward = rays.double().flatten(2).chunk(2, 1)
    length = toward.norm(dim=1, keepdim=True).clamp_min(1e-9)
    moment, toward = moment / length, toward / length
    left = toward.shape[2] * torch.eye(3, dtype=torch.float64, device=rays.device) - toward @ toward.transpose(1, 2)
    right = torch.linalg.cross(toward, moment, dim=1).sum(2)
    return torch.linalg.solve(left, right)


def camera_accuracy(centres, truth, scale):
    """Share of camera centres [B,3] within 10% and 30% of `scale` of the true ones."""
    off = (centres - truth).norm(dim=1) / scale
    return {"within_10%": (off < 0.1).float().mean().item(), "within_30%": (off < 0.3).float().mean().item()}
