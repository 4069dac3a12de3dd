"""ONE-PIC: the identities that hold before any training, the recipe, and drawing from Python and the command line."""

import json
import shutil
from dataclasses import asdict, replace

import peers
import pytest
import tiny
import torch
from test_pipeline import mask, mine, picture

import sample
import train
from minipic.common import InputError
from minipic.diffusion.schedule import Schedule
from minipic.image import open_picture, read_settings, to_pictures, to_tensor, white
from minipic.layers import lora
from minipic.methods import onepic, t2i
from minipic.pipeline import Pipeline
from minipic.weights import read_header, read_weights
from minipic.world.tasks import TASKS
from tiny import PROMPT

HOW = {visible: onepic.Context(visible, "two panels: another view | {text}", (64, 64))
       for visible in ("clean", "noised")}


def config_of(**settings):
    return onepic.Recipe(**{"model": str(tiny.folder()), "precision": "fp32", "scenes": 6, "drop": 0.0, **settings})


def canvases(count=3):
    """x, known, noise [B,4,4,8], the mask of the right half [B,1,4,8] and timesteps."""
    x, known, noise = (peers.numbers((count, 4, 4, 8), seed).float() for seed in (1, 2, 3))
    return x, known, noise, torch.arange(8).ge(4).expand(count, 1, 4, 8), torch.tensor([1, 500, 999])[:count]


# What the UNet sees, and what counts --------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_is_given_is_seen_clean_or_as_noisy_as_the_rest(prediction):
    objective = Schedule(prediction_type=prediction).objective
    x, known, noise, right, t = canvases()
    for visible in HOW:  # all masked: an ordinary sample
        assert torch.equal(onepic.fill(x, t, known, noise, torch.ones_like(right), visible, objective), x)
    for other in (noise, -noise):  # clean: bit for bit, whatever the noise and the time
        seen = onepic.fill(x, t, known, other, right, "clean", objective)
        assert torch.equal(seen[..., :4], known[..., :4]) and torch.equal(seen[..., 4:], x[..., 4:])
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square()
    abar = (1 - beta).cumprod(0)[t].view(-1, 1, 1, 1)
    seen = onepic.fill(x, t, known, noise, right, "noised", objective)
    wanted = abar.sqrt() * known + (1 - abar).sqrt() * noise
    assert torch.allclose(seen[..., :4], wanted[..., :4], atol=1e-5) and torch.equal(seen[..., 4:], x[..., 4:])
    one = onepic.fill(x[:1], t[1], known[:1], noise[:1], right[:1], "noised", objective)  # a scalar t, as in drawing
    abar = (1 - beta).cumprod(0)[500]
    assert torch.allclose(one[..., :4], (abar.sqrt() * known + (1 - abar).sqrt() * noise)[:1, ..., :4], atol=1e-5)


def test_the_masked_loss_is_the_mean_inside_and_has_no_gradient_outside():
    x0, answer, noise, right, t = canvases()
    objective, answer = mine().schedule.objective, answer.requires_grad_()

    def loss(where):
        return objective.loss(lambda x, t: answer, x0, noise, t, where=where)
    inside, outside, every = loss(right), loss(~right), loss(None)
    assert torch.allclose(inside, (answer - noise)[..., 4:].square().flatten(1).mean(1))
    assert torch.allclose(every, (inside + outside) / 2)  # both halves have as many numbers
    assert torch.allclose(loss(torch.ones_like(right)), every)
    gradient, = torch.autograd.grad(inside.sum(), answer)
    assert (gradient[..., :4] == 0).all() and (gradient[..., 4:] != 0).all()


@pytest.mark.parametrize("visible", HOW)
def test_noise_of_the_given_half_reaches_the_loss_only_if_it_is_seen(visible):
    config = config_of(visible=visible)
    pipeline = onepic.build(config)
    onepic.setup(pipeline, config)
    batch = onepic.data(pipeline, config)(0, range(2))
    other = batch | {"noise": torch.where(batch["mask"], batch["noise"], -batch["noise"])}
    same = torch.equal(onepic.loss(pipeline, batch, config), onepic.loss(pipeline, other, config))
    assert same == (visible == "clean")


