"""The judge and the scores: perfect on the truth, at chance on shuffled pairs, equal to formulas where known."""

import json

import pytest
import torch
from torch import nn

from minipic.common import InputError, rng
from minipic.recipes import judge as recipe
from minipic.world import metrics, probe
from minipic.world.camera import Camera, extrinsics, eyes, intrinsics, plucker
from minipic.world.caption import ask, describe, parse
from minipic.world.probe import (
    CELL_HEADS, Judge, JudgeConfig, accuracy, distance, frechet, heads, read)
from minipic.world.scene import FLOORS, SKIES, render, sample_scene

SCENES = [sample_scene(3, i, held_out="any") for i in range(48)]
ASKED = [ask(s, rng(3, "ask", i)) for i, s in enumerate(SCENES)]
DRAWN = render(SCENES)


class Oracle(nn.Module):
    """Says the truth of SCENES in the judge's own form: tests all that follows the network."""

    def forward(self, images):
        cells, setting = torch.zeros(len(images), sum(CELL_HEADS.values()), 16, 16), torch.zeros(len(images), 6)
        cells[:, 0] = -9
        for b, s in enumerate(SCENES):
            t = recipe.truth_of(s)
            for k in range(len(s.objects)):
                shape, size, pattern, color, color2 = t["labels"][k].tolist()
                x, y = t["middle"][k].floor().long().tolist()
                says = torch.zeros(len(cells[0]))
                part = heads(says, CELL_HEADS, 0)                 # views: what is written there is in `says`
                part["object"][:], part["ahead"][:] = 9, t["ahead"][k]
                part["middle"][:] = t["middle"][k] - torch.tensor([x, y]) - 0.5
                part["color"][[color, color2]] = 5
                part["shape"][shape] = part["size"][size] = part["pattern"][pattern] = 5
                cells[b, :, y, x] = says
            setting[b, list(FLOORS).index(s.floor)] = setting[b, 3 + list(SKIES).index(s.sky)] = 5
        return cells, setting


def test_the_truth_read_back_is_right_and_shuffled_captions_are_at_chance():
    seen = read(Oracle(), DRAWN.rgb)
    assert set(accuracy(ASKED, seen).values()) == {1.0}
    assert [d.things for d in seen] != [describe(s).things for s in SCENES]      # the judge finds its own order
    singles = [describe(sample_scene(4, i, objects=1)) for i in range(400)]
    chance = accuracy(singles, singles[1:] + singles[:1])
    for fact, expected in {"shape": 1 / 6, "size": 1 / 3, "place": 1 / 3, "floor": 1 / 3, "sky": 1 / 3}.items():
        assert abs(chance[fact] - expected) < 0.08, fact
    assert 0.05 < chance["color"] < 0.2 and chance["whole"] < 0.02 and chance["count"] == 1


def test_nothing_asked_gives_no_number():
    result = accuracy([parse("a red sphere")], [describe(SCENES[0])])
    assert result["relation"] != result["relation"] and result["color"] in (0.0, 1.0)


@pytest.mark.slow
def test_the_judge_learns_and_is_saved(tmp_path):
    torch.manual_seed(0)
    config = recipe.Settings(steps=60, batch=8, pool=8)
    judge = recipe.build(config)
    assert sum(p.numel() for p in judge.parameters()) < 500_000
    batch = recipe.data(judge, config).batch
    parameters = recipe.setup(judge, config)
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for step in range(60):
        loss, parts = recipe.loss(judge, batch(step, range(8 * step, 8 * step + 8)), config)
        first = loss.item() if step == 0 else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.25 * first
    scenes = [sample_scene(config.seed, i, held_out="any") for i in range(8)]
    images = render(scenes, truth=False).rgb
    right = accuracy([describe(s) for s in scenes], read(judge, images))
    assert right["color"] > 0.6 and right["floor"] > 0.8
    recipe.export(judge, tmp_path, config, None)
    again = probe.load_judge(tmp_path / "judge")
    assert all(torch.equal(a, b) for a, b in zip(judge(images), again(images)))
    (tmp_path / "judge" / "config.json").write_text('{"width": 64, "depth": 80}')
    with pytest.raises(InputError, match="depth"):
        probe.load_judge(tmp_path / "judge")
    for width, problem in ((32, "model.safetensors does not fit config.json"),
                           (60, "model.safetensors does not fit config.json"),  # groups of 8 do not divide it
                           ("64", "width: '64' is of the wrong type")):
        (tmp_path / "judge" / "config.json").write_text(f'{{"width": {json.dumps(width)}, "deep": 80}}')
        with pytest.raises(InputError, match=problem):
            probe.load_judge(tmp_path / "judge")


