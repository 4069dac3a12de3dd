"""Token ids equal transformers' for official and self-trained vocabularies; damaged files are named."""

import copy
import json
import random
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from minipic.common import InputError, ParameterError
from minipic.pipeline import Pipeline
from minipic.recipes.clip import train_tokenizer
from minipic.text import Tokenizer, encode_prompts, parse_weights, size_ids
from minipic.weights.tokenizer import END, LENGTH, open_bpe

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
    (lambda d: (d / "merges.txt").unlink(), "merges.txt: cannot read it"),
    (lambda d: edit(d / "vocab.json", lambda s: s[:500]), "vocab.json: is not valid JSON"),
    (lambda d: edit(d / "vocab.json", lambda s: "[]"), "vocab.json: expected a JSON object"),
    (lambda d: edit(d / "merges.txt", lambda s: s + "one two three\n"), "merges.txt is damaged"),
    (lambda d: edit(d / "merges.txt", lambda s: s + "zz yy\n"), "does not fit vocab.json"),
    (lambda d: edit(d / "vocab.json", lambda s: s.replace(END, "<|end|>")), "ends with <|startoftext|> and"),
    (lambda d: edit(d / "tokenizer_config.json", lambda s: s.replace('"pad_token": "!"', '"pad_token": "[PAD]"')),
     "special token '[PAD]'"),
    (lambda d: edit(d / "tokenizer_config.json", lambda s: s.replace('"pad_token": "!"', '"pad_token": {"content": 5}')),
     "tokenizer_config.json: its pad_token is {'content': 5}"),
    (lambda d: edit(d / "tokenizer_config.json", lambda s: s.replace('"pad_token": "!"', '"pad_token": "\\ud800"')),
     "tokenizer_config.json: its pad_token is"),
    (lambda d: edit(d / "vocab.json", lambda s: s.replace(': 3,', ': 4,')), "the ids are not 0 to"),
    (lambda d: (d / "added_tokens.json").write_text('{"<cat>": 9999}'), "added words do not follow"),
])
def test_damaged_files_are_named(damage, message, tmp_path):
    train_tokenizer(CAPTIONS, tmp_path, 600, "!")
    damage(tmp_path)
    with pytest.raises(InputError) as error:
        Tokenizer(tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def test_merges_cut_anywhere_are_refused(tmp_path):
    """A cut at the end of a line leaves a good file of fewer merges, which reads prompts as other tokens."""
    train_tokenizer(CAPTIONS, tmp_path, 600)
    whole = (tmp_path / "merges.txt").read_bytes()
    ids = Tokenizer(tmp_path)(CAPTIONS)
    for end in range(0, len(whole), 7):
        for cut in {end, whole.rfind(b"\n", 0, end + 1) + 1}:
            (tmp_path / "merges.txt").write_bytes(whole[:cut])
            with pytest.raises(InputError, match="merges.txt is damaged or does not fit vocab.json"):
                Tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_bytes(whole[:-1])  # only the last line's end: nothing is missing
    assert Tokenizer(tmp_path)(CAPTIONS).equal(ids)
    first, *lines = whole.decode().splitlines()
    swapped = "\n".join([first, lines[1], lines[0], *lines[2:]])
    (tmp_path / "merges.txt").write_text(swapped, encoding="utf-8")
    with pytest.raises(InputError, match="does not fit"):
        Tokenizer(tmp_path)


def test_a_cut_single_file_is_refused(tmp_path):
    train_tokenizer(CAPTIONS, tmp_path / "pair", 600)
    (tmp_path / "single").mkdir()
    path = tmp_path / "single" / "tokenizer.json"
    bpe = open_bpe(tmp_path / "pair")
    bpe.save(str(path))
    ids = Tokenizer(tmp_path / "pair")(CAPTIONS)
    assert Tokenizer(tmp_path / "single")(CAPTIONS).equal(ids)
    values = json.loads(path.read_text())
    values["model"]["merges"].pop()
    for content in (json.dumps(values), "[]", "{}", '{"model": {"vocab": {}, "merges": [1]}}'):
        path.write_text(content)
        with pytest.raises(InputError, match="tokenizer.json"):
            Tokenizer(tmp_path / "single")


@pytest.mark.parametrize("place", ["added_tokens.json", "tokenizer_config.json"])
def test_words_that_were_saved_with_a_model(place, tmp_path):
    """After a textual inversion of two vectors and one of one; <b>_1 is a word of its own."""
    tokenizer = train_tokenizer(CAPTIONS, tmp_path, 600)
    words = {"<a>": tokenizer.size, "<a>_1": tokenizer.size + 1, "<b>": tokenizer.size + 2}
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    values = words
    if place == "tokenizer_config.json":
        decoder = {str(id): {"content": word} for word, id in words.items()}
        values = settings | {"added_tokens_decoder": decoder | {str(tokenizer.end): {"content": END}}}
    (tmp_path / place).write_text(json.dumps(values))
    grown = Tokenizer(tmp_path)
    assert (grown.start, grown.end, grown.size) == (tokenizer.start, tokenizer.end, tokenizer.size + 3)
    red, = tokenizer.tokenize("red")[0][1]
    (row,) = grown(["red <a> red <b>"]).tolist()
    assert row[:7] == [grown.start, red, grown.size - 3, grown.size - 2, red, grown.size - 1, grown.end]
    grown.save(tmp_path / "copy")
    assert Tokenizer(tmp_path / "copy")(["red <a>"]).equal(grown(["red <a>"]))


def test_too_small_a_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match="at least 514"):
        train_tokenizer(CAPTIONS, tmp_path, 100)


