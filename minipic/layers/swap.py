"""Surgery: replace sub-modules of a network by name, so that a method changes a model without the model knowing."""


def swap(model, match, build):
    """Replace every sub-module for which match(name, module) holds by build(name, module) -> {name: the new one}.

    What lies inside a replaced module is not visited. `build` may return the module itself, changed or not.
    """
    found, inside = {}, ()
    for name, module in list(model.named_modules()):
        if name and not name.startswith(inside) and match(name, module):
            found[name], inside = build(name, module), (*inside, name + ".")
    for name, module in found.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return found