def test_batches_are_a_pure_function_of_the_sample_numbers():
    config = recipe.Settings(pool=6)
    first, second = recipe.data(None, config).batch, recipe.data(None, config).batch
    second(0, range(3))                                                  # another history
    a, b = first(9, [4, 10, 11]), second(9, [4, 10, 11])
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(a["labels"][0], a["labels"][1]) and not torch.equal(a["image"][0], a["image"][1])


def test_frechet_is_the_formula_for_gaussians():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(20000, 3, generator=g)
    assert abs(frechet(a, a)) < 1e-9
    assert frechet(a, a + torch.tensor([1.0, 2, 0])) == pytest.approx(5, abs=1e-4)
    assert frechet(a, 3 * a) == pytest.approx(3 * 4, rel=0.05)           # per axis (3 - 1)^2
    mixed = a @ torch.tensor([[2.0, 1, 0], [0, 1, 0], [1, 0, 0.5]])
    ca, cb = torch.cov(a.T.double()), torch.cov(mixed.T.double())
    cross = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    off = (a.double() - mixed.double()).mean(0).square().sum()
    assert frechet(a, mixed) == pytest.approx((off + ca.trace() + cb.trace() - 2 * cross).item(), abs=1e-9)
    few = torch.randn(10, 40, generator=g)                               # singular covariances
    assert abs(frechet(few, few)) < 1e-5 < frechet(few, 2 * few)


def test_maps_score_perfectly_on_the_truth_and_badly_on_other_pictures():
    turned = torch.arange(len(SCENES)).roll(1)
    depth, labels = DRAWN.depth, DRAWN.instances
    assert metrics.depth_errors(depth, depth) == {"abs_rel": 0, "delta1": 1}
    assert metrics.depth_errors(1.1 * depth, depth) == {"abs_rel": pytest.approx(0.1, abs=1e-5), "delta1": 1}
    assert metrics.depth_errors(1.3 * depth, depth)["delta1"] == 0
    assert metrics.depth_errors(depth.clamp(max=1e3)[turned], depth)["abs_rel"] > 0.02
    assert metrics.mean_iou(labels, labels) == 1 and metrics.mean_iou(labels[turned], labels) < 0.5
    half = torch.tensor([[1, 1, 0, 0]])
    assert metrics.mean_iou(torch.tensor([[1, 0, 0, 0]]), half) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics.normal_angle(DRAWN.normals, DRAWN.normals) < 0.1
    assert metrics.psnr(DRAWN.rgb, DRAWN.rgb) > 100
    assert metrics.psnr(DRAWN.rgb, DRAWN.rgb + 0.2) == pytest.approx(20, abs=1e-3)
    edge = torch.zeros(1, 8, 8, dtype=torch.bool)
    edge[0, 3, 2:6] = True
    assert metrics.edge_f1(edge, edge) == metrics.edge_f1(edge.roll(1, 1), edge) == 1
    assert metrics.edge_f1(edge.roll(3, 1), edge) == metrics.edge_f1(edge & False, edge) == 0


def test_camera_centres_come_back_from_their_rays():
    cameras = [Camera(azimuth, 30, 6.5) for azimuth in (-60, 0, 45)]
    rays, truth = plucker(extrinsics(cameras), intrinsics((16, 16)), (16, 16)), eyes(extrinsics(cameras))
    found = metrics.camera_from_plucker(2 * rays)
    assert (found - truth).norm(dim=1).max() < 1e-4
    assert metrics.camera_accuracy(found, truth, 6.5) == {"within_10%": 1, "within_30%": 1}
    assert metrics.camera_accuracy(found.roll(1, 0), truth, 6.5) == {"within_10%": 0, "within_30%": 0}
    off = truth + torch.tensor([0.2 * 6.5, 0, 0])
    assert metrics.camera_accuracy(off, truth, 6.5) == {"within_10%": 0, "within_30%": 1}


def test_identity_and_style_distances_are_zero_on_themselves_and_order_pairs():
    torch.manual_seed(0)
    judge = Judge(JudgeConfig(width=16, deep=16))
    images = DRAWN.rgb[:6]
    middles = torch.stack([recipe.truth_of(s)["middle"][0] * probe.CELL for s in SCENES[:6]])
    for embed in (lambda x: probe.embed_objects(judge, x, middles), lambda x: probe.embed_style(judge, x),
                  lambda x: probe.embed(judge, x)):
        a = embed(images)
        assert distance(a, a).abs().max() < 1e-6
        near, far = distance(a, embed(images * 0.98)).mean(), distance(a, embed(-images)).mean()
        assert near < 0.2 * far