# Batches ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", ["edit", "wear"])
def test_batches_are_the_worlds_pairs_side_by_side(task):
    config = config_of(task=task)
    pipeline = onepic.build(config)
    pipeline.vae.quant_conv.weight.data[4:], pipeline.vae.quant_conv.bias.data[4:] = 0, -30  # the mean itself
    batch, pairs = onepic.data(pipeline, config)(0, range(5)), TASKS[task](0, range(6))
    rows = batch["rows"]
    given = {"edit": "the picture before", "wear": "the garment"}[task]
    assert batch["captions"] == [f"two panels: {given} | {pairs.prompts[row]}" for row in rows]
    assert batch["size_ids"].tolist() == 5 * [[64, 128, 0, 0, 64, 128]]

    def latent(images):
        with torch.no_grad():
            return pipeline.vae.scale(pipeline.vae.encode(images)[0])
    left, right = batch["known"].chunk(2, dim=3)
    close = 0.03 * batch["x0"].abs().max()  # latents are encoded and kept in 16 bits
    assert (left - latent(pairs.source[rows])).abs().max() < close
    assert torch.equal(left, batch["x0"].chunk(2, dim=3)[0])
    assert (batch["x0"].chunk(2, dim=3)[1] - latent(pairs.target[rows])).abs().max() < close
    first, second = batch["mask"].chunk(2, dim=3)
    assert not first.any()
    if task == "edit":
        assert second.all()
    else:  # all but the garment is given
        worn = pairs.truth["mask"][rows]
        assert torch.equal(second, worn[..., 2::4, 2::4]) or torch.equal(second, worn[..., ::4, ::4])
        assert 0.02 < second.float().mean() < 0.5
        hidden = torch.where(worn, onepic.GREY / 127.5 - 1, pairs.target[rows])
        assert (right - latent(hidden)).abs().max() < close
    again = onepic.data(pipeline, config)(7, [3])
    assert torch.equal(again["noise"][0], batch["noise"][3]) and torch.equal(again["x0"][0], batch["x0"][3])


def test_the_answer_does_not_leak_into_what_is_given(monkeypatch):
    config = config_of(task="wear")
    pipeline, pairs_of = onepic.build(config), t2i.pairs_of

    def known(change):
        monkeypatch.setattr(t2i, "pairs_of", lambda *given: [
            replace(pair, image=torch.where(pair.mask, change(pair.image), pair.image)) for pair in pairs_of(*given)])
        return onepic.data(pipeline, config)(0, range(4))
    before, after = known(lambda image: image), known(lambda image: 255 - image)
    assert torch.equal(before["known"], after["known"]) and not torch.equal(before["x0"], after["x0"])
    whole = torch.cat([torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)], dim=3)  # what happens encoded together
    with torch.no_grad():
        halves = [pipeline.vae.encode(x)[0][..., :16] for x in (whole, torch.cat([whole[..., :64], -whole[..., 64:]], 3))]
    assert (halves[0] - halves[1]).abs().max() > 1e-3


def test_only_the_lora_learns_and_at_first_changes_no_bit():
    config = config_of()
    pipeline = onepic.build(config)
    torch.manual_seed(0)
    params, batch = onepic.setup(pipeline, config), onepic.data(pipeline, config)(0, range(4))
    first = onepic.loss(pipeline, batch, config)
    assert torch.equal(first, onepic.loss(Pipeline.load(config.model), batch, config))
    optimizer = torch.optim.AdamW(params, 3e-3)
    for _ in range(12):
        last = onepic.loss(pipeline, batch, config)
        optimizer.zero_grad(), last.backward(), optimizer.step()
    assert last < 0.85 * first
    assert {id(p) for p in pipeline.parameters() if p.grad is not None} == set(map(id, params))
    assert sum(p.numel() for p in params) == 32 * sum(
        len(module.weight) + module.weight[0].numel() for module in lora.layers(pipeline.unet).values())


