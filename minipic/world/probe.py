"""The judge: a small network that reads a picture of the world back into a Description, and scores made with it.

A centre detector (Zhou et al. 2019, arXiv 1904.07850): pictures [B,3,H,W] -> a grid of H/4 x W/4 cells, each with how
likely an object's middle is there and what it would be, and one reading of floor and sky for the whole picture.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minipic.common import InputError, from_json
from minipic.weights import read_json, read_weights, save_weights, write_json
from minipic.world.caption import FACTS, Description, Thing, compare, relations_of
from minipic.world.scene import AHEAD, ASIDE, COLORS, FLOORS, PATTERNS, PLACES, SHAPES, SIZES, SKIES

CELL = 4            # pixels to a cell
# What a cell says, and how many numbers it takes: `middle` is an offset in cells, `ahead` as in scene.layout
CELL_HEADS = {"object": 1, "middle": 2, "ahead": 1, "color": len(COLORS), "shape": len(SHAPES), "size": len(SIZES),
              "pattern": len(PATTERNS)}
PICTURE_HEADS = {"floor": len(FLOORS), "sky": len(SKIES)}
SURE = 0.4          # least probability that counts as an object: renders score near 1, empty floor near 0


@dataclass(frozen=True)
class JudgeConfig:
    width: int = 64     # channels at 1/4 of the picture's size
    deep: int = 80      # channels at 1/8


class Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(self.norm(x)))))


class Judge(nn.Module):
    """images [B,3,H,W] in [-1,1], H and W multiples of 8 -> (cells [B,24,H/4,W/4], setting [B,6])."""

    def __init__(self, config=JudgeConfig()):
        super().__init__()
        self.config, w, d = config, config.width, config.deep
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, w, 3, 2, 1), Residual(w))
        self.down = nn.Sequential(nn.Conv2d(w, d, 3, 2, 1), Residual(d), Residual(d))
        self.up, self.mix = nn.Conv2d(d, w, 1), Residual(w)
        self.cells = nn.Conv2d(w, sum(CELL_HEADS.values()), 1)
        self.setting = nn.Linear(d, sum(PICTURE_HEADS.values()))
        nn.init.constant_(self.cells.bias[:1], -4.0)    # nearly every cell is empty: start from there

    def features(self, images):
        """What the heads read: fine [B,width,H/4,W/4] and deep [B,deep,H/8,W/8]."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        deep = self.down(x)
        return self.mix(x + F.interpolate(self.up(deep), scale_factor=2)), deep

    def forward(self, images):
        fine, deep = self.features(images)
        return self.cells(F.relu(fine)).float(), self.setting(F.relu(deep).mean((2, 3))).float()


def save_judge(judge, folder):
    """Write config.json and model.safetensors into `folder`."""
    write_json(asdict(judge.config), Path(folder, "config.json"))
    save_weights(judge.state_dict(), Path(folder, "model.safetensors"))


