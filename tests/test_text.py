"""Token ids equal transformers' for official and self-trained vocabularies; damaged files are named."""

import json
import random
import warnings
from pathlib import Path

import pytest
import torch

from minipic.common import InputError
from minipic.recipes.tokenizer import train_tokenizer
from minipic.text import Tokenizer, size_ids
from minipic.weights.tokenizer import END, LENGTH

OFFICIAL = Path(__file__).parents[2] / "shared" / "official"  # the official small files; not part of this repository
needs_official = pytest.mark.skipif(not OFFICIAL.exists(), reason="no official vocabulary here")

CAPTIONS = ["a small red sphere left of a large blue cube on a grey floor", "a cyan torus, a green cone!",
            "two-colour cubes; it's striped"] * 4
NASTY = ["", " ", "wow!", "wow !", "a!b", "!!", "!!!! ! !", "a <|endoftext|> b", "a<|ENDOFTEXT|>b", "<|startoftext|>x",
         "<|STARTOFTEXT|> x", "<|endoftext", "日本語 中文 한국어", "e\u0301 é ÀÉ", "ﬁ ﬂ ½ ②", "👩‍👩‍👧 🏳️‍🌈!", "&amp; &lt;",
         "schÃ¶n", "a\x00b\x07\t\n\r\x0b\u200b\ufeff\u2028c", "x" * 500, "can't WON'T I'll He's 'S", "İstanbul ǅ ß ẞ",
         "123 4567 ١٢٣", "a  b\u00a0\u3000c", "\u1112\u1161\u11ab", "…—“quoted” ‘x’", "a_b-c/d\\e", "<w></w>"]


def some_prompts(vocab, n):
    """n seeded prompts: real words, ASCII noise with specials, and any Unicode."""
    draw, words = random.Random(0), [token.replace("</w>", " ") for token in sorted(vocab)]
    pool = "abcdefghijklmnopqrstuvwxyzABCDEFG  !!''.,0123<|>é世界👍\u0301\n"
    ranges = ((32, 1000), (32, 0xD7FF), (0xE000, 0x10FFFF))
    makers = (lambda: " ".join(draw.choices(words, k=draw.randint(1, 12))),
              lambda: "".join(draw.choices(pool, k=draw.randint(0, 60))),
              lambda: "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(0, 20))))
    return NASTY + [makers[i % 3]() for i in range(n)]


def assert_ids_equal(folder, n):
    transformers = pytest.importorskip("transformers")
    mine, peer = Tokenizer(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    prompts = some_prompts(mine.bpe.get_vocab(), n)
    expected = peer(prompts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these are too long
        found = mine(prompts)
    assert [p for p, a, b in zip(prompts, found, expected) if not a.equal(b)] == []
    return peer


@needs_official
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_ids_of_the_official_vocabulary_equal_transformers(name, tmp_path):
    peer = assert_ids_equal(OFFICIAL / name, 2000)
    peer.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()  # newer writers leave only tokenizer.json
    assert_ids_equal(tmp_path, 200)


@needs_official
def test_an_exclamation_mark_is_padding_to_the_second_tokenizer():
    first, second = (Tokenizer(OFFICIAL / name) for name in ("tokenizer", "tokenizer_2"))
    assert first(["wow!"])[0, :6].tolist() == [49406, 2781, 256, 49407, 49407, 49407]
    assert second(["wow!"])[0, :6].tolist() == [49406, 2781, 0, 49407, 0, 0]


@needs_official
def test_a_trained_vocabulary_is_ordered_as_clips(tmp_path):
    official = json.loads((OFFICIAL / "tokenizer/vocab.json").read_text(encoding="utf-8"))
    train_tokenizer(CAPTIONS, tmp_path, 600)
    ours = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(ours, key=ours.get)[:512] == sorted(official, key=official.get)[:512]


@pytest.mark.parametrize("pad", [END, "!"])
def test_ids_of_a_trained_vocabulary_equal_transformers(pad, tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, tmp_path, 600, pad)
    assert tokenizer.pad == (0 if pad == "!" else tokenizer.end)
    assert_ids_equal(tmp_path, 200)


def test_trained_words_are_whole_tokens_and_ids_are_77(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, tmp_path, 2000)
    assert tokenizer.size == len(json.loads((tmp_path / "vocab.json").read_text())) < 2000
    words = "a small red sphere left of a large blue cube"
    (ids,) = tokenizer([words]).tolist()
    assert [tokenizer.bpe.id_to_token(i) for i in ids[1:11]] == [word + "</w>" for word in words.split()]
    assert ids[0] == tokenizer.start and ids[11:] == [tokenizer.end] * (LENGTH - 11)
    assert train_tokenizer(CAPTIONS, tmp_path / "small", 530).size == 530
    assert tokenizer([]).shape == (0, LENGTH)


def test_words_that_do_not_fit_are_quoted(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, tmp_path, 600)
    with pytest.warns(UserWarning, match="80 tokens and 75 fit; cut off: 'CUBE red cube red cube'"):
        ids = tokenizer(["red cube " * 37 + "red CUBE red cube red cube"])
    assert ids[0, -1] == tokenizer.end and ids[0, -2] != tokenizer.end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["red " * 75])


def test_a_copy_gives_the_same_ids(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS, tmp_path / "a", 600, "!")
    tokenizer.save(tmp_path / "b")
    assert Tokenizer(tmp_path / "b")(CAPTIONS).equal(tokenizer(CAPTIONS))
    edit(tmp_path / "b" / "tokenizer_config.json", lambda s: s.replace('"pad_token": "!"', '"pad_token": null'))
    assert Tokenizer(tmp_path / "b").pad == tokenizer.end  # as with none at all


def edit(path, change):
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


@pytest.mark.parametrize("damage, message", [
    (lambda d: (d / "vocab.json").unlink(), "vocab.json: cannot read it"),
    (lambda d: (d / "merges.txt").unlink(), "merges.txt is damaged"),
    (lambda d: edit(d / "vocab.json", lambda s: s[:500]), "vocab.json: is not valid JSON"),
    (lambda d: edit(d / "vocab.json", lambda s: "[]"), "vocab.json: expected a JSON object"),
    (lambda d: edit(d / "merges.txt", lambda s: s + "one two three\n"), "merges.txt is damaged"),
    (lambda d: edit(d / "merges.txt", lambda s: s + "zz yy\n"), "does not fit vocab.json"),
    (lambda d: edit(d / "vocab.json", lambda s: s.replace(END, "x")), "ends with <|startoftext|> and"),
    (lambda d: edit(d / "tokenizer_config.json", lambda s: s.replace('"pad_token": "!"', '"pad_token": "[PAD]"')),
     "special token '[PAD]'"),
])
def test_damaged_files_are_named(damage, message, tmp_path):
    train_tokenizer(CAPTIONS, tmp_path, 600, "!")
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        Tokenizer(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least 514"):
        train_tokenizer(CAPTIONS, tmp_path, 100)


def test_size_ids_are_heights_first():
    assert size_ids((640, 480), (3, 7), (1024, 512)).tolist() == [480, 640, 7, 3, 512, 1024]
    assert size_ids((640, 480), (3, 7), 6.0).tolist() == [480, 640, 7, 3, 6]
    assert size_ids((640, 480), (3, 7), 6.0).dtype == torch.float32
