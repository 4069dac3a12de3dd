"""The tasks that baselines.py measures recipes on: what is asked, what is right, and scores of what was drawn.

subject: five photos of a two-coloured object, another one for each seed, whose colour and shape never met in the
model's training; they show it on two of the floors under two of the skies. Prompts put it in three places on the other
floor or under the other sky.
    identity   share of drawings with its shape, both colours and pattern
    setting    share with one object, at the place, on the floor and under the sky asked for
    class      the same prompts with its class, "red torus", in place of its name: share in which everything is right
    leak       share of those that show the subject, which nobody asked for
    others     share of drawings of other shapes, wholly described, in which everything is right
"renders" are the truth (the ceiling); "untouched" is the model before training, "in words" the same when told the
subject's colours and pattern: what training on photos has to compete with.

control: maps of scenes that no model was trained on. The prompt says colours, patterns, floor and sky; shapes, sizes,
places and what is beside or behind what can only come from the map.
    edge F1    the world's exact edges against the drawing's: pixels whose right or lower neighbour differs by more than
               EDGE in a channel; one pixel off counts. Shadows and patterns have such edges too, so renders do not
               reach 1
    layout     share of drawings in which the judge reads every shape, size, place and relation of the scene, and no
               object more (shape, size, place and relation: share of the single facts)
    text       share in which everything holds that the prompt says
    shuffled   the edge F1 when the next scene's map is given instead: what the map does not decide (ONE-PIC only)
"renders" are the scenes themselves (the ceiling), "untouched" the model without the map (the floor).

edit: an instruction and a picture of a scene that no model was trained on. Recolour, remove, move, resize and reshape
come alike often.
    changed    share of drawings in which what such an instruction changes is right: colours and patterns, the count,
               places and relations, sizes, or shapes
    kept       share in which all else is
    edited     share in which everything is
    PSNR       dB, of the drawing to the exact picture after the edit
"renders" are those pictures (the ceiling), "untouched" the pictures as they were before (the floor).
"""

import functools
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from quality import WORLD, draw  # noqa: E402

from minipic.common import rng  # noqa: E402
from minipic.image import to_pictures  # noqa: E402
from minipic.world import metrics, probe  # noqa: E402
from minipic.world.caption import (  # noqa: E402
    FACTS, PLACE_WORDS, SKY_WORDS, Description, Thing, compare, describe, say)
from minipic.world.edits import name_of, put, valid  # noqa: E402
from minipic.world.scene import FLOORS, PLACES, SKIES, Object, render, sample_scene  # noqa: E402
from minipic.world.tasks import TASKS  # noqa: E402

EDGE = 0.15 * 2  # chosen on other renders; pictures span [-1,1]
CHANGES = {"recolour": {"color", "pattern"}, "remove": {"count"}, "move": {"place", "relation"}, "resize": {"size"},
           "reshape": {"shape"}}
SUBJECTS = {Object("torus", "green", "large", "striped", "white"): "red",    # and the colour of its class: of things
            Object("cube", "blue", "large", "striped", "yellow"): "red",     # without one the model has seen too few
            Object("cylinder", "red", "large", "checkered", "cyan"): "blue"}
KNOWN_FLOORS, KNOWN_SKIES = list(FLOORS)[:2], list(SKIES)[:2]   # of the photos


class Case(NamedTuple):
    """A task with one seed: words for Entry.flags, scores of renders, and score(pipeline, name of the entry,
    onepic.TrainedAs or None) -> {measure: number}."""
    words: dict
    renders: dict
    score: Callable


# ---- scores -----------------------------------------------------------------------------------------------------

def share(asked, seen, facts):
    """Share of pictures in which every asked one of these facts holds; Descriptions as in caption.compare."""
    scores = [compare(a, s) for a, s in zip(asked, seen, strict=True)]
    return statistics.mean(all(score[fact][0] == score[fact][1] for fact in facts) for score in scores)


def own_edges(images):
    """Pictures [B,3,H,W] -> bool [B,H,W]: where the right or lower neighbour differs by more than EDGE in a channel."""
    found = torch.zeros(len(images), *images.shape[2:], dtype=torch.bool, device=images.device)
    for dim in (2, 3):
        steep = images.diff(dim=dim).abs().amax(1) > EDGE
        found.narrow(dim - 1, 0, steep.shape[dim - 1]).logical_or_(steep)
    return found


def layout_of(full):
    """What of a full Description a map says."""
    return Description(tuple(Thing(shape=t.shape, size=t.size, place=t.place) for t in full.things), full.relations)


def looks_of(full):
    """What of a full Description the control task's prompts say."""
    things = tuple(Thing(t.color, t.color2, pattern=t.pattern) for t in full.things)
    return Description(things, (), full.floor, full.sky)


def control_scores(judge, images, edges, scenes):
    full, seen = [describe(scene) for scene in scenes], probe.read(judge, images)
    layouts, looks = [layout_of(d) for d in full], [looks_of(d) for d in full]
    facts = probe.accuracy(layouts, seen)
    return {"edge F1": metrics.edge_f1(own_edges(images), edges), "layout": facts["whole"],
            **{fact: facts[fact] for fact in ("shape", "size", "place", "relation")},
            "text": share(looks, seen, ("color", "pattern", "floor", "sky"))}


def subject_scores(judge, images, asked, classes, said):
    """`images` of the subject, its class and other things; Descriptions of what was asked of each, see the top."""
    (mine, plain, others), looks = (probe.read(judge, part) for part in images), ("shape", "color", "pattern")
    return {"identity": share(asked, mine, looks), "setting": share(asked, mine, ("count", "place", "floor", "sky")),
            "class": share(classes, plain, ("whole",)), "leak": share(asked, plain, looks),
            "others": share(said, others, ("whole",))}


