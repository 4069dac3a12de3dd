"""The networks of one model, in memory or still on disk, and what files can add to them.

LoRAs, new words and ControlNets can be added at any time. A network that is read from disk later
gets them then.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn

from minipic.common import InputError, ParameterError, find_file
from minipic.layers import lora
from minipic.layers.embedding import grow
from minipic.weights.controlnet import open_controlnet
from minipic.weights.embedding import load_embedding
from minipic.weights.layouts import Part, build_empty, load_part
from minipic.weights.lora import load_lora

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZER_OF = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
}


@dataclass(frozen=True)
class OnDisk:
    """A network that can be read, and be read again after its memory was given back.

    Until it is read, `empty` stands in its place: the same modules on the meta device, with shapes
    but without numbers.
    """

    part: Part
    dtype: torch.dtype
    device: str | torch.device
    cast: bool

    def load(self) -> nn.Module:
        return load_part(self.part, self.dtype, self.device, self.cast)

    def empty(self) -> nn.Module:
        return build_empty(self.part.model, self.part.config)


def is_in_memory(network: nn.Module) -> bool:
    return not next(network.parameters()).is_meta


class Networks(nn.Module):
    """The networks and tokenizers of one model.

    SDXL's refiner has no text_encoder, SD 1.x and 2.x no text_encoder_2.
    """

    def __init__(
            self, unet, vae, text_encoder=None, text_encoder_2=None,
            tokenizer=None, tokenizer_2=None):
        super().__init__()
        self.unet = unet
        self.vae = vae
        self.text_encoder = text_encoder
        self.text_encoder_2 = text_encoder_2
        self.tokenizer = tokenizer
        self.tokenizer_2 = tokenizer_2
        # Where each network can be read from when it is needed, and read again after its memory
        # was given back. Empty if all networks were read at once: then they stay in memory.
        self.on_disk: dict[str, OnDisk] = {}
        self.loras = {}  # {file: (scale, {part: {module: (A, B, alpha)}})}
        self.words = {}  # {word: {part: vectors [n,D]}}
        self.changes = 0  # grows with everything added: what was encoded before is out of date

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """{part: text encoder} of the encoders that this model has."""
        encoders = {part: getattr(self, part) for part in TEXT_ENCODERS}
        return {part: encoder for part, encoder in encoders.items() if encoder is not None}

    @property
    def tokenizers_and_encoders(self) -> list:
        """[(tokenizer, text encoder), ...], as `text.encode_prompts` takes them."""
        pairs = []
        for part, encoder in self.text_encoders.items():
            pairs.append((getattr(self, TOKENIZER_OF[part]), encoder))
        return pairs

    @property
    def controlnets(self) -> list[str]:
        """The names of the ControlNets in their order: "controlnet", "controlnet_2", ..."""
        return [name for name, _ in self.named_children() if name.startswith("controlnet")]

    @property
    def device(self) -> torch.device:
        """Where drawing happens: the UNet's device, also while it is on disk."""
        if "unet" in self.on_disk:  # an empty UNet's device is "meta"
            return torch.device(self.on_disk["unet"].device)
        return next(self.unet.parameters()).device

    # In memory and on disk ------------------------------------------------------------------------

    def fetch(self, *names: str):
        """Read these networks from disk, unless they are in memory."""
        for name in names:
            if name in self.on_disk and not is_in_memory(getattr(self, name)):
                setattr(self, name, self.on_disk[name].load())
                self.apply_added(name)

    def free(self, *names: str):
        """Give back the memory of these networks, if they can be read again."""
        for name in names:
            if name in self.on_disk:
                setattr(self, name, self.on_disk[name].empty())

    # What can be added ----------------------------------------------------------------------------

    def add_lora(self, path: str | Path, scale: float = 1.0, partial: bool = False):
        """Add the LoRA of a file, in any common spelling, beside those that are there.

        scale: how strong, 1 as trained; `set_lora_scale` changes it later.
        partial: leave out what fits no layer.
        The path is the LoRA's name. Raises InputError naming the file and what does not fit.
        """
        name = str(path)
        if name in self.loras:
            raise ParameterError(
                "lora", f"{path} is given twice; give it once with the sum of the scales")
        parts = {"unet": self.unet, **self.text_encoders}
        self.loras[name] = scale, load_lora(find_file(path), parts, partial)
        for part, network in parts.items():
            if is_in_memory(network):
                self.apply_lora(part, name)
        self.changes += 1

    def set_lora_scale(self, path: str | Path, scale: float):
        """Change the strength of a LoRA that was added; 0 turns it off."""
        name = str(path)
        _, weights = self.loras[name]
        self.loras[name] = scale, weights
        for part in weights:
            lora.set_scale(getattr(self, part), scale, name)
        self.changes += 1

    def add_embedding(self, path: str | Path, word: str | None = None):
        """Read a textual inversion; `word` in a prompt means it from now on.

        word: None takes the one in the file, else the file's name.
        Raises InputError naming the file.
        """
        vectors, own_word = load_embedding(find_file(path))
        try:
            self.add_word(word or own_word or Path(path).stem, vectors)
        except InputError as error:
            raise ParameterError("embedding", f"{path}: {error}") from None

    def add_word(self, word: str, vectors: dict[str, torch.Tensor]):
        """Let `word` in a prompt mean these vectors, {part: [n,D]}.

        Raises InputError where they are not as wide as this model's.
        """
        expected = {}
        for part, encoder in self.text_encoders.items():
            expected[part] = encoder.config.hidden_size
        widths = {part: tensor.shape[1] for part, tensor in vectors.items()}
        if widths != expected:
            raise InputError(
                f"its vectors are as wide as {widths}, this model's text encoders {expected}; "
                "use one made for this model")
        for part, tensor in vectors.items():
            getattr(self, TOKENIZER_OF[part]).add(word, len(tensor))
            if is_in_memory(getattr(self, part)):
                grow(getattr(self, part), tensor)
        self.words[word] = vectors
        self.changes += 1

    def add_controlnet(self, path: str | Path):
        """Add the ControlNet of a diffusers folder or of a file, beside those that are there.

        Raises InputError naming the path and what does not fit this model.
        """
        if "unet" in self.on_disk:
            unet = self.on_disk["unet"]
            dtype, device, cast = unet.dtype, unet.device, unet.cast
        else:
            weight = next(self.unet.parameters())
            dtype, device, cast = weight.dtype, weight.device, False
        half = dtype != torch.float32
        part = open_controlnet(find_file(path), self.unet.config, self.vae.config.factor, half)
        network = OnDisk(part, dtype, device, cast)
        number = len(self.controlnets) + 1
        name = "controlnet" if number == 1 else f"controlnet_{number}"
        if self.on_disk:  # it waits on disk, as the other networks do
            self.on_disk[name] = network
            setattr(self, name, network.empty())
        else:
            setattr(self, name, network.load())

    def apply_added(self, part: str):
        """Add again what was added to a network that has just been read from disk."""
        for name in self.loras:
            self.apply_lora(part, name)
        for vectors in self.words.values():
            if part in vectors:
                grow(getattr(self, part), vectors[part])

    def apply_lora(self, part: str, name: str):
        """Put the layers of a LoRA into a network that is in memory."""
        scale, weights = self.loras[name]
        network = getattr(self, part)
        dtype = next(network.parameters()).dtype  # of the arithmetic; see kernels/casting.py
        for path, (a, b, alpha) in weights.get(part, {}).items():
            lora.add(network, path, name, a.to(dtype), b.to(dtype), alpha)
        lora.set_scale(network, scale, name)
