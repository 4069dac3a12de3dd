"""Textual inversion: new words in prompts, their files, what diffusers makes of ours, and training that moves only them."""

import json

import pytest
import torch
from peers import distance, numbers
from tiny import build, folder

import sample
import train
from minipic.common import InputError
from minipic.embedding import load_embedding, save_embedding
from minipic.image import open_picture, to_pictures
from minipic.pipeline import Pipeline
from minipic.weights import read_weights, save_weights
from minipic.world.scene import render, sample_scene

VECTORS = {"text_encoder": numbers((2, 16), 1).float(), "text_encoder_2": numbers((2, 24), 2).float()}
PROMPT = "a small <cat> left of a blue cube"


def encoded(pipeline, text):
    return pipeline.encode(text)[0][:2]


def test_a_new_word_is_its_vectors_and_the_end_token_still_pools():
    """The states are those of a vocabulary in which other tokens have these vectors."""
    pipeline, plain = build(), build()
    pipeline.add_word("<cat>", VECTORS)
    for (part, vectors), (tokenizer, encoder), (knows, grown) in zip(VECTORS.items(), plain.towers, pipeline.towers):
        ids = knows([PROMPT])
        assert (ids == tokenizer.size).sum() == 1 and (ids == tokenizer.size + 1).sum() == 1
        unused = [7, 8]  # bytes that no prompt here has
        weight = encoder.text_model.embeddings.token_embedding.weight
        assert grown is getattr(pipeline, part)
        weight.data[unused] = vectors
        swapped = ids.clone()
        for new, old in zip((tokenizer.size, tokenizer.size + 1), unused):
            swapped[ids == new] = old
        for a, b in zip(grown(ids)[0], encoder(swapped)[0]):
            assert torch.equal(a, b)
        assert torch.equal(grown(ids)[1], encoder(swapped)[1])


def test_words_without_new_ones_are_as_before():
    pipeline, plain = build(), build()
    before = encoded(plain, "a small cube")
    pipeline.add_word("<cat>", VECTORS)
    assert all(map(torch.equal, encoded(pipeline, "a small cube"), before))
    assert not torch.equal(encoded(pipeline, "a small <cat>")[0], encoded(plain, "a small <cat>")[0])
    pipeline.add_word("<dog>", {part: -x for part, x in VECTORS.items()})
    both = build()
    both.add_word("<dog>", {part: -x for part, x in VECTORS.items()})
    assert all(map(torch.equal, encoded(pipeline, "a <dog>"), encoded(both, "a <dog>")))


def test_long_prompts_count_every_vector():
    pipeline = build()
    pipeline.add_word("<cat>", {part: x.repeat(20, 1) for part, x in VECTORS.items()})
    with pytest.warns(UserWarning, match="81 tokens and 75 fit; cut off: '<cat>"):
        ids = pipeline.tokenizer(["a <cat> <cat>"])
    assert ids.shape == (1, 77) and ids[0, -1] == pipeline.tokenizer.end


def test_files_come_back_in_both_spellings(tmp_path):
    save_embedding(VECTORS, tmp_path / "cat.safetensors", "<cat>")
    assert read_weights(tmp_path / "cat.safetensors").keys() == {"clip_l", "clip_g"}
    for name, word in (("cat.safetensors", "<cat>"), ("learned_embeds.safetensors", "<cat>")):
        found, told = load_embedding(tmp_path / name)
        assert told == word and all(torch.equal(found[part], VECTORS[part]) for part in VECTORS)
    (tmp_path / "learned_embeds.safetensors").rename(tmp_path / "learned_embeds-steps-500.safetensors")
    (tmp_path / "learned_embeds_2.safetensors").rename(tmp_path / "learned_embeds_2-steps-500.safetensors")
    found, told = load_embedding(tmp_path / "learned_embeds-steps-500.safetensors")
    assert told == "<cat>" and torch.equal(found["text_encoder_2"], VECTORS["text_encoder_2"])
    save_weights({"<dog>": VECTORS["text_encoder"][0]}, tmp_path / "dog.safetensors")  # one vector, as diffusers had it
    save_weights({"other": torch.zeros(3)}, tmp_path / "dog_2.safetensors")  # and a file that has nothing to do with it
    found, told = load_embedding(tmp_path / "dog.safetensors")
    assert told == "<dog>" and torch.equal(found["text_encoder"], VECTORS["text_encoder"][:1]) and len(found) == 1
    save_weights({"emb_params": VECTORS["text_encoder"]}, tmp_path / "sd15.safetensors")
    pipeline = build("sd15")
    pipeline.add_embedding(tmp_path / "sd15.safetensors")
    expected = build("sd15")
    expected.add_word("other", {"text_encoder": VECTORS["text_encoder"]})
    assert torch.equal(encoded(pipeline, "a sd15")[0], encoded(expected, "a other")[0])


