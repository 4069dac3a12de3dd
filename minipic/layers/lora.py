"""LoRA: W x + s B A x with W frozen and B A of low rank R (arXiv 2106.09685 section 4.1).

s = scale * alpha / R. A LoRA layer takes the place of a Linear or Conv2d and shares its `weight`
and `bias`, so that their names in the state dict stay; it has two more modules, lora_A and lora_B.

Several LoRAs of a layer lie side by side in lora_A and lora_B, as if they were one whose rank is
the sum of theirs. `factor` [R] has one s for each row of A, so that the scale of each LoRA can
change alone, between two pictures.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn

from minipic.common import InputError, ParameterError
from minipic.kernels.casting import CastLinear
from minipic.layers.swap import swap

# The attention projections of the UNet and of the text encoders.
ATTENTION = r".*attn[12]\.to_(q|k|v|out\.0)|.*self_attn\.(q|k|v|out)_proj"


@dataclass
class Scaling:
    """What one LoRA of a layer is multiplied by."""

    rank: int
    alpha: float
    scale: float = 1.0

    @property
    def factor(self) -> float:
        return self.alpha / self.rank * self.scale


class LoRA:
    """What all LoRA layers share: the first base class of each, before Linear or Conv2d."""

    def take_over(self, layer: nn.Module):
        """Share weight and bias with the layer that this one replaces. There is no LoRA yet."""
        self.weight = layer.weight
        self.bias = layer.bias
        self.train(layer.training)
        self.scalings = {}  # {name of a LoRA: its Scaling}, in the order of their ranks
        self.original = None  # while LoRAs are merged: the weight without them

    @property
    def merged(self) -> bool:
        return self.original is not None

    def add(self, name: str, a: torch.Tensor, b: torch.Tensor, alpha: float | None):
        """Add the LoRA A [R,...], B [out,R] under a new name. alpha: R if None."""
        if self.merged:
            raise InputError("its LoRAs are merged; unmerge them before adding one")
        if name in self.scalings:
            raise ParameterError("name", f"there is a LoRA called {name!r} already; give another")
        rank = len(a)
        kernel = self.weight.shape[2:]  # (height, width) of a convolution, () of a Linear
        a = a.reshape(rank, -1, *kernel).to(self.weight.device)
        b = b.reshape(len(b), rank, *[1] * len(kernel)).to(self.weight.device)
        if self.scalings:
            a = torch.cat([self.lora_A.weight, a])
            b = torch.cat([self.lora_B.weight, b], dim=1)
        self.scalings[name] = Scaling(rank, rank if alpha is None else alpha)
        self.lora_A, self.lora_B = self.low_rank_modules(len(a))
        self.lora_A.weight = nn.Parameter(a)
        self.lora_B.weight = nn.Parameter(b)
        self.refresh_factor()

    def low_rank_modules(self, rank: int) -> tuple[nn.Module, nn.Module]:
        """Modules for A and B, without memory. A convolution's A has its kernel and stride."""
        if isinstance(self, nn.Conv2d):
            lora_A = nn.Conv2d(self.in_channels, rank, self.kernel_size, self.stride, self.padding,
                               self.dilation, bias=False, device="meta")
            lora_B = nn.Conv2d(rank, self.out_channels, 1, bias=False, device="meta")
        else:
            lora_A = nn.Linear(self.in_features, rank, bias=False, device="meta")
            lora_B = nn.Linear(rank, self.out_features, bias=False, device="meta")
        return lora_A, lora_B

    def refresh_factor(self):
        """Make `factor` [R] from the scalings: one s for each row of A."""
        factors = []
        for scaling in self.scalings.values():
            factors.append(torch.full((scaling.rank,), scaling.factor))
        factor = torch.cat(factors).to(self.weight.device)
        self.register_buffer("factor", factor, persistent=False)

    def lora(self, x: torch.Tensor) -> torch.Tensor:
        """s B A x, of all LoRAs together, in the type of A and B."""
        dtype = self.lora_A.weight.dtype
        factor = self.factor.to(dtype)
        if isinstance(self, nn.Conv2d):
            factor = factor[:, None, None]  # ranks are channels
        return self.lora_B(self.lora_A(x.to(dtype)) * factor).to(x.dtype)

    def delta(self) -> torch.Tensor:
        """s B A, in the shape and type of `weight`."""
        a = self.lora_A.weight.flatten(1)
        b = self.lora_B.weight.flatten(1)
        return (b * self.factor.to(b) @ a).view_as(self.weight).to(self.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)  # W x + bias, by the class after LoRA: Linear, CastLinear or Conv2d
        if self.merged:
            return y
        return y + self.lora(x)


