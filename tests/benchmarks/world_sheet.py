"""One pair of every task and two scenes in every style, as tutorials/figures/world.png; and tutorials/magenta, a folder
of captioned pictures that show a colour the world lacks, for a model to learn.

    python tests/benchmarks/world_sheet.py
"""

import argparse
import json
import sys
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from minipic.common import rng  # noqa: E402
from minipic.figures import image_grid  # noqa: E402
from minipic.image import to_pictures  # noqa: E402
from minipic.world.caption import describe, say  # noqa: E402
from minipic.world.scene import COLORS, render, sample_scene  # noqa: E402
from minipic.world.styles import STYLES  # noqa: E402
from minipic.world.tasks import TASKS  # noqa: E402

SEED, GAP = 0, 4


def rich(number):
    """The indices of the first scenes that show three objects and a pattern."""
    objects = ((i, sample_scene(SEED, i).objects) for i in count())
    return list(islice((i for i, found in objects if len(found) == 3 and any(o.color2 for o in found)), number))


def side_by_side(one, two):
    """Two pictures [3,H,W] with a gap, every pixel twice as large, as a PIL picture."""
    pair = to_pictures(torch.cat([F.pad(one, (0, GAP), value=1.0), two], 2)[None])[0]
    return pair.resize((2 * pair.width, 2 * pair.height), Image.Resampling.NEAREST)


@mock.patch.dict(COLORS, magenta=(0.95, 0.12, 0.55))
def magenta(folder, shapes=("sphere", "cube", "cylinder", "diamond"), each=3):
    """Pictures of single magenta objects, some shapes left out, with a metadata.jsonl of captions."""
    found = [sample_scene(SEED + 1, i, objects=1) for i in range(200)]
    scenes = []
    for shape in shapes:
        fitting = [scene for scene in found if scene.objects[0].shape == shape and scene.objects[0].size != "small"]
        for scene in fitting[:each]:
            magenta_object = replace(scene.objects[0], color="magenta", color2=None, pattern="plain")
            scenes.append(replace(scene, objects=(magenta_object,)))
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w") as file:
        for i, (scene, picture) in enumerate(zip(scenes, to_pictures(render(scenes, truth=False).rgb))):
            picture.save(folder / f"{i:02d}.png", optimize=True)
            print(json.dumps({"file_name": f"{i:02d}.png", "text": say(describe(scene), rng(SEED, i))}), file=file)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    magenta(ROOT / "tutorials" / "magenta")
    index, other = rich(2)
    pairs = {name: task(SEED, [index]) for name, task in TASKS.items()}
    pictures = [side_by_side(pair.source[0], pair.target[0]) for pair in pairs.values()]
    labels = [f"{name}: {pair.prompts[0]}" if name in ("edit", "view") else name for name, pair in pairs.items()]
    scenes = [sample_scene(SEED, i) for i in (index, other)]
    for name, (shade, _) in STYLES.items():
        pictures.append(side_by_side(*render(scenes, shade=shade, truth=False).rgb))
        labels.append(name)
    path = ROOT / "tutorials" / "figures" / "world.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(pictures, labels, columns=3, cell=pictures[0].width).save(path, optimize=True)
    print(path.relative_to(ROOT), path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
