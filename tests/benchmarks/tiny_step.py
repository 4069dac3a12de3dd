"""A training step of the tiny UNet, whose kernels are so small that their start is what takes time.

    python tests/benchmarks/tiny_step.py [--batch 64 512] [--rounds 30]

"as trained": forward in bf16, backward, clipped gradients, fused AdamW and the weight average, as
train.py does it. On a GPU also "compiled": the same with torch.compile of the UNet; and "graph":
forward, backward, clipping and AdamW recorded as one CUDA graph (PyTorch's notes on CUDA, section
"Whole-network capture"), which is started with one call. Latents and text are at hand: data takes
no time here. Prints samples a second, and the share of the rate of a large matrix product. Writes
tiny_step.json beside, on a GPU tiny_step-gpu.json.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from side_by_side import DEVICE, GPU, Case, compare, flops, record_here, unet_inputs

from minipic.models.unet import UNet
from minipic.training.optimizer import EMA, build_optimizer, clip_gradients
from minipic.training.settings import TrainSettings

CASE = Case("tiny", 64, "fp32")
CONFIG = TrainSettings(lr=1e-3, max_grad_norm=0.5, ema=0.999)


class Trainer:
    """A UNet of its own, its optimizer and average, and a batch that stays in its place."""

    def __init__(self, batch: int, compiles: bool = False, capturable: bool = False):
        torch.manual_seed(0)
        self.unet = CASE.network("unet").train()
        self.network = torch.compile(self.unet) if compiles else self.unet
        self.params = dict(self.unet.named_parameters())
        self.optimizer = build_optimizer(self.params, CONFIG, {})
        if capturable:
            for group in self.optimizer.param_groups:
                group["capturable"] = True
                group["lr"] = torch.tensor(CONFIG.lr, device=DEVICE)
        self.ema = EMA(self.params, CONFIG.ema)
        self.inputs = unet_inputs(self.unet, CASE, batch)
        self.target = torch.randn_like(self.inputs["x"])

    def compute(self) -> torch.Tensor:
        """All of a step but the average: what can be one graph. Returns the loss."""
        # Without the cache: what it keeps of the weights would be of no use to a later step.
        with torch.autocast(DEVICE, torch.bfloat16, cache_enabled=False):
            predicted = self.network(**self.inputs)
        loss = F.mse_loss(predicted.float(), self.target)
        loss.backward()
        clip_gradients(self.params, CONFIG.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def step(self) -> torch.Tensor:
        loss = self.compute()
        self.ema.update(1000)
        return loss


def graphed(batch: int) -> Callable[[], torch.Tensor]:
    """A step whose `compute` is one CUDA graph."""
    trainer = Trainer(batch, capturable=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is made at the first steps must not be in the graph
        for _ in range(3):
            trainer.compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = trainer.compute()

    def step():
        graph.replay()
        trainer.ema.update(1000)
        return loss

    return step


def forward_and_backward(unet: UNet, batch: int):
    """What the count of operations is of."""
    inputs = {name: value.to("meta") for name, value in unet_inputs(unet, CASE, batch).items()}
    unet(**inputs).sum().backward()


def run(batch: int, rounds: int) -> dict:
    works = {"as trained": Trainer(batch).step}
    if GPU:
        works["compiled"] = Trainer(batch, compiles=True).step
        works["graph"] = graphed(batch)
    first = works["as trained"]().item()
    for _ in range(20):
        last = works["as trained"]().item()
    assert last < first, f"the loss went from {first} to {last}: this step learns nothing"
    if GPU:  # three steps of warming, one when it is recorded: far fewer than those above
        assert works["graph"]().item() < first, "the graph learns nothing"
    count = flops(CASE.network("unet"), lambda unet: forward_and_backward(unet, batch))
    rows = compare(f"training step, batch {batch}", works, count, "bf16", rounds)
    for row in rows.values():
        row["samples a second"] = 1e3 * batch / row["ms"]
        print(f"    {row['samples a second']:.0f} samples a second")
    return rows


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 512] if GPU else [16])
    parser.add_argument("--rounds", type=int, default=30 if GPU else 5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = {f"batch {batch}": run(batch, options.rounds) for batch in options.batch}
    print(record_here("tiny_step", results, rounds=options.rounds))


if __name__ == "__main__":
    main()
