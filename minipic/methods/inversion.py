"""Textual inversion: a new word for a model that stays as it is (arXiv 2208.01618).

Only the word's vectors are trained, in each text encoder, to lower the diffusion loss (equation 2 there) on a few
pictures whose captions contain the word.
"""

from dataclasses import dataclass

from minipic.common import InputError, option
from minipic.embedding import save_embedding
from minipic.methods import t2i
from minipic.methods.t2i import loss, sample  # noqa: F401


@dataclass
class Recipe(t2i.Photos):
    """Teach a model a new word from a few pictures (--data) with captions that contain it."""

    word: str = option("<new>", "the new word, as captions and prompts write it")
    like: str = option("object", "a word of the vocabulary to start from")
    vectors: int = option(1, "vectors the word stands for")
    steps: int = option(500, "optimizer steps in all")
    batch: int = option(4, "pictures a step")
    lr: float = option(5e-3, "peak learning rate")
    ema: float = option(0.0, "decay of the average of the vectors that is exported; 0: none")
    weight_decay: float = option(0.0, "AdamW's decay, which would draw the vectors to zero")

    LEAST = t2i.Photos.LEAST | {"vectors": 1}
    train_text = True  # the vectors lie in the text encoders

    def __post_init__(self):
        super().__post_init__()
        if not self.data:
            raise InputError("--data: name a folder of pictures that show what the word means")


def build(config):
    """The pipeline with the new word; all its vectors, which alone train, start as those of `like`."""
    pipeline, vectors = t2i.load(config, stays=True), {}
    for part, (tokenizer, encoder) in zip(pipeline.encoders, pipeline.towers):
        first, second = tokenizer([config.like])[0, 1:3].tolist()
        if second != encoder.end_token:
            raise InputError(f"--like {config.like}: is not one token of this model's vocabulary; choose another")
        weight = encoder.text_model.embeddings.token_embedding.weight
        vectors[part] = weight[first].detach().repeat(config.vectors, 1)
    try:
        pipeline.add_word(config.word, vectors)
    except InputError as error:
        raise InputError(f"--word {error}") from None
    for embedding in embeddings(pipeline).values():
        embedding.added.data = embedding.added.data.float()  # of the rest's digits until here
    return pipeline


def embeddings(pipeline):
    return {part: encoder.text_model.embeddings.token_embedding for part, encoder in pipeline.encoders.items()}


def setup(pipeline, config):
    return [embedding.added for embedding in embeddings(pipeline).values()]


def data(pipeline, config):
    pictures, (tokenizer, encoder) = t2i.pictures_of(pipeline, config), pipeline.towers[0]
    known = len(encoder.text_model.embeddings.token_embedding.weight)  # the new ids follow
    missing = next((photo for photo in pictures if (tokenizer([photo.text]) < known).all()), None)
    if missing:
        raise InputError(f"{missing.path}: its caption {missing.text!r} lacks the word {config.word}; put it there, or "
                         f'give --caption "a picture of {config.word}" in place of caption files')
    return t2i.batches(pipeline, pictures, {}, config)


def export(pipeline, folder, config):
    """The word's vectors, in one file of kohya's spelling and in diffusers' files."""
    name = "".join(letter for letter in config.word if letter.isalnum() or letter in "-_") or "word"
    vectors = {part: embedding.added.detach() for part, embedding in embeddings(pipeline).items()}
    save_embedding(vectors, folder / f"{name}.safetensors", config.word)
