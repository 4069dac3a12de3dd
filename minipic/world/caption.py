"""Captions for scenes by a grammar, and the way back: Scene -> Description -> text -> Description.

A Description holds facts about a picture; None stands for a fact that it leaves open.

    full = describe(scene)              # every fact
    asked = ask(scene, generator)       # a random part of them
    text = say(asked, generator)        # "a small red sphere left of a blue cube at night"
    parse(text) == asked                # exactly
    parse("two red cubes and a cone")   # three things, of which two are equal
    compare(asked, other)               # which of the facts asked for hold in another Description
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, permutations, product

import torch

from minipic.common import InputError
from minipic.world.choices import chance, one_of
from minipic.world.scene import (
    AHEAD, ASIDE, COLORS, FLOORS, PATTERNS, PLACES, SHAPES, Scene, centres, layout)

# The words for each meaning. The first is the usual one.
NOUNS = {
    **{shape: (shape,) for shape in SHAPES},
    "sphere": ("sphere", "ball"),
    "cube": ("cube", "box"),
    "torus": ("torus", "ring"),
    None: ("object",),
}
PLURALS = {
    **{shape: (f"{shape}s",) for shape in SHAPES},
    "sphere": ("spheres", "balls"),
    "cube": ("cubes", "boxes"),
    "torus": ("tori", "toruses", "rings"),
    None: ("objects",),
}
NUMBER_WORDS = {2: "two", 3: "three"}  # a scene has no more things
SIZE_WORDS = {"small": ("small", "tiny"), "medium": ("medium",), "large": ("large", "big")}
PLACE_WORDS = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
RELATIONS = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "front": ("in front of",),
    "behind": ("behind",),
}
SKY_WORDS = {
    "blue": ("under a blue sky",),
    "sunset": ("at sunset", "under a sunset sky"),
    "night": ("at night", "under a night sky"),
}
OPENINGS = ("", "a picture of ", "a rendering of ", "there is ")
PLURAL_OPENINGS = ("", "a picture of ", "a rendering of ", "there are ")  # of "two red cubes"

THING_FACTS = ("color", "shape", "size", "pattern", "place")
FACTS = ("count", *THING_FACTS, "relation", "floor", "sky")


@dataclass(frozen=True)
class Thing:
    """What is known of one object."""

    color: str | None = None
    color2: str | None = None  # of a pattern; the two colours are kept in the order of COLORS
    shape: str | None = None
    size: str | None = None
    pattern: str | None = None
    place: str | None = None  # of PLACES


@dataclass(frozen=True)
class Description:
    """What is known of a picture."""

    things: tuple[Thing, ...]
    relations: tuple[tuple[int, str, int], ...] = ()  # (0, "left", 1): thing 0 is left of thing 1
    floor: str | None = None
    sky: str | None = None


# ---- a scene's facts ---------------------------------------------------------------------------

def describe(scene: Scene) -> Description:
    """Every fact of a scene."""
    spots = layout(centres(scene.objects), scene.camera, scene.aspect)
    things = []
    for o, across in zip(scene.objects, spots.across.tolist()):
        things.append(Thing(o.color, o.color2, o.shape, o.size, o.pattern, place_of(across)))
    relations = relations_of(spots.aside.tolist(), spots.ahead.tolist())
    return Description(tuple(things), relations, scene.floor, scene.sky)


def place_of(across: float) -> str | None:
    """The place of PLACES at a share of the picture's width; None in the gaps between places."""
    for name, (low, high) in PLACES.items():
        if low <= across <= high:
            return name
    return None


def relations_of(aside: list[float], ahead: list[float], least_aside: float = ASIDE,
                 least_ahead: float = AHEAD) -> tuple[tuple[int, str, int], ...]:
    """All clear relations of things: (0, "left", 1) says that thing 0 is left of thing 1.

    aside, ahead: where each thing is, see scene.Layout.
    least_aside, least_ahead: how far apart two things must be.
    """
    relations = []
    for i, j in product(range(len(aside)), repeat=2):
        i_is_left_by = aside[j] - aside[i]
        i_is_in_front_by = ahead[i] - ahead[j]
        if i_is_left_by >= least_aside:
            relations.append((i, "left", j))
        if -i_is_left_by >= least_aside:
            relations.append((i, "right", j))
        if i_is_in_front_by >= least_ahead:
            relations.append((i, "front", j))
        if -i_is_in_front_by >= least_ahead:
            relations.append((i, "behind", j))
    return tuple(relations)


# ---- from a scene to words ---------------------------------------------------------------------

