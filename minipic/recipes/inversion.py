"""Textual inversion: a new word for a frozen model (arXiv 2208.01618).

Only the word's vectors are trained, in each text encoder, to lower the diffusion loss (equation 2
there) on a few pictures whose captions contain the word.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from minipic.common import InputError, ParameterError
from minipic.latents import LatentData, load_pipeline, training_pictures
from minipic.pipeline import Pipeline
from minipic.recipes.t2i import loss, sample  # noqa: F401 - the recipe's own
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
    """The pipeline with the new word, whose vectors all start as that of --initializer-token."""
    pipeline = load_pipeline(config, frozen=True)
    vectors = {}
    for part, (tokenizer, encoder) in zip(pipeline.text_encoders, pipeline.tokenizers_and_encoders):
        first, second = tokenizer([config.initializer_token])[0, 1:3].tolist()
        if second != encoder.end_token:
            raise ParameterError(
                "initializer_token", f"{config.initializer_token} is not one token of this "
                "model's vocabulary; choose another")
        weight = encoder.text_model.embeddings.token_embedding.weight
        vectors[part] = weight[first].detach().repeat(config.num_vectors, 1)
    try:
        pipeline.add_word(config.word, vectors)
    except InputError as error:
        raise ParameterError("word", str(error)) from None
    for embedding in token_embeddings(pipeline).values():
        embedding.added.data = embedding.added.data.float()  # what trains is in fp32
    return pipeline


def token_embeddings(pipeline: Pipeline) -> dict[str, nn.Module]:
    embeddings = {}
    for part, encoder in pipeline.text_encoders.items():
        embeddings[part] = encoder.text_model.embeddings.token_embedding
    return embeddings


def setup(pipeline: Pipeline, config: Settings) -> list[nn.Parameter]:
    return [embedding.added for embedding in token_embeddings(pipeline).values()]


def data(pipeline: Pipeline, config: Settings) -> LatentData:
    pictures = training_pictures(pipeline, config)
    tokenizer, encoder = pipeline.tokenizers_and_encoders[0]
    # The ids of new words follow those of the vocabulary.
    vocabulary = len(encoder.text_model.embeddings.token_embedding.weight)
    for photo in pictures:
        if (tokenizer([photo.text]) < vocabulary).all():
            raise InputError(
                f"{photo.path}: its caption {photo.text!r} lacks the word {config.word}; put it "
                f'there, or give --caption "a picture of {config.word}" in place of caption files')
    return LatentData(pipeline, pictures, config)


def export(pipeline: Pipeline, folder: Path, config: Settings, data: LatentData):
    """The word's vectors, in one file of kohya's spelling and in diffusers' files."""
    letters = [letter for letter in config.word if letter.isalnum() or letter in "-_"]
    name = "".join(letters) or "word"
    vectors = {}
    for part, embedding in token_embeddings(pipeline).items():
        vectors[part] = embedding.added.detach()
    save_embedding(vectors, folder / f"{name}.safetensors", config.word)
