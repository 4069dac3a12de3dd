"""Encodings on disk: what frozen networks make of pictures and texts, kept so that the next run need not make it again.

A file's name is the sha256 of all that decides its content, weights included: what has changed has another name.
"""

import hashlib
from pathlib import Path

import torch

from minipic.common import InputError
from minipic.weights import read_header, read_weights, save_weights, sha256


def digest(*values):
    """The hexadecimal sha256 of values: of tensors and of files (Paths) the content, of others what they print as."""
    found = hashlib.sha256()
    for value in values:
        is_tensor = torch.is_tensor(value)
        text = (value.dtype, value.shape) if is_tensor else sha256(value) if isinstance(value, Path) else value
        found.update(f"{text!r}\n".encode())
        if is_tensor:
            found.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class Cache:
    """Lists of tensors in `folder`, made by `networks` as they are now; without a folder (""), none is kept."""

    def __init__(self, folder, *networks):
        self.folder, self.made_by = folder, folder and digest(*(value for network in networks for value in (
            network.config, *(x for item in network.state_dict().items() for x in item))))

    def __call__(self, make, *key):
        """make() for this `key`, see `digest`, or what it returned at an earlier time. A damaged file is made anew."""
        if not self.folder:
            return make()
        path = Path(self.folder, f"{digest(self.made_by, *key)}.safetensors")
        if path.exists():
            try:
                found = [tensor.clone() for _, tensor in sorted(read_weights(path).items())]  # keeps no file open
                if read_header(path)[1].get("sha256") == digest(path.name, *found):
                    return found
                raise InputError(f"{path}: its content does not match its sha256")
            except InputError as error:
                print(f"--cache: {error}; making it anew")
        made = make()
        save_weights({str(i): tensor for i, tensor in enumerate(made)}, path, {"sha256": digest(path.name, *made)})
        return made