def test_size_ids_are_heights_first():
    assert size_ids((640, 480), (3, 7), (1024, 512)).tolist() == [480, 640, 7, 3, 512, 1024]
    assert size_ids((640, 480), (3, 7), 6.0).tolist() == [480, 640, 7, 3, 6]
    assert size_ids((640, 480), (3, 7), 6.0).dtype == torch.float32


# ---- weights in a prompt -------------------------------------------------------------------------

WEB_UI = json.loads((Path(__file__).parent / "goldens" / "prompts.json").read_text())["prompts"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """CLIP's vocabulary without merges: every letter is a token."""
    return train_tokenizer(CAPTIONS, tmp_path_factory.mktemp("tokenizer"), 514)


@pytest.mark.filterwarnings("ignore")  # some of these prompts are read as letters in part
def test_prompts_are_cut_and_weighted_as_by_the_web_ui(trained):
    for prompt, expected in WEB_UI:
        chunks = trained.chunks(parse_weights(prompt))
        ids = [[id for id, _ in chunk] for chunk in chunks]
        weights = [weight for chunk in chunks for _, weight in chunk]
        assert ids == [[id for run in runs for id in run[1:]] for runs in expected], prompt
        assert weights == pytest.approx([run[0] for runs in expected for run in runs for _ in run[1:]]), prompt


def test_a_break_inside_brackets_starts_a_chunk_and_keeps_the_weights():
    assert parse_weights("(red BREAK cube:1.3) x") == [("", 1.0), ("red ", 1.3), ("", None), (" cube", 1.3), (" x", 1.0)]


def test_the_ids_of_an_added_word_stay_in_one_chunk(trained):
    tokenizer = copy.deepcopy(trained)
    tokenizer.add("<my-cat>", 3)
    first = tokenizer.size
    ((_, (x,)),) = tokenizer.tokenize("x")
    chunks = tokenizer.chunks([("x " * 73, 1.0), ("<my-cat> x", 1.5)])
    assert chunks == [[(x, 1.0)] * 73, [(first, 1.5), (first + 1, 1.5), (first + 2, 1.5), (x, 1.5)]]


@pytest.mark.parametrize("prompt, message", [
    ("a <lora:foo:0.8> cat", "load the file with `lora`"), ("<lyco:x>", "load the file"), ("<hypernet:x:1>", "load the file"),
    ("< LoRA : x : 1 >", "load the file")])
def test_a_file_named_in_a_prompt_is_answered_with_the_parameter(prompt, message):
    with pytest.raises(ParameterError, match=message):
        parse_weights(prompt)


@pytest.mark.parametrize("prompt, message", [
    ("(" * 1000 + "a", "weight of"), ("(a:9999)", "'a' has a weight of 9999; choose at most 1000"),
    ("a" * 20001, "20,001 characters; expected at most 20,000")])
def test_a_prompt_out_of_bounds_is_refused(prompt, message):
    with pytest.raises(ParameterError, match=f"^prompt: .*{message}"):
        parse_weights(prompt)


def test_a_long_prompt_is_read_at_once():
    start = time.process_time()
    assert parse_weights("a" + " " * 19000 + "BREAK" + " " * 900)[1] == ("", None)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("prompt", ["[cat:dog:0.5]", "[cat|dog]", "[cat:5]", "a {red|blue} cube", "a cat AND a dog", "a embedding:ring"])
def test_other_syntax_is_said_to_be_read_as_letters(prompt):
    with pytest.warns(UserWarning, match="read as letters"):
        parse_weights(prompt)


@pytest.mark.parametrize("prompt", ["a red cube", "a [(red:1.2)] cube: blue", "it is 5:30", "sand and band", "<my-cat> {x}"])
def test_ordinary_prompts_are_read_without_a_word(prompt):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_weights(prompt)


def test_weighted_prompts_are_encoded_as_by_the_formula():
    """The encoders are transformers', the formula is written out: two chunks, two encoders, one negative prompt."""
    transformers = pytest.importorskip("transformers")
    folder = Path(__file__).parents[1] / "weights" / "tiny"
    pipeline = Pipeline.load(folder)
    negative = "[blue] cube"
    cond, uncond = pipeline.encode("a small (red:1.4) cube BREAK on a [grey] floor", negative)
    peers = [transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").float(),
             transformers.CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2").float()]
    # [text, its weights], a token per word
    chunks = [("a small red cube", [1, 1, 1.4, 1]), ("on a grey floor", [1, 1, 1 / 1.1, 1])]
    unwanted = [("blue cube", [1 / 1.1, 1]), ("", [])]
    for conditioning, texts in ((cond, chunks), (uncond, unwanted)):
        rows = []
        for text, weights in texts:
            states = []
            for peer, tokenizer in zip(peers, (pipeline.tokenizer, pipeline.tokenizer_2)):
                with torch.no_grad():
                    output = peer(tokenizer([text]), output_hidden_states=True)
                z = output.hidden_states[-2][0].double().numpy()
                w = np.ones((LENGTH, 1))
                w[1:1 + len(weights), 0] = weights
                states.append(z * w * z.mean() / (z * w).mean())
                if text == texts[0][0] and peer is peers[1]:
                    assert conditioning.pooled[0].numpy() == pytest.approx(output.text_embeds[0].numpy(), abs=1e-5)
            rows.append(np.concatenate(states, axis=1))
        assert conditioning.context[0].numpy() == pytest.approx(np.concatenate(rows), abs=2e-5)


def test_a_long_prompt_draws_and_captions_are_taken_literally():
    pipeline = Pipeline.load(Path(__file__).parents[1] / "weights" / "tiny")
    cond, uncond = pipeline.encode("a small red cube, " * 40)
    assert cond.context.shape[1] == uncond.context.shape[1] == 3 * LENGTH and not uncond.context.any()
    (picture,) = pipeline.generate("a small red cube, " * 40, steps=1)
    assert picture.size == (64, 64)
    literal, _ = encode_prompts(["a (red:1.4) cube"], pipeline.tokenizers_and_encoders)
    assert literal.shape[1] == LENGTH and not literal.equal(pipeline.encode("a (red:1.4) cube")[0].context)
    with torch.no_grad():
        plain, _ = encode_prompts(["a red cube"], pipeline.tokenizers_and_encoders)
    assert plain.equal(pipeline.encode("a red cube")[0].context)  # without weights, to the last bit
