"""Edits of scenes by instruction: "make the cube green" -> the scene in which the cube is green.

Every edit is clear: its words fit one object only, and the scene after it could come from
sample_scene.
"""

from dataclasses import replace

import torch

from minipic.world.camera import direction
from minipic.world.caption import Thing, describe, noun_phrase, place_of
from minipic.world.choices import one_of
from minipic.world.scene import (
    COLORS, PLACES, SHAPES, SIZES, Object, Scene, centres, clear, layout)

LEAST_MOVE = 0.2  # of an object that moves, in shares of the picture's width

# ---- names of objects ---------------------------------------------------------------------------

# The facts that a name is made of, from the shortest name to the longest.
NAMES = (
    ("shape",),
    ("color", "color2", "pattern", "shape"),
    ("size", "color", "color2", "pattern", "shape"),
)


def refer(scene: Scene, k: int) -> str | None:
    """The shortest name that fits object k alone, e.g. "red cube"; None if no name does."""
    things = describe(scene).things
    for facts in NAMES:
        reduced = []
        for thing in things:
            known = {fact: getattr(thing, fact) for fact in facts}
            reduced.append(Thing(**known))
        if reduced.count(reduced[k]) == 1:
            return name_of(reduced[k])
    return None


def name_of(thing: Thing) -> str:
    """A thing in the usual words without article and place, e.g. "small red cube"."""
    phrase = noun_phrase(replace(thing, place=None), choose=_first)
    _, name = phrase.split(" ", 1)
    return name


def _first(options):
    return options[0]


def nameable(scene: Scene) -> bool:
    """Whether every object has a name that fits it alone."""
    return all(refer(scene, k) is not None for k in range(len(scene.objects)))


# ---- clear scenes -------------------------------------------------------------------------------

def valid(scene: Scene) -> bool:
    """Whether a scene is as clear as those of sample_scene and all its objects are nameable."""
    objects = scene.objects
    if len(objects) == 1:
        across = layout(centres(objects), scene.camera, scene.aspect).across
        if place_of(across.item()) is None:
            return False
    at_the_middle = [replace(o, x=0.0, z=0.0) for o in objects]
    offsets = torch.tensor([[[o.x, 0, o.z] for o in objects]])  # [1,n,3]: one placement
    return bool(clear(at_the_middle, offsets, scene.camera, scene.aspect)) and nameable(scene)


def put(scene: Scene, k: int, o: Object | None) -> Scene:
    """The scene with `o` in place of its object k, or without object k."""
    new = () if o is None else (o,)
    return replace(scene, objects=scene.objects[:k] + new + scene.objects[k + 1:])


# ---- the edits ----------------------------------------------------------------------------------
#
# An edit of object k, which is called `name`, for example "the red cube", gives
#     the object after the edit, or None if it is removed, and the instruction;
#     or None where the edit is not possible.

Change = tuple[Object | None, str]


def _others(options, *unwanted):
    return [option for option in options if option not in unwanted]


def recolour(scene: Scene, k: int, name: str, generator: torch.Generator) -> Change | None:
    o = scene.objects[k]
    color = one_of(_others(COLORS, o.color, o.color2), generator)
    verb = one_of(("make", "paint"), generator)
    plain = "" if o.pattern == "plain" else "plain "
    return replace(o, color=color, color2=None, pattern="plain"), f"{verb} {name} {plain}{color}"


def remove(scene: Scene, k: int, name: str, generator: torch.Generator) -> Change | None:
    if len(scene.objects) == 1:
        return None
    verb = one_of(("remove", "take away"), generator)
    return None, f"{verb} {name}"


def move(scene: Scene, k: int, name: str, generator: torch.Generator) -> Change | None:
    """Sideways, to the clear spot nearest to the middle of another place."""
    o = scene.objects[k]
    right = direction(scene.camera.azimuth + 90, 0)
    far = 2.4 * max(1, scene.aspect)
    moves = (torch.linspace(-far, far, 65)[:, None] * right).tolist()
    moved = [replace(o, x=o.x + x, z=o.z + z) for x, _, z in moves]
    here, *across = layout(centres([o, *moved]), scene.camera, scene.aspect).across.tolist()

    place = one_of(_others(PLACES, place_of(here)), generator)
    middle = sum(PLACES[place]) / 2

    def distance_to_middle(candidate):
        x, _ = candidate
        return abs(x - middle)

    for x, new in sorted(zip(across, moved), key=distance_to_middle):
        if place_of(x) == place and abs(x - here) > LEAST_MOVE and valid(put(scene, k, new)):
            return new, f"move {name} to the {place}"
    return None


def resize(scene: Scene, k: int, name: str, generator: torch.Generator) -> Change | None:
    o = scene.objects[k]
    sizes = _others(SIZES, o.size)
    if o.pattern != "plain":
        sizes = _others(sizes, "small")  # small objects have no patterns
    size = one_of(sizes, generator)
    return replace(o, size=size), f"make {name} {size}"


def reshape(scene: Scene, k: int, name: str, generator: torch.Generator) -> Change | None:
    o = scene.objects[k]
    shape = one_of(_others(SHAPES, o.shape), generator)
    verb = one_of(("turn", "change"), generator)
    return replace(o, shape=shape), f"{verb} {name} into a {shape}"


EDITS = {
    "recolour": recolour, "remove": remove, "move": move, "resize": resize, "reshape": reshape}


def edited(scene: Scene, kind: str, generator: torch.Generator) -> tuple[Scene, str] | None:
    """A random edit. kind: of EDITS. -> the scene after it and the instruction.

    Gives None if the object that it draws cannot be edited in this way, or not clearly.
    """
    k = one_of(range(len(scene.objects)), generator)
    if not nameable(scene):
        return None
    change = EDITS[kind](scene, k, f"the {refer(scene, k)}", generator)
    if change is None:
        return None
    o, instruction = change
    after = put(scene, k, o)
    return (after, instruction) if valid(after) else None
