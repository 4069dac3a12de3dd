"""Files of CLIP's tokenizers: a folder with vocab.json and merges.txt, or with tokenizer.json."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from minipic.common import InputError
from minipic.weights.files import read_json, read_text

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"  # ends the last token of a word, so the word "red" is not the "red" of "redder"
LENGTH = 77  # ids of a prompt: START, up to 75 tokens, END, padding
FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")  # of special tokens
PROPERTIES = ("single_word", "lstrip", "rstrip", "normalized")  # that they may have

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
            for role in ROLES:
                if not is_token(settings.get(role)):
                    raise InputError(
                        f"{folder / name}: its {role} is {settings[role]!r}; expected a token")
    return settings


def is_token(value: Any) -> bool:
    """Whether a setting names a special token: as its text, as {"content": text, ...}, or none."""
    text = value
    if isinstance(value, dict):
        text = value.get("content")
        for name in PROPERTIES:
            if type(value.get(name, True)) is not bool:
                return False
    elif value is None:
        return True
    # Half a surrogate pair, as JSON can hold, is no text.
    return isinstance(text, str) and text == text.encode(errors="ignore").decode()


def open_bpe(folder: Path) -> tokenizers.Tokenizer:
    """The BPE in a folder, from vocab.json and merges.txt, or else from tokenizer.json.

    Words that textual inversion added to a saved model have the ids after those of the vocabulary.
    """
    is_single = (folder / "tokenizer.json").exists() and not (folder / "vocab.json").exists()
    try:
        return open_single_file(folder / "tokenizer.json") if is_single else open_pair(folder)
    except InputError:
        raise
    except Exception as error:  # the tokenizers package raises nothing finer
        problem = f"merges.txt is damaged or does not fit vocab.json ({error}); copy both"
        if is_single:
            problem = f"tokenizer.json is damaged or not CLIP's ({error}); copy it again"
        raise InputError(f"{folder}: {problem}") from error


def open_single_file(path: Path) -> tokenizers.Tokenizer:
    """The BPE in a tokenizer.json."""
    model = read_json(path)["model"]
    merges = []
    for merge in model["merges"]:
        merges.append(merge.split(" ") if isinstance(merge, str) else merge)
    check_merges(model["vocab"], merges)
    bpe = tokenizers.Tokenizer.from_str(read_text(path))
    bpe.no_padding()  # the file may carry its writer's settings
    bpe.no_truncation()
    return bpe


def open_pair(folder: Path) -> tokenizers.Tokenizer:
    """The BPE in a vocab.json and a merges.txt."""
    vocab = read_json(folder / "vocab.json")
    merges = []
    for line in read_text(folder / "merges.txt").split("\n"):
        if line and not line.startswith("#version"):
            merges.append(tuple(line.rstrip("\r").split(" ")))
    check_merges(vocab, merges)
    bpe = byte_level_bpe(vocab, merges)
    bpe.add_tokens(added_words(folder, len(vocab)))
    return bpe


def check_merges(vocab: dict[str, int], merges: list):
    """ValueError unless the merges, in their order, make the tokens of the vocabulary in theirs.

    Only single bytes and the two special tokens, the last, are not made of others. With fewer
    merges, prompts would be read as other tokens.
    """
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError(f"the ids are not 0 to {len(vocab) - 1}")
    tokens = sorted(vocab, key=vocab.get)[:-2]
    learned = [token for token in tokens if len(token.removesuffix(WORD_END)) > 1]
    made = {}  # in their order; two pairs may make one token
    for first, second in merges:
        made[first + second] = True
    if list(made) != learned:
        raise ValueError(f"{len(made)} merged tokens, not the {len(learned)} of the vocabulary")


def added_words(folder: Path, first: int) -> list[AddedToken]:
    """The words in added_tokens.json or tokenizer_config.json whose ids are `first` or later."""
    words = {}  # {id: word}
    if (folder / "added_tokens.json").exists():
        for word, id in read_json(folder / "added_tokens.json").items():
            words[id] = word
    for id, token in read_tokenizer_settings(folder).get("added_tokens_decoder", {}).items():
        words[int(id)] = token["content"]
    words = {id: word for id, word in words.items() if id >= first}
    if sorted(words) != list(range(first, first + len(words))):
        raise ValueError(f"the ids of its added words do not follow {first - 1}")
    return [AddedToken(words[id]) for id in sorted(words)]


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
    for role in ROLES:
        token = settings.get(role)
        if isinstance(token, dict):
            properties = {}
            for name in PROPERTIES:
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
