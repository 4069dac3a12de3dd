"""The ordinary ways to train, one file each, and those that make the tiny model: clip, vae, judge.

Each has the names that `minipic/papers/__init__.py` lists for recipes. `setup` replaces parts of
the model where a recipe needs it, and returns the parameters to train; train.py freezes all others.
"""
