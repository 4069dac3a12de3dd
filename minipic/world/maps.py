"""Maps of scenes as pictures, and back: edges, depth, normals, labels and boxes.

The first half takes exact maps out of a Render. The second half turns each kind of map into a
picture [B,3,H,W] in [-1,1], which is what the tasks give to a model or want from it. The way back,
picture_to_..., reads what a model drew where a map was wanted (ONE-PIC and OneDiffusion draw maps
as pictures), so that metrics.py can compare it with the truth.
"""

import torch

from minipic.world.scene import COLORS, Render, visible_boxes

NEAR = 3.5  # no surface is nearer to the camera, in world units
CREASE = 0.7  # the cosine of the angle between neighbouring pixels' normals that makes an edge

# ---- exact maps of a Render ---------------------------------------------------------------------

def labels_of(rendered: Render) -> torch.Tensor:
    """What every pixel shows [B,H,W]: 0 is the sky, 1 the floor, 2 + k scene.objects[k]."""
    return torch.where(rendered.depth.isinf(), 0, rendered.instances + 1)


def edges_of(rendered: Render) -> torch.Tensor:
    """Outlines and creases, bool [B,H,W]."""
    return borders(labels_of(rendered), rendered.normals)


def borders(labels: torch.Tensor, normals: torch.Tensor) -> torch.Tensor:
    """Where the pixel below or to the right is across an edge, bool [B,H,W].

    An edge is where the labels [B,H,W] differ, or the normals [B,3,H,W] differ much. Normals of 0
    stand for none and make no edge.
    """
    edge = torch.zeros_like(labels, dtype=torch.bool)
    for dim in (1, 2):  # below, to the right
        count = labels.shape[dim] - 1
        label = labels.narrow(dim, 0, count)
        next_label = labels.narrow(dim, 1, count)
        normal = normals.narrow(dim + 1, 0, count)
        next_normal = normals.narrow(dim + 1, 1, count)
        cosine = (normal * next_normal).sum(1)
        crease = (cosine < CREASE) & (normal != 0).any(1)
        edge.narrow(dim, 0, count).logical_or_((label != next_label) | crease)
    return edge


def normals_of(rendered: Render) -> torch.Tensor:
    """Normals [B,3,H,W] as the camera sees them: right, up, towards the viewer; 0 in the sky."""
    right_down_forward = rendered.extrinsics[:, :, :3]
    axes = right_down_forward * torch.tensor([1, -1, -1])[:, None]
    return (axes @ rendered.normals.flatten(2)).view_as(rendered.normals)


# ---- maps as pictures, and back -----------------------------------------------------------------

def edges_to_picture(edges: torch.Tensor) -> torch.Tensor:
    """Edges, bool [B,H,W], in white on black."""
    return edges[:, None].expand(-1, 3, -1, -1) * 2.0 - 1


def picture_to_edges(picture: torch.Tensor) -> torch.Tensor:
    """-> edges, bool [B,H,W]."""
    return picture.mean(1) > 0


def depth_to_picture(depth: torch.Tensor) -> torch.Tensor:
    """Depth [B,H,W] in world units, as its inverse in grey: NEAR is white, the sky black."""
    return (NEAR / depth)[:, None].expand(-1, 3, -1, -1) * 2 - 1


def picture_to_depth(picture: torch.Tensor) -> torch.Tensor:
    """-> depth [B,H,W] in world units; inf where the picture is black."""
    grey = (picture.mean(1) + 1) / 2
    return NEAR / grey.clamp(0, 1)


def normals_to_picture(normals: torch.Tensor) -> torch.Tensor:
    """Normals [B,3,H,W]: red is right, green up, blue towards the viewer; no normal is grey."""
    return normals.clamp(-1, 1)


def picture_to_normals(picture: torch.Tensor) -> torch.Tensor:
    """-> normals [B,3,H,W] of length 1; 0 where the picture is nearly grey."""
    length = picture.norm(dim=1, keepdim=True)
    return torch.where(length > 0.5, picture / length, 0.0)


def labels_to_picture(labels: torch.Tensor, colors: list[list[str]]) -> torch.Tensor:
    """Labels [B,H,W] in colours. colors: for each picture, the name of each label's colour."""
    pictures = []
    for label_map, names in zip(labels, colors):
        pictures.append(_paints(names)[label_map].permute(2, 0, 1))
    return torch.stack(pictures)


def picture_to_labels(picture: torch.Tensor, colors: list[list[str]]) -> torch.Tensor:
    """-> labels [B,H,W]: for each pixel the number of the nearest of its picture's colours."""
    labels = []
    for image, names in zip(picture, colors):
        difference = image[None] - _paints(names)[:, :, None, None]  # [labels,3,H,W]
        labels.append(difference.square().sum(1).argmin(0))
    return torch.stack(labels)


def boxes_to_picture(boxes: list[torch.Tensor], colors: list[list[str]],
                     size: tuple[int, int]) -> torch.Tensor:
    """Boxes as coloured frames on black.

    boxes: [n,4] of each picture, x0 y0 x1 y1 in pixels, the end exclusive. colors: their n names.
    """
    line = max(1, min(size) // 32)
    labels = torch.zeros(len(boxes), *size, dtype=torch.long)
    for label_map, corners in zip(labels, boxes):
        areas = (corners[:, 2:] - corners[:, :2]).prod(1)
        # large ones first: a small frame on top hides no more than parts of a large one's sides
        for k in areas.argsort(descending=True).tolist():
            x0, y0, x1, y1 = corners[k].tolist()
            inside = label_map[y0:y1, x0:x1]
            for side in (inside[:line], inside[-line:], inside[:, :line], inside[:, -line:]):
                side.fill_(k + 1)
    return labels_to_picture(labels, [["black", *names] for names in colors])


def picture_to_boxes(picture: torch.Tensor, colors: list[list[str]]) -> list[torch.Tensor]:
    """-> boxes [n,4] around the pixels of each of n colours; zeros for a colour that is missing."""
    labels = picture_to_labels(picture, [["black", *names] for names in colors])
    return [visible_boxes(label_map, len(names)) for label_map, names in zip(labels, colors)]


def _paints(names):
    """Colours by their names, of COLORS or "black": [n,3] in [-1,1]."""
    paints = []
    for name in names:
        rgb = (0.0, 0.0, 0.0) if name == "black" else COLORS[name]
        paints.append([2 * value - 1 for value in rgb])
    return torch.tensor(paints)
