"""What a run reads: the files of its model and its data, of which a checkpoint keeps short hashes.

So a resumed run notices that they have changed.
"""

import os
from collections.abc import Callable
from pathlib import Path

from minipic.common import ParameterError, find_file, printable, real_path
from minipic.training.photos import find_files, is_picture
from minipic.training.settings import TrainSettings
from minipic.weights.files import read_json, sha256

ENDINGS = (".safetensors", ".json", ".jsonl", ".csv", ".txt", ".caption")  # besides pictures'
MAX_CHANGES = 10  # that are named


def digest_inputs(config: TrainSettings) -> dict[str, str]:
    """{file: digest} of all files in config.data and config.model, where a recipe has them.

    The names begin with "data" or "model", so the same files in another folder are the same inputs.
    What the run writes itself is left out.
    """
    digests = {}
    for setting in ("data", "model"):
        given = getattr(config, setting, "")
        root = find_file(given)
        if not given or not root.exists():  # the recipe will say so
            continue
        own = [real_path(folder) for folder in (config.out, config.save)]
        own = [folder for folder in own if folder.is_relative_to(real_path(root))]
        for path in find_files(root) if root.is_dir() else [root]:
            is_read = is_picture(path) or path.suffix.lower() in ENDINGS
            is_own = any(real_path(path).is_relative_to(folder) for folder in own)
            if is_read and not is_own and os.path.isfile(path):
                name = Path(setting, path.relative_to(root)).as_posix()
                digests[name] = sha256(path)[:16]  # enough to tell files apart
    return digests


def check_inputs(
        checkpoint: Path, inputs: dict[str, str], allowed: bool, say: Callable[[str], None]):
    """Compare the files that a run reads with those of the run that wrote a checkpoint.

    Raises ParameterError that says what has changed; says it where that is `allowed`.
    """
    path = checkpoint / "inputs.json"
    if not path.exists():  # written before there was such a file
        return
    saved = read_json(path)
    changes = []
    for name in sorted(saved.keys() | inputs.keys()):
        if name not in inputs:
            changes.append(f"{name} is gone")
        elif name not in saved:
            changes.append(f"{name} is new")
        elif inputs[name] != saved[name]:
            changes.append(f"{name} has changed")
    if not changes:
        return
    named = ", ".join(changes[:MAX_CHANGES])
    if len(changes) > MAX_CHANGES:
        named += f" and {len(changes) - MAX_CHANGES} more"
    problem = printable(f"{checkpoint} was trained on other files: {named}")
    if not allowed:
        raise ParameterError(
            "allow_data_change", f"{problem}; restore them, start a new run, or set this to go on")
    say(problem)
