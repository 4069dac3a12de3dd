"""A UNet without text: attention to the text becomes a constant (arXiv 2312.08195, its code).

    vectors = capture(unet, run)                    # what the null text adds in each block
    null_text_unet = NullTextUNet(unet, vectors)    # takes a UNet of its own, and changes it
    null_text_unet(x, t)

What is taken out are the projections of that attention and the norm before it: 5 % of the weights
of SD 1.5, 21 % of SDXL's. papers/indomain.py trains what is left.
"""

from collections.abc import Callable

import torch
from torch import nn

from minipic.layers import lora
from minipic.layers.blocks import add_norm, layer_norm
from minipic.layers.swap import swap


class NullText(nn.Module):
    """Attention to the null text: the same vector [1,1,D] for every token. It is not trained."""

    def __init__(self, vector: torch.Tensor):
        super().__init__()
        self.register_buffer("null_text_feature", vector)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.null_text_feature.to(x.dtype).expand_as(x)


class NullTextBlock(nn.Module):
    """A UNet's TransformerBlock without text. norm2 has no use: nothing reads what it makes."""

    def __init__(self, block: nn.Module, vector: torch.Tensor):
        super().__init__()
        self.norm1 = block.norm1
        self.attn1 = block.attn1
        self.attn2 = NullText(vector)
        self.norm3 = block.norm3
        self.ff = block.ff

    def forward(self, x: torch.Tensor, context: None = None) -> torch.Tensor:
        x = x + self.attn1(layer_norm(x, self.norm1))
        x, normed = add_norm(x, self.attn2(x), self.norm3)
        return x + self.ff(normed)


class NullTextUNet(nn.Module):
    """A UNet that reads no text: x [B,4,h,w], t -> prediction like x.

    unet: it is changed; give one that nothing else needs.
    vectors: {path of a transformer block: what attention to the text adds there [1,1,D]}.
    pooled [1,D], size_ids [1,6]: what SDXL's has in the place of pooled text and sizes.
    """

    def __init__(
            self, unet: nn.Module, vectors: dict[str, torch.Tensor],
            pooled: torch.Tensor | None = None, size_ids: torch.Tensor | None = None):
        super().__init__()

        def build_block(path, block):
            return NullTextBlock(block, vectors[path])

        swap(unet, reads_text, build_block)
        self.unet = unet
        self.register_buffer("pooled", pooled)
        self.register_buffer("size_ids", size_ids)

    def forward(
            self, x: torch.Tensor, t: torch.Tensor | float, context: None = None,
            pooled: None = None, size_ids: None = None,
            residuals: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Called as a UNet is, but what it would read of a text is left out."""
        if self.pooled is not None:
            pooled = self.pooled.expand(len(x), -1)
            size_ids = self.size_ids.expand(len(x), -1)
        return self.unet(x, t, None, pooled, size_ids, residuals)

    def own_state_dict(self) -> dict[str, torch.Tensor]:
        """The constants, and the LoRA if there is one, else all weights, for a file."""
        state = self.state_dict()
        if not lora.layers(self):
            return state
        constants = dict(self.named_buffers())
        own = {}
        for name, tensor in state.items():
            if name in constants or ".lora_" in name:
                own[name] = tensor
        return own


def reads_text(path: str, module: nn.Module) -> bool:
    """Whether a module of a UNet is a transformer block. attn2 is its attention to the text."""
    return hasattr(module, "attn2")


def zero_text_vectors(unet: nn.Module) -> dict[str, torch.Tensor]:
    """What each block's attention to a text of zeros gives: {path: [1,1,D]}.

    All values are zero, so that it is exactly the bias of its last layer.
    """
    vectors = {}
    for path, module in unet.named_modules():
        if reads_text(path, module):
            vectors[path] = module.attn2.to_out[0].bias.detach().float()[None, None]
    return vectors


def capture(unet: nn.Module, run: Callable) -> dict[str, torch.Tensor]:
    """What each block's attention to the text gives while run() uses the UNet: {path: [1,1,D]}.

    It is the mean over pictures, tokens and calls.
    """
    means = {}
    hooks = []
    for path, module in unet.named_modules():
        if not reads_text(path, module):
            continue
        means[path] = []

        def keep_mean(attention, inputs, output, means=means[path]):
            means.append(output.float().mean((0, 1), keepdim=True))

        hooks.append(module.attn2.register_forward_hook(keep_mean))
    run()
    for hook in hooks:
        hook.remove()
    return {path: torch.stack(of_calls).mean(0) for path, of_calls in means.items()}