def caption(scene: Scene, generator: torch.Generator) -> str:
    """A random true caption of a scene."""
    return say(ask(scene, generator), generator)


def counting_caption(scene: Scene, generator: torch.Generator) -> str:
    """A random true caption that counts what is alike: "two red cubes and a blue cone"."""
    return say(ask_counts(scene, generator), generator, plurals=True)


def ask(scene: Scene, generator: torch.Generator) -> Description:
    """A random part of a scene's facts: all things, in any order, and some facts about them."""
    full = describe(scene)
    order = torch.randperm(len(full.things), generator=generator).tolist()
    words = {}  # (i, j): what relates thing i to thing j, in the new order
    for i, word, j in full.relations:
        pair = (order.index(i), order.index(j))
        words.setdefault(pair, []).append(word)

    relations = []  # the grammar relates only the first thing to the others
    if words and chance(0.75, generator):
        relations.append((0, one_of(words[0, 1], generator), 1))
        if len(order) == 3 and chance(0.6, generator):
            relations.append((0, one_of(words[0, 2], generator), 2))

    things = []
    for k in order:
        with_place = not relations and chance(0.6, generator)
        things.append(_part_of(full.things[k], with_place, generator))
    floor = full.floor if chance(0.5, generator) else None
    sky = full.sky if chance(0.4, generator) else None
    return Description(tuple(things), tuple(relations), floor, sky)


def ask_counts(scene: Scene, generator: torch.Generator) -> Description:
    """A random part of a scene's facts: all things, and of those that are alike the same facts.

    Alike are those of one shape, or of one shape and look. They follow one another, the groups of
    them in any order. No place and no relation is asked for.
    """
    full = describe(scene)
    by_look = chance(0.5, generator)
    groups = {}
    for thing in full.things:
        look = (thing.color, thing.color2, thing.pattern) if by_look else None
        groups.setdefault((thing.shape, look), []).append(thing)
    groups = list(groups.values())

    things = []
    for k in torch.randperm(len(groups), generator=generator).tolist():
        shared = _shared_facts(groups[k])
        part = _part_of(shared, with_place=False, generator=generator)
        things += [part] * len(groups[k])
    floor = full.floor if chance(0.5, generator) else None
    sky = full.sky if chance(0.4, generator) else None
    return Description(tuple(things), (), floor, sky)


def _shared_facts(things):
    """A Thing with the facts that all of these have in common."""
    def shared(*facts):
        """The values of these facts if they are the same in all things, else None for each."""
        first = [getattr(things[0], fact) for fact in facts]
        for thing in things[1:]:
            if [getattr(thing, fact) for fact in facts] != first:
                return [None] * len(facts)
        return first

    shape, = shared("shape")
    size, = shared("size")
    pattern, = shared("pattern")
    color, color2, _ = shared("color", "color2", "pattern")
    if color is None and pattern == "plain":
        pattern = None  # only a colour says so, see _part_of
    return Thing(color, color2, shape, size, pattern)


def _part_of(thing, with_place, generator):
    """A random part of a thing's facts: nearly always its colours and its shape."""
    with_color = chance(0.95, generator)
    with_shape = chance(0.96, generator)
    with_size = chance(0.7, generator)
    # "a red cube" is a plain one, but "a cube" may have any pattern
    with_pattern = with_color or thing.pattern != "plain"
    return Thing(
        color=thing.color if with_color else None,
        color2=thing.color2 if with_color else None,
        shape=thing.shape if with_shape else None,
        size=thing.size if with_size else None,
        pattern=thing.pattern if with_pattern else None,
        place=thing.place if with_place else None)


def say(description: Description, generator: torch.Generator, plurals: bool = False) -> str:
    """Words for a Description that `ask` made. `parse` gives the same Description back.

    plurals: of equal things that follow one another say "two cubes", not "a cube and a cube". A
        Description with relations names each by itself.
    """

    def choose(options):
        """The first option three times out of four, else one of the others."""
        if len(options) == 1 or chance(0.75, generator):
            return options[0]
        return options[torch.randint(1, len(options), (), generator=generator).item()]

    groups = [(thing, 1) for thing in description.things]
    if plurals and not description.relations:
        groups = [(thing, len(list(equal))) for thing, equal in groupby(description.things)]
    phrases = [noun_phrase(thing, choose, count) for thing, count in groups]
    words = [word for _, word, _ in description.relations]
    text = _sentence(phrases, words, choose)
    setting = []
    if description.floor:
        setting.append(f"on a {description.floor} floor")
    if description.sky:
        setting.append(choose(SKY_WORDS[description.sky]))
    _, first_count = groups[0]
    text = choose(OPENINGS if first_count == 1 else PLURAL_OPENINGS) + text
    if setting:
        text += choose((" ", ", ")) + " ".join(setting)
    return text


