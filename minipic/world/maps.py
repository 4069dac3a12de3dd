"""Exact truth <-> pictures: edges, depth, normals, labels and boxes as maps in [-1,1], and back from drawn or predicted
ones."""

import torch

from minipic.world.scene import COLORS, visible_boxes

NEAR = 3.5          # no surface is nearer to the camera, in world units
CREASE = 0.7        # cosine between the normals of neighbouring pixels, below which there is an edge
PAINTS = {**{name: [2 * v - 1 for v in rgb] for name, rgb in COLORS.items()}, "black": [-1.0] * 3}


def labels_of(seen):
    """What every pixel of a Render shows [B,H,W]: 0 sky, 1 floor, 2 + the place in scene.objects."""
    return torch.where(seen.depth.isinf(), 0, seen.instances + 1)


def edges_of(seen):
    """Outlines and creases of a Render, bool [B,H,W]."""
    return borders(labels_of(seen), seen.normals)


def borders(labels, normals):
    """Where the pixel below or to the right has another label or, within a body, a quite different normal: labels
    [B,H,W], normals [B,3,H,W] (0: none) -> bool [B,H,W]."""
    found = torch.zeros_like(labels, dtype=torch.bool)
    for dim in (1, 2):
        last = labels.shape[dim] - 1
        (here, there), (a, b) = ([x.narrow(d, k, last) for k in (0, 1)] for x, d in ((labels, dim), (normals, dim + 1)))
        crease = ((a * b).sum(1) < CREASE) & (a != 0).any(1)
        found.narrow(dim, 0, last).logical_or_((here != there) | crease)
    return found


def normals_of(seen):
    """Normals [B,3,H,W] of a Render as the camera has them: right, up, towards the viewer; 0 in the sky."""
    axes = seen.extrinsics[:, :, :3] * torch.tensor([1, -1, -1])[:, None]       # the camera's are right, down, forward
    return (axes @ seen.normals.flatten(2)).view_as(seen.normals)


def edges_to_picture(edges):
    """White on black."""
    return edges[:, None].expand(-1, 3, -1, -1) * 2.0 - 1


def picture_to_edges(picture):
    return picture.mean(1) > 0


def depth_to_picture(depth):
    """Inverse depth in grey: NEAR is white, infinitely far black."""
    return (NEAR / depth)[:, None].expand(-1, 3, -1, -1) * 2 - 1


def picture_to_depth(picture):
    return NEAR / ((picture.mean(1) + 1) / 2).clamp(0, 1)


def normals_to_picture(normals):
    """Red right, green up, blue towards the viewer; no normal is grey."""
    return normals.clamp(-1, 1)


def picture_to_normals(picture):
    length = picture.norm(dim=1, keepdim=True)
    return torch.where(length > 0.5, picture / length, 0.0)


def _paints(names):
    return torch.tensor([PAINTS[name] for name in names])


def labels_to_picture(labels, colors):
    """Labels [B,H,W] in colours: a list of names for every picture, one name for every label."""
    return torch.stack([_paints(names)[label].permute(2, 0, 1) for label, names in zip(labels, colors)])


def picture_to_labels(picture, colors):
    """The label [B,H,W] of the nearest of the picture's colours for every pixel."""
    return torch.stack([(p[None] - _paints(names)[:, :, None, None]).square().sum(1).argmin(0)
                        for p, names in zip(picture, colors)])


def boxes_to_picture(boxes, colors, size):
    """Frames on black: boxes is a list of [n,4] x0 y0 x1 y1, colors one of n names. Large ones are drawn first: small
    ones hide no more than a part of their sides."""
    labels, line = torch.zeros(len(boxes), *size, dtype=torch.long), max(1, min(size) // 32)
    for label, found in zip(labels, boxes):
        for k in (found[:, 2:] - found[:, :2]).prod(1).argsort(descending=True).tolist():
            x0, y0, x1, y1 = found[k].tolist()
            frame = label[y0:y1, x0:x1]
            for side in (frame[:line], frame[-line:], frame[:, :line], frame[:, -line:]):
                side.fill_(k + 1)
    return labels_to_picture(labels, [["black", *names] for names in colors])


def picture_to_boxes(picture, colors):
    """A list of [n,4]: how far the pixels of each colour reach; zeros for a colour that isn't there."""
    labels = picture_to_labels(picture, [["black", *names] for names in colors])
    return [visible_boxes(label, len(names)) for label, names in zip(labels, colors)]