@pytest.fixture
def photos(tmp_path):
    """Three pairs of photos, two wide ones and a square one, with masks."""
    for kind in ("target", "source", "mask"):
        (tmp_path / kind).mkdir()
    for i, size in enumerate(((96, 48), (96, 48), (80, 80))):
        for kind in ("target", "source", "mask"):
            image = mask() if kind == "mask" else picture(i + 5 * (kind == "target"))
            image.resize(size).save(tmp_path / kind / f"{i}.png")
        (tmp_path / "target" / f"{i}.txt").write_text(f"cube {i}")
    return tmp_path


@pytest.mark.parametrize("masked", [True, False])
def test_batches_of_a_folder(photos, masked):
    if not masked:
        shutil.rmtree(photos / "mask")
    config = config_of(data=str(photos), prompt="a sketch | {text}")
    pipeline = onepic.build(config)
    batch_of = onepic.data(pipeline, config)
    assert pipeline.how == onepic.Context("clean", "a sketch | {text}", (80, 48)) and len(pipeline.examples) == 3
    seen = set()
    for step in range(6):
        batch = batch_of(step, range(3 * step, 3 * step + 3))
        width, height = (80, 48) if 2 not in batch["rows"] else (64, 64)
        assert batch["size_ids"].tolist() == 3 * [[height, 2 * width, 0, 0, height, 2 * width]]
        for k, row in enumerate(batch["rows"]):
            seen.add(row)
            target, source, part = (open_picture(photos / kind / f"{row}.png") if kind != "mask" or masked else None
                                    for kind in ("target", "source", "mask"))
            assert batch["captions"][k] == f"a sketch | cube {row}"
            target, source = (to_tensor(onepic.cover(x, (width, height))) for x in (target, source))
            part = white(part, (width, height)).bool() if masked else torch.ones(1, height, width, dtype=torch.bool)
            with torch.no_grad():
                left, right = pipeline.vae.scale(pipeline.vae.encode(torch.stack(
                    [source, torch.where(part, onepic.GREY / 127.5 - 1, target)]))[0])
            known, where = batch["known"][k].chunk(2, dim=2), batch["mask"][k].chunk(2, dim=2)
            assert (known[0] - left).abs().max() < 0.05 * left.abs().max()
            assert not masked or (known[1] - right).abs().max() < 0.05 * right.abs().max()
            assert not where[0].any() and torch.equal(where[1], onepic.latent_mask(part.float(), 4)[0].bool())
    assert seen == {0, 1, 2}


# Drawing ------------------------------------------------------------------------------------------------------------

def drawn(how, pipeline=None, **settings):
    """The last x of a drawing, and everything that the UNet saw."""
    pipeline, seen = pipeline or Pipeline.load(tiny.folder()), []
    source = settings.pop("source", picture(1))
    with pytest.MonkeyPatch.context() as patch:
        forward = pipeline.unet.forward
        patch.setattr(pipeline.unet, "forward", lambda x, *told: seen.append(x) or forward(x, *told))
        *_, (x, _) = onepic.steps(pipeline, PROMPT, source, how, **{"steps": 4, "n": 2, **settings})
    return x, seen


