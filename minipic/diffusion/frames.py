"""Drawing sequences of frames, each with a noise level of its own, of which some are given.

OneDiffusion (arXiv 2411.16318), in the direction of its released code: flow matching from noise, at
timestep 1000, to data, at 0. `predict` and `network` are whatever predicts the velocity.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from minipic.diffusion.guidance import combine
from minipic.diffusion.samplers import SAMPLERS
from minipic.diffusion.schedule import Grid, Schedule

SCHEDULE = Schedule(prediction_type="flow", class_name="FlowMatchEulerDiscreteScheduler")


def dynamic_shift(tokens: int) -> float:
    """The shift of the noise levels with which the released model draws this many tokens."""
    share = (tokens - 256) / (4096 - 256)
    return math.exp(0.5 + share * (1.15 - 0.5))


def flow_grid(steps: int, shift: float = 1.0) -> Grid:
    """The noise levels of a drawing."""
    return replace(SCHEDULE, shift=shift).grid(steps)


def sample_frames(
        predict: Callable, x: torch.Tensor, is_drawn: torch.Tensor, grid: Grid,
        label: str = "last") -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Draw some frames and keep the others -> (x, x0), each [B,F,C,h,w], after every step.

    predict(x, t): the velocity, see `guided`. x: noise where is_drawn [F] is true, else clean.
    label: the timestep that kept frames are said to be at: "last" of the grid, or "zero".

    With the released weights, T5's states and the SD3 VAE's latents z = 1.5305 * sample:
        network = load_part(open_part(folder / "transformer", "transformer"), torch.bfloat16)
        ids = T5Tokenizer.from_pretrained(folder / "tokenizer")(
            ["", "[[depth2image]] a cat"], padding="max_length", max_length=300,
            return_tensors="pt")
        text = T5EncoderModel.from_pretrained(folder / "text_encoder")(**ids)[0].bfloat16()
        predict = guided(network, text[1:], ids.attention_mask[1:], text[:1],
                         ids.attention_mask[:1], 4.0)
        grid = flow_grid(50, dynamic_shift(256))  # tokens of the frames that are drawn
        for x, x0 in sample_frames(predict, x, torch.tensor([True, False]), grid):
    """
    given = x
    drawn = is_drawn.to(x.device)[:, None, None, None]
    given_t = grid.timesteps[-1] if label == "last" else torch.zeros(())

    def predict_frames(x, t):
        t = torch.where(drawn.flatten(), t.to(x.device), given_t.to(x.device))
        return predict(x, t.expand(x.shape[:2]))

    denoise = SCHEDULE.objective.denoiser(predict_frames, grid)
    for x, x0 in SAMPLERS["flow_euler"](denoise, x, grid.sigmas):
        x.copy_(torch.where(drawn, x, given))
        yield x, torch.where(drawn, x0, given)


def guided(
        network: Callable, text: torch.Tensor, mask: torch.Tensor, no_text: torch.Tensor,
        no_mask: torch.Tensor, guidance: float) -> Callable:
    """predict(x, t) with guidance by the text alone: both predictions see the same given frames.

    text [1,M,D] or [B,M,D] of the prompt, no_text [1,M,D] of the negative one or of "", and their
    masks.
    """
    def predict(x, t):
        n = len(x)
        inputs = x.to(text.dtype)
        texts = text.expand(n, -1, -1)
        masks = mask.expand(n, -1)
        if guidance > 1:
            inputs = torch.cat([inputs, inputs])
            t = torch.cat([t, t])
            texts = torch.cat([no_text.expand(n, -1, -1), texts])
            masks = torch.cat([no_mask.expand(n, -1), masks])
        velocity = network(inputs, t, texts, masks).to(x.dtype)
        if guidance <= 1:
            return velocity
        without, with_text = velocity.chunk(2)
        return combine(without, [(guidance, with_text)])

    return predict
