"""The judge: a small network that reads a picture of the world back into a Description, and scores.

    judge = load_judge("weights/tiny/judge")
    descriptions = read(judge, images)              # images [B,3,H,W] in [-1,1]
    accuracy(asked, descriptions)["whole"]          # share of captions of which everything is right

It is a centre detector (Zhou et al. 2019, arXiv 1904.07850): it divides a picture into cells of 4x4
pixels. Each cell says how likely it holds the middle of an object, and what that object would be.
Floor and sky are read from the picture as a whole.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from minipic.common import CheckedConfig, InputError
from minipic.weights import read_weights, save_weights
from minipic.weights.files import read_json, write_json
from minipic.world.caption import FACTS, Description, Thing, compare, relations_of
from minipic.world.scene import (
    AHEAD, ASIDE, COLORS, FLOORS, PATTERNS, PLACES, SHAPES, SIZES, SKIES)
from minipic.weights.configs import config_from_json

CELL = 4  # pixels along a side of a cell

# What a cell says about the object whose middle it may hold, and in how many numbers.
CELL_HEADS = {
    "object": 1,  # logit of there being one
    "middle": 2,  # x and y of its middle from the cell's own, in cells
    "ahead": 1,  # see scene.Layout
    "color": len(COLORS),  # logits; an object with a pattern has two colours
    "shape": len(SHAPES),
    "size": len(SIZES),
    "pattern": len(PATTERNS),
}
# The same about the whole picture.
PICTURE_HEADS = {"floor": len(FLOORS), "sky": len(SKIES)}

MIN_PROBABILITY = 0.4  # of an object: those of renders score near 1, an empty floor near 0
MAX_OBJECTS = 3


@dataclass(frozen=True)
class JudgeConfig(CheckedConfig):
    width: int = 64  # channels at 1/4 of the picture's size
    deep: int = 80  # channels at 1/8


class Residual(nn.Module):
    """x [B,width,h,w] -> the same shape."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(F.relu(self.norm(x)))
        return x + self.conv2(F.relu(h))


class Judge(nn.Module):
    """Images [B,3,H,W] in [-1,1], H and W multiples of 8 -> (cells [B,24,H/4,W/4], setting [B,6]).

    The 24 numbers of a cell are those of CELL_HEADS, the 6 of a setting those of PICTURE_HEADS: see
    `heads`.
    """

    def __init__(self, config: JudgeConfig = JudgeConfig()):
        super().__init__()
        self.config = config
        width = config.width
        deep = config.deep
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, width, 3, stride=2, padding=1), Residual(width))
        self.down = nn.Sequential(
            nn.Conv2d(width, deep, 3, stride=2, padding=1), Residual(deep), Residual(deep))
        self.up = nn.Conv2d(deep, width, 1)
        self.mix = Residual(width)
        self.cells = nn.Conv2d(width, sum(CELL_HEADS.values()), 1)
        self.setting = nn.Linear(deep, sum(PICTURE_HEADS.values()))
        nn.init.constant_(self.cells.bias[:1], -4.0)  # "object": nearly every cell is empty

    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the heads read: fine [B,width,H/4,W/4] and deep [B,deep,H/8,W/8]."""
        x = self.stem(images.contiguous(memory_format=torch.channels_last))
        deep = self.down(x)
        fine = self.mix(x + F.interpolate(self.up(deep), scale_factor=2))
        return fine, deep

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fine, deep = self.features(images)
        cells = self.cells(F.relu(fine))
        setting = self.setting(F.relu(deep).mean((2, 3)))
        return cells.float(), setting.float()


def save_judge(judge: Judge, folder: str | Path):
    """Write config.json and model.safetensors into `folder`."""
    write_json(asdict(judge.config), Path(folder, "config.json"))
    save_weights(judge.state_dict(), Path(folder, "model.safetensors"))


def load_judge(folder: str | Path) -> Judge:
    """The judge of `folder`, in eval mode. Raises InputError for files that do not fit."""
    values = read_json(Path(folder, "config.json"))
    config = config_from_json(JudgeConfig, values, {}, f"{folder}/config.json")
    weights = read_weights(Path(folder, "model.safetensors"))
    weights = {name: tensor.float() for name, tensor in weights.items()}
    try:
        with torch.device("meta"):
            judge = Judge(config)
        judge.load_state_dict(weights, strict=True, assign=True)
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"{folder}: model.safetensors does not fit config.json; "
                         "copy both again") from error
    return judge.eval()


# ---- reading pictures ---------------------------------------------------------------------------

def heads(numbers: torch.Tensor, sizes: dict[str, int], dim: int) -> dict[str, torch.Tensor]:
    """Split numbers along `dim` by name. sizes: CELL_HEADS or PICTURE_HEADS.

    The parts are views: to write into one is to write into `numbers`.
    """
    return dict(zip(sizes, numbers.split(tuple(sizes.values()), dim)))


@torch.no_grad()
def read(judge: nn.Module, images: torch.Tensor, batch: int = 256) -> list[Description]:
    """Everything that the judge finds in pictures [B,3,H,W] in [-1,1]: B Descriptions."""
    descriptions = []
    for part in images.split(batch):
        cells, settings = judge(part)
        for cells_of_picture, setting in zip(cells, settings):
            descriptions.append(_describe(cells_of_picture, setting))
    return descriptions


def _describe(cells, setting):
    """The judge's numbers for one picture, cells [24,h,w] and setting [6] -> a Description."""
    height, width = cells.shape[1:]
    y, x = _find_objects(cells[0].sigmoid())
    objects = heads(cells[:, y, x].T, CELL_HEADS, dim=1)  # each [n, its numbers]
    across = (x + 0.5 + objects["middle"][:, 0]) / width
    aside = (across - 0.5) * width / min(height, width)
    ahead = objects["ahead"][:, 0]

    shapes = _most_likely(objects["shape"], SHAPES)
    sizes = _most_likely(objects["size"], SIZES)
    patterns = _most_likely(objects["pattern"], PATTERNS)
    things = []
    for k, share in enumerate(across.tolist()):
        count = 1 if patterns[k] == "plain" else 2
        color, color2 = _colors(objects["color"][k], count)
        place = _nearest_place(share)
        things.append(Thing(color, color2, shapes[k], sizes[k], patterns[k], place))

    # two things that a caption relates are ASIDE or AHEAD apart, in one direction or in the other:
    # half of it separates "left of" from neither
    relations = relations_of(aside.tolist(), ahead.tolist(), ASIDE / 2, AHEAD / 2)
    picture = heads(setting, PICTURE_HEADS, dim=0)
    floor, = _most_likely(picture["floor"][None], FLOORS)
    sky, = _most_likely(picture["sky"][None], SKIES)
    return Description(tuple(things), relations, floor, sky)


