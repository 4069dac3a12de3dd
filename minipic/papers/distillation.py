"""Text to 3-D: score distillation (DreamFusion, arXiv 2209.14988) into a small grid of voxels.

A picture of the grid is noised, a network removes the noise again, and the grid changes so that its
picture comes nearer to that. Views come from the world's own camera. Whatever a drawing follows,
several guidances for example, the grid follows too.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from minipic.common import rng
from minipic.image import to_pictures
from minipic.pipeline import Pipeline
from minipic.world.camera import Camera, directions, extrinsics, eyes, intrinsics

CELLS = 32  # of the grid along each side
CENTRE = (0.0, 1.1, 0.0)  # of the grid, in world units: it stands on the floor
HALF = (1.7, 1.1, 1.7)  # half its sides
NEAR, FAR, SAMPLES = 4.0, 9.2, 48  # on a ray: depths between which it is looked at, and how often
ELEVATIONS = (15.0, 40.0)  # degrees, of the views that are learned from
ABSORPTION = 4.0  # of light, per density and world unit
NOISE = (0.02, 0.98)  # the timesteps that are drawn, as shares of all
LEARNING_RATE = 0.05
EMPTINESS = 0.02  # weight of the grid's mean opacity in the loss, against fog


class Voxels(nn.Module):
    """Density and colour in a box on a floor under a sky, whose colours are learned too."""

    def __init__(self):
        super().__init__()
        steps = torch.linspace(-1, 1, CELLS)
        z, y, x = torch.meshgrid(steps, steps, steps, indexing="ij")
        ball = 3 - 8 * (x**2 + y**2 + z**2).sqrt()  # to begin with
        self.density = nn.Parameter(ball[None, None])
        self.color = nn.Parameter(torch.zeros(1, 3, CELLS, CELLS, CELLS))
        self.floor = nn.Parameter(torch.zeros(3))
        self.sky = nn.Parameter(torch.full((3,), 0.5))

    def forward(
            self, cameras: list[Camera],
            size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        """size: (height, width) -> (images [B,3,H,W] in [-1,1], opacity [B,H,W] in 0..1)."""
        extrinsic = extrinsics(cameras)
        toward = directions(extrinsic, intrinsics(size), size)  # [B,3,H,W]
        eye = eyes(extrinsic)[:, None, None, None]
        depths = torch.linspace(NEAR, FAR, SAMPLES)
        points = eye + depths[:, None, None, None] * toward.permute(0, 2, 3, 1)[:, None]
        inside = (points - torch.tensor(CENTRE)) / torch.tensor(HALF)  # [B,S,H,W,3] in -1..1

        # In a box of -1..1 the grid is read between its cells, and outside there is nothing.
        grid = torch.cat([F.softplus(self.density), self.color.sigmoid()], dim=1)
        grid = grid.expand(len(cameras), -1, -1, -1, -1)
        density, color = F.grid_sample(grid, inside, align_corners=True).split([1, 3], dim=1)

        # How much light each sample takes away, and how much reaches it (NeRF, 2003.08934, eq. 3).
        length = (FAR - NEAR) / SAMPLES
        alpha = 1 - torch.exp(-ABSORPTION * density * length)
        passed = torch.cumprod(1 - alpha, dim=2)
        reaching = torch.cat([torch.ones_like(passed[:, :, :1]), passed[:, :, :-1]], dim=2)
        seen = (alpha * reaching * color).sum(2)
        is_floor = toward[:, 1:2] < 0
        behind = torch.where(
            is_floor, self.floor.sigmoid()[:, None, None], self.sky.sigmoid()[:, None, None])
        return 2 * (seen + passed[:, :, -1] * behind) - 1, 1 - passed[:, 0, -1]


def distill(
        pipeline: Pipeline, network: Callable, size: tuple[int, int], steps: int, seed: int,
        on_step: Callable | None = None) -> Voxels:
    """Learn voxels whose pictures the network finds likely.

    network: as for Pipeline.denoise, of one row. size: (height, width) of a view.
    on_step(x, x0): after every tenth step.

    Score distillation's gradient is a weight times (predicted - added noise). Both lead from the
    same x to clean data: it is the view's x0 minus the predicted x0, over sigma. Here the weight is
    sigma, which makes it the gradient of half a squared distance.
    """
    schedule = pipeline.schedule
    objective = schedule.objective
    field = Voxels()
    optimizer = torch.optim.Adam(field.parameters(), LEARNING_RATE)
    for step in range(steps):
        generator = rng(seed, "view", step)
        azimuth, height, share = torch.rand(3, generator=generator).tolist()
        low, high = ELEVATIONS
        camera = Camera(360 * azimuth, low + (high - low) * height)
        least, most = NOISE
        t = torch.tensor((least + (most - least) * share) * schedule.num_train_timesteps)

        with torch.enable_grad():
            image, opacity = field([camera], size)
            mean, _ = pipeline.encode_moments(image[0])
            x0 = pipeline.vae.scale(mean)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        sigma = schedule.sigma(t).to(x0)
        x = objective.add_noise(x0.detach(), noise, sigma)
        seen = objective.network_input(x, sigma).to(next(pipeline.unet.parameters()).dtype)
        prediction = network(seen, t.to(x0.device), None, None, None, None)
        target = objective.to_x0(x, sigma, prediction)

        with torch.enable_grad():
            loss = F.mse_loss(x0, target) + EMPTINESS * opacity.mean().to(x0.device)
            optimizer.zero_grad()
            loss.backward(inputs=list(field.parameters()))  # not the VAE's
        optimizer.step()
        if on_step is not None and step % 10 == 9:
            on_step(x, target)
    return field


@torch.no_grad()
def turntable(field: Voxels, size: tuple[int, int], views: int = 8) -> Image.Image:
    """Views from all around, side by side. size: (height, width) of each."""
    cameras = [Camera(360 * i / views) for i in range(views)]
    images, _ = field(cameras, size)
    strip = torch.cat(list(images), dim=2)
    return to_pictures(strip[None].clamp(-1, 1))[0]
