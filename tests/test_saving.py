"""A model saved over another: killed at any moment, or after an error, no mix of the two can be opened."""

import copy
import itertools
import os
import shutil
import sys

import pytest
import tiny
import torch

from minipic.common import InputError
from minipic.pipeline import Pipeline
from minipic.weights import layouts
from minipic.weights.files import replacing_folder
from minipic.weights.layouts import save_part


def killed_at(k, write):
    """Call `write` in a process of its own, which dies before its k-th change of a name on the disk.

    Returns whether it died.
    """
    child = os.fork()
    if child == 0:
        changes = itertools.count(1)

        def die(event, arguments):
            if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir") and next(changes) == k:
                os._exit(9)

        sys.addaudithook(die)
        write()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def content(folder):
    """{path: bytes} of the files of a model, without what is being written."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and not any(part.startswith("part-") for part in path.relative_to(folder).parts)}


def with_doubled_weights(pipeline):
    pipeline = copy.deepcopy(pipeline)
    for param in pipeline.parameters():
        param.data *= 2
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("names", [pytest.param(["."], marks=pytest.mark.slow), ["text_encoder", "text_encoder_2", "tokenizer"], ["vae"]])
def test_killed_at_any_moment_a_folder_holds_the_old_model_or_the_new_or_is_refused(tmp_path, monkeypatch, names):
    """Also where only some parts of a model are replaced, as recipes/clip.py and recipes/vae.py do."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # what a kill leaves does not depend on it
    plain, doubled, folder = tmp_path / "plain", tmp_path / "doubled", tmp_path / "folder"
    tiny.model().save(plain)
    with_doubled_weights(tiny.model()).save(doubled)
    new = content(plain)
    for name in names:
        new |= {path: data for path, data in content(doubled).items() if path.is_relative_to(name)}
    assert layouts.open_model(doubled)
    weights = next((plain / names[0]).rglob("*.safetensors"))  # an old variant must leave with the old model
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    old = content(plain)

    def write():
        with replacing_folder(folder, "me") as temporary:
            for name in names:
                shutil.copytree(doubled / name, temporary / name, dirs_exist_ok=True)

    seen = []
    died = True
    while died:
        shutil.copytree(plain, folder)
        died = killed_at(len(seen) + 1, write)
        try:
            layouts.open_model(folder)
            seen.append("new" if content(folder) == new else "old")
            assert content(folder) in (old, new)
        except InputError as error:
            assert "is unfinished: its writing was interrupted" in str(error)
            seen.append("unfinished")
        write()  # the next writing
        assert content(folder) == new and not list(folder.rglob("part-*"))
        shutil.rmtree(folder)
    assert seen == sorted(seen, key=["old", "unfinished", "new"].index)  # once new, new
    assert set(seen) == {"old", "unfinished", "new"}


@pytest.mark.parametrize("save, last", [
    (lambda model, folder: model.save(folder), 15), (lambda model, folder: save_part(model.vae, folder / "vae"), 3)])
def test_killed_while_its_files_are_written_the_old_model_is_there(tmp_path, save, last):
    new = with_doubled_weights(tiny.model())
    shutil.copytree(tiny.folder(), tmp_path / "model")
    for k in (1, 2, last):
        assert killed_at(k, lambda: save(new, tmp_path / "model"))
        assert content(tmp_path / "model") == content(tiny.folder())


def states_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_error_while_saving_leaves_the_old_model(tmp_path, monkeypatch):
    shutil.copytree(tiny.folder(), tmp_path / "model")
    new = with_doubled_weights(tiny.model())
    monkeypatch.setattr(type(new.tokenizer), "save", lambda self, folder: open(tmp_path / "no" / "such", "w"))
    with pytest.raises(InputError, match="cannot write there .*No such file.*make room"):
        new.save(tmp_path / "model")
    assert states_equal(Pipeline.load(tmp_path / "model").state_dict(), tiny.model().state_dict())
    assert not list(tmp_path.rglob("part-*"))
