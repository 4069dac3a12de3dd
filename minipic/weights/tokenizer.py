"""Files of CLIP's tokenizers: a folder with vocab.json and merges.txt, or with tokenizer.json."""

import json
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from minipic.common import InputError
from minipic.weights.files import read_json

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"  # ends the last token of a word, so the word "red" is not the "red" of "redder"
LENGTH = 77  # ids of a prompt: START, up to 75 tokens, END, padding
FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json")

# What a prompt is split into before BPE: a special token, a contraction, a run of letters, one
# digit, or a run of anything else but space.
PIECES = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")


def read_tokenizer_settings(folder: Path) -> dict:
    """The settings in a tokenizer folder; where two files differ, tokenizer_config.json counts."""
    settings = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            settings |= read_json(folder / name)
    return settings


def open_bpe(folder: Path) -> tokenizers.Tokenizer:
    """The BPE in a folder, from vocab.json and merges.txt, or else from tokenizer.json."""
    single = folder / "tokenizer.json"
    if single.exists() and not (folder / "vocab.json").exists():
        try:
            bpe = tokenizers.Tokenizer.from_file(str(single))
        except Exception as error:  # the tokenizers package raises nothing finer
            raise InputError(f"{single}: not a tokenizer ({error}); copy the file again") from error
        bpe.no_padding()  # the file may carry its writer's settings
        bpe.no_truncation()
        return bpe

    vocab = read_json(folder / "vocab.json")
    try:
        _, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        return byte_level_bpe(vocab, merges)
    except Exception as error:  # as above
        raise InputError(
            f"{folder}: merges.txt is damaged or does not fit vocab.json ({error}); copy both"
        ) from error


def byte_level_bpe(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """CLIP's tokenizer with a vocabulary {token: id} and its merges, the first learned first."""
    model = models.BPE(vocab, merges, unk_token=END, end_of_word_suffix=WORD_END)
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return bpe


def special_tokens(settings: dict) -> dict[str, AddedToken]:
    """{text: token} of the special tokens, which are found in a prompt before it is split.

    As transformers reads the settings: a token given as a plain string is looked for in the text as
    typed; one given with its properties may ask for the lower-cased text. Of several with the same
    text the last one counts: SDXL pads with a plain `<|endoftext|>`.
    """
    tokens = {START: AddedToken(START, special=True), END: AddedToken(END, special=True)}
    for role in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(role)
        if isinstance(token, dict):
            properties = {}
            for name in ("single_word", "lstrip", "rstrip", "normalized"):
                if name in token:
                    properties[name] = token[name]
            text = token["content"]
            tokens[text] = AddedToken(text, special=True, **properties)
        elif token is not None:
            tokens[token] = AddedToken(token, special=True, normalized=False)
    return tokens


def write_tokenizer(folder: Path, vocab: dict[str, int], merges: list[list[str]], pad: str):
    """Write the four files of an official tokenizer folder."""
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {
        **specials, "add_prefix_space": False, "do_lower_case": True, "errors": "replace",
        "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    files = {
        "vocab.json": vocab, "special_tokens_map.json": specials, "tokenizer_config.json": config}
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in files.items():
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
    lines = ["#version: 0.2"] + [f"{first} {second}" for first, second in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