def noun_phrase(thing: Thing, choose: Callable, count: int = 1) -> str:
    """For example "a large red and white striped ball on the left", or "two red balls".

    choose: a function that picks one of several options that mean the same.
    count: of equal things, of NUMBER_WORDS or 1.
    """
    words = []
    if thing.size:
        words.append(choose(SIZE_WORDS[thing.size]))
    colors = [color for color in (thing.color, thing.color2) if color]
    if colors:
        direction = choose((1, -1))
        words.append(" and ".join(colors[::direction]))
    if thing.pattern not in (None, "plain"):
        words.append(thing.pattern)
    nouns = NOUNS if count == 1 else PLURALS
    words.append(choose(nouns[thing.shape]))
    if thing.place:
        words.append(PLACE_WORDS[thing.place])
    if count > 1:
        words.insert(0, NUMBER_WORDS[count])
    elif words[0][0] in "aeiou":
        words.insert(0, "an")
    else:
        words.insert(0, "a")
    return " ".join(words)


def _sentence(phrases, words, choose):
    """Join one to three noun phrases. words: how the first is related to the second, and third."""
    if words == ["right", "left"]:
        return f"{phrases[0]} between {phrases[1]} and {phrases[2]}"
    if not words:
        listed = ", ".join(phrases[:-1])
        return f"{listed} and {phrases[-1]}" if listed else phrases[-1]
    text = f"{phrases[0]} {choose(RELATIONS[words[0]])} {phrases[1]}"
    if len(phrases) == 3 and len(words) == 2:
        text += f" and {choose(RELATIONS[words[1]])} {phrases[2]}"
    elif len(phrases) == 3:
        text += f", and {phrases[2]}"
    return text


# ---- from words to facts -----------------------------------------------------------------------

def _meanings(words_of):
    """{meaning: its words} -> {word: its meaning}."""
    meanings = {}
    for meaning, words in words_of.items():
        for word in words:
            meanings[word] = meaning
    return meanings


_NOUN_MEANINGS = _meanings(NOUNS)
_PLURAL_MEANINGS = _meanings(PLURALS)
_NUMBERS = {word: number for number, word in NUMBER_WORDS.items()}
_SIZE_MEANINGS = _meanings(SIZE_WORDS)
_RELATION_MEANINGS = _meanings(RELATIONS)
_SKY_MEANINGS = _meanings(SKY_WORDS)
_PLACE_MEANINGS = {words: place for place, words in PLACE_WORDS.items()}
_PATTERN_WORDS = [pattern for pattern in PATTERNS if pattern != "plain"]


def _any_of(words):
    return "|".join(words)


# "a large red and white striped ball on the left": all but the article and the noun may be missing.
# In "two red balls" a number takes the place of the article, and the noun is a plural.
_THING = re.compile(
    rf"\b(?:an?|(?P<number>{_any_of(_NUMBERS)})) "
    rf"(?:(?P<size>{_any_of(_SIZE_MEANINGS)}) )?"
    rf"(?:(?P<color>{_any_of(COLORS)}) )?"
    rf"(?:and (?P<color2>{_any_of(COLORS)}) )?"
    rf"(?:(?P<pattern>{_any_of(_PATTERN_WORDS)}) )?"
    rf"(?(number)(?P<plural>{_any_of(_PLURAL_MEANINGS)})|(?P<noun>{_any_of(_NOUN_MEANINGS)}))\b"
    rf"(?: (?P<place>{_any_of(_PLACE_MEANINGS)})\b)?")
# " on a grey floor, at night": each part may be missing
_SETTING = re.compile(
    rf"(?: ?,? ?on a (?P<floor>{_any_of(FLOORS)}) floor)?"
    rf"(?: ?,? ?(?P<sky>{_any_of(_SKY_MEANINGS)}))?")


def _all_words():
    phrases = [
        "a an and between , floor on", *OPENINGS, *PLURAL_OPENINGS, *COLORS, *FLOORS,
        *_PATTERN_WORDS, *_NOUN_MEANINGS, *_PLURAL_MEANINGS, *_NUMBERS, *_SIZE_MEANINGS,
        *_RELATION_MEANINGS, *_SKY_MEANINGS, *_PLACE_MEANINGS]
    return tuple(sorted(set(" ".join(phrases).split())))


