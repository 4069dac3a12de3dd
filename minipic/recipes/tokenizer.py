"""Learns the vocabulary of the tiny model's tokenizers from captions, for recipes/clip.py."""

import json
from pathlib import Path

from tokenizers import pre_tokenizers, trainers

from minipic.common import InputError
from minipic.text import Tokenizer
from minipic.weights.tokenizer import END, START, WORD_END, byte_level_bpe, write_tokenizer


def train_tokenizer(
        captions: list[str], folder: str | Path, vocab_size: int, pad: str = END) -> Tokenizer:
    """Learn a vocabulary of at most `vocab_size` tokens from captions and write it to a folder.

    Its order is CLIP's: 256 bytes ("!" is the first), the same bytes ending a word, the merges,
    START, END. The vocabulary is smaller than `vocab_size` where the captions hold no more pairs.
    pad: END, or "!" as in SDXL's second tokenizer. transformers' CLIPTokenizer reads the folder as
    well.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [byte + WORD_END for byte in alphabet]
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise InputError(
            f"vocab_size={vocab_size}: a byte-level vocabulary has at least {smallest} tokens")

    merges = learn_merges(captions, vocab_size)[:vocab_size - smallest]
    tokens = alphabet + [first + second for first, second in merges] + [START, END]
    vocab = {}
    for token in tokens:
        if token not in vocab:  # two pairs may make one token
            vocab[token] = len(vocab)
    write_tokenizer(Path(folder), vocab, merges, pad)
    return Tokenizer(folder)


def learn_merges(captions: list[str], vocab_size: int) -> list[list[str]]:
    """The pairs of tokens that BPE merges, the first learned first, for at most `vocab_size`."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix=WORD_END, show_progress=False,
        min_frequency=2)  # a pair that occurs once teaches nothing
    bpe = byte_level_bpe({}, [])
    bpe.train_from_iterator(captions, trainer)
    return json.loads(bpe.to_str())["model"]["merges"]
