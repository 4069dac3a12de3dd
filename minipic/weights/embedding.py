"""Files of textual inversion (arXiv 2208.01618): the vectors of a new word.

kohya's scripts write one file with a tensor for each text encoder: "clip_l" and "clip_g" for SDXL,
"emb_params" for SD 1.5. The ones written here also have the word in the header. diffusers writes
learned_embeds.safetensors, whose tensor has the word as its name, and for SDXL's second text
encoder learned_embeds_2.safetensors.
"""

from pathlib import Path

import torch

from minipic.common import InputError
from minipic.weights.files import read_header, read_weights, save_weights

Vectors = dict[str, torch.Tensor]  # {part: [n, D]}, n vectors as wide as the part's hidden states

KOHYA_SDXL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
KOHYA_SD15 = {"text_encoder": "emb_params"}
KOHYA_PARTS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "emb_params": "text_encoder"}
DIFFUSERS_FILES = {
    "text_encoder": "learned_embeds.safetensors",
    "text_encoder_2": "learned_embeds_2.safetensors"}


def load_embedding(path: str | Path) -> tuple[Vectors, str | None]:
    """A textual inversion -> ({part: vectors [n,D]}, the word in the file or None).

    Raises InputError naming the file where it holds something else, or several words.
    """
    path = Path(path)
    tensors = read_weights(path)
    if tensors.keys() <= KOHYA_PARTS.keys():
        _, metadata = read_header(path)
        word = metadata.get("word")
        vectors = {KOHYA_PARTS[name]: tensor for name, tensor in tensors.items()}
    else:
        word = next(iter(tensors))
        vectors = from_diffusers(path, tensors, word)

    for part, tensor in list(vectors.items()):
        if tensor.ndim == 1 and len(tensor) > 0:  # one vector: diffusers until 2023
            vectors[part] = tensor[None]
    check_vectors(path, vectors)
    return vectors, word


def from_diffusers(path: Path, tensors: dict[str, torch.Tensor], word: str) -> Vectors:
    """The word's vectors in a file of diffusers, and those of the second file beside it."""
    vectors = {"text_encoder": tensors[word]}
    others = [name for name in tensors if name != word]
    second = path.with_name(path.name.replace("learned_embeds", "learned_embeds_2"))
    if not others and second != path and second.exists():
        tensors_2 = read_weights(second)
        others = [name for name in tensors_2 if name != word]
        vectors["text_encoder_2"] = tensors_2.get(word, torch.empty(0))  # which is refused later
    if others:
        raise InputError(
            f"{path}: {others[0]!r} is more than one word's vectors; expected clip_l and clip_g, "
            "or one word")
    return vectors


def check_vectors(path: Path, vectors: Vectors):
    """InputError unless each encoder has the same number of vectors."""
    numbers = set()
    for tensor in vectors.values():
        is_matrix = tensor.ndim == 2 and tensor.is_floating_point()
        numbers.add(len(tensor) if is_matrix else None)
    if len(numbers) != 1 or None in numbers:
        raise InputError(
            f"{path}: is no textual inversion: expected vectors [n, width], as many for each "
            "encoder")


def save_embedding(vectors: Vectors, path: str | Path, word: str):
    """Write a word's vectors as one file in kohya's spelling, and as diffusers' files beside it."""
    names = KOHYA_SDXL if "text_encoder_2" in vectors else KOHYA_SD15
    kohya = {names[part]: tensor for part, tensor in vectors.items()}
    save_weights(kohya, path, {"word": word})
    for part, tensor in vectors.items():
        save_weights({word: tensor}, Path(path).parent / DIFFUSERS_FILES[part])
