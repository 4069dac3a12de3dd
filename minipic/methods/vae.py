"""Trains the tiny autoencoder on the world's pictures and ground-truth maps (arXiv 2112.10752 section 3.1).

Loss: squared error of pixels (an absolute one takes small bright objects for noise and learns the floor first),
absolute error of the differences between neighbours, which keeps edges sharp without a discriminator, and a small
Kullback-Leibler term that keeps the latents near a unit Gaussian.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from minipic.common import option, random
from minipic.image import labelled_grid, to_pictures
from minipic.layouts import save_part
from minipic.models.vae import VAE, VAEConfig
from minipic.training import Recipe as Base
from minipic.world.scene import render, sample_scene

TINY = VAEConfig(sample_size=64, block_out_channels=(32, 64, 128), layers_per_block=1, force_upcast=False,
                 norm_num_groups=8)  # of 4 channels and more, as SDXL's: a group of one forgets a picture's colours
MEASURED = 256  # pictures whose latents give the scaling factor


@dataclass
class Recipe(Base):
    """Train the tiny VAE: 64x64 pictures to 4x16x16 latents and back."""

    steps: int = option(1500, "optimizer steps in all")
    batch: int = option(16, "pictures a step")
    kl_weight: float = option(1e-4, "weight of the Kullback-Leibler term, a mean over latent numbers")
    edge_weight: float = option(0.1, "weight of the differences between neighbouring pixels")
    maps_share: float = option(0.25, "share of depth, normal, segmentation and edge maps among the pictures")

    LEAST = Base.LEAST | {"kl_weight": 0, "edge_weight": 0, "maps_share": 0}


def build(config):
    vae = VAE(TINY)
    for module in vae.modules():  # PyTorch's own start shrinks every signal by sqrt(3): it learns ten times slower
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    nn.init.constant_(vae.quant_conv.bias[TINY.latent_channels:], -6)  # a log-variance: at 0 the noise drowns all
    return vae


def setup(vae, config):
    return list(vae.parameters())


def data(vae, config):
    def batch(step, indices):
        scenes = [sample_scene(config.seed, index) for index in indices]
        drawn = render(scenes, (64, 64))
        return {"image": torch.stack([
            vary(drawn, i, config.maps_share, random(config.seed, "vary", step, index))
            for i, index in enumerate(indices)]), "indices": indices}
    return batch


def vary(drawn, i, maps_share, generator):
    """Picture i of a Render, or one of its maps; some with mixed-up colours, so that every colour can be coded."""
    u, kind, mix = torch.rand(3, generator=generator).tolist()
    if u < maps_share:
        choices = maps(drawn, i)
        return choices[int(kind * len(choices))]
    image = drawn.rgb[i]
    if mix < 0.25:
        image = image[torch.randperm(3, generator=generator)]
        image = -image if mix < 0.08 else image
    return image


def maps(drawn, i):
    """Picture i's depth, normals, segmentation and outlines as pictures, so that the latents can carry them too."""
    near = 1 / drawn.depth[i].clamp(min=2)
    labels = drawn.instances[i]
    palette = torch.stack([((labels + 1) * k % 7) / 3 - 1 for k in (2, 3, 5)])
    edge = F.max_pool2d(labels[None].float(), 3, 1, 1) + F.max_pool2d(-labels[None].float(), 3, 1, 1)
    return [(4 * near - 1).clamp(-1, 1).expand(3, -1, -1), drawn.normals[i], palette,
            (edge > 0).float().mul(2).sub(1).expand(3, -1, -1)]


def loss(vae, batch, config):
    x = batch["image"]
    mean, logvar = vae.encode(x)
    noise = torch.stack([torch.randn(mean.shape[1:], generator=random(config.seed, "posterior", index))
                         for index in batch["indices"]]).to(mean)
    out = vae.decode(mean + (0.5 * logvar).exp() * noise).float()
    kl = 0.5 * (mean.float() ** 2 + logvar.float().exp() - 1 - logvar.float()).mean()
    pixel = F.mse_loss(out, x)
    edge = sum(F.l1_loss(out.diff(dim=d), x.diff(dim=d)) for d in (2, 3))
    psnr = 10 * torch.log10(4 / pixel.detach())  # pictures span [-1,1]: peak 2
    return pixel + config.edge_weight * edge + config.kl_weight * kl, {"pixel": pixel, "kl": kl, "psnr": psnr}


@torch.no_grad()
def sample(vae, config):
    x = data(vae, config)(0, range(10**6, 10**6 + 8))["image"].to(next(vae.parameters()).device)
    out = vae.decode(vae.encode(x)[0])
    return labelled_grid(to_pictures(torch.cat([x, out])), columns=8)


@torch.no_grad()
def export(vae, folder, config):
    """Write the VAE with the scaling factor under which latents have standard deviation 1."""
    x = data(vae, replace(config, maps_share=0.0))(0, range(10**6, 10**6 + MEASURED))["image"]
    device = next(vae.parameters()).device
    std = torch.cat([vae.encode(part.to(device))[0] for part in x.split(16)]).std().item()
    vae.config = replace(vae.config, scaling_factor=round(1 / std, 5))
    save_part(vae, folder / "vae", torch.float16)
