"""Files of textual inversion (arXiv 2208.01618): the vectors of a new word.

kohya's scripts write one file with a tensor for each text encoder: "clip_l" and "clip_g" for SDXL,
"emb_params" for SD 1.5; other trainers have other names (`PART_OF`). The ones written here also
have the word in the header. LoRA files can hold words too (weights/lora.py). diffusers writes
learned_embeds.safetensors, whose tensor has the word as its name, and for SDXL's second text
encoder learned_embeds_2.safetensors.
"""

from pathlib import Path

import torch

from minipic.common import InputError
from minipic.weights import keys
from minipic.weights.files import read_header, read_weights, save_weights, stream

Vectors = dict[str, torch.Tensor]  # {part: [n, D]}, n vectors as wide as the part's hidden states

KOHYA_SDXL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
KOHYA_SD15 = {"text_encoder": "emb_params"}
PART_OF = {  # name of a tensor: the part that its vectors are for
    "clip_l": "text_encoder", "clip_g": "text_encoder_2",  # kohya, ComfyUI
    "emb_params": "text_encoder",  # kohya, for SD 1.5
    "string_to_param.*": "text_encoder", "string_to_param": "text_encoder",  # A1111
    "*": "text_encoder",  # A1111's, without its notes
    "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2",
    "text_encoders_0": "text_encoder", "text_encoders_1": "text_encoder_2"}  # diffusers until 2024
A1111_IDS = "string_to_token.*"  # whole numbers that mean nothing elsewhere
DIFFUSERS_FILES = {
    "text_encoder": "learned_embeds.safetensors",
    "text_encoder_2": "learned_embeds_2.safetensors"}


def load_embedding(path: str | Path) -> tuple[Vectors, str | None]:
    """A textual inversion -> ({part: vectors [n,D]}, the word in the file or None).

    Raises InputError naming the file where it holds something else, or several words.
    """
    path = Path(path)
    entries, metadata = read_header(path)
    foreign = keys.foreign_kind(entries, besides="a textual inversion")
    if foreign is not None:
        kind, name = foreign
        raise InputError(f"{path} is {kind} ({name!r}); expected a textual inversion")
    entries = {name: entry for name, entry in entries.items() if name != A1111_IDS}
    if not entries.keys() <= PART_OF.keys() and len(entries) > 1:
        raise InputError(
            f"{path}: {list(entries)[1]!r} is more than one word's vectors; expected clip_l and "
            "clip_g, or one word")
    tensors = dict(stream(path, entries))
    if tensors.keys() <= PART_OF.keys():
        word = metadata.get("word")
        vectors = {}
        for name, tensor in tensors.items():
            if PART_OF[name] in vectors:
                raise InputError(f"{path}: {name!r} is there in two spellings; use another file")
            vectors[PART_OF[name]] = tensor
    else:
        word = next(iter(tensors))
        vectors = from_diffusers(path, tensors, word)
    return check_vectors(path, vectors), word


def from_diffusers(path: Path, tensors: dict[str, torch.Tensor], word: str) -> Vectors:
    """The word's vectors in a file of diffusers, and those of the second file beside it."""
    vectors = {"text_encoder": tensors[word]}
    second = path.with_name(path.name.replace("learned_embeds", "learned_embeds_2"))
    if second != path and second.exists():
        tensors_2 = read_weights(second)
        if tensors_2.keys() != {word}:
            raise InputError(f"{second}: expected the vectors of {word!r} alone, as in {path.name}")
        vectors["text_encoder_2"] = tensors_2[word]
    return vectors


def check_vectors(path: Path, vectors: Vectors) -> Vectors:
    """The vectors of a word, each [n,D]. InputError unless each encoder has the same number."""
    vectors = dict(vectors)
    for part, tensor in vectors.items():
        if tensor.ndim == 1 and len(tensor) > 0:  # one vector: diffusers until 2023
            vectors[part] = tensor[None]
    numbers = set()
    for tensor in vectors.values():
        is_matrix = tensor.ndim == 2 and tensor.is_floating_point()
        numbers.add(len(tensor) if is_matrix else None)
    if len(numbers) != 1 or None in numbers:
        raise InputError(
            f"{path}: is no textual inversion: expected vectors [n, width], as many for each "
            "encoder")
    return vectors


def save_embedding(vectors: Vectors, path: str | Path, word: str):
    """Write a word's vectors as one file in kohya's spelling, and as diffusers' files beside it."""
    names = KOHYA_SDXL if "text_encoder_2" in vectors else KOHYA_SD15
    kohya = {names[part]: tensor for part, tensor in vectors.items()}
    save_weights(kohya, path, {"word": word})
    for part, tensor in vectors.items():
        save_weights({word: tensor}, Path(path).parent / DIFFUSERS_FILES[part])