WORDS = _all_words()  # all words of the grammar, and the comma


def parse(text: str) -> Description:
    """The Description that a text states. Raises InputError for a text outside the grammar.

    A text is an opening, noun phrases with joints between them, and a setting, for example
    "a picture of | a red cube | left of | a cone | , and | a ball | on a grey floor at night".
    "two red cubes" are two equal things. Only single things can be related.
    """
    text = " ".join(text.lower().split())
    matches = list(_THING.finditer(text))
    if not matches:
        raise InputError(f"caption {text!r} names no object; "
                         "say e.g. 'a small red sphere left of a large blue cube'")
    opening = text[:matches[0].start()].strip()
    joints = []
    for match, next_match in zip(matches, matches[1:]):
        joints.append(text[match.end():next_match.start()].strip())
    setting = _SETTING.fullmatch(text[matches[-1].end():])

    if joints == ["between", "and"]:
        words = ["right", "left"]
    else:
        words = [_relation_of(joint) for joint in joints]
    known_openings = [known.strip() for known in OPENINGS + PLURAL_OPENINGS]
    if opening not in known_openings or None in words or setting is None:
        raise InputError(f"caption {text!r} has words outside the grammar; "
                         f"its words are {', '.join(WORDS)}")
    things = []
    for match in matches:
        things += [_thing_of(match)] * _NUMBERS.get(match["number"], 1)
    relations = tuple((0, word, i + 1) for i, word in enumerate(words) if word)
    if relations and len(things) > len(matches):
        raise InputError(f"caption {text!r} relates several things at once; name each by itself, "
                         "e.g. 'a cone left of a cube and left of a cube'")
    sky = _SKY_MEANINGS.get(setting["sky"])
    return Description(tuple(things), relations, setting["floor"], sky)


def _relation_of(joint):
    """The relation that words between two things state; "" in a mere list, None if unknown."""
    if joint in (",", "and", ", and"):
        return ""
    return _RELATION_MEANINGS.get(joint.removeprefix("and "))


def _thing_of(match):
    """The Thing that a match of _THING names."""
    color, color2 = sorted((match["color"], match["color2"]), key=[*COLORS, None].index)
    pattern = match["pattern"]
    if pattern is None and color is not None:
        pattern = "plain"  # see _part_of
    if match["number"]:
        shape = _PLURAL_MEANINGS[match["plural"]]
    else:
        shape = _NOUN_MEANINGS[match["noun"]]
    return Thing(color, color2, shape, _SIZE_MEANINGS.get(match["size"]), pattern,
                 _PLACE_MEANINGS.get(match["place"]))


# ---- comparing facts ---------------------------------------------------------------------------

def compare(asked: Description, actual: Description) -> dict[str, tuple[int, int]]:
    """{fact: (right, asked)}: for each of FACTS, how many are asked for and how many of these hold.

    "whole" is (1, 1) if everything holds, else (0, 1). The things of the two Descriptions are
    matched so that most facts hold; all facts of a thing that has no match are wrong.
    """
    missing = max(0, len(asked.things) - len(actual.things))
    candidates = actual.things + (Thing(),) * missing
    best = None
    most_right = -1
    for order in permutations(range(len(candidates)), len(asked.things)):
        score = _score_of_match(asked, candidates, actual.relations, order)
        right = 0
        for right_of_fact, _ in score.values():
            right += right_of_fact
        if right > most_right:
            best = score
            most_right = right
    best["count"] = (int(len(asked.things) == len(actual.things)), 1)
    for fact in ("floor", "sky"):
        wanted = getattr(asked, fact)
        if wanted:
            best[fact] = (int(wanted == getattr(actual, fact)), 1)
    all_right = all(right == total for right, total in best.values())
    return best | {"whole": (int(all_right), 1)}


def _score_of_match(asked, candidates, relations, order):
    """{fact: (right, asked)} for things and relations; asked.things[i] is candidates[order[i]]."""
    score = {fact: (0, 0) for fact in FACTS}
    for thing, k in zip(asked.things, order):
        candidate = candidates[k]
        for fact in THING_FACTS:
            wanted = getattr(thing, fact)
            if wanted is None:
                continue
            holds = wanted == getattr(candidate, fact)
            if fact == "color":
                holds = holds and thing.color2 == candidate.color2
            right, total = score[fact]
            score[fact] = (right + holds, total + 1)
    right = 0
    for i, word, j in asked.relations:
        right += (order[i], word, order[j]) in relations
    score["relation"] = (right, len(asked.relations))
    return score
