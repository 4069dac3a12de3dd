"""One file a paper, plus the plain recipes. `train.py` relies on exactly these names in each:

    Recipe                        a flat dataclass of settings on top of minipic.training.Recipe
    build(config)                 the model (nn.Module), from nothing or from files
    setup(model, config)          freezes and replaces parts; the list of parameters that train
    rates(config)                 may be left out: {parameter's name: its learning rate over that of the rest}
    data(model, config)           a function (step, indices) -> batch, a dict. `indices` are sample numbers; all that is
                                  random for sample i comes from common.random(config.seed, purpose, i)
    loss(model, batch, config)    a scalar, or (scalar, {name: value to log})
    sample(model, config)         a picture (PIL) that shows how far the training has come
    export(model, folder, config) writes the finished weights in the official layout
"""