def edit_scores(judge, images, after, kinds, truth):
    """`images` of edits of these kinds; Scenes and pictures of what they should have become."""
    asked, seen = [describe(scene) for scene in after], probe.read(judge, images)
    right = [{fact: have == want for fact, (have, want) in compare(a, s).items()} for a, s in zip(asked, seen)]
    both = [[all(row[fact] for fact in facts) for facts in (CHANGES[kind], {*FACTS} - CHANGES[kind])]
            for row, kind in zip(right, kinds)]
    changed, kept = map(statistics.mean, zip(*both))
    return {"changed": changed, "kept": kept, "edited": statistics.mean(map(all, both)),
            "PSNR": metrics.psnr(images, truth)}


# ---- tasks: (seed, pictures, judge, folder, steps of drawing) -> Case ---------------------------------------------

def control(seed, number, judge, folder, steps):
    pairs = {name: TASKS[name]((WORLD, seed), range(number)) for name in ("edges", "depth", "segmentation")}
    scenes, edges = pairs["edges"].scenes, pairs["edges"].truth["edges"]
    prompts = [say(looks_of(describe(scene)), rng(WORLD, "say", seed, i)) for i, scene in enumerate(scenes)]

    def score(pipeline, name, trained_as=None):
        kind = name.split(", ")[-1]  # as in "ControlNet, edges"
        if trained_as:
            own_maps = pairs[kind].source
            images, others = [
                draw(pipeline, prompts, 10**6 * seed, steps, guidance=3.0, sources=maps, trained_as=trained_as,
                     task=kind) for maps in (own_maps, own_maps.roll(-1, dims=0))]
            shuffled = metrics.edge_f1(own_edges(others), edges)
            return control_scores(judge, images, edges, scenes) | {"shuffled": shuffled}
        hints = (pairs[kind].source + 1) / 2 if kind in pairs else None
        images = draw(pipeline, prompts, 10**6 * seed, steps, hints=hints)
        return control_scores(judge, images, edges, scenes) | {"shuffled": None}
    truth = control_scores(judge, pairs["edges"].target, edges, scenes) | {"shuffled": None}
    return Case({}, truth, score)


def placed(it, setting, key):
    """A scene that shows the object `it` alone in a setting: place, floor, sky."""
    for i in count():
        scene = sample_scene(key, i, objects=1)
        o = scene.objects[0]
        scene = put(scene, 0, replace(it, x=o.x, z=o.z, turn=o.turn))
        if valid(scene) and describe(scene).things[0].place == setting[0]:
            return replace(scene, floor=setting[1], sky=setting[2])


def prompt(name, setting):
    place, floor, sky = setting
    return f"a {name} {PLACE_WORDS[place]} on a {floor} floor {SKY_WORDS[sky][0]}"


def subject(seed, number, judge, folder, steps):
    it, color = list(SUBJECTS.items())[seed % len(SUBJECTS)]
    new = [s for s in product(PLACES, FLOORS, SKIES) if s[1] not in KNOWN_FLOORS or s[2] not in KNOWN_SKIES]
    known = [s for s in product(PLACES, FLOORS, SKIES) if s not in new]
    settings = [new[i % len(new)] for i in range(number)]
    photos, drawn = (render([placed(it, s, (WORLD, kind, seed, i)) for i, s in enumerate(wanted)], truth=False).rgb
                     for kind, wanted in (("photo", [known[7 * i % 12] for i in range(5)]), ("asked", settings)))
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(to_pictures(photos)):
        picture.save(folder / f"{i}.png")
    thing = Thing(it.color, it.color2, it.shape, pattern=it.pattern)
    asked, classes = ([Description((replace(t, place=s[0]),), (), *s[1:]) for s in settings]
                      for t in (thing, Thing(color, None, it.shape, pattern="plain")))
    singles = (sample_scene((WORLD, "others"), i, objects=1) for i in count())
    others = [next(s for s in singles if s.objects[0].shape != it.shape) for _ in settings]
    said = [describe(scene) for scene in others]
    prompts = [say(d, rng(WORLD, "say", i)) for i, d in enumerate(said)]

    def score(pipeline, name, trained_as=None):
        called = {"in words": name_of(thing), "textual inversion": "<new>"}.get(name, f"sks {it.shape}")
        texts = [prompt(words, s) for words in (called, f"{color} {it.shape}") for s in settings] + prompts
        return subject_scores(judge, draw(pipeline, texts, 10**6 * seed, steps).split(number), asked, classes, said)
    truth = subject_scores(judge, [drawn, drawn, render(others, truth=False).rgb], asked, asked, said)
    return Case({"photos": folder, "shape": it.shape, "color": color}, truth | {"class": None, "leak": None}, score)


def edit(seed, number, judge, folder, steps):
    pairs = TASKS["edit"]((WORLD, seed), range(number))
    scores = functools.partial(edit_scores, judge, after=pairs.scenes, kinds=pairs.truth["kinds"], truth=pairs.target)

    def score(pipeline, name, trained_as=None):
        if name == "untouched":
            return scores(pairs.source)
        given = {"edits": pairs.source}
        if trained_as:
            given = {"sources": pairs.source, "trained_as": trained_as, "task": "edit"}
        return scores(draw(pipeline, pairs.prompts, 10**6 * seed, steps, guidance=3.0, **given))
    return Case({}, scores(pairs.target), score)


CASES = {"subject": subject, "control": control, "edit": edit}
REFERENCES = {"subject": ("renders", "untouched", "in words"), "control": ("renders", "untouched"),
              "edit": ("renders", "untouched")}
