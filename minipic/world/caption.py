"""Captions for scenes by grammar, and the way back: scene -> Description -> text -> Description.

A Description holds what is said (or seen); None means unsaid. `ask` chooses what to say of a scene, `say` finds words
for it, `parse` reads them back exactly, `compare` counts which of the facts asked for hold in what is seen.
"""

import re
from dataclasses import dataclass, fields
from itertools import permutations, product

import torch

from minipic.common import InputError
from minipic.world.scene import AHEAD, ASIDE, COLORS, FLOORS, PATTERNS, PLACES, SHAPES, SIZES, SKIES, centres, layout

NOUNS = {**{shape: (shape,) for shape in SHAPES}, "sphere": ("sphere", "ball"), "cube": ("cube", "box"),
         "torus": ("torus", "ring"), None: ("object",)}
SIZE_WORDS = {"small": ("small", "tiny"), "medium": ("medium",), "large": ("large", "big")}
PLACE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
RELATIONS = {"left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
             "front": ("in front of",), "behind": ("behind",)}
SKY_WORDS = {"blue": ("under a blue sky",), "sunset": ("at sunset", "under a sunset sky"),
             "night": ("at night", "under a night sky")}
OPENINGS = ("", "a picture of ", "a rendering of ", "there is ")
FACTS = ("count", "color", "shape", "size", "pattern", "place", "relation", "floor", "sky")


@dataclass(frozen=True)
class Thing:
    color: str = None
    color2: str = None      # with color: unordered, kept in the order of COLORS
    shape: str = None
    size: str = None
    pattern: str = None
    place: str = None


@dataclass(frozen=True)
class Description:
    things: tuple
    relations: tuple = ()   # (i, word of RELATIONS, j): thing i is left of / ... thing j
    floor: str = None
    sky: str = None


def place_of(across):
    """The named place of a share of the picture's width, or None in the gaps between."""
    return next((name for name, (low, high) in PLACES.items() if low <= across <= high), None)


def relations_of(aside, ahead, least_aside=ASIDE, least_ahead=AHEAD):
    """All clear relations of things at `aside` and `ahead` (see scene.layout), both ways round."""
    return tuple((i, word, j) for i, j in product(range(len(aside)), repeat=2) for word, gap, least in (
        ("left", aside[j] - aside[i], least_aside), ("right", aside[i] - aside[j], least_aside),
        ("front", ahead[i] - ahead[j], least_ahead), ("behind", ahead[j] - ahead[i], least_ahead)) if gap >= least)


def describe(scene):
    """Everything that can be said of a scene."""
    across, aside, ahead = (x.tolist() for x in layout(centres(scene.objects), scene.camera, scene.aspect))
    things = tuple(Thing(o.color, o.color2, o.shape, o.size, o.pattern, place_of(x))
                   for o, x in zip(scene.objects, across))
    return Description(things, relations_of(aside, ahead), scene.floor, scene.sky)


def ask(scene, generator):
    """A random part of what can be said of a scene: the things in any order, some of their attributes and relations."""
    chance = lambda p: torch.rand((), generator=generator).item() < p
    full = describe(scene)
    order = torch.randperm(len(full.things), generator=generator).tolist()
    known = {(order.index(i), order.index(j)): [] for i, _, j in full.relations}
    for i, word, j in full.relations:
        known[order.index(i), order.index(j)].append(word)
    pick = lambda words: words[torch.randint(len(words), (), generator=generator).item()]
    relations = ()
    if known and chance(0.75):
        relations = ((0, pick(known[0, 1]), 1),)
        if len(order) == 3 and chance(0.6):
            relations += ((0, pick(known[0, 2]), 2),)
    things = tuple(_part(full.things[k], chance, not relations and chance(0.6)) for k in order)
    return Description(things, relations, full.floor if chance(0.5) else None, full.sky if chance(0.4) else None)


def _part(thing, chance, with_place):
    """Shape and colours are nearly always said; a plain surface goes without saying where the colour is said."""
    color, shape, size = chance(0.95), chance(0.96), chance(0.7)
    return Thing(thing.color if color else None, thing.color2 if color else None, thing.shape if shape else None,
                 thing.size if size else None, thing.pattern if color or thing.pattern != "plain" else None,
                 thing.place if with_place else None)


def noun_phrase(thing, pick):
    words = [pick(SIZE_WORDS[thing.size])] if thing.size else []
    colors = [c for c in (thing.color, thing.color2) if c]
    words += [" and ".join(colors[::pick((1, -1))])] if colors else []
    words += [thing.pattern] if thing.pattern not in (None, "plain") else []
    words += [pick(NOUNS[thing.shape])] + ([PLACE_WORDS[thing.place]] if thing.place else [])
    return ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)


