"""Draws the experiments of the papers, from the JSON files beside this one.

    python tests/benchmarks/figures.py

Writes PNGs into figures/, which report.py links under the tables of RESULTS.md. Marks and bars are
means over seeds; thin bars reach from the lowest seed to the highest. What is not measured is left
out, and a figure of which nothing is measured is not written.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path

from PIL import Image, PngImagePlugin

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

import report  # noqa: E402

from minipic.figures import Measured, bars, error_bars, heat_map, image_grid  # noqa: E402
from minipic.weights.files import sha256  # noqa: E402

WHOLE = "captions drawn wholly right"
STYLE = "style distance"
EARLY = {"decoupled": "w_d 2, w_c 3"}  # the way to draw at every step count; of others, guidance 5
LOWER_IS_BETTER = ("abs_rel", "degrees")

Lines = dict[str, list[Measured]]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    folder = report.HERE / "figures"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for name, measured_by, draw in FIGURES:
        source = report.HERE / f"{measured_by}.json"
        if not source.exists():
            continue
        info = PngImagePlugin.PngInfo()
        info.add_text("source", sha256(source))  # a test compares it with today's JSON
        for suffix, picture in draw(report.read(measured_by)["results"]).items():
            path = folder / f"{name}{suffix}.png"
            small = picture.quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            small.save(path, pnginfo=info, optimize=True)


# ---- points of lines -----------------------------------------------------------------------------

def select(rows: list[dict], key: str, name: str) -> list[dict]:
    """The rows of one entry: its seeds."""
    return [row for row in rows if row[key] == name]


def names_of(rows: list[dict], key: str) -> list[str]:
    """The entries, in the order of the file."""
    return list(dict.fromkeys(row[key] for row in rows))


def counts_of(seeds: list[dict]) -> list[str]:
    """The step counts at which any seed was measured."""
    counts = {count for row in seeds for count in row["at"]}
    return sorted(counts, key=int)


def scores_at(seeds: list[dict], count: str, way: str | None = None) -> list[dict]:
    """The scores of each seed at a step count, of a way to draw if there are several."""
    scores = []
    for row in seeds:
        at_count = row["at"].get(count, {})
        scores.append(at_count.get(way, {}) if way else at_count)
    return scores


def against(scores: list[dict], x: str, y: str, note: str = "") -> list[Measured]:
    """One score against another: a point, or none where no seed has both."""
    both = [score for score in scores if is_number(score.get(x)) and is_number(score.get(y))]
    if not both:
        return []
    return [Measured([score[x] for score in both], [score[y] for score in both], note)]


def at_counts(seeds: list[dict], x: str, y: str, way: str | None = None) -> list[Measured]:
    """One score against another at every step count, which is noted beside the point."""
    points = []
    for count in counts_of(seeds):
        note = count if count != "0" else ""
        points += against(scores_at(seeds, count, way), x, y, note)
    return points


def over_steps(seeds: list[dict], y: str, way: str | None = None) -> list[Measured]:
    """A score over the step counts."""
    points = []
    for count in counts_of(seeds):
        values = [score[y] for score in scores_at(seeds, count, way) if is_number(score.get(y))]
        if values:
            points.append(Measured([int(count)], values))
    return points


def level(line: list[Measured], last: float) -> list[Measured]:
    """What does not depend on the steps, drawn from step 0 to the last one."""
    return [Measured([step], point.y) for point in line for step in (0, last)]


def is_number(value: float | None) -> bool:
    """False of None and NaN: nothing was asked."""
    return value is not None and value == value


def drawn(lines: Lines, across: str, up: str) -> Image.Image | None:
    """The lines that have points; None if none has."""
    lines = {name: points for name, points in lines.items() if points}
    return error_bars(lines, across, up) if lines else None


def together(
        pictures: list[Image.Image | None], columns: int = 1) -> dict[str, Image.Image]:
    """Several plots as one figure, without those that are not there."""
    pictures = [picture for picture in pictures if picture]
    return named({"": image_grid(pictures, columns=columns) if pictures else None})


def named(pictures: dict[str, Image.Image | None]) -> dict[str, Image.Image]:
    """{end of the file's name: picture}, without those that are not there."""
    return {suffix: picture for suffix, picture in pictures.items() if picture}


# ---- in-domain generation ------------------------------------------------------------------------

def join_grid(rows: list[dict]) -> list[dict]:
    """The rows with those of "decoupled, grid" put into "decoupled" of the same seed.

    Both are the same training, drawn at other weights. A score that both have is taken once.
    """
    joined = [row for row in rows if row["entry"] != "decoupled, grid"]
    for grid in select(rows, "entry", "decoupled, grid"):
        same = [row for row in select(joined, "entry", "decoupled") if row["seed"] == grid["seed"]]
        if not same:
            joined.append({**grid, "entry": "decoupled"})
            continue
        at = dict(same[0]["at"])
        for count, ways in grid["at"].items():
            at[count] = {**ways, **at.get(count, {})}
        joined[joined.index(same[0])] = {**same[0], "at": at}
    return joined


def against_distance(rows: list[dict], distance: str) -> Lines:
    """Captions right against a distance: over w_d, over steps, or a single point."""
    rows = join_grid(rows)
    lines = {}
    for name in names_of(rows, "entry"):
        seeds = select(rows, "entry", name)
        last = counts_of(seeds)[-1]
        for way in sorted(ways_of(seeds), key=weights_of):
            w_c, w_d = weights_of(way)
            if w_c:
                points = against(scores_at(seeds, last, way), distance, "whole", f"{w_d:g}")
                lines.setdefault(f"{name}, w_c {w_c:g}", []).extend(points)
            elif way.startswith(("guidance", "style words", "renders")):
                lines[name if way == name else f"{name}, {way}"] = at_counts(
                    seeds, distance, "whole", way)
    return lines


def weights_of(way: str) -> tuple[float, float]:
    """w_c and w_d of the paper's three predictions; zeros of every other way to draw."""
    weights = re.fullmatch(r"w_d ([\d.]+), w_c ([\d.]+)", way)
    return (float(weights[2]), float(weights[1])) if weights else (0, 0)


def ways_of(seeds: list[dict]) -> list[str]:
    """The ways to draw, at any step count and of any seed."""
    ways = {}
    for row in seeds:
        for at_count in row["at"].values():
            ways.update(at_count)
    return list(ways)


def in_domain_over_steps(rows: list[dict], fact: str) -> Lines:
    """A score over the steps of training, of every entry; the base model is not trained."""
    rows = join_grid(rows)
    lines = {}
    for name in names_of(rows, "entry"):
        way = EARLY.get(name.removesuffix(", LoRA"), "guidance 5")
        lines[name] = over_steps(select(rows, "entry", name), fact, way)
    return lines


def drift_over_steps(rows: list[dict], fact: str) -> Lines:
    """How far the predictions of a trained model have moved; the base model's have not."""
    lines = {}
    for name in names_of(rows, "entry"):
        points = over_steps(select(rows, "entry", name), fact, "predictions")
        if points:
            lines[name] = points
    return {"base": [Measured([0], [0])], **lines} if lines else {}


def draw_style(rows):
    return named({"": drawn(against_distance(rows, "style"), STYLE, WHOLE)})


def draw_frechet(rows):
    return named({"": drawn(against_distance(rows, "frechet"), "Frechet distance", WHOLE)})


def draw_steps(rows):
    return together([
        drawn(in_domain_over_steps(rows, "whole"), "steps of training", WHOLE),
        drawn(in_domain_over_steps(rows, "style"), "steps of training", STYLE)])


def draw_drift(rows):
    return together([
        drawn(drift_over_steps(rows, "drift"), "steps of training",
              "drift of the prediction for the null text, relative"),
        drawn(drift_over_steps(rows, "forgotten"), "steps of training",
              "guidance forgotten, 1 - cosine")])


# ---- MTU -----------------------------------------------------------------------------------------

def router_table(rows: list[dict], experts: int) -> tuple[list, list[str], list[str]]:
    """Weights of the experts: (table, its rows' names, its columns' names), of the first seed.

    A row for each expert and task, so that the tasks stand below each other; a column for each
    scale and layer.
    """
    columns = []
    column_names = []
    tasks = []
    for name in names_of(rows, "name"):
        weights = select(rows, "name", name)[0].get("router", {})
        tasks = tasks or list(weights)
        if not weights or list(weights) != tasks or len(weights[tasks[0]][0]) != experts:
            continue
        for layer in range(len(weights[tasks[0]])):
            columns.append([weights[task][layer][i] for i in range(experts) for task in tasks])
            column_names.append(f"{name.rpartition(', ')[2]}, layer {layer + 1}")
    row_names = [f"expert {i + 1}, {task}" for i in range(experts) for task in tasks]
    return [list(row) for row in zip(*columns)], row_names, column_names


def draw_router(rows):
    """A heat map for each number of experts."""
    counts = set()
    for row in rows:
        for layers in row.get("router", {}).values():
            counts.add(len(layers[0]))
    pictures = {}
    for experts in sorted(counts - {1}):
        table, row_names, column_names = router_table(rows, experts)
        if table:
            pictures[f"-{experts}"] = heat_map(table, row_names, column_names, cell=34)
    return pictures


def held_out_losses(rows: list[dict], task: str) -> dict[str, list[float]]:
    """{entry: each seed's loss on unseen scenes, mean over noise levels}."""
    losses = {}
    for row in rows:
        levels = row.get("held-out loss", {}).get(task)
        if levels:
            losses.setdefault(row["name"], []).append(statistics.mean(levels.values()))
    return losses


def scores_of_entries(rows: list[dict], task: str, fact: str) -> dict[str, list[float]]:
    """{entry: each seed's score}."""
    scores = {}
    for row in rows:
        value = row.get("scores", {}).get(task, {}).get(fact)
        if is_number(value):
            scores.setdefault(row["name"], []).append(value)
    return scores


def bars_of_seeds(values: dict[str, list[float]], title: str) -> Image.Image | None:
    """A bar for each entry's mean, a thin line from its lowest seed to its highest."""
    if not values:
        return None
    means = {name: statistics.mean(seeds) for name, seeds in values.items()}
    spans = {name: (min(seeds), max(seeds)) for name, seeds in values.items()}
    return bars(means, title, spans=spans, font_size=20)


def draw_losses(rows):
    tasks = list(dict.fromkeys(task for row in rows for task in row.get("held-out loss", {})))
    return together(
        [bars_of_seeds(held_out_losses(rows, task), f"{task}, loss") for task in tasks], columns=2)


def draw_scores(rows):
    pictures = []
    for column, (task, fact) in report.MTU_COLUMNS.items():
        pictures.append(bars_of_seeds(scores_of_entries(rows, task, fact), column))
    return together(pictures, columns=2)


# ---- ONE-PIC and the baselines -------------------------------------------------------------------

def edges_over_steps(rows: list[dict]) -> Lines:
    """Edge F1 of what is trained on edges, given the right map and another scene's."""
    rows = select(rows, "task", "control")
    lines = {}
    for name in names_of(rows, "name"):
        if name.endswith(", edges"):
            seeds = select(rows, "name", name)
            label = name.removesuffix(", edges")
            lines[label] = over_steps(seeds, "edge F1")
            lines[f"{label}, shuffled"] = over_steps(seeds, "shuffled")
    last = max((max(point.x) for line in lines.values() for point in line), default=0)
    for name in references(rows):
        lines[name] = level(over_steps(select(rows, "name", name), "edge F1"), last)
    return lines


def references(rows: list[dict]) -> list[str]:
    """What is not trained, of the names in the table."""
    return [name for name in names_of(rows, "name") if name in ("renders", "untouched")]


def edits(rows: list[dict]) -> Lines:
    """What changed against what was kept, with the steps of training beside the marks."""
    rows = select(rows, "task", "edit")
    lines = {}
    for name in names_of(rows, "name"):
        lines[name] = at_counts(select(rows, "name", name), "kept", "changed")
    return lines


def draw_edges(rows):
    return named({"": drawn(edges_over_steps(rows), "steps of training", "edge F1")})


def draw_edits(rows):
    return named({"": drawn(edits(rows), "kept", "changed")})


# ---- Specialist Diffusion ------------------------------------------------------------------------

def of_style(rows: list[dict], style: str) -> Lines:
    """Captions right against style distance, with the steps of training beside the marks."""
    rows = select(rows, "style", style)
    lines = {}
    for name in names_of(rows, "name"):
        lines[name] = at_counts(select(rows, "name", name), "style", "whole")
    return lines


def draw_styles(rows):
    pictures = {}
    for style in names_of(rows, "style"):
        pictures[f"-{style}"] = drawn(of_style(rows, style), f"{STYLE}, {style}", WHOLE)
    return named(pictures)


# ---- OneDiffusion --------------------------------------------------------------------------------

def with_controls(seeds: list[dict], task: str) -> tuple[str, dict[str, list[float]]]:
    """(title, {"drawn", "shuffled", "reference": seeds}) of a task's first score with a control."""
    scores = [row["scores"].get(task, {}) for row in seeds]
    for keys in report.onediffusion_keys(scores[0]):
        if keys[1] is None:
            continue
        values = {}
        for label, key in zip(("drawn", "shuffled", "reference"), keys):
            numbers = [score[key] for score in scores if is_number(score.get(key))]
            if numbers:
                values[label] = numbers
        return score_title(task, keys[0]), values
    return "", {}


def score_title(task: str, score: str) -> str:
    return f"{task}: {score}" + ", lower is better" * (score in LOWER_IS_BETTER)


def draw_tasks(rows):
    first = select(rows, "name", rows[0]["name"])
    pictures = []
    for task in first[0]["scores"]:
        title, values = with_controls(first, task)
        pictures.append(bars_of_seeds(values, title))
    return together(pictures, columns=2)


def draw_entries(rows):
    """The first score of each task that several entries have."""
    pictures = []
    for task in dict.fromkeys(task for row in rows for task in row["scores"]):
        scores = next(row["scores"][task] for row in rows if task in row["scores"])
        score = report.onediffusion_keys(scores)[0][0]
        values = scores_of_entries(rows, task, score)
        if len(values) > 1:
            pictures.append(bars_of_seeds(values, score_title(task, score)))
    return together(pictures)


# ---- all of them ---------------------------------------------------------------------------------

FIGURES = (  # (beginning of the file's name, the JSON, what draws its results)
    ("indomain-style", "indomain", draw_style),
    ("indomain-frechet", "indomain", draw_frechet),
    ("indomain-steps", "indomain", draw_steps),
    ("indomain-drift", "indomain", draw_drift),
    ("mtu-router", "mtu", draw_router),
    ("mtu-loss", "mtu", draw_losses),
    ("mtu-scores", "mtu", draw_scores),
    ("onepic-edges", "baselines", draw_edges),
    ("onepic-edits", "baselines", draw_edits),
    ("specialist", "specialist", draw_styles),
    ("specialist-gpu", "specialist-gpu", draw_styles),
    ("onediffusion-tasks", "onediffusion", draw_tasks),
    ("onediffusion-entries", "onediffusion", draw_entries),
    ("onediffusion-tasks-gpu", "onediffusion-gpu", draw_tasks),
    ("onediffusion-entries-gpu", "onediffusion-gpu", draw_entries),
)


if __name__ == "__main__":
    main()
