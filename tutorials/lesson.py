"""What every lesson uses: checkpoints, figures, and minipic's own source.

The form of a lesson, tutorials/NN_name.py (00_picture.py is the shortest example):
1.  Cells begin with `# %%` (code) or `# %% [markdown]` (prose). All cells run from top to bottom.
2.  The first cell is prose: a title `# NN · Title`, then a list of exactly these four lines:
    `- **Goal:** ...`  `- **Time:** 10 s`  `- **Needs:** 00_picture`  `- **Figures:** a, b`.
3.  The second cell begins with `from lesson import Lesson` (which lets minipic be imported from any
    folder) and makes `lesson = Lesson("NN_name")`. Random numbers start from `lesson.seed`.
4.  `## Predict` asks one question before the code that answers it. `## Change one thing` and
    `## Exercises` (two or three) are the last two headings.
5.  `lesson.expect("name", value)` is a checkpoint, at least two in a lesson. Its band is in
    bands.json, measured by `python tutorials/render.py --bands NN_name`, and never typed.
6.  `lesson.show(picture, "name", caption)` keeps a figure; the caption says what is to be seen.
    `lesson.show_source(function)` prints minipic's own lines: a lesson copies none of them.
7.  About 100 lines, at most 90 seconds on two cores. Then `python tutorials/render.py NN_name`.
"""

import inspect
import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.insert(0, str(ROOT))
# Threads that wait for each other sleep. Otherwise two of them take four times the processor's time
# on a busy machine, for networks as small as these.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402 - with the checkout on the path
from PIL import Image  # noqa: E402

from minipic.common import choose_threads  # noqa: E402

BANDS = FOLDER / "bands.json"
MOST_BYTES = 60_000  # of a figure


class Lesson:
    """One run of a lesson.

    name: of its file, such as "05_unet".
    Environment variables: LESSON_SEED (0) is for another random start; LESSON_FIGURES is the folder
    of its figures (runs/lessons/NAME, so that a run never changes those of the text);
    LESSON_VALUES is a file that gets the values of the checkpoints instead of comparing them.
    """

    def __init__(self, name: str):
        self.name = name
        self.seed = int(os.environ.get("LESSON_SEED", 0))
        self.figures = Path(os.environ.get("LESSON_FIGURES", ROOT / "runs" / "lessons" / name))
        bands = json.loads(BANDS.read_text(encoding="utf-8")) if BANDS.exists() else {}
        self.bands = bands.get(name, {}).get("checkpoints", {})
        choose_threads(0)  # one, unless OMP_NUM_THREADS says how many
        torch.manual_seed(self.seed)

    def expect(self, name: str, value: float):
        """A checkpoint: print the value, and end the lesson where it is outside its band."""
        value = float(value)
        record = os.environ.get("LESSON_VALUES")
        if record:
            with open(record, "a", encoding="utf-8") as file:
                file.write(json.dumps([name, value]) + "\n")
            return
        if name not in self.bands:
            sys.exit(f"checkpoint {name!r} has no band yet; run "
                     f"`python tutorials/render.py --bands {self.name}`")
        low, high = self.bands[name]
        if not low <= value <= high:
            sys.exit(f"checkpoint {name!r}: got {value:.4g}, expected {low:g} to {high:g}; undo "
                     f"your last change, or compare each step with tutorials/{self.name}.md")
        print(f"checkpoint: {name} is {value:.4g}, expected {low:g} to {high:g}")

    def show(self, picture: Image.Image, name: str, caption: str):
        """Save a figure as NAME.png, with at most MOST_BYTES, and say what it shows."""
        self.figures.mkdir(parents=True, exist_ok=True)
        path = self.figures / f"{name}.png"
        picture = picture.convert("RGB")
        picture.save(path, optimize=True)
        for colors in (256, 128, 64):  # noise and photos may need a palette
            if path.stat().st_size > MOST_BYTES:
                picture.quantize(colors).save(path, optimize=True)
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes; draw it smaller")
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        print(f"figure {shown.as_posix()}")
        print(textwrap.indent(textwrap.fill(caption, 96), "    "))
        notebook = sys.modules.get("IPython")
        if notebook and notebook.get_ipython():
            notebook.display.display(picture)

    def show_source(self, code: Callable):
        """Print a function or class of minipic as it stands in its file."""
        code = inspect.unwrap(code)  # from decorators such as torch.no_grad
        lines, first = inspect.getsourcelines(code)
        path = Path(inspect.getsourcefile(code)).relative_to(ROOT)
        print(f"source {path.as_posix()}, line {first}")
        print(textwrap.indent(textwrap.dedent("".join(lines)), "    ").rstrip())
