"""Surgery: replace modules of a network by name, so that a method changes a model from outside."""

from collections.abc import Callable

import torch.nn as nn


def swap(model: nn.Module, match: Callable, build: Callable) -> dict[str, nn.Module]:
    """Replace every module for which match(path, module) is true by build(path, module).

    Returns {path: new module}. Modules inside a replaced one are not visited. `build` may return
    the old module itself, changed or not.
    """
    replaced = {}
    inside = None  # how the paths begin of what lies in the module replaced last
    for path, module in list(model.named_modules()):  # lists a module's content right after it
        if path == "" or (inside is not None and path.startswith(inside)):
            continue
        if match(path, module):
            replaced[path] = build(path, module)
            inside = path + "."
    for path, module in replaced.items():
        model.set_submodule(path, module)
    return replaced