@torch.no_grad()
@pytest.mark.parametrize("visible", HOW)
def test_a_drawing_is_the_formula(visible):
    """Euler's steps with guidance, written out: before every call of the UNet the given half is put in its place."""
    found, seen = drawn(HOW[visible], seed=3)
    pipeline = mine()
    cond, uncond = pipeline.encode(f"two panels: another view | {PROMPT}")
    context, pooled = (torch.cat([a, a, b, b]) for a, b in zip(uncond[:2], cond[:2]))
    ids = torch.tensor([[64.0, 128, 0, 0, 64, 128]] * 4)
    z0 = pipeline.vae.scale(pipeline.vae.encode(to_tensor(picture(1))[None])[0])
    grid = pipeline.schedule.grid(4)
    x = grid.start * torch.stack([torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(3 + i)) for i in (0, 1)])
    noise = torch.stack([torch.randn(4, 16, 32, generator=onepic.random(3 + i, "given")) for i in (0, 1)])[..., :16]
    for i, (sigma, lower) in enumerate(zip(grid.sigmas, grid.sigmas[1:])):
        shown = x / (sigma**2 + 1) ** 0.5
        shown[..., :16] = z0 if visible == "clean" else (z0 + sigma * noise) / (sigma**2 + 1) ** 0.5
        assert torch.allclose(seen[i], torch.cat([shown, shown]), atol=1e-5)
        assert visible == "noised" or torch.equal(seen[i][:1, :, :, :16], z0)
        without, told = pipeline.unet(torch.cat([shown, shown]), grid.timesteps[i], context, pooled, ids).chunk(2)
        x = x + (lower - sigma) * (without + 5 * (told - without))
    assert len(seen) == 4 and torch.allclose(found, x[..., 16:], atol=1e-4)


def test_what_is_given_of_the_target_comes_out_bit_for_bit():
    pipeline, target = Pipeline.load(tiny.folder()), picture(2)
    part = white(mask(), (64, 64)).bool()
    hidden = torch.where(part, onepic.GREY / 127.5 - 1, to_tensor(target))
    with torch.no_grad():
        known = pipeline.vae.scale(pipeline.vae.encode(hidden[None])[0])
    small = onepic.latent_mask(part.float(), 4).bool().expand(2, 4, -1, -1)
    found, seen = drawn(HOW["clean"], pipeline, target=target, mask=mask())
    assert torch.equal(found[~small], known.expand(2, -1, -1, -1)[~small]) and 0 < small.float().mean() < 1
    assert torch.equal(seen[-1][:2, :, :, 16:][~small], found[~small])
    black = to_pictures(-torch.ones(1, 3, 64, 64))[0]
    with torch.no_grad():
        whole = pipeline.vae.scale(pipeline.vae.encode(to_tensor(target)[None])[0])
    for how in HOW.values():  # nothing to draw: what is given
        assert torch.equal(drawn(how, pipeline, target=target, mask=black)[0], whole.expand(2, -1, -1, -1))
    assert not pipeline.unet._forward_pre_hooks


def test_the_source_matters_and_rows_do_not_mix():
    first, _ = drawn(HOW["clean"])
    assert not torch.equal(first, drawn(HOW["clean"], source=picture(2))[0])
    alone, _ = drawn(HOW["clean"], n=1, seed=1)
    assert torch.allclose(first[1:], alone, atol=1e-4)
    lazy, _ = drawn_lazily(n=2)
    assert torch.equal(lazy, first)


def drawn_lazily(**settings):
    pipeline = Pipeline.load(tiny.folder(), lazy=True)
    *_, pair = onepic.steps(pipeline, PROMPT, picture(1), HOW["clean"], steps=4, **settings)
    return pair


# The recipe and the command line --------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("onepic")
    flags = ["--task", "edit", "--model", str(tiny.folder()), "--scenes", "4", "--batch", "2", "--steps", "2", "--lora-rank",
             "4", "--lr", "0.01", "--warmup", "0", "--out", str(out)]
    assert train.main(["onepic", *flags, "--checkpointing"]) == 0
    return out


