"""Every style draws the same scene in its own way, each picture for itself."""

from dataclasses import replace

import pytest
import torch

from minipic.world.maps import edges_of
from minipic.world.scene import Object, Scene, render, sample_scene
from minipic.world.styles import HELD_OUT_STYLES, STYLES

SCENES = [sample_scene(0, i) for i in (2, 4, 7)]
BASE = render(SCENES)


def draw(name, scenes=SCENES):
    return render(scenes, shade=STYLES[name][0], truth=False).rgb


def levels(pictures):
    return (pictures + 1) / 2


@pytest.mark.parametrize("name", STYLES)
def test_a_picture_does_not_depend_on_its_batch(name):
    together, alone = draw(name), draw(name, SCENES[1:2])
    assert together.isfinite().all() and together.amin() >= -1 and together.amax() <= 1
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert name == "base" or (together - BASE.rgb).abs().mean() > 0.03


def test_styles_have_words_and_some_are_held_out():
    assert set(HELD_OUT_STYLES) < set(STYLES) and "base" not in HELD_OUT_STYLES
    assert STYLES["base"][1] == "" and len({words for _, words in STYLES.values()}) == len(STYLES)
    assert torch.equal(draw("base"), BASE.rgb)


def test_porcelain_is_white_and_blue():
    r, g, b = levels(draw("porcelain")).unbind(1)
    assert (r <= b + 0.02).all()
    solid = BASE.instances > 0
    blue, white = (b - r > 0.2)[solid].float().mean(), ((r > 0.6) & (b - r < 0.1))[solid].float().mean()
    assert 0.1 < blue < 0.5 and white > 0.3 and (b[~solid] < 0.6).float().mean() > 0.97


def test_a_sketch_knows_lines_but_no_colours():
    scene = Scene((Object("cone", "red", "large"),))
    assert torch.equal(draw("sketch", [scene]), draw("sketch", [replace(scene, objects=(replace(scene.objects[0],
                                                                                                color="cyan"),))]))
    striped = replace(scene, objects=(replace(scene.objects[0], color2="blue", pattern="striped"),))
    assert (draw("sketch", [striped]) < 0).sum() > 1.2 * (draw("sketch", [scene]) < 0).sum()
    grey, lines = levels(draw("sketch")).mean(1), edges_of(BASE)
    assert grey[lines].mean() < 0.5 and grey[~lines].mean() > 0.8


def test_mosaic_tiles_keep_the_colours():
    mean = lambda x: torch.nn.functional.avg_pool2d(levels(x), 16)
    assert (mean(draw("mosaic")) - mean(BASE.rgb)).abs().mean() < 0.12
    assert 0.75 < levels(draw("mosaic")).mean() / levels(BASE.rgb).mean() < 0.95       # dark joints
    wide = render(Scene((Object("cube", "red", "large"),)), (128, 128), STYLES["mosaic"][0], truth=False).rgb
    counts = torch.unique((levels(wide)[0] * 255).round().flatten(1), dim=1, return_counts=True)[1]
    assert counts.sort(descending=True).values[:256].sum() > 0.35 * 128 * 128       # 256 tiles and their parts


def test_a_poster_has_few_tones():
    inner = levels(draw("poster", [Scene((Object("sphere", "red", "large"),))]))[0, :, 2:-2, 2:-2]
    colors, counts = torch.unique((inner * 255).round().flatten(1), dim=1, return_counts=True)
    assert counts.sort(descending=True).values[:7].sum() > 0.85 * counts.sum()
    edge = levels(draw("poster"))[:, :, 0]
    assert torch.allclose(edge, torch.tensor([0.98, 0.94, 0.84])[:, None].expand_as(edge), atol=1e-3)


def test_neon_glows_in_the_dark():
    bright, lines = levels(draw("neon")).amax(1), edges_of(BASE)
    solid = BASE.instances > 0
    assert bright.median() < 0.4 and bright[lines & solid].mean() > 0.75
    red = levels(draw("neon", [Scene((Object("sphere", "red", "large"),))]))[0, :, 34:46, 20:44].flatten(1).mean(1)
    assert red[0] > 1.5 * red[2]
