"""Edit instructions: a scene -> the scene after "make the cube green" and the like, clear and unambiguous."""

from dataclasses import replace

import torch

from minipic.world.camera import direction
from minipic.world.caption import Thing, describe, noun_phrase, place_of
from minipic.world.scene import COLORS, PLACES, SHAPES, SIZES, centres, clear, layout


def pick(options, g):
    return options[torch.randint(len(options), (), generator=g).item()]


def refer(scene, k):
    """The fewest words that mean object k alone, e.g. "red cube", or None where another one looks the same."""
    things = describe(scene).things
    for known in (("shape",), ("color", "color2", "pattern", "shape"), ("size", "color", "color2", "pattern", "shape")):
        said = [Thing(**{part: getattr(thing, part) for part in known}) for thing in things]
        if said.count(said[k]) == 1:
            return name_of(said[k])


def name_of(thing):
    """Its looks in words, e.g. "small red cube"."""
    return noun_phrase(replace(thing, place=None), lambda words: words[0]).split(" ", 1)[1]


def nameable(scene):
    return all(refer(scene, k) for k in range(len(scene.objects)))


def valid(scene):
    """Whether the scene is as clear as those of sample_scene, and every object can be named."""
    offset = torch.tensor([[[o.x, 0, o.z] for o in scene.objects]])
    still = [replace(o, x=0.0, z=0.0) for o in scene.objects]
    across = layout(centres(scene.objects), scene.camera, scene.aspect)[0].tolist()
    placed = len(across) > 1 or place_of(across[0])
    return bool(placed and clear(still, offset, scene.camera, scene.aspect) and nameable(scene))


# ---- (scene, k, its name, generator) -> object k changed (None: removed) and the instruction; or None --------------

def recolour(scene, k, it, g):
    o = scene.objects[k]
    color = pick([c for c in COLORS if c not in (o.color, o.color2)], g)
    plain = "" if o.pattern == "plain" else "plain "
    return replace(o, color=color, color2=None, pattern="plain"), f"{pick(('make', 'paint'), g)} {it} {plain}{color}"


def remove(scene, k, it, g):
    return (None, f"{pick(('remove', 'take away'), g)} {it}") if len(scene.objects) > 1 else None


def move(scene, k, it, g):
    """Sideways, to the clear spot that is nearest to the middle of another place."""
    o, right, far = scene.objects[k], direction(scene.camera.azimuth + 90, 0), 2.4 * max(1, scene.aspect)
    steps = (torch.linspace(-far, far, 65)[:, None] * right).tolist()
    spots = [o] + [replace(o, x=o.x + x, z=o.z + z) for x, _, z in steps]
    here, *across = layout(centres(spots), scene.camera, scene.aspect)[0].tolist()
    place = pick([name for name in PLACES if name != place_of(here)], g)
    for x, spot in sorted(zip(across, spots[1:]), key=lambda way: abs(way[0] - sum(PLACES[place]) / 2)):
        if place_of(x) == place and abs(x - here) > 0.2 and valid(put(scene, k, spot)):
            return spot, f"move {it} to the {place}"


def resize(scene, k, it, g):
    o = scene.objects[k]
    size = pick([s for s in SIZES if s != o.size and (o.pattern == "plain" or s != "small")], g)
    return replace(o, size=size), f"make {it} {size}"


def reshape(scene, k, it, g):
    shape = pick([s for s in SHAPES if s != scene.objects[k].shape], g)
    return replace(scene.objects[k], shape=shape), f"{pick(('turn', 'change'), g)} {it} into a {shape}"


EDITS = {"recolour": recolour, "remove": remove, "move": move, "resize": resize, "reshape": reshape}


def put(scene, k, o):
    """The scene with `o` in place of its object k, or without it."""
    return replace(scene, objects=scene.objects[:k] + ((o,) if o else ()) + scene.objects[k + 1:])


def edited(scene, kind, g):
    """A random edit of one of EDITS: the scene after it and the instruction, or None where that isn't clear."""
    k = pick(range(len(scene.objects)), g)
    change = EDITS[kind](scene, k, f"the {refer(scene, k)}", g) if nameable(scene) else None
    if change and valid(put(scene, k, change[0])):
        return put(scene, k, change[0]), change[1]
