"""Text: prompts -> token ids [B,77] -> Conditioning(context, pooled, size_ids), everything a UNet hears of the prompt.

Tokens are CLIP's lower-cased byte-level BPE (arXiv 2103.00020 section 2.4); the encoders are in `models/clip.py`; two
encoders side by side and the size ids are SDXL's (arXiv 2307.01952 sections 2.1 and 2.2).
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

from minipic.common import InputError
from minipic.weights import read_json

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # marks a token that ends a word: "red" in "redder" is another token than the word "red"
LENGTH = 77  # ids a prompt: start, up to 75 tokens, end, padding
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# A special token, a contraction, a run of letters, one digit, or a run of anything else but space.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class Conditioning(NamedTuple):
    """What a UNet takes after x and t: `unet(x, t, *conditioning)`. SD 1.5 and 2.x have only the context."""

    context: torch.Tensor  # [B,N,D]
    pooled: torch.Tensor | None = None  # [B,D]
    size_ids: torch.Tensor | None = None  # [B,6], the refiner's [B,5]


class Tokenizer:
    """Prompts -> ids [B,77] as diffusers feeds its encoders, from an official tokenizer folder.

    The folder has vocab.json and merges.txt, or the tokenizer.json of newer writers. SDXL's second tokenizer pads with
    "!", which makes every "!" of a prompt the padding id 0 instead of the word "!" (256): its encoder is fed so in
    diffusers, and here. Raises InputError naming the file that is missing or damaged.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        settings = {key: token for name in ("special_tokens_map.json", "tokenizer_config.json")
                    if (self.folder / name).exists() for key, token in read_json(self.folder / name).items()}
        self.bpe = self.open()
        self.size = self.bpe.get_vocab_size()
        self.start, self.end = self.size - 2, self.size - 1
        if [self.bpe.token_to_id(token) for token in (START, END)] != [self.start, self.end]:
            raise InputError(f"{self.folder}: a CLIP vocabulary ends with {START} and {END}; this one does not")
        specials = special_tokens(settings)
        for token in specials:
            if self.bpe.token_to_id(token) is None:
                raise InputError(f"{self.folder}: the special token {token!r} is not in the vocabulary")
        known = {token.content for token in self.bpe.get_added_tokens_decoder().values()}  # tokenizer.json's own
        self.bpe.add_special_tokens([token for text, token in specials.items() if text not in known])
        pad = settings.get("pad_token") or END
        self.pad = self.bpe.token_to_id(pad["content"] if isinstance(pad, dict) else pad)
        self.words = {}  # {id of an added word: all its ids}

    def open(self):
        single = self.folder / "tokenizer.json"
        if not single.exists() or (self.folder / "vocab.json").exists():
            return byte_level_bpe(self.folder)
        try:
            bpe = tokenizers.Tokenizer.from_file(str(single))
        except Exception as error:  # the tokenizers package raises nothing finer
            raise InputError(f"{single}: not a tokenizer ({error}); copy the file again") from error
        bpe.no_padding()  # the file may carry its writer's settings
        bpe.no_truncation()
        return bpe

    def __call__(self, prompts):
        """prompts: a list of B strings -> ids [B,77] int64. Warns, quoting them, about words that do not fit."""
        rows = [self.row(prompt, encoding) for prompt, encoding in
                zip(prompts, self.bpe.encode_batch(list(prompts), add_special_tokens=False))]
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, LENGTH)

    def row(self, prompt, encoding):
        room = LENGTH - 2
        ids, starts = zip(*[(id, start) for first, (start, _) in zip(encoding.ids, encoding.offsets)
                            for id in self.words.get(first, [first])]) if encoding.ids else ((), ())
        if len(ids) > room:
            lost = prompt[starts[room]:].strip()
            warnings.warn(f"the prompt has {len(ids)} tokens and {room} fit; cut off: {lost!r}", stacklevel=3)
        ids = [self.start, *ids[:room], self.end]
        return ids + [self.pad] * (LENGTH - len(ids))

    def add(self, word, count=1):
        """Let `word` stand for `count` new ids, which follow all others. Raises InputError for a word already there."""
        first, names = self.bpe.get_vocab_size(), [word, *(f"{word}_{i}" for i in range(1, count))]
        taken = [self.bpe.token_to_id(token) for name in names for token in (name, name.lower() + WORD_END)]
        if not word.strip() or any(id is not None for id in taken):
            raise InputError(f"{word!r} already is a token, or none at all; choose another word, such as <my-cat> (of "
                             "a file that holds one, FILE:<my-cat>)")
        self.bpe.add_tokens([AddedToken(name, single_word=name[0].isalnum()) for name in names])
        self.words[first] = list(range(first, first + count))

    def save(self, folder):
        """Copy the files this tokenizer was read from."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.folder / name).exists() and self.folder.resolve() != Path(folder).resolve():
                shutil.copyfile(self.folder / name, Path(folder) / name)


def open_tokenizer(path, name, vocab_size):
    """The tokenizer `name` of a model folder, or of the folder that a single file lies in."""
    folder = (path if path.is_dir() else path.parent) / name
    if not folder.is_dir():
        remedy = "fetch the model again" if path.is_dir() else "put the model's official one beside the file"
        raise InputError(f"{folder}: no such folder, and a model needs its tokenizer; {remedy}")
    tokenizer = Tokenizer(folder)
    if tokenizer.size != vocab_size:
        raise InputError(f"{folder}: has {tokenizer.size} tokens, its text encoder {vocab_size}; use the model's own")
    return tokenizer


def special_tokens(settings):
    """{text: token} of those that are found in a prompt before it is split into words, as transformers reads them.

    One given as a plain string is looked for in the text as typed (a later one wins: SDXL pads with a plain
    `<|endoftext|>`), one given with its properties may ask for the lower-cased text.
    """
    tokens = {START: AddedToken(START, special=True), END: AddedToken(END, special=True)}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(key)
        if isinstance(token, dict):
            flags = {name: token[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in token}
            tokens[token["content"]] = AddedToken(token["content"], special=True, **flags)
        elif token is not None:
            tokens[token] = AddedToken(token, special=True, normalized=False)
    return tokens


def byte_level_bpe(folder=None):
    """CLIP's tokenizer with the vocabulary in `folder`, or with none yet."""
    vocab, merges = read_json(folder / "vocab.json") if folder else {}, []
    try:
        if folder:
            merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))[1]
        model = models.BPE(vocab, merges, unk_token=END, end_of_word_suffix=WORD_END)
    except Exception as error:  # the tokenizers package raises nothing finer
        raise InputError(f"{folder}: merges.txt is damaged or does not fit vocab.json ({error}); copy both") from error
    bpe = tokenizers.Tokenizer(model)
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "removed", invert=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return bpe


