"""The networks of one model, in memory or still on disk, and what files can add to them.

LoRAs, new words and ControlNets can be added at any time. A network that is read from disk later
gets them then.
"""

from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from minipic.common import InputError, ParameterError, find_file
from minipic.layers import lora
from minipic.layers.embedding import grow
from minipic.models.clip import CLIPText
from minipic.models.unet import UNet
from minipic.models.vae import VAE
from minipic.weights.controlnet import open_controlnet
from minipic.weights.embedding import Vectors, load_embedding
from minipic.weights.layouts import Part, build_empty, load_part
from minipic.weights.lora import read_lora

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZER_OF = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
}

MAX_SCALE = 1e6  # of a LoRA; no larger one is meant, and float32 ends at 3e38


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
            self, unet: UNet, vae: VAE, text_encoder: CLIPText | None = None,
            text_encoder_2: CLIPText | None = None, tokenizer: Any = None,
            tokenizer_2: Any = None):
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
        self.loras = {}  # {path: (scale, LoRAFile)}
        # {part: {parameter: what it was}} of what whole differences in LoRA files have changed
        self.originals = {}
        self.words = {}  # {word: {part: vectors [n,D]}}
        self.changes = 0  # grows with everything added: what was encoded before is out of date

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet also takes a pooled text and sizes, as SDXL's do."""
        return self.unet.config.addition_embed_type is not None

    @property
    def extra_input(self) -> str:
        """What the UNet sees besides x.

        "" nothing, "edit" the picture to change (InstructPix2Pix), "mask" the mask and the picture
        around it (inpainting).
        """
        latent = self.vae.config.latent_channels
        kinds = {latent: "", 2 * latent: "edit", 2 * latent + 1: "mask"}
        return kinds[self.unet.config.in_channels]

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

    @property
    def dtype(self) -> torch.dtype:
        """The UNet's, also while it is on disk."""
        if "unet" in self.on_disk:
            return self.on_disk["unet"].dtype
        return next(self.unet.parameters()).dtype

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
                self.originals.pop(name, None)

    # What can be added ----------------------------------------------------------------------------

    def add_lora(self, path: str | Path, scale: float = 1.0, allow_partial: bool = False):
        """Add the LoRA of a file or folder, in any common spelling, beside those that are there.

        scale: how strong, 1 as trained; `set_lora_scale` changes it later.
        allow_partial: leave out what fits no layer, with a warning.
        The path is the LoRA's name. Words that the file holds mean something in prompts from now
        on. Raises InputError naming the file and what does not fit; then nothing has changed.
        """
        name = str(path)
        check_scale(scale)
        if name in self.loras:
            raise InputError(
                f"{path} is given twice as a LoRA; give it once with the sum of the scales")
        parts = {"unet": self.unet, **self.text_encoders}
        for network in parts.values():
            if any(layer.merged for layer in lora.layers(network).values()):
                raise InputError(
                    f"{path} cannot be added: the model's LoRAs are merged; unmerge them first")
        file = read_lora(find_file(path), parts, allow_partial)
        self.add_words(path, file.words)
        self.loras[name] = scale, file
        for part, network in parts.items():
            if is_in_memory(network):
                self.apply_lora(part, name)
        self.changes += 1

    def set_lora_scale(self, path: str | Path, scale: float):
        """Change the strength of a LoRA that was added; 0 turns it off."""
        name = str(path)
        check_scale(scale)
        if name not in self.loras:
            added = ", ".join(self.loras) or "none"
            raise ParameterError("path", f"{name!r} is no LoRA that was added (added: {added})")
        _, file = self.loras[name]
        self.loras[name] = scale, file
        for part, network in {"unet": self.unet, **self.text_encoders}.items():
            lora.set_scale(network, scale, name)
            if is_in_memory(network):
                self.apply_differences(part)
        self.changes += 1

    def add_embedding(self, path: str | Path, word: str | None = None):
        """Read a textual inversion; `word` in a prompt means it from now on.

        word: None takes the one in the file, else the file's name.
        Raises InputError naming the file.
        """
        if not isinstance(word, str | None):
            raise ParameterError("word", f"expected a text such as '<my-cat>', not {word!r}")
        vectors, own_word = load_embedding(find_file(path))
        self.add_words(path, {word or own_word or Path(path).stem: vectors})

    def add_words(self, path: str | Path, words: dict[str, Vectors]):
        """Add the words of a file. InputError naming it; then none is added."""
        for word, vectors in words.items():
            try:
                self.check_word(word, vectors)
            except InputError as error:
                raise InputError(f"{path}: the word {word!r}: {error}") from None
        for word, vectors in words.items():
            self.add_word(word, vectors)

    def check_word(self, word: str, vectors: Vectors):
        """InputError where vectors are not as wide as this model's, or the word is a token."""
        expected = {}
        for part, encoder in self.text_encoders.items():
            expected[part] = encoder.config.hidden_size
        widths = {part: tensor.shape[1] for part, tensor in vectors.items()}
        if widths != expected:
            raise InputError(
                f"its vectors are as wide as {widths}, this model's text encoders {expected}; "
                "use one made for this model")
        for part, tensor in vectors.items():
            getattr(self, TOKENIZER_OF[part]).check_new(word, len(tensor))

    def add_word(self, word: str, vectors: Vectors):
        """Let `word` in a prompt mean these vectors, {part: [n,D]}; see `check_word` for errors."""
        self.check_word(word, vectors)
        for part, tensor in vectors.items():
            getattr(self, TOKENIZER_OF[part]).add(word, len(tensor))
            if is_in_memory(getattr(self, part)):
                grow(getattr(self, part), tensor)
        self.words[word] = vectors
        self.changes += 1

    def vectors_of(self, text: str) -> dict[str, torch.Tensor]:
        """{part: the vectors [n,D] of a text's n tokens}, for a new word to start from."""
        vectors = {}
        for part, (tokenizer, encoder) in zip(self.text_encoders, self.tokenizers_and_encoders):
            ids = []
            for _, ids_of_token in tokenizer.tokenize(text):
                ids += ids_of_token
            weight = encoder.text_model.embeddings.token_embedding.weight
            vectors[part] = weight[ids].detach()
        return vectors

    def word_vectors(self) -> dict[str, nn.Parameter]:
        """{part: the vectors [n,D] of all words that were added}, to train and to save."""
        vectors = {}
        for part, encoder in self.text_encoders.items():
            vectors[part] = encoder.text_model.embeddings.token_embedding.added
        return vectors

    def add_controlnet(self, path: str | Path):
        """Add the ControlNet of a diffusers folder or of a file, beside those that are there.

        Raises InputError naming the path and what does not fit this model.
        """
        half = self.dtype != torch.float32
        part = open_controlnet(find_file(path), self.unet.config, self.vae.config.factor, half)
        cast = "unet" in self.on_disk and self.on_disk["unet"].cast
        network = OnDisk(part, self.dtype, self.device, cast)
        if self.on_disk:  # it waits on disk, as the other networks do
            name = self.attach_controlnet(network.empty())
            self.on_disk[name] = network
        else:
            self.attach_controlnet(network.load())

    def attach_controlnet(self, controlnet: nn.Module) -> str:
        """Add a ControlNet that is in memory, beside those that are there. Returns its name."""
        number = len(self.controlnets) + 1
        name = "controlnet" if number == 1 else f"controlnet_{number}"
        setattr(self, name, controlnet)
        return name

    def apply_added(self, part: str):
        """Add again what was added to a network that has just been read from disk."""
        for name in self.loras:
            self.apply_lora(part, name)
        for vectors in self.words.values():
            if part in vectors:
                grow(getattr(self, part), vectors[part])

    def apply_lora(self, part: str, name: str):
        """Put what a LoRA file changes into a network that is in memory."""
        scale, file = self.loras[name]
        network = getattr(self, part)
        dtype = next(network.parameters()).dtype  # of the arithmetic; see kernels/casting.py
        for path, (a, b, alpha) in file.layers.get(part, {}).items():
            lora.add(network, path, name, a.to(dtype), b.to(dtype), alpha)
        lora.set_scale(network, scale, name)
        self.apply_differences(part)

    def apply_differences(self, part: str):
        """Add the whole differences of all LoRA files to the parameters of a network in memory.

        It starts from the parameters as they were, so that a scale of 0 gives the same bits.
        """
        network = getattr(self, part)
        is_merged = any(layer.merged for layer in lora.layers(network).values())
        lora.unmerge(network)
        originals = self.originals.setdefault(part, {})
        for path, original in originals.items():
            network.get_parameter(path).data = original
        for scale, file in self.loras.values():
            for path, difference in file.differences.get(part, {}).items():
                parameter = network.get_parameter(path)
                originals.setdefault(path, parameter.data)
                if scale != 0:
                    parameter.data = parameter.data + (difference.float() * scale).to(parameter)
        if is_merged:
            lora.merge(network)


def check_scale(scale: float):
    """ParameterError unless this is a scale for a LoRA."""
    if not is_scale(scale):
        raise ParameterError("scale", f"choose a number such as 0.8, not {scale!r}")


def is_scale(value: Any) -> bool:
    """Whether this is a number, not a huge one and not NaN."""
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) <= MAX_SCALE
