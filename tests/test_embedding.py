"""Textual inversion: new words in prompts, their files, diffusers with our files, and training."""

import json

import pytest
import torch
from peers import distance, numbers
from tiny import build, folder

import sample
import train
from minipic.common import InputError, ParameterError
from minipic.image import open_picture, to_pictures
from minipic.pipeline import Pipeline
from minipic.weights import read_weights, save_weights
from minipic.weights.embedding import load_embedding, save_embedding
from minipic.world.scene import render, sample_scene

VECTORS = {
    "text_encoder": numbers((2, 16), 1).float(), "text_encoder_2": numbers((2, 24), 2).float()}
PROMPT = "a small <cat> left of a blue cube"


def encoded(pipeline, text):
    return pipeline.encode(text)[0][:2]


def test_a_new_word_is_its_vectors_and_the_end_token_still_pools():
    """The states are those of a vocabulary in which other tokens have these vectors."""
    pipeline, plain = build(), build()
    pipeline.add_word("<cat>", VECTORS)
    unused = [7, 8]  # bytes that no prompt here has
    for i, (part, vectors) in enumerate(VECTORS.items()):
        tokenizer, encoder = plain.tokenizers_and_encoders[i]
        grown_tokenizer, grown = pipeline.tokenizers_and_encoders[i]
        assert grown is getattr(pipeline, part)
        new_ids = tokenizer.size, tokenizer.size + 1
        ids = grown_tokenizer([PROMPT])
        encoder.text_model.embeddings.token_embedding.weight.data[unused] = vectors
        swapped = ids.clone()
        for new, old in zip(new_ids, unused):
            assert (ids == new).sum() == 1
            swapped[ids == new] = old
        hidden_states, pooled = grown(ids)
        expected_states, expected_pooled = encoder(swapped)
        assert all(map(torch.equal, hidden_states, expected_states))
        assert torch.equal(pooled, expected_pooled)


def test_words_without_new_ones_are_as_before():
    pipeline, plain = build(), build()
    before = encoded(plain, "a small cube")
    pipeline.add_word("<cat>", VECTORS)
    assert all(map(torch.equal, encoded(pipeline, "a small cube"), before))
    with_word, without = (encoded(model, "a small <cat>")[0] for model in (pipeline, plain))
    assert not torch.equal(with_word, without)
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


def assert_loads(path, word, vectors):
    loaded, own_word = load_embedding(path)
    assert own_word == word and loaded.keys() == vectors.keys()
    assert all(torch.equal(loaded[part], vectors[part]) for part in vectors)


def test_files_come_back_in_both_spellings(tmp_path):
    save_embedding(VECTORS, tmp_path / "cat.safetensors", "<cat>")
    assert read_weights(tmp_path / "cat.safetensors").keys() == {"clip_l", "clip_g"}
    first = tmp_path / "learned_embeds.safetensors"
    second = tmp_path / "learned_embeds_2.safetensors"
    assert_loads(tmp_path / "cat.safetensors", "<cat>", VECTORS)
    assert_loads(first, "<cat>", VECTORS)
    later = first.rename(tmp_path / "learned_embeds-steps-500.safetensors")
    second.rename(tmp_path / "learned_embeds_2-steps-500.safetensors")
    assert_loads(later, "<cat>", VECTORS)


@pytest.mark.parametrize("first, second", [
    ("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1"), ("string_to_param.*", "clip_g"),
    ("emb_params", "clip_g"), ("string_to_param", "clip_g"), ("*", "clip_g"), ("text_encoder", "text_encoder_2")])
def test_the_encoders_have_several_names(first, second, tmp_path):
    tensors = {first: VECTORS["text_encoder"], second: VECTORS["text_encoder_2"]}
    save_weights(tensors, tmp_path / "cat.safetensors")
    assert_loads(tmp_path / "cat.safetensors", None, VECTORS)
    save_weights(tensors | {"string_to_token.*": torch.tensor(265)}, tmp_path / "cat.safetensors")
    assert_loads(tmp_path / "cat.safetensors", None, VECTORS)
    save_weights({second: tensors[second], first: tensors[first]}, tmp_path / "cat.safetensors")
    assert_loads(tmp_path / "cat.safetensors", None, VECTORS)