def load_judge(folder):
    """The judge of `folder`, in eval mode. Raises InputError for files that don't fit."""
    config = from_json(JudgeConfig, read_json(Path(folder, "config.json")), {}, f"{folder}/config.json")
    weights = {k: v.float() for k, v in read_weights(Path(folder, "model.safetensors")).items()}
    try:
        with torch.device("meta"):
            judge = Judge(config)
        judge.load_state_dict(weights, strict=True, assign=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: model.safetensors does not fit config.json; copy both again") from error
    return judge.eval()


# ---- reading pictures -------------------------------------------------------------------------------------------

def heads(numbers, sizes, dim):
    """Split the numbers of a cell or picture by name."""
    return dict(zip(sizes, numbers.split(tuple(sizes.values()), dim)))


@torch.no_grad()
def read(judge, images, batch=256):
    """Pictures [B,3,H,W] in [-1,1] -> B Descriptions of everything that the judge sees."""
    return [_describe(c, s) for part in images.split(batch) for c, s in zip(*judge(part))]


def _describe(cells, setting):
    height, width = cells.shape[1:]
    likely = cells[:1].sigmoid()
    peak = (likely == F.max_pool2d(likely, 3, 1, 1)) & (likely > SURE)
    y, x = peak[0].nonzero(as_tuple=True)
    best = likely[0, y, x].argsort(descending=True)[:3]
    y, x = y[best], x[best]
    says = heads(cells[:, y, x].T, CELL_HEADS, 1)
    across = (x + 0.5 + says["middle"][:, 0]) / width
    aside = (across - 0.5) * width / min(height, width)
    names = lambda key, table: [list(table)[k] for k in says[key].argmax(1).tolist()]
    shapes, sizes, patterns = names("shape", SHAPES), names("size", SIZES), names("pattern", PATTERNS)
    things = []
    for k, share in enumerate(across.tolist()):
        colors = says["color"][k].topk(1 if patterns[k] == "plain" else 2).indices.sort().values.tolist()
        color, color2 = ([list(COLORS)[c] for c in colors] + [None])[:2]
        things.append(Thing(color, color2, shapes[k], sizes[k], patterns[k], _place(share)))
    # asked relations are clear by the full gaps: half of each is the line between true and false
    relations = relations_of(aside.tolist(), says["ahead"][:, 0].tolist(), ASIDE / 2, AHEAD / 2)
    setting = heads(setting, PICTURE_HEADS, 0)
    floor, sky = list(FLOORS)[setting["floor"].argmax()], list(SKIES)[setting["sky"].argmax()]
    return Description(tuple(things), relations, floor, sky)


def _place(across):
    """The named place nearest to a share of the width: the lines are in the middle of the gaps."""
    names = list(PLACES)
    lines = [(PLACES[a][1] + PLACES[b][0]) / 2 for a, b in zip(names, names[1:])]
    return names[sum(across > line for line in lines)]


# ---- scores -----------------------------------------------------------------------------------------------------

def accuracy(asked, seen):
    """{fact: share of right ones among those asked for} over pairs of Descriptions; nan if nothing was asked.

    "whole" is the share of captions of which everything is right, the number of objects included.
    """
    scores = [compare(a, s) for a, s in zip(asked, seen, strict=True)]
    totals = {fact: [sum(score[fact][k] for score in scores) for k in (0, 1)] for fact in (*FACTS, "whole")}
    return {fact: right / total if total else float("nan") for fact, (right, total) in totals.items()}


@torch.no_grad()
def embed(judge, images, batch=256):
    """One vector [B, width + deep] for each picture: the judge's features, averaged over the picture."""
    return torch.cat([torch.cat([F.relu(f).mean((2, 3)).float() for f in judge.features(part)], 1)
                      for part in images.split(batch)])


@torch.no_grad()
def embed_objects(judge, images, middles):
    """The judge's features [B, width] at one object in each picture; middles [B,2] are x, y in pixels."""
    fine = F.relu(judge.features(images)[0]).float()
    size = torch.tensor([images.shape[3], images.shape[2]], device=middles.device)
    grid = (2 * middles / size - 1)[:, None, None]
    return F.grid_sample(fine, grid, padding_mode="border", align_corners=False)[:, :, 0, 0]


@torch.no_grad()
def embed_style(judge, images):
    """How a picture is drawn rather than what is in it [B, width (width + 1) / 2]: the features' Gram matrix
    (Gatys et al. 2016), early in the network."""
    early = judge.stem(images).flatten(2).float()
    gram = early @ early.transpose(1, 2) / early.shape[2]
    rows, columns = torch.triu_indices(*gram.shape[1:])
    return gram[:, rows, columns]


def distance(a, b):
    """1 - cosine of vectors [B,D]: 0 the same object or style."""
    return 1 - F.cosine_similarity(a.double(), b.double(), dim=1)


def frechet(a, b):
    """Frechet distance of two sets of feature vectors [N,D], as Gaussians (Heusel et al. 2017), in fp64.

    tr sqrt(S_a S_b) is taken from the symmetric sqrt(S_a) S_b sqrt(S_a), which has the same eigenvalues.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = (torch.cov(x.T, correction=1) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()
