"""Scores of predicted pictures and maps against the world's exact truth.

What they are for:
    psnr                edits, and what a VAE gives back
    edge_f1             pictures drawn from edges, and edges read out of pictures
    depth_errors        depth read out of pictures, as table 4 of OneDiffusion (arXiv 2411.16318)
    mean_iou            segmentations read out of pictures
    normal_angle        normals read out of pictures
    camera_accuracy     cameras found from pictures, as OneDiffusion's table 5; the cameras of
                        predicted rays are camera_from_plucker's
A paper that turns pictures into maps is measured by these, the others by psnr and edge_f1.
"""

import torch
import torch.nn.functional as F


def psnr(images: torch.Tensor, truth: torch.Tensor) -> float:
    """Peak signal-to-noise ratio of pictures [B,3,H,W] in [-1,1]: the mean of B values, in dB."""
    error = (images - truth).square().flatten(1).mean(1)
    error = error.clamp_min(1e-12)  # 126 dB at most
    return (10 * (4 / error).log10()).mean().item()  # the peak is 2: from -1 to 1


def edge_f1(edges: torch.Tensor, truth: torch.Tensor, slack: int = 1) -> float:
    """F1 of edge pixels, bool [B,H,W]; `slack` pixels off still count (Martin et al. 2004)."""
    precision = (edges & _widened(truth, slack)).sum() / edges.sum().clamp_min(1)
    recall = (truth & _widened(edges, slack)).sum() / truth.sum().clamp_min(1)
    return (2 * precision * recall / (precision + recall).clamp_min(1e-9)).item()


def _widened(edges, slack):
    return F.max_pool2d(edges[:, None].float(), 2 * slack + 1, 1, slack)[:, 0] > 0


def depth_errors(depth: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """Errors of depth, where the truth is finite.

    abs_rel: the mean of |depth - truth| / truth. delta1: the share of pixels at which neither depth
    is 1.25 times the other or more.
    """
    known = truth.isfinite()
    depth = depth[known].clamp_min(1e-6)
    truth = truth[known]
    ratio = torch.maximum(depth / truth, truth / depth)
    return {"abs_rel": ((depth - truth).abs() / truth).mean().item(),
            "delta1": (ratio < 1.25).float().mean().item()}


def mean_iou(labels: torch.Tensor, truth: torch.Tensor) -> float:
    """Intersection over union of integer maps of one shape: the mean over the truth's labels."""
    shares = []
    for label in truth.unique():
        intersection = (labels == label) & (truth == label)
        union = (labels == label) | (truth == label)
        shares.append(intersection.sum() / union.sum())
    return torch.stack(shares).mean().item()


def normal_angle(normals: torch.Tensor, truth: torch.Tensor) -> float:
    """The mean angle in degrees between normals [B,3,H,W], where the truth has one."""
    known = truth.norm(dim=1) > 0
    cosine = F.cosine_similarity(normals, truth, dim=1)[known].clamp(-1, 1)
    return cosine.acos().rad2deg().mean().item()


def camera_from_plucker(rays: torch.Tensor) -> torch.Tensor:
    """Camera centres [B,3] from Pluecker maps [B,6,H,W]: the point nearest to all rays.

    A ray with direction d, |d| = 1, and moment m = c x d goes through the centre c. By least
    squares over all rays, c solves sum (I - d d^T) c = sum d x m.
    """
    moment, toward = rays.double().flatten(2).chunk(2, 1)
    length = toward.norm(dim=1, keepdim=True).clamp_min(1e-9)
    moment = moment / length
    toward = toward / length
    count = toward.shape[2]
    left = count * torch.eye(3, dtype=torch.float64, device=rays.device) - toward @ toward.mT
    right = torch.linalg.cross(toward, moment, dim=1).sum(2)
    return torch.linalg.solve(left, right)


def camera_accuracy(centres: torch.Tensor, truth: torch.Tensor, scale: float) -> dict[str, float]:
    """Share of camera centres [B,3] within 10% and 30% of `scale` of the true ones."""
    off = (centres - truth).norm(dim=1) / scale
    return {"within_10%": (off < 0.1).float().mean().item(),
            "within_30%": (off < 0.3).float().mean().item()}