def test_one_vector_may_have_one_dimension(tmp_path):
    """As diffusers wrote it until 2023. A file that has nothing to do with it is left alone."""
    vector = VECTORS["text_encoder"][0]
    save_weights({"<dog>": vector}, tmp_path / "dog.safetensors")
    save_weights({"other": torch.zeros(3)}, tmp_path / "dog_2.safetensors")
    assert_loads(tmp_path / "dog.safetensors", "<dog>", {"text_encoder": vector[None]})


def test_a_file_without_a_word_takes_its_own_name(tmp_path):
    save_weights({"emb_params": VECTORS["text_encoder"]}, tmp_path / "sd15.safetensors")
    assert_loads(tmp_path / "sd15.safetensors", None, {"text_encoder": VECTORS["text_encoder"]})
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
    ({"lora_unet_mid_block.lora_up.weight": torch.zeros(1, 16)},
     r"is a LoRA \('lora_unet_mid_block.lora_up.weight'\); expected a textual inversion"),
    ({"<a>": torch.zeros(1, 16), "<b>": torch.zeros(1, 24)}, "is more than one word's vectors"),
    ({"clip_l": torch.zeros(1, 16), "text_encoders_0": torch.zeros(1, 16)},
     "is there in two spellings"),
    ({"clip_l": torch.zeros(1, 16, dtype=torch.int8), "clip_g": torch.zeros(1, 24)},
     "is no textual inversion"),
])
def test_what_does_not_fit_is_refused_by_name(tensors, words, tmp_path):
    save_weights(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=words) as error:
        build().add_embedding(tmp_path / "bad.safetensors")
    assert "bad.safetensors" in str(error.value)


@pytest.mark.parametrize("word", [3, b"<cat>", ["<cat>"], True])
def test_a_word_is_a_text(word, tmp_path):
    save_embedding(VECTORS, tmp_path / "cat.safetensors", "<cat>")
    with pytest.raises(ParameterError, match="word: expected a text such as '<my-cat>', not "):
        build().add_embedding(tmp_path / "cat.safetensors", word)


def test_a_second_file_without_the_word_is_refused(tmp_path):
    save_weights({"<a>": torch.zeros(1, 16)}, tmp_path / "learned_embeds.safetensors")
    save_weights({}, tmp_path / "learned_embeds_2.safetensors")
    with pytest.raises(InputError, match="_2.safetensors: expected the vectors of '<a>' alone"):
        build().add_embedding(tmp_path / "learned_embeds.safetensors")


def test_a_file_that_is_refused_changes_nothing(tmp_path):
    save_weights({"clip_l": torch.zeros(1, 16), "clip_g": torch.zeros(1, 24)}, tmp_path / "small.safetensors")
    pipeline = build()
    before = encoded(pipeline, "a small cube")
    with pytest.raises(InputError, match="small.safetensors: the word 'small': 'small' already is a token"):
        pipeline.add_embedding(tmp_path / "small.safetensors")
    assert not pipeline.words and all(map(torch.equal, encoded(pipeline, "a small cube"), before))


@pytest.mark.parametrize("word", ["\ud800", "a\nb", "\0", "\x1b[31m", "", " "])
def test_a_word_that_no_prompt_can_hold_is_refused(word):
    with pytest.raises(InputError, match="already is a token, or is no printable text; choose another"):
        build().add_word(word, VECTORS)


def test_a_whole_model_is_not_read_to_learn_that_it_is_no_word(tmp_path, monkeypatch):
    monkeypatch.setattr("minipic.weights.embedding.stream", lambda *_: pytest.fail("the weights were read"))
    for names in (("model.diffusion_model.out.0.bias", "betas"), ("a", "b", "c")):
        save_weights({name: torch.zeros(3) for name in names}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match="model.safetensors: .* is more than one word's vectors"):
            build().add_embedding(tmp_path / "model.safetensors")


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
    without = drawn("without.png")
    assert drawn("with.png", "--embedding", file) != without
    assert drawn("other.png", "--embedding", f"{file}:<dog>") == without
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
        path = str(tmp_path / f"{name}.safetensors")
        peer.load_textual_inversion(path, text_encoder=encoder, tokenizer=tokenizer)
    context, _, pooled, _ = peer.encode_prompt(PROMPT, do_classifier_free_guidance=False)
    ours = encoded(pipeline, PROMPT)
    assert distance(ours[0], context) < 1e-5
    assert distance(ours[1], pooled) > 1e-3  # it pools at the new word, whose id is the largest


