"""Guidance at its limits and against the formulas of its papers."""

import pytest
import torch

from minipic.diffusion.guidance import combine, rescale


@pytest.fixture
def predictions():
    return torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_limits(predictions):
    uncond, cond, _ = predictions
    assert torch.equal(combine(uncond, [(0.0, cond)]), uncond)
    assert torch.equal(combine(uncond, []), uncond)
    torch.testing.assert_close(combine(uncond, [(1.0, cond)]), cond, rtol=0, atol=1e-15)


def test_classifier_free_guidance(predictions):
    uncond, cond, _ = predictions
    torch.testing.assert_close(combine(uncond, [(7.5, cond)]), 7.5 * cond - 6.5 * uncond)


def test_two_conditions_add_up(predictions):
    uncond, a, b = predictions
    torch.testing.assert_close(combine(uncond, [(2.0, a), (3.0, b)]), 2 * a + 3 * b - 4 * uncond)
    torch.testing.assert_close(combine(uncond, [(2.0, a), (3.0, a)]), combine(uncond, [(5.0, a)]))


def test_a_weight_may_vary_over_the_picture(predictions):
    uncond, cond, _ = predictions
    weight = torch.zeros(8, 8).double()
    weight[:, 4:] = 3
    guided = combine(uncond, [(weight, cond)])
    assert torch.equal(guided[..., :4], uncond[..., :4])
    torch.testing.assert_close(guided[..., 4:], combine(uncond, [(3.0, cond)])[..., 4:])


def test_rescale_moves_the_standard_deviation(predictions):
    uncond, cond, _ = predictions
    guided = combine(uncond, [(7.5, cond)])
    assert torch.equal(rescale(guided, cond, 0.0), guided)
    full, part = rescale(guided, cond, 1.0), rescale(guided, cond, 0.7)
    for i in range(2):  # per sample
        assert guided[i].std() > 5 * cond[i].std()
        torch.testing.assert_close(full[i].std(), cond[i].std())
        torch.testing.assert_close(part[i].std(), 0.7 * cond[i].std() + 0.3 * guided[i].std())


def test_rescale_equals_diffusers(predictions):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    uncond, cond, _ = predictions
    guided = combine(uncond, [(7.5, cond)])
    torch.testing.assert_close(rescale(guided, cond, 0.7), rescale_noise_cfg(guided, cond, guidance_rescale=0.7))
