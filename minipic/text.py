"""Text: prompts -> token ids [B,77] -> Conditioning, which tells a UNet what to draw.

Tokens are CLIP's lower-cased byte-level BPE, byte-pair encoding: frequent sequences of bytes are
merged into one token (arXiv 2103.00020 section 2.4). The encoders are in models/clip.py. Two
encoders side by side and the size ids are SDXL's (arXiv 2307.01952 sections 2.1 and 2.2).
"""

import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Encoding

from minipic.common import InputError
from minipic.weights.tokenizer import (
    END, FILES, LENGTH, START, WORD_END, open_bpe, read_tokenizer_settings, special_tokens)

MAX_TOKENS = LENGTH - 2  # without START and END


class Conditioning(NamedTuple):
    """What a UNet takes after x and t: `unet(x, t, *conditioning)`.

    SD 1.5 and 2.x have only the context.
    """

    context: torch.Tensor  # [B,N,D]
    pooled: torch.Tensor | None = None  # [B,D]
    size_ids: torch.Tensor | None = None  # [B,6], the refiner's [B,5]


# ---- from prompts to conditioning ----------------------------------------------------------------

def encode_prompts(
        prompts: list[str], encoders: list[tuple["Tokenizer", torch.nn.Module]],
        sdxl: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """B prompts -> (context [B,N,D], pooled [B,D]). encoders: [(Tokenizer, CLIPText), ...].

    SDXL: the context is the last layer but one of each encoder, side by side, without the final
    norm, as SDXL was trained. CLIP's loss needs one vector for a whole text, and the last layer
    gathers it; the layer before says more of each word. The pooled vector is the last encoder's.
    The refiner has one encoder.
    SD 1.5 and 2.x: the context is the last layer after the final norm. There is no pooled vector.
    """
    outputs = []
    for tokenizer, encoder in encoders:
        device = next(encoder.parameters()).device
        ids = tokenizer(prompts).to(device)
        outputs.append(encoder(ids))

    if sdxl:
        context = torch.cat([hidden_states[-2] for hidden_states, _ in outputs], dim=-1)
        _, pooled = outputs[-1]
        return context, pooled
    _, encoder = encoders[0]  # the only one
    hidden_states, _ = outputs[0]
    return encoder.last(hidden_states), None


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
        self.start = self.size - 2
        self.end = self.size - 1
        if self.bpe.token_to_id(START) != self.start or self.bpe.token_to_id(END) != self.end:
            raise InputError(
                f"{self.folder}: a CLIP vocabulary ends with {START} and {END}; this one does not")
        self._add_special_tokens(settings)
        pad = settings.get("pad_token") or END
        self.pad = self.bpe.token_to_id(pad["content"] if isinstance(pad, dict) else pad)
        self.added_words = {}  # {id of an added word: all the ids it stands for}

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

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """B prompts -> ids [B,77] int64. Warns of words that do not fit, and quotes them."""
        rows = []
        encodings = self.bpe.encode_batch(list(prompts), add_special_tokens=False)
        for prompt, encoding in zip(prompts, encodings):
            rows.append(self._row(prompt, encoding))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, LENGTH)

    def _row(self, prompt: str, encoding: Encoding) -> list[int]:
        """The 77 ids of one prompt. encoding: what `bpe` made of it."""
        ids = []
        starts = []  # where each id's text starts in the prompt, in characters
        for token, (start, _) in zip(encoding.ids, encoding.offsets):
            for id in self.added_words.get(token, [token]):
                ids.append(id)
                starts.append(start)
        if len(ids) > MAX_TOKENS:
            cut_off = prompt[starts[MAX_TOKENS]:].strip()
            warnings.warn(
                f"the prompt has {len(ids)} tokens and {MAX_TOKENS} fit; cut off: {cut_off!r}",
                stacklevel=3)  # the line that called the tokenizer
        ids = [self.start] + ids[:MAX_TOKENS] + [self.end]
        return ids + [self.pad] * (LENGTH - len(ids))

    def add(self, word: str, count: int = 1):
        """Let `word` stand for `count` new ids, which follow all others.

        Raises InputError for a word that is a token already, or empty.
        """
        # Every id needs a name of its own. In a prompt, the first one stands for all.
        names = [word] + [f"{word}_{i}" for i in range(1, count)]
        if not word.strip() or any(self._has_token(name) for name in names):
            raise InputError(
                f"{word!r} already is a token, or is empty; choose another word, such as <my-cat> "
                "(for the word of a file: FILE:<my-cat>)")
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