@pytest.fixture
def photos(tmp_path):
    scenes = [sample_scene(1, i, 1) for i in range(3)]
    (tmp_path / "photos").mkdir()
    for i, picture in enumerate(to_pictures(render(scenes, truth=False).rgb)):
        picture.save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def test_training_moves_the_new_vectors_only(photos, tmp_path, capsys):
    flags = [
        "inversion", "--model", str(folder()), "--data", str(photos), "--word", "<cat>",
        "--initializer-token", "cube", "--num-vectors", "2", "--batch", "2", "--sample-every", "0",
        "--precision", "fp32", "--out", str(tmp_path / "run")]
    more = ["--caption", "a <cat>", "--steps", "3", "--lr", "0.01", "--warmup", "0"]
    assert train.main([*flags, *more]) == 0
    assert "training 80 of" in capsys.readouterr().out  # 2 vectors of 16 and of 24
    file = tmp_path / "run" / "model" / "cat.safetensors"
    loaded, _ = load_embedding(file)
    plain = Pipeline.load(folder())
    for part, vectors in loaded.items():
        cube = plain.tokenizer(["cube"])[0, 1]
        start = getattr(plain, part).text_model.embeddings.token_embedding.weight[cube]
        moved = (vectors - start).abs()
        assert 1e-4 < moved.mean() and moved.max() <= 0.0301  # three steps of Adam
    plain.add_embedding(file, "<cat>")

    for more, words in (
            (["--caption", "a cat"], "lacks the word <cat>"),
            ([], "has no caption"),
            (["--caption", "zyxs", "--word", "zyx"], "lacks the word zyx"),
            (["--caption", "a <cat>", "--initializer-token", "small cube"],
             "--initializer-token: small cube is not one token"),
            (["--caption", "a <cat>", "--word", "small</w>"],
             "--word: 'small</w>' already is a token")):
        assert train.main([*flags, "--out", str(tmp_path / "other"), "--steps", "1", *more]) == 2
        assert words in "".join(capsys.readouterr())


@pytest.mark.slow
def test_dreambooth_keeps_what_the_model_drew_of_the_class(photos, tmp_path, capsys):
    flags = [
        "dreambooth", "--model", str(folder()), "--data", str(photos), "--caption", "a sks cube",
        "--sample-every", "0", "--precision", "fp32", "--batch", "2", "--num-class-images", "2",
        "--prior-loss-weight", "0.5", "--out", str(tmp_path / "run")]
    more = ["--class-prompt", "a cube", "--steps", "2", "--lora-rank", "2"]
    assert train.main([*flags, *more]) == 0
    drawn = Pipeline.load(folder()).generate("a cube", seed=10**6)[0]
    kept = tmp_path / "run" / "prior" / f"a-cube-{folder().name}-0" / "0000.png"
    assert open_picture(kept).tobytes() == drawn.tobytes()
    assert (tmp_path / "run" / "model" / "lora.safetensors").exists()
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert row["loss"] == pytest.approx(row["subject"] + 0.5 * row["prior"], rel=1e-5)
    assert row["subject"] != row["prior"]
    kept.unlink()  # the one that is missing is drawn again, and no other
    assert train.main([*flags, *more, "--resume", "latest"]) == 0
    assert sorted(path.name for path in kept.parent.iterdir()) == ["0000.png", "0001.png"]
    assert open_picture(kept).tobytes() == drawn.tobytes()
    assert train.main(flags) == 2
    assert "train.py: --class-prompt: say what the subject is one of" in capsys.readouterr().err