def train_tokenizer(captions, folder, vocab_size, pad=END):
    """Learn a CLIP-format vocabulary of at most `vocab_size` tokens from `captions` and write it to `folder`.

    CLIP's order: 256 bytes ("!" is the first), the same ending a word, the merges, START, END. `pad`: END, or "!" as in
    SDXL's second tokenizer. transformers' CLIPTokenizer reads the folder too. Returns the Tokenizer; its `.size` is
    smaller than `vocab_size` where the captions hold no more pairs.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    alphabet += [byte + WORD_END for byte in alphabet]
    room = vocab_size - len(alphabet) - 2
    if room < 0:
        raise InputError(f"vocab_size={vocab_size}: a byte-level vocabulary has at least {len(alphabet) + 2} tokens")
    bpe = byte_level_bpe()
    # min_frequency 2: a pair seen once teaches nothing
    bpe.train_from_iterator(captions, trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False,
                                                          end_of_word_suffix=WORD_END))
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]][:room]
    vocab = dict.fromkeys(alphabet + ["".join(pair) for pair in merges] + [START, END])  # two pairs may make one token
    folder, vocab = Path(folder), {token: i for i, token in enumerate(vocab)}
    folder.mkdir(parents=True, exist_ok=True)
    specials = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {**specials, "add_prefix_space": False, "do_lower_case": True, "errors": "replace",
              "model_max_length": LENGTH, "tokenizer_class": "CLIPTokenizer"}
    for name, values in (("vocab", vocab), ("special_tokens_map", specials), ("tokenizer_config", config)):
        text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Tokenizer(folder)


def encode(prompts, towers, sdxl=True):
    """Prompts (B strings) -> (context [B,N,D], pooled [B,D]); towers: [(Tokenizer, CLIPText), ...].

    SDXL: the last layer but one of each encoder side by side (no final norm), pooled from the last encoder; the refiner
    has one encoder. SD 1.5 and 2.x: the last layer after the final norm, no pooled vector.
    """
    outputs = [encoder(tokenizer(prompts).to(next(encoder.parameters()).device)) for tokenizer, encoder in towers]
    if sdxl:
        return torch.cat([states[-2] for states, _ in outputs], dim=-1), outputs[-1][1]
    return towers[0][1].last(outputs[0][0]), None


def size_ids(original, crop, target):
    """SDXL's micro-conditioning, one row [6]: original size, crop and target size of the training picture.

    `original` and `target`: (width, height) in pixels, `crop`: (left, top) of the crop in the original. The network
    takes heights first. A `target` that is an aesthetic score (a number, 6 is good) gives the refiner's row [5].
    """
    last = [target] if isinstance(target, (int, float)) else target[::-1]
    return torch.tensor([*original[::-1], *crop[::-1], *last], dtype=torch.float32)
