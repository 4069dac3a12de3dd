"""Text: prompts -> token ids [B,77] -> Conditioning, which tells a UNet what to draw.

Tokens are CLIP's lower-cased byte-level BPE, byte-pair encoding: frequent sequences of bytes are
merged into one token (arXiv 2103.00020 section 2.4). The encoders are in models/clip.py. Two
encoders side by side and the size ids are SDXL's (arXiv 2307.01952 sections 2.1 and 2.2).
"""

import re
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken

from minipic.common import InputError, ParameterError
from minipic.weights.tokenizer import (
    END, FILES, LENGTH, START, WORD_END, open_bpe, read_tokenizer_settings, special_tokens)

MAX_TOKENS = LENGTH - 2  # of a chunk, without START and END
COMMA_REACH = 20         # a chunk may end after a comma among its last 20 tokens


class Conditioning(NamedTuple):
    """What a UNet takes after x and t: `unet(x, t, *conditioning)`.

    SD 1.5 and 2.x have only the context.
    """

    context: torch.Tensor  # [B,N,D]
    pooled: torch.Tensor | None = None  # [B,D]
    size_ids: torch.Tensor | None = None  # [B,6], the refiner's [B,5]


# ---- from prompts to conditioning ----------------------------------------------------------------

def text_states(
        ids: torch.Tensor, encoder: torch.nn.Module,
        sdxl: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """ids [B,77] -> (states [B,77,D], pooled [B,D]) of one CLIPText, as the UNet was trained.

    SDXL: the last layer but one, without the final norm. CLIP's loss needs one vector for a whole
    text, and the last layer gathers it; the layer before says more of each word.
    SD 1.5 and 2.x: the last layer after the final norm, and no pooled vector.
    """
    ids = ids.to(next(encoder.parameters()).device, non_blocking=True)
    end_token = ids[:, :1] + 1  # a row begins with START, and END is the next in the vocabulary
    hidden_states, pooled = encoder(ids, end_token)
    if sdxl:
        return hidden_states[-2], pooled
    return encoder.last(hidden_states), None


def encode_prompts(
        prompts: list[str], encoders: list[tuple["Tokenizer", torch.nn.Module]],
        sdxl: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """B captions of up to 75 tokens, taken literally -> (context [B,77,D], pooled [B,D]).

    encoders: [(Tokenizer, CLIPText), ...]. The context is their states side by side, the pooled
    vector is the last encoder's. SDXL has two encoders, its refiner only the second.
    """
    states = []
    for tokenizer, encoder in encoders:
        state, pooled = text_states(tokenizer(prompts), encoder, sdxl)
        states.append(state)
    return torch.cat(states, dim=-1), pooled


def encode_unpadded(
        prompts: list[str], encoders: list[tuple["Tokenizer", torch.nn.Module]],
        sdxl: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """As `encode_prompts`, cut after the longest text -> states [B,M,D], is a token real [B,M]."""
    states = []
    for tokenizer, encoder in encoders:
        ids = tokenizer(prompts)
        state, _ = text_states(ids, encoder, sdxl)
        states.append(state)
    ends = (ids == tokenizer.end).int().argmax(dim=1)  # the first END of each
    longest = int(ends.max()) + 1
    mask = torch.arange(longest) <= ends[:, None]
    states = torch.cat(states, dim=-1)[:, :longest]
    return states, mask.to(states.device)


def encode_weighted(
        prompts: list[str], encoders: list[tuple["Tokenizer", torch.nn.Module]],
        sdxl: bool = True) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """Prompts of any length, with weights -> for each (context [1,77K,D], pooled [1,D]).

    This is how AUTOMATIC1111's web UI reads a prompt. The text is cut into K chunks of 75 tokens,
    which are encoded by themselves and put one after the other; K is the same for all `prompts`.
    The pooled vector is the first chunk's. With z [77,D] the states of a chunk and w [77] the
    weights of its tokens, the states become

        z' = w z mean(z) / mean(w z)

    so that weights do not change the mean. A prompt of one chunk without weights is encoded as
    `encode_prompts` does.
    """
    count = 1  # K
    chunks_of_prompts = []
    for prompt in prompts:
        parts = parse_weights(prompt)
        chunks_of_encoders = [tokenizer.chunks(parts) for tokenizer, _ in encoders]
        chunks_of_prompts.append(chunks_of_encoders)
        count = max(count, *map(len, chunks_of_encoders))
    encoded = []
    for chunks_of_encoders in chunks_of_prompts:
        states = []
        for (tokenizer, encoder), chunks in zip(encoders, chunks_of_encoders):
            empty = [[]] * (count - len(chunks))
            ids, weights = tokenizer.pad_chunks(chunks + empty)
            z, pooled = text_states(ids, encoder, sdxl)  # [K,77,D], [K,D]
            if (weights != 1).any():
                weighted = z * weights[:, :, None].to(z)
                mean = z.float().mean(dim=(1, 2), keepdim=True)
                weighted_mean = weighted.float().mean(dim=(1, 2), keepdim=True)
                z = weighted * (mean / weighted_mean).to(z)
            states.append(z.flatten(0, 1))
        context = torch.cat(states, dim=-1)[None]
        encoded.append((context, None if pooled is None else pooled[:1]))
    return encoded


# ---- weights in a prompt -------------------------------------------------------------------------

EMPHASIS = 1.1  # of a pair of round brackets; square ones divide by it
SYNTAX = re.compile(
    r"""\\[()\[\]\\]?  # a bracket or backslash that is meant as a letter
    | :\s*(?P<weight>[+-]?(\d{1,4}\.?\d{0,9}|\.\d{1,9}))\s*\)
    | [()\[\]:]
    | [^()\[\]:\\]+""", re.VERBOSE)
BREAK = re.compile(r"\bBREAK\b")
MAX_WEIGHT = 1000.0
MAX_LENGTH = 20_000  # characters of a prompt
LORA = re.compile(r"<\s*(?:lora|lyco|hypernet)\s*:[^<>]{1,200}>", re.IGNORECASE)
NOT_SUPPORTED = {  # what else the web UI reads in a prompt
    "a text that changes during a drawing": re.compile(r"\[[^][()]{0,200}[:|][^][()]{0,200}\]"),
    "a choice of texts": re.compile(r"\{[^{}]{0,200}\|[^{}]{0,200}\}"),
    "a sum of prompts": re.compile(r"\bAND\b"),
    "the name of an embedding's file": re.compile(r"\bembedding:\S{1,200}")}  # ComfyUI's


def parse_weights(prompt: str) -> list[tuple[str, float | None]]:
    """A prompt -> [(text, weight), ...]; the weight of a BREAK, which starts a new chunk, is None.

    (red) weighs 1.1, (red:1.3) as much as it says, [red] 1 / 1.1, all of them multiplied where they
    are nested; \\( is a bracket. A bracket that is never closed goes on to the end.
    Raises ParameterError for <lora:...>, for a prompt of more than MAX_LENGTH characters and for
    weights beyond MAX_WEIGHT; warns of what is read as letters.
    """
    if len(prompt) > MAX_LENGTH:
        raise ParameterError(
            "prompt", f"has {len(prompt):,} characters; expected at most {MAX_LENGTH:,}")
    found = LORA.search(prompt)
    if found:
        raise ParameterError(
            "prompt", f"{found[0]!r} is not text; leave it out and load the file with `lora`, "
            "such as style.safetensors:0.8")
    for meaning, pattern in NOT_SUPPORTED.items():
        found = pattern.search(prompt)
        if found:
            warnings.warn(f"{found[0]!r} is read as letters; {meaning} is not supported")

    parts = []
    open_brackets = {"(": [], "[": []}  # for each, which part comes first inside

    def close(bracket, weight):
        for part in parts[open_brackets[bracket].pop():]:
            if part[1] is not None:
                part[1] *= weight

    for match in SYNTAX.finditer(prompt):
        piece = match[0]
        if piece in open_brackets:
            open_brackets[piece].append(len(parts))
        elif match["weight"] and open_brackets["("]:
            close("(", float(match["weight"]))
        elif piece == ")" and open_brackets["("]:
            close("(", EMPHASIS)
        elif piece == "]" and open_brackets["["]:
            close("[", 1 / EMPHASIS)
        elif piece[0] == "\\":
            parts.append([piece[1:], 1.0])
        else:
            first, *others = BREAK.split(piece)
            parts.append([first, 1.0])
            for text in others:
                parts += [["", None], [text, 1.0]]
    for bracket, weight in (("(", EMPHASIS), ("[", 1 / EMPHASIS)):
        while open_brackets[bracket]:
            close(bracket, weight)

    for text, weight in parts:
        if weight is not None and abs(weight) > MAX_WEIGHT:
            raise ParameterError(
                "prompt", f"{text[:30]!r} has a weight of {weight:g}; choose at most "
                f"{MAX_WEIGHT:g}, and 0.5 to 1.5 to see what is wanted")

    # Neighbours of one weight are one text: a word may continue over an escaped bracket.
    joined = [["", 1.0]]
    for text, weight in parts:
        if weight is not None and weight == joined[-1][1]:
            joined[-1][0] += text
        else:
            joined.append([text, weight])
    return [tuple(part) for part in joined]


def size_ids(
        original: tuple[int, int], crop: tuple[int, int],
        target: tuple[int, int] | float) -> torch.Tensor:
    """SDXL's micro-conditioning of one picture [6]: original size, crop and target size.

    original: (width, height) of the picture before cropping, in pixels.
    crop: (left, top) of the crop in the original.
    target: (width, height) of the crop; or, for the refiner, a number: the picture's aesthetic
        score, of which 6 is good. The refiner has no target size, and its ids are [5].
    The network takes heights before widths.
    """
    width, height = original
    left, top = crop
    ids = [height, width, top, left]
    if isinstance(target, (int, float)):
        ids.append(target)
    else:
        target_width, target_height = target
        ids += [target_height, target_width]
    return torch.tensor(ids, dtype=torch.float32)


# ---- the tokenizer -------------------------------------------------------------------------------

class Tokenizer:
    """Prompts -> ids [B,77] as diffusers feeds its encoders, from an official tokenizer folder.

    The folder has vocab.json and merges.txt, or the tokenizer.json of newer writers.
    SDXL's second tokenizer pads with "!". So every "!" in a prompt becomes the padding id 0 instead
    of the word "!" (256). diffusers feeds the encoder these ids, and so does this class.
    Raises InputError naming the file that is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        settings = read_tokenizer_settings(self.folder)
        self.bpe = open_bpe(self.folder)
        self.size = self.bpe.get_vocab_size()
        vocabulary = self.bpe.get_vocab_size(with_added_tokens=False)
        self.start = vocabulary - 2
        self.end = vocabulary - 1
        if self.bpe.token_to_id(START) != self.start or self.bpe.token_to_id(END) != self.end:
            raise InputError(
                f"{self.folder}: a CLIP vocabulary ends with {START} and {END}; this one does not")
        self._add_special_tokens(settings)
        pad = settings.get("pad_token") or END
        self.pad = self.bpe.token_to_id(pad["content"] if isinstance(pad, dict) else pad)
        self.added_words = self._saved_words()  # {id of an added word: all ids it stands for}

    def _add_special_tokens(self, settings: dict):
        """Let `bpe` find the special tokens in a prompt."""
        tokens = special_tokens(settings)
        for text in tokens:
            if self.bpe.token_to_id(text) is None:
                raise InputError(
                    f"{self.folder}: the special token {text!r} is not in the vocabulary")
        # A tokenizer.json has set up its special tokens already, with properties of their own.
        known = {token.content for token in self.bpe.get_added_tokens_decoder().values()}
        self.bpe.add_special_tokens([token for text, token in tokens.items() if text not in known])

    def _saved_words(self) -> dict[int, list[int]]:
        """`added_words` of the words in the files, after a textual inversion.

        The vectors of <cat> are named <cat>, <cat>_1, <cat>_2, ...
        """
        words = {}
        for id in range(self.end + 1, self.size):
            name, _, number = self.bpe.id_to_token(id).rpartition("_")
            first = self.bpe.token_to_id(name)
            if number.isdecimal() and len(words.get(first, ())) == int(number):
                words[first].append(id)
            else:
                words[id] = [id]
        return words

    def __call__(self, captions: list[str]) -> torch.Tensor:
        """B captions -> ids [B,77] int64. Warns of words that do not fit, and quotes them."""
        chunks = []
        for caption in captions:
            ids = []
            starts = []  # where each id's text starts in the caption
            for start, token_ids in self.tokenize(caption):
                ids += token_ids
                starts += [start] * len(token_ids)
            if len(ids) > MAX_TOKENS:
                cut_off = caption[starts[MAX_TOKENS]:].strip()
                warnings.warn(
                    f"the caption has {len(ids)} tokens and {MAX_TOKENS} fit; "
                    f"cut off: {cut_off!r}", stacklevel=2)  # the line that called the tokenizer
            chunks.append([(id, 1.0) for id in ids[:MAX_TOKENS]])
        ids, _ = self.pad_chunks(chunks)
        return ids

    def tokenize(self, text: str) -> list[tuple[int, list[int]]]:
        """A text -> [(where it starts in the text, its ids), ...], one entry for each token.

        A token has one id, an added word may have several.
        """
        encoding = self.bpe.encode(text, add_special_tokens=False)
        tokens = []
        for id, (start, _) in zip(encoding.ids, encoding.offsets):
            tokens.append((start, self.added_words.get(id, [id])))
        return tokens

    def chunks(self, parts: list[tuple[str, float | None]]) -> list[list[tuple[int, float]]]:
        """What `parse_weights` gives -> chunks of up to 75 (id, weight).

        A full chunk ends after its last comma, where one is among its last 20 tokens. The ids of an
        added word stay together.
        """
        comma = [self.bpe.token_to_id("," + WORD_END)]
        chunks = [[]]
        after_comma = 0  # in the last chunk; 0: it has none
        for text, weight in parts:
            if weight is None:
                chunks.append([])
                after_comma = 0
                continue
            for _, ids in self.tokenize(text):
                chunk = chunks[-1]
                if len(chunk) + len(ids) > MAX_TOKENS:
                    end = len(chunk)
                    if len(ids) == 1 and ids != comma and after_comma > MAX_TOKENS - COMMA_REACH:
                        end = after_comma
                    chunks[-1:] = [chunk[:end], chunk[end:]]
                    after_comma = 0
                chunks[-1] += [(id, weight) for id in ids]
                if ids == comma:
                    after_comma = len(chunks[-1])
        if len(chunks) > 1 and not chunks[-1]:
            chunks.pop()
        return chunks

    def pad_chunks(
            self, chunks: list[list[tuple[int, float]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """K chunks of up to 75 (id, weight) -> ids [K,77] int64 and weights [K,77] float32."""
        ids = torch.full((len(chunks), LENGTH), self.pad)
        weights = torch.ones(len(chunks), LENGTH)
        for row, chunk in enumerate(chunks):
            inside = slice(1, 1 + len(chunk))
            ids[row, 0] = self.start
            ids[row, inside] = torch.tensor([id for id, _ in chunk], dtype=torch.int64)
            ids[row, 1 + len(chunk)] = self.end
            weights[row, inside] = torch.tensor([weight for _, weight in chunk])
        return ids, weights

    def check_new(self, word: str, count: int = 1) -> list[str]:
        """The names of `count` new ids that a word can stand for.

        Raises InputError for a word that is a token already, or empty, and for more than 75 ids.
        """
        if not 1 <= count <= MAX_TOKENS:
            raise InputError(f"{word!r}: a word has 1 to {MAX_TOKENS} vectors, not {count}")
        # Every id needs a name of its own. In a prompt, the first one stands for all.
        names = [word] + [f"{word}_{i}" for i in range(1, count)]
        if not word.strip() or not word.isprintable() or any(map(self._has_token, names)):
            raise InputError(
                f"{word!r} already is a token, or is no printable text; choose another word, such "
                "as <my-cat> "
                "(for the word of a file: FILE:<my-cat>)")
        return names

    def add(self, word: str, count: int = 1):
        """Let `word` stand for `count` new ids, which follow all others. See `check_new`."""
        names = self.check_new(word, count)
        first = self.bpe.get_vocab_size()
        for name in names:
            # A word of letters must not be found inside a longer word; <my-cat> may touch others.
            self.bpe.add_tokens([AddedToken(name, single_word=name[0].isalnum())])
        self.added_words[first] = list(range(first, first + count))

    def _has_token(self, text: str) -> bool:
        """Whether a text is a token as it is, or a whole word of the vocabulary."""
        for token in (text, text.lower() + WORD_END):
            if self.bpe.token_to_id(token) is not None:
                return True
        return False

    def save(self, folder: str | Path):
        """Copy the files that this tokenizer was read from."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if folder.resolve() == self.folder.resolve():
            return
        for name in FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, folder / name)


def open_tokenizer(path: Path, name: str, vocab_size: int) -> Tokenizer:
    """The tokenizer in the folder `name` of a model's folder, or beside a model's single file.

    vocab_size: the text encoder's. Raises InputError when the tokenizer is missing, damaged or of
    another size.
    """
    if path.is_dir():
        folder = path / name
        remedy = "fetch the model again"
    else:
        folder = path.parent / name
        remedy = "put the model's official one beside the file"
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, and a model needs its tokenizer; {remedy}")
    tokenizer = Tokenizer(folder)
    if tokenizer.size != vocab_size:
        raise InputError(
            f"{folder}: has {tokenizer.size} tokens, its text encoder {vocab_size}; "
            "use the model's own")
    return tokenizer
