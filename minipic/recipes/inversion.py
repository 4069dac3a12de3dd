"""Textual inversion: a new word for a frozen model (arXiv 2208.01618).

Only the word's vectors are trained, in each text encoder, to lower the diffusion loss (equation 2
there) on a few pictures whose captions contain the word.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from minipic.common import InputError, ParameterError
from minipic.latents import (
    LatentData, denoising_loss, load_pipeline, read_photos, sample_captions)
from minipic.pipeline import Pipeline
from minipic.training.flags import option
from minipic.training.settings import DATA, PhotoSettings
from minipic.weights.embedding import save_embedding


@dataclass
class Settings(PhotoSettings):
    """Teach a model a new word from a few pictures (--data) with captions that contain it."""

    word: str = option("<new>", "the new word, as captions and prompts write it", group=DATA)
    initializer_token: str = option("object", "a word of the vocabulary to start from", group=DATA)
    num_vectors: int = option(1, "vectors that the word stands for", group=DATA)
    steps: int = option(500)
    batch: int = option(4)
    lr: float = option(5e-3)
    ema: float = option(0.0)
    weight_decay: float = option(0.0, "AdamW's decay, which would draw the vectors to zero")

    MINIMUM = PhotoSettings.MINIMUM | {"num_vectors": 1}
    train_text = True  # the vectors lie in the text encoders

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise ParameterError("data", "name a folder of pictures that show what the word means")


def build(config: Settings) -> Pipeline:
    """The pipeline with the new word, whose vectors all start as the initializer token's."""
    pipeline = load_pipeline(config, frozen=True)
    vectors = {}
    for part, of_token in pipeline.vectors_of(config.initializer_token).items():
        if len(of_token) != 1:
            raise ParameterError(
                "initializer_token", f"{config.initializer_token} is not one token of this "
                "model's vocabulary; choose another")
        vectors[part] = of_token.repeat(config.num_vectors, 1)
    try:
        pipeline.add_word(config.word, vectors)
    except InputError as error:
        raise ParameterError("word", str(error)) from None
    for vectors in pipeline.word_vectors().values():
        vectors.data = vectors.data.float()  # what trains is in fp32
    return pipeline


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    return list(pipeline.word_vectors().values())


def data(pipeline: Pipeline, config: Settings) -> LatentData:
    photos = read_photos(pipeline, config, config.data)
    tokenizer, encoder = pipeline.tokenizers_and_encoders[0]
    # The ids of new words follow those of the vocabulary.
    vocabulary = len(encoder.text_model.embeddings.token_embedding.weight)
    for photo in photos:
        if (tokenizer([photo.text]) < vocabulary).all():
            raise InputError(
                f"{photo.path}: its caption {photo.text!r} lacks the word {config.word}; put it "
                f'there, or give the caption "a picture of {config.word}" for all and no files')
    return LatentData(pipeline, photos, config)


loss = denoising_loss
sample = sample_captions


def export(pipeline: Pipeline, folder: Path, config: Settings, data: LatentData):
    """The word's vectors, in one file of kohya's spelling and in diffusers' files."""
    letters = [letter for letter in config.word if letter.isalnum() or letter in "-_"]
    name = "".join(letters) or "word"
    save_embedding(pipeline.word_vectors(), folder / f"{name}.safetensors", config.word)