# The constructors make weights on the meta device, without memory, and `take_over` replaces them.

class LoRALinear(LoRA, nn.Linear):
    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.take_over(layer)


class LoRACastLinear(LoRA, CastLinear):
    def __init__(self, layer: CastLinear):
        super().__init__(layer)
        self.take_over(layer)


class LoRAConv2d(LoRA, nn.Conv2d):
    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride,
                         layer.padding, layer.dilation, layer.groups,
                         padding_mode=layer.padding_mode, device="meta")
        self.take_over(layer)


LAYERS = {nn.Linear: LoRALinear, CastLinear: LoRACastLinear, nn.Conv2d: LoRAConv2d}


def lora_layer(layer: nn.Module) -> nn.Module:
    """The LoRA layer for the place of a Linear or Conv2d; a layer that is one already, itself."""
    return layer if isinstance(layer, LoRA) else LAYERS[type(layer)](layer)


def inject(model: nn.Module, rank: int, alpha: float | None = None, match: str = ATTENTION,
           name: str = "default") -> list[nn.Parameter]:
    """Give every Linear and Conv2d whose path fits the pattern `match` a new LoRA.

    Everything else in the model is frozen. A starts as a Linear's weight does, B at zero, so that
    the output stays what it was, bit for bit. Both are in fp32, whatever type the model has.
    alpha: `rank` if None.
    name: what `set_scale` calls this LoRA.
    Returns the parameters to train. Raises ParameterError if nothing matches, for a rank below 1
    and for a name that is taken.
    """
    if rank < 1:
        raise ParameterError("rank", f"choose 1 or more, not {rank}")

    def matches(path, module):
        return re.fullmatch(match, path) and isinstance(module, tuple(LAYERS))

    def build(path, module):
        a = torch.empty(rank, *module.weight.shape[1:], device=module.weight.device)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        b = a.new_zeros(len(module.weight), rank)
        layer = lora_layer(module)
        layer.add(name, a, b, alpha)
        return layer

    model.requires_grad_(False)
    changed = swap(model, matches, build)
    if not changed:
        network = type(model).__name__
        problem = f"no Linear or Conv2d of this {network} has a path like {match!r}"
        raise ParameterError("match", problem)
    parameters = []
    for layer in changed.values():
        parameters += [layer.lora_A.weight, layer.lora_B.weight]
    return parameters


def add(model: nn.Module, path: str, name: str, a: torch.Tensor, b: torch.Tensor,
        alpha: float | None = None):
    """Add the LoRA A [R,...], B [out,R] called `name` to the Linear or Conv2d at a path.

    alpha: R if None.
    """
    layer = lora_layer(model.get_submodule(path))
    layer.add(name, a, b, alpha)
    model.set_submodule(path, layer)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """{path: LoRA layer} of a model."""
    return {path: module for path, module in model.named_modules() if isinstance(module, LoRA)}


@torch.no_grad()
def set_scale(model: nn.Module, scale: float, name: str = "default"):
    """Change the strength of the LoRA `name`: 1 as trained, 0 off."""
    for layer in layers(model).values():
        if name in layer.scalings:
            layer.scalings[name].scale = scale
            layer.refresh_factor()
            if layer.merged:
                layer.weight.data = layer.original + layer.delta()


@torch.no_grad()
def merge(model: nn.Module):
    """Add every LoRA to its weight: the same pictures at the speed of the model without LoRAs.

    `unmerge` undoes it.
    """
    for layer in layers(model).values():
        if not layer.merged:
            layer.original = layer.weight.data
            layer.weight.data = layer.original + layer.delta()


def unmerge(model: nn.Module):
    """Put back the weights from before `merge`, bit for bit.

    They were kept, because subtracting would round.
    """
    for layer in layers(model).values():
        if layer.merged:
            layer.weight.data = layer.original
            layer.original = None


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """All LoRAs of a model as one, for a file.

    {"PATH.lora_A.weight": [R,...], "PATH.lora_B.weight": [out,R,...], "PATH.alpha": []}. Where
    the ranks of a layer have different factors, these are multiplied into B, and alpha is the rank.
    """
    state = {}
    for path, layer in layers(model).items():
        a = layer.lora_A.weight.detach()
        b = layer.lora_B.weight.detach()
        factor = layer.factor
        rank = len(a)
        if (factor == factor[0]).all():
            alpha = factor[0].cpu() * rank
        else:
            alpha = torch.tensor(float(rank))
            b = (b.flatten(1) * factor.to(b)).view_as(b)
        state[f"{path}.lora_A.weight"] = a
        state[f"{path}.lora_B.weight"] = b
        state[f"{path}.alpha"] = alpha
    return state
