"""What may be added to a model that stays as it is: LoRAs, new words and ControlNets, each from a file of its own."""

from pathlib import Path

import torch
import torch.nn as nn

from minipic.common import InputError
from minipic.embedding import grow, load_embedding
from minipic.layers import lora
from minipic.layouts import blank, load_part, open_controlnet
from minipic.weights import load_lora

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


class Adapters(nn.Module):
    """The part of a Pipeline that adds to its networks; it has `unet`, `vae`, text encoders, `lazy` and `texts`."""

    def __init__(self):
        super().__init__()
        self.loras = {}  # {name: (scale, {part: {module: (A, B, alpha)}})}
        self.words = {}  # {word: {part: vectors [n,D]}}

    @property
    def controlnets(self):
        """Names of the ControlNets this model has: "controlnet", "controlnet_2", ... in the order of `add_control`."""
        return [name for name, _ in self.named_children() if name.startswith("controlnet")]

    @property
    def encoders(self):
        """{part: text encoder} of the encoders this model has."""
        return {part: getattr(self, part) for part in TOKENIZERS if getattr(self, part) is not None}

    def add_lora(self, path, scale=1.0, partial=False):
        """Add the LoRA of a file in any common spelling, beside those that are there; nothing is read again.

        `scale`: how strong, 1 as trained; `set_lora` changes it later. `partial`: leave out what fits no layer. The
        file's path is its name. Raises InputError naming the file and what does not fit.
        """
        if str(path) in self.loras:
            raise InputError(f"--lora {path}: given twice; give it once with the sum of the scales")
        parts = {"unet": self.unet, **self.encoders}
        self.loras[str(path)] = scale, load_lora(path, parts, partial)
        for part in parts:
            if not next(parts[part].parameters()).is_meta:
                self.apply_lora(part, str(path))
        self.texts.clear()

    def apply_lora(self, part, name):
        (scale, found), model = self.loras[name], getattr(self, part)
        dtype = next(model.parameters()).dtype  # of the arithmetic; see layers/casting.py
        for module, (a, b, alpha) in found.get(part, {}).items():
            lora.add(model.get_submodule(module), name, a.to(dtype), b.to(dtype), alpha)
        lora.set_scale(model, scale, name)

    def set_lora(self, path, scale):
        """Change the strength of a LoRA that was added; 0 turns it off."""
        self.loras[str(path)] = scale, self.loras[str(path)][1]
        for part in self.loras[str(path)][1]:
            lora.set_scale(getattr(self, part), scale, str(path))
        self.texts.clear()

    def add_embedding(self, path, word=None):
        """Read a textual inversion, see embedding.load_embedding; `word` in a prompt means it from now on.

        word: None takes the one in the file, else the file's name. Raises InputError naming the file and what is wrong.
        """
        vectors, told = load_embedding(path)
        try:
            self.add_word(word or told or Path(path).stem, vectors)
        except InputError as error:
            raise InputError(f"--embedding {path}: {error}") from None

    def add_word(self, word, vectors):
        """Let `word` in a prompt mean these vectors, {part: [n,D]}; InputError where they are not this model's."""
        widths = {part: encoder.config.hidden_size for part, encoder in self.encoders.items()}
        found = {part: tensor.shape[1] for part, tensor in vectors.items()}
        if found != widths:
            raise InputError(f"its vectors are as wide as {found}, this model's text encoders {widths}; use one made "
                             "for this model")
        for part, tensor in vectors.items():
            getattr(self, TOKENIZERS[part]).add(word, len(tensor))
            if not next(getattr(self, part).parameters()).is_meta:
                grow(getattr(self, part), tensor)
        self.words[word] = vectors
        self.texts.clear()

    def add_control(self, path):
        """Add the ControlNet of a diffusers folder or a file, beside those that are there, for `steps` to follow a
        picture with. Raises InputError naming the path and what does not fit this model."""
        like = next(self.unet.parameters())
        dtype, device, cast = self.lazy["unet"][1:] if self.lazy else (like.dtype, like.device, False)
        part = open_controlnet(path, self.unet.config, self.vae.config.factor, dtype != torch.float32)
        name = f"controlnet_{len(self.controlnets) + 1}" if self.controlnets else "controlnet"
        if self.lazy:
            self.lazy[name] = part, dtype, device, cast
        setattr(self, name, blank(part.model, part.config) if self.lazy else load_part(part, dtype, device))

    def apply_added(self, part):
        """Add again what was added to a part that has just been read from disk."""
        for file in self.loras:
            self.apply_lora(part, file)
        for vectors in self.words.values():
            if part in vectors:
                grow(getattr(self, part), vectors[part])