def say(description, generator):
    """Words for a Description: `parse` gives the same Description back."""
    def pick(options):      # the first word is the usual one
        usual = len(options) == 1 or torch.rand((), generator=generator).item() < 0.75
        return options[0 if usual else torch.randint(1, len(options), (), generator=generator).item()]

    first, *others = (noun_phrase(thing, pick) for thing in description.things)
    words = [word for _, word, _ in description.relations]
    if words == ["right", "left"]:
        text = f"{first} between {others[0]} and {others[1]}"
    elif words:
        text = f"{first} {pick(RELATIONS[words[0]])} {others[0]}"
        if len(others) == 2:
            text += f" and {pick(RELATIONS[words[1]])} {others[1]}" if len(words) == 2 else f", and {others[1]}"
    else:
        text = ", ".join([first, *others[:-1]]) + (f" and {others[-1]}" if others else "")
    setting = [f"on a {description.floor} floor"] if description.floor else []
    setting += [pick(SKY_WORDS[description.sky])] if description.sky else []
    return pick(OPENINGS) + text + (pick((" ", ", ")) + " ".join(setting) if setting else "")


def caption(scene, generator):
    """A random true caption of a scene."""
    return say(ask(scene, generator), generator)


def _meanings(table):
    return {word: meaning for meaning, words in table.items() for word in words}


_NOUN, _SIZE, _RELATION, _SKY = map(_meanings, (NOUNS, SIZE_WORDS, RELATIONS, SKY_WORDS))
_PLACE = {words: place for place, words in PLACE_WORDS.items()}
_THING = re.compile(r"\ban? (?:({size}) )?(?:({color}) )?(?:and ({color}) )?(?:({pattern}) )?({noun})\b"
                    r"(?: ({place})\b)?".format(size="|".join(_SIZE), color="|".join(COLORS),
                                                pattern="|".join(list(PATTERNS)[1:]), noun="|".join(_NOUN),
                                                place="|".join(_PLACE)))
_SETTING = re.compile(r"(?: ?,? ?on a ({}) floor)?(?: ?,? ?({}))?".format("|".join(FLOORS), "|".join(_SKY)))


def _thing(match):
    size, color, color2, pattern, noun, place = match.groups()
    color, color2 = sorted((color, color2), key=lambda c: [*COLORS, None].index(c))
    pattern = pattern or ("plain" if color else None)
    return Thing(color, color2, _NOUN[noun], _SIZE.get(size), pattern, _PLACE.get(place))


def parse(text):
    """The Description that `text` states. Raises InputError where the grammar doesn't know the words."""
    text = " ".join(text.lower().split())
    matches = list(_THING.finditer(text))
    if not matches:
        raise InputError(f"caption {text!r} names no object; say e.g. 'a small red sphere left of a large blue cube'")
    ends = [0] + [m.end() for m in matches]
    opening, *joints = (text[end:m.start()].strip() for end, m in zip(ends, matches))
    setting = _SETTING.fullmatch(text[ends[-1]:])
    things = tuple(map(_thing, matches))
    if joints == ["between", "and"]:
        words = ["right", "left"]
    else:
        words = [_RELATION.get(joint.removeprefix("and "), "" if joint in (",", "and", ", and") else None)
                 for joint in joints]
    relations = tuple((0, word, i + 1) for i, word in enumerate(words) if word)
    if None in words or not setting or opening not in {o.strip() for o in OPENINGS}:
        raise InputError(f"caption {text!r} has words outside the grammar; its words are {', '.join(WORDS)}")
    return Description(things, relations, setting[1], _SKY.get(setting[2]))


WORDS = tuple(sorted(set(" ".join(["a an and between , floor on", *OPENINGS, *COLORS, *FLOORS, *list(PATTERNS)[1:],
                                   *_NOUN, *_SIZE, *_RELATION, *_SKY, *_PLACE]).split())))


def compare(asked, seen):
    """{fact: (right, asked)} for every one of FACTS and "whole": which facts of Description `asked` hold in `seen`.

    The things are matched in the way that makes most facts hold; things that are missing make theirs wrong.
    """
    spare = (Thing(),) * max(0, len(asked.things) - len(seen.things))
    candidates, best = seen.things + spare, None
    for order in permutations(range(len(candidates)), len(asked.things)):
        score = {fact: [0, 0] for fact in FACTS}
        for thing, k in zip(asked.things, order):
            for f in fields(Thing):
                want, got = getattr(thing, f.name), getattr(candidates[k], f.name)
                if want is not None and f.name != "color2":
                    same = want == got and (f.name != "color" or thing.color2 == candidates[k].color2)
                    score[f.name] = [score[f.name][0] + same, score[f.name][1] + 1]
        holds = [(order[i], word, order[j]) in seen.relations for i, word, j in asked.relations]
        score["relation"] = [sum(holds), len(holds)]
        if best is None or sum(right for right, _ in score.values()) > sum(right for right, _ in best.values()):
            best = score
    best["count"] = [int(len(asked.things) == len(seen.things)), 1]
    for fact in ("floor", "sky"):
        want = getattr(asked, fact)
        best[fact] = [int(want == getattr(seen, fact)), 1] if want else [0, 0]
    best["whole"] = [int(all(right == total for right, total in best.values())), 1]
    return {fact: tuple(counts) for fact, counts in best.items()}