def _find_objects(probability):
    """The cells (y [n], x [n]) that hold objects, the likeliest first. probability [h,w]."""
    highest_around = F.max_pool2d(probability[None], 3, 1, 1)[0]
    is_peak = (probability == highest_around) & (probability > MIN_PROBABILITY)
    y, x = is_peak.nonzero(as_tuple=True)
    best = probability[y, x].argsort(descending=True)[:MAX_OBJECTS]
    return y[best], x[best]


def _most_likely(logits, options):
    """Logits [n, number of options] -> n options."""
    options = list(options)
    return [options[k] for k in logits.argmax(1).tolist()]


def _colors(logits, count):
    """The one or two most likely colours in the order of COLORS; the second is None for one."""
    names = list(COLORS)
    best = logits.topk(count).indices.sort().values.tolist()
    color = names[best[0]]
    color2 = names[best[1]] if count == 2 else None
    return color, color2


def _nearest_place(across):
    """The place of PLACES nearest to a share of the picture's width."""
    names = list(PLACES)
    for name, next_name in zip(names, names[1:]):
        gap_start = PLACES[name][1]
        gap_end = PLACES[next_name][0]
        if across <= (gap_start + gap_end) / 2:
            return name
    return names[-1]


# ---- scores -------------------------------------------------------------------------------------

def accuracy(asked: list[Description], actual: list[Description]) -> dict[str, float]:
    """{fact: share of those asked for that are right}, over pairs of Descriptions; nan if none is.

    "whole" is the share of pairs in which everything is right, the number of objects included.
    """
    scores = [compare(wanted, found) for wanted, found in zip(asked, actual, strict=True)]
    shares = {}
    for fact in (*FACTS, "whole"):
        right = 0
        total = 0
        for score in scores:
            right += score[fact][0]
            total += score[fact][1]
        shares[fact] = right / total if total else float("nan")
    return shares


@torch.no_grad()
def embed(judge: Judge, images: torch.Tensor, batch: int = 256) -> torch.Tensor:
    """The judge's features, averaged over each picture: [B, width + deep]."""
    vectors = []
    for part in images.split(batch):
        fine, deep = judge.features(part)
        means = [F.relu(fine).mean((2, 3)).float(), F.relu(deep).mean((2, 3)).float()]
        vectors.append(torch.cat(means, dim=1))
    return torch.cat(vectors)


@torch.no_grad()
def embed_objects(judge: Judge, images: torch.Tensor, middles: torch.Tensor) -> torch.Tensor:
    """The judge's features [B,width] at one object of each picture. middles [B,2]: its x, y."""
    height, width = images.shape[2:]
    fine, _ = judge.features(images)
    size = torch.tensor([width, height], device=middles.device)
    grid = (2 * middles / size - 1)[:, None, None]  # grid_sample's -1..1
    features = F.grid_sample(
        F.relu(fine).float(), grid, padding_mode="border", align_corners=False)
    return features[:, :, 0, 0]


@torch.no_grad()
def embed_style(judge: Judge, images: torch.Tensor) -> torch.Tensor:
    """How a picture is drawn rather than what is in it [B, width (width + 1) / 2].

    It is the Gram matrix of early features (Gatys et al. 2016), its upper half.
    """
    early = judge.stem(images).flatten(2).float()
    gram = early @ early.transpose(1, 2) / early.shape[2]
    rows, columns = torch.triu_indices(*gram.shape[1:])
    return gram[:, rows, columns]


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """1 - cosine of vectors [B,D] -> [B]: 0 for the same object or style."""
    return 1 - F.cosine_similarity(a.double(), b.double(), dim=1)


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """Frechet distance of two sets of feature vectors [N,D] as Gaussians (Heusel et al. 2017).

    It is |mean_a - mean_b|^2 + tr(S_a + S_b - 2 sqrt(S_a S_b)), with covariances S, in fp64.
    sqrt(S_a) S_b sqrt(S_a) has the same eigenvalues as S_a S_b, and it is symmetric.
    """
    a = a.double()
    b = b.double()
    cov_a = torch.cov(a.T, correction=1)
    cov_b = torch.cov(b.T, correction=1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * cross).item()