def test_from_the_command_to_a_picture(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (trained / "samples" / "step-000002.png").exists()
    file, example = trained / "model" / "lora.safetensors", trained / "model" / "example.png"
    how = onepic.context_of(file)
    assert how == onepic.Context("clean", "two panels: the picture before | {text}", (64, 64))
    assert (to_tensor(open_picture(example)) - TASKS["edit"](0, [4]).source[0]).abs().max() < 0.01
    flags = ["--model", str(tiny.folder()), "--device", "cpu", "--steps", "3", "--dtype", "fp32", "--n"]
    assert sample.main([PROMPT, *flags, "1", "--lora", f"{file}:0.5", "--source", str(example), "--out", "drawn.png"]) == 0
    pipeline = Pipeline.load(tiny.folder(), lora=[(file, 0.5)])
    expected, = onepic.generate(pipeline, PROMPT, open_picture(example), how, steps=3)
    assert open_picture("drawn.png").tobytes() == expected.tobytes() and expected.size == (64, 64)
    assert read_settings("drawn.png")["source"] == str(example)
    assert sample.main(["--from", "drawn.png", "--device", "cpu", "--out", "again.png"]) == 0
    assert open_picture("again.png").tobytes() == open_picture("drawn.png").tobytes()
    picture(2).save("figure.png"), mask().save("part.png")
    assert sample.main([PROMPT, *flags, "1", "--lora", str(file), "--source", str(example), "--image", "figure.png",
                        "--mask", "part.png", "--out", "worn.png"]) == 0
    pipeline.set_lora(file, 1.0)
    expected, = onepic.generate(pipeline, PROMPT, open_picture(example), how, picture(2), mask(), steps=3)
    assert open_picture("worn.png").tobytes() == expected.tobytes()
    assert sample.main([PROMPT, *flags, "3", "--lora", str(file), "--source", str(example), "--out", "three.png"]) == 0
    assert open_picture("three-grid.png").size[0] > 3 * 64


def test_training_is_kept_in_the_file(trained):
    file = trained / "model" / "lora.safetensors"
    assert json.loads(read_header(file)[1]["onepic"]) == asdict(onepic.context_of(file)) | {"size": [64, 64]}
    kept = dict(read_weights(file))
    assert kept and any(tensor.abs().max() > 0 for name, tensor in kept.items() if "lora_B" in name)


@pytest.mark.parametrize("flags, words", [
    ("--source p.png", "--source: needs --lora"), ("--source nowhere.png --lora {lora}", "nowhere.png: no such picture"),
    ("--source p.png --lora {lora} --refiner m", "--source: draws beside a picture as its LoRA was taught; leave --refiner out"),
    ("--source p.png --lora {lora} --edit p.png", "leave --edit out"),
    ("--source p.png --lora {lora} --image p.png", "--image: with --source it needs --mask"),
    ("--source p.png --lora {lora} --mask m.png", "--mask: needs --image"),
    ("--source p.png --lora {lora} --image flat.png --mask m.png", "--mask has 64x64 pixels and --image 64x48"),
    ("--source p.png --lora {lora} --size 60x64", "--size 60x64: width and height must be multiples of 8"),
    ("--source p.png --lora other.safetensors", "--lora other.safetensors: was not made by train.py onepic"),
    ("--source p.png --lora bent.safetensors", "--lora bent.safetensors: was not made by train.py onepic"),
    ("--source p.png --lora list.safetensors", "--lora list.safetensors: was not made by train.py onepic"),
    ("--source p.png --lora three.safetensors", "--lora three.safetensors: was not made by train.py onepic"),
    ("--source p.png --lora dim.safetensors", "dim.safetensors: visible='dim' is not supported"),
    ("--source p.png --lora new.safetensors", "unknown key 'glow' for Context")])
def test_a_wrong_flag_is_one_sentence(flags, words, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(1).save("p.png"), mask().save("m.png"), picture(2).crop((0, 0, 64, 48)).save("flat.png")
    state = {"unet": lora.lora_state_dict(onepic_model())}
    told = {name: {"onepic": json.dumps(asdict(HOW["clean"]) | change)} for name, change in (
        ("new", {"glow": 3}), ("three", {"size": [64, 64, 64]}), ("dim", {"visible": "dim"}))}
    for name, metadata in ({"other": {}, "bent": {"onepic": "{"}, "list": {"onepic": "[3]"}} | told).items():
        onepic.save_lora(state, tmp_path / f"{name}.safetensors", metadata)
    given = flags.format(lora=trained / "model" / "lora.safetensors").split()
    assert sample.main([PROMPT, "--model", str(tiny.folder()), "--device", "cpu", *given]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("sample.py: ") and output.err.count("\n") == 1 and words in output.err


def onepic_model():
    pipeline = onepic.build(config_of())
    onepic.setup(pipeline, config_of())
    return pipeline.unet


def test_from_ones_own_pictures_to_a_picture(photos):
    out, flags = photos / "out", ["--prompt", "a sketch | {text}", "--steps", "1", "--batch", "2", "--lora-rank", "2"]
    (photos / "data").mkdir()
    for kind in ("target", "source", "mask"):
        shutil.move(photos / kind, photos / "data" / kind)
    flags += ["--data", str(photos / "data"), "--cache", str(photos / "kept"), "--model", str(tiny.folder())]
    assert train.main(["onepic", *flags, "--out", str(out)]) == 0
    assert open_picture(out / "model" / "example.png").size == (80, 48) and (out / "samples/step-000001.png").exists()
    given = ["--lora", str(out / "model/lora.safetensors"), "--source", str(photos / "data/source/0.png"), "--n", "1"]
    assert sample.main(["cube", "--model", str(tiny.folder()), *given, "--device", "cpu", "--steps", "2", "--out",
                        str(photos / "drawn.png")]) == 0
    assert open_picture(photos / "drawn.png").size == (80, 48)


@pytest.mark.parametrize("change, words", [
    (lambda path: (path / "source/1.png").unlink(), "source/ lacks 1 of the pictures in target/, the first is 1"),
    (lambda path: (path / "mask/2.png").unlink(), "mask/ lacks 1 of the pictures in target/, the first is 2"),
    (lambda path: shutil.rmtree(path / "target"), "target: no such folder"),
    (lambda path: (path / "source/0.png").write_bytes(b"no"), "0.png: "),
    (lambda path: mask().resize((96, 96)).save(path / "mask/0.png"), "0.png has 96x96 pixels and its picture 96x48"),
    (lambda path: mask().point(lambda x: 0).resize((96, 48)).save(path / "mask/1.png"), "1.png: hardly anything is white"),
    (lambda path: (path / "target/1.txt").unlink(), "1 problems, listed above")])
def test_a_folder_that_is_wrong_is_told(photos, change, words, capsys):
    change(photos)
    flags = ["--data", str(photos), "--prompt", "a sketch | {text}", "--model", str(tiny.folder()), "--steps",
             "1", "--out"]
    assert train.main(["onepic", *flags, str(photos.with_name("out"))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train.py: ") and words in error


@pytest.mark.parametrize("flags, words", [
    ("--data here", '--data: say in --prompt what is given'),
    ("--cache here", "--cache here: must be a folder"),
    ("--prompt two", "--prompt two: lacks {text}"), ("--task colours", "invalid choice: 'colours'"),
    ("--lora-rank 0", "--lora-rank must be at least 1"), ("--side 60", "--side must be a multiple of 16"),
    ("--visible dim", "invalid choice: 'dim'"), ("--loss-on none", "invalid choice: 'none'")])
def test_what_cannot_be_trained_is_refused(flags, words, capsys, tmp_path):
    assert train.main(["onepic", *flags.split(), "--out", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err


def test_another_kind_of_lora_is_named(tmp_path):
    onepic.save_lora({"unet": lora.lora_state_dict(onepic_model())}, tmp_path / "style.safetensors")
    with pytest.raises(InputError, match="style.safetensors: was not made by train.py onepic"):
        onepic.context_of(tmp_path / "style.safetensors")
