"""Trains the tiny autoencoder on the world's pictures and maps (arXiv 2112.10752 section 3.1).

Loss: squared error of pixels (an absolute one takes small bright objects for noise and learns the
floor first), absolute error of the differences between neighbours, which keeps edges sharp without
a discriminator, and a small Kullback-Leibler term that keeps the latents near a unit Gaussian.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from minipic.common import rng
from minipic.figures import image_grid
from minipic.image import to_pictures
from minipic.models.vae import VAE, VAEConfig
from minipic.training.flags import option
from minipic.training.settings import DATA, LOSS, TrainSettings
from minipic.weights.layouts import save_part
from minipic.world.scene import Render, render, sample_scene

TINY = VAEConfig(
    sample_size=64, block_out_channels=(32, 64, 128), layers_per_block=1, force_upcast=False,
    # Groups of 4 channels and more, as SDXL's: a group of one forgets a picture's colours.
    norm_num_groups=8)
HELD_OUT = 10**6   # number of the first scene that training never reaches
MEASURED = 256     # pictures whose latents give the scaling factor


@dataclass
class Settings(TrainSettings):
    """Train the tiny VAE: 64x64 pictures to 4x16x16 latents and back."""

    steps: int = option(1500)
    batch: int = option(16)
    kl_weight: float = option(
        1e-4, "weight of the Kullback-Leibler term, a mean over latent numbers", group=LOSS)
    edge_weight: float = option(
        0.1, "weight of the differences between neighbouring pixels", group=LOSS)
    maps_share: float = option(
        0.25, "share of depth, normal, segmentation and edge maps", group=DATA)

    MINIMUM = TrainSettings.MINIMUM | {"kl_weight": 0, "edge_weight": 0, "maps_share": 0}


def build(config: Settings) -> VAE:
    vae = VAE(TINY)
    for module in vae.modules():
        # PyTorch's own start shrinks every signal by sqrt(3): it learns 10 times as slowly.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    logvar_bias = vae.quant_conv.bias[TINY.latent_channels:]
    nn.init.constant_(logvar_bias, -6)  # at a log-variance of 0 the noise drowns everything
    return vae


def setup(vae: VAE, config: Settings) -> list[nn.Parameter]:
    return list(vae.parameters())


class RenderData:
    """Batches of renders and of their maps: image [B,3,64,64], and the numbers of the samples."""

    def __init__(self, config: Settings):
        self.config = config

    def batch(self, step: int, indices: list[int]) -> dict:
        scenes = [sample_scene(self.config.seed, index) for index in indices]
        rendered = render(scenes, (64, 64))
        images = []
        for i, index in enumerate(indices):
            generator = rng(self.config.seed, "vary", step, index)
            images.append(vary(rendered, i, self.config.maps_share, generator))
        return {"image": torch.stack(images), "indices": indices}


def data(vae: VAE, config: Settings) -> RenderData:
    return RenderData(config)


def vary(rendered: Render, i: int, maps_share: float, generator: torch.Generator) -> torch.Tensor:
    """Picture i of a render, or one of its maps.

    Some get mixed-up colours, so that every colour can be coded.
    """
    u, kind, mix = torch.rand(3, generator=generator).tolist()
    if u < maps_share:
        maps = maps_of(rendered, i)
        return maps[int(kind * len(maps))]
    image = rendered.rgb[i]
    if mix < 0.25:
        image = image[torch.randperm(3, generator=generator)]
    if mix < 0.08:
        image = -image
    return image


def maps_of(rendered: Render, i: int) -> list[torch.Tensor]:
    """Depth, normals, segmentation and outlines of picture i, each [3,H,W] in [-1,1]."""
    nearness = 1 / rendered.depth[i].clamp(min=2)
    depth = (4 * nearness - 1).clamp(-1, 1).expand(3, -1, -1)
    labels = rendered.instances[i]
    segmentation = torch.stack([((labels + 1) * k % 7) / 3 - 1 for k in (2, 3, 5)])
    labels = labels[None].float()
    largest = F.max_pool2d(labels, 3, 1, 1)
    smallest = -F.max_pool2d(-labels, 3, 1, 1)
    outlines = (largest > smallest).float().mul(2).sub(1).expand(3, -1, -1)
    return [depth, rendered.normals[i], segmentation, outlines]


def loss(vae: VAE, batch: dict, config: Settings) -> tuple[torch.Tensor, dict]:
    x = batch["image"]
    mean, logvar = vae.encode(x)
    noise = []
    for index in batch["indices"]:
        generator = rng(config.seed, "posterior", index)
        noise.append(torch.randn(mean.shape[1:], generator=generator))
    noise = torch.stack(noise).to(mean)
    out = vae.decode(mean + (0.5 * logvar).exp() * noise).float()

    mean = mean.float()
    logvar = logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    pixel = F.mse_loss(out, x)
    edge = F.l1_loss(out.diff(dim=2), x.diff(dim=2)) + F.l1_loss(out.diff(dim=3), x.diff(dim=3))
    psnr = 10 * torch.log10(4 / pixel.detach())  # pictures span [-1,1]: the peak is 2
    total = pixel + config.edge_weight * edge + config.kl_weight * kl
    return total, {"pixel": pixel, "kl": kl, "psnr": psnr}


@torch.no_grad()
def sample(vae: VAE, config: Settings, data: RenderData) -> Image.Image:
    """Eight pictures or maps not trained on, above what the VAE makes of them."""
    x = data.batch(0, range(HELD_OUT, HELD_OUT + 8))["image"].to(next(vae.parameters()).device)
    out = vae.decode(vae.encode(x)[0])
    return image_grid(to_pictures(torch.cat([x, out])), columns=8)


@torch.no_grad()
def export(vae: VAE, folder: Path, config: Settings, data: RenderData):
    """Write the VAE with the scaling factor under which latents have standard deviation 1."""
    pictures = RenderData(replace(config, maps_share=0.0))
    x = pictures.batch(0, range(HELD_OUT, HELD_OUT + MEASURED))["image"]
    device = next(vae.parameters()).device
    latents = torch.cat([vae.encode(part.to(device))[0] for part in x.split(16)])
    vae.config = replace(vae.config, scaling_factor=round(1 / latents.std().item(), 5))
    save_part(vae, folder / "vae", torch.float16)