@pytest.mark.parametrize("tensors, words", [
    ({"clip_l": torch.zeros(1, 16)}, "its vectors are as wide as"),
    ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "its vectors are as wide as"),
    ({"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(2, 24)}, "is no textual inversion"),
    ({"clip_l": torch.zeros(1, 1, 16), "clip_g": torch.zeros(1, 1, 24)}, "is no textual inversion"),
    ({"<a>": torch.zeros(1, 16), "<b>": torch.zeros(1, 24)}, "is more than one word's vectors"),
    ({"clip_l": torch.zeros(1, 16, dtype=torch.int8), "clip_g": torch.zeros(1, 24)}, "is no textual inversion"),
])
def test_what_does_not_fit_is_refused_by_name(tensors, words, tmp_path, capsys):
    save_weights(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=words) as error:
        build().add_embedding(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(error.value)


def test_a_second_file_without_the_word_is_refused(tmp_path):
    save_weights({"<a>": torch.zeros(1, 16)}, tmp_path / "learned_embeds.safetensors")
    save_weights({}, tmp_path / "learned_embeds_2.safetensors")
    with pytest.raises(InputError, match="is no textual inversion"):
        build().add_embedding(tmp_path / "learned_embeds.safetensors")


def test_a_word_of_the_vocabulary_is_refused():
    with pytest.raises(InputError, match="'small' already is a token.* FILE:<my-cat>"):
        build().add_word("small", VECTORS)


def test_sample_draws_with_a_new_word(tmp_path, capsys):
    save_embedding(VECTORS, tmp_path / "cat.safetensors", "<cat>")
    flags = ["--model", str(folder()), "--steps", "2", "--n", "1"]

    def drawn(name, *more):
        assert sample.main([PROMPT, *flags, "--out", str(tmp_path / name), *more]) == 0
        return open_picture(tmp_path / name).tobytes()  # the pixels: the file keeps the flags too
    file = str(tmp_path / "cat.safetensors")
    assert drawn("with.png", "--embedding", file) != drawn("without.png") == drawn("other.png", "--embedding",
                                                                                   f"{file}:<dog>")
    assert sample.main([PROMPT, *flags, "--embedding", str(tmp_path / "none.safetensors")]) == 2
    assert "none.safetensors" in capsys.readouterr().err


def test_diffusers_reads_our_files_and_encodes_the_same(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save_embedding(VECTORS, tmp_path / "cat.safetensors", "<cat>")
    pipeline = Pipeline.load(folder())
    pipeline.add_embedding(tmp_path / "learned_embeds.safetensors")
    peer = diffusers.StableDiffusionXLPipeline.from_pretrained(folder())
    for name, encoder, tokenizer in (("learned_embeds", peer.text_encoder, peer.tokenizer),
                                     ("learned_embeds_2", peer.text_encoder_2, peer.tokenizer_2)):
        peer.load_textual_inversion(str(tmp_path / f"{name}.safetensors"), text_encoder=encoder, tokenizer=tokenizer)
    context, _, pooled, _ = peer.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    ours = encoded(pipeline, PROMPT)
    assert distance(ours[0], context) < 1e-5
    assert distance(ours[1], pooled) > 1e-3  # it pools at the new word, whose id is the largest


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(to_pictures(render([sample_scene(1, i, 1) for i in range(3)], truth=False).rgb)):
        picture.save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def test_training_moves_the_new_vectors_only(photos, tmp_path, capsys):
    flags = ["inversion", "--model", str(folder()), "--data", str(photos), "--out", str(tmp_path / "run"), "--word",
             "<cat>", "--like", "cube", "--vectors", "2", "--batch", "2", "--sample-every", "0", "--precision", "fp32"]
    assert train.main([*flags, "--caption", "a <cat>", "--steps", "3", "--lr", "0.01", "--warmup", "0"]) == 0
    assert "training 80 of" in capsys.readouterr().out  # 2 vectors of 16 and of 24
    found, _ = load_embedding(tmp_path / "run" / "model" / "cat.safetensors")
    plain = Pipeline.load(folder())
    for part, vectors in found.items():
        encoder, tokenizer = getattr(plain, part), plain.tokenizer
        start = encoder.text_model.embeddings.token_embedding.weight[tokenizer(["cube"])[0, 1]]
        moved = (vectors - start).abs()
        assert 1e-4 < moved.mean() and moved.max() <= 0.0301  # three steps of Adam
    plain.add_embedding(tmp_path / "run" / "model" / "cat.safetensors", "<cat>")

    for more, words in ((["--caption", "a cat"], "lacks the word <cat>"), ([], "has no caption"),
                        (["--caption", "zyxs", "--word", "zyx"], "lacks the word zyx"),
                        (["--caption", "a <cat>", "--like", "small cube"], "--like small cube: is not one token"),
                        (["--caption", "a <cat>", "--word", "small</w>"], "--word 'small</w>' already is a token")):
        assert train.main([*flags, "--out", str(tmp_path / "other"), "--steps", "1", *more]) == 2
        assert words in "".join(capsys.readouterr())


def test_dreambooth_keeps_what_the_model_drew_of_the_class(photos, tmp_path, capsys):
    flags = ["dreambooth", "--model", str(folder()), "--data", str(photos), "--out", str(tmp_path / "run"), "--caption",
             "a sks cube", "--sample-every", "0", "--precision", "fp32", "--batch", "2", "--prior-pictures", "2",
             "--prior-weight", "0.5"]
    assert train.main([*flags, "--prior", "a cube", "--steps", "2", "--lora-rank", "2"]) == 0
    drawn, name = Pipeline.load(folder()).generate("a cube", seed=10**6)[0], f"a-cube-{folder().name}-0"
    assert open_picture(tmp_path / "run" / "prior" / name / "0000.png").tobytes() == drawn.tobytes()
    assert (tmp_path / "run" / "model" / "lora.safetensors").exists()
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert row["loss"] == pytest.approx(row["subject"] + 0.5 * row["prior"], rel=1e-5) and row["subject"] != row["prior"]
    assert train.main(flags) == 2 and "--prior" in capsys.readouterr().err
