'''# A3: the UNet's blocks and attention

The UNet of SDXL looks large, but it is made of a few blocks that repeat. A residual block sees its
neighbourhood of pixels and the noise level. A spatial transformer lets every pixel look at every
other one, and at the words of the prompt. Here you write the parts of both, from the sinusoids that
tell the noise level to the layer where the text comes in.

Shapes are written in brackets: B pictures, C channels, H x W pixels, N tokens of width D, M keys, h
heads, d numbers a head. Read "Attention Is All You Need" (arXiv 1706.03762), sections 3.2 and 3.5,
and section 3.3 of "High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv
2112.10752).
'''

from unittest import mock

import torch
import torch.nn as nn

from coursework.checks import BreakIt, Case, Exercise, Prediction, Random, draw
from coursework.source import resolve
from minipic.layers import attention, blocks
from minipic.models import unet

PROMPT = "a small blue cone on a pink floor"


# ---- inputs --------------------------------------------------------------------------------------


def embedding_cases(random):
    for name, t, width in (
        ("one timestep", random.uniform(0, 1000, 1), 2),
        ("three timesteps", random.uniform(0, 1000, 3), 10),
        ("whole numbers", random.integers(1000, 4), 6),
        ("numbers of 64 bits", random.uniform(0, 1000, 5).double(), 4),
    ):
        yield Case(name, unet.timestep_embedding, t, width)


def embedding_identities(random):
    found = unet.timestep_embedding(torch.zeros(2), 8)
    yield "at 0 all cosines are 1 and all sines 0", found, torch.tensor([[1.0] * 4 + [0.0] * 4] * 2)
    t = random.uniform(0, 1000, 5)
    cosines, sines = unet.timestep_embedding(t, 12).chunk(2, dim=1)
    yield "cos^2 + sin^2 is 1", cosines**2 + sines**2, torch.ones(5, 6), 1e-5
    yield "the first angle is t itself", cosines[:, 0], t.cos(), 1e-5


def future_cases(random):
    for name, shape, first in (
        ("two queries", (2, 3), 0),
        ("a square", (2, 4, 5, 5), 0),
        ("a chunk", (2, 3, 8), 4),
        ("more queries than keys", (1, 6, 2), 0),
    ):
        yield Case(name, attention.hide_future, random.normal(*shape), first)
    yield Case("without first_query", attention.hide_future, random.normal(3, 4, 4))


def future_identities(random):
    weights = attention.hide_future(random.normal(3, 6, 6)).softmax(-1)
    yield "the first query sees the first key only", weights[:, 0, 0], torch.ones(3)
    yield "no query sees a later key", weights.triu(1), torch.zeros(3, 6, 6)


def softmax_cases(random):
    yield Case("no mask", attention.masked_softmax, random.normal(2, 3, 4), None)
    mask = random.uniform(0, 1, 3, 1, 5) > 0.5
    mask[0] = False
    mask[1, :, 1:] = False
    mask[1, :, 0] = True
    yield Case(
        "one row sees nothing, one sees one key",
        attention.masked_softmax,
        random.normal(3, 2, 5),
        mask,
    )
    yield Case(
        "one mask for all",
        attention.masked_softmax,
        40 * random.normal(2, 3, 4),
        torch.arange(4) < 3,
    )


def softmax_identities(random):
    mask = torch.tensor([True, False, True, True])
    weights = attention.masked_softmax(random.normal(5, 4), mask)
    yield "weights add up to 1", weights.sum(-1), torch.ones(5), 1e-6
    nothing = attention.masked_softmax(random.normal(2, 3), torch.zeros(3).bool())
    yield "where no key is seen, all weights are 0", nothing, torch.zeros(2, 3)


def attention_cases(random):
    layer = random.fill(attention.Attention(6, 10, heads=2, head_dim=4))
    yield Case(
        "to a context",
        attention.Attention.forward,
        layer,
        random.normal(3, 5, 6),
        random.normal(3, 7, 10),
    )
    layer = random.fill(attention.Attention(6, 6, heads=3, head_dim=2, qkv_bias=True))
    yield Case(
        "to a context as wide as x", attention.Attention.forward, layer, *random.normal(2, 2, 4, 6)
    )
    yield Case("to itself", attention.Attention.forward, layer, random.normal(2, 5, 6))
    k, v = random.normal(2, 2, 4, 3, 2)
    yield Case("keys and values are given", with_keys_values, layer, random.normal(2, 5, 6), k, v)


def with_keys_values(layer, x, k, v):
    return layer(x, attention.TextKeysValues({layer: (k, v)}))


def attention_identities(random):
    layer = random.fill(attention.Attention(6, 8, heads=2, head_dim=4))
    x = random.normal(2, 5, 6)
    context = random.normal(2, 7, 8)
    order = torch.randperm(7, generator=random.generator)
    yield "the order of the keys does not matter", layer(x, context[:, order]), layer(
        x, context
    ), 1e-5
    same = layer(x, context[:, :1].expand(-1, 7, -1))
    yield "equal keys count as one", same, layer(x, context[:, :1]), 1e-5


def resnet_cases(random):
    for name, inputs, outputs, shape in (
        ("as many channels", 4, 4, (1, 4, 3, 5)),
        ("more channels", 4, 6, (2, 4, 5, 3)),
    ):
        block = random.fill(blocks.ResnetBlock(inputs, outputs, groups=2, eps=1e-5, temb_width=7))
        yield Case(
            name,
            blocks.ResnetBlock.forward,
            block,
            random.normal(*shape),
            random.normal(shape[0], 7),
        )
    block = random.fill(blocks.ResnetBlock(6, 4, groups=2, eps=1e-3))
    yield Case("without temb", blocks.ResnetBlock.forward, block, random.normal(3, 6, 2, 4))


def resnet_identities(random):
    block = random.fill(blocks.ResnetBlock(4, 4, groups=2, eps=1e-5, temb_width=3))
    block.conv2.weight.data.zero_()
    block.conv2.bias.data.zero_()
    x = random.normal(2, 4, 3, 3)
    yield "when the last convolution is zero, x goes through", block(x, random.normal(2, 3)), x


class Stub(nn.Module):
    """In the place of a transformer block: mixes tokens and text in a way that is easy to
    follow."""

    def forward(self, x, context):
        rows = torch.arange(1.0, x.shape[1] + 1).to(x)[:, None]
        return x * rows.sqrt() + context.mean(1, keepdim=True)


def transformer_cases(random):
    for linear, shape in ((True, (2, 4, 3, 5)), (False, (1, 4, 5, 2))):
        config = unet.UNetConfig(
            block_out_channels=(4, 4, 4),
            norm_num_groups=2,
            attention_head_dim=2,
            cross_attention_dim=4,
            use_linear_projection=linear,
        )
        layer = random.fill(unet.SpatialTransformer(4, 0, 2, config))
        layer.transformer_blocks = nn.ModuleList([Stub(), Stub()])
        name = "projects tokens" if linear else "projects pixels"
        yield Case(
            name,
            unet.SpatialTransformer.forward,
            layer,
            random.normal(*shape),
            random.normal(shape[0], 6, 4),
        )


def transformer_identities(random):
    config = unet.UNetConfig(
        block_out_channels=(4, 4, 4), norm_num_groups=2, attention_head_dim=2, cross_attention_dim=4
    )
    layer = random.fill(unet.SpatialTransformer(4, 0, 2, config))
    layer.proj_out.weight.data.zero_()
    layer.proj_out.bias.data.zero_()
    x = random.normal(2, 4, 3, 5)
    yield "when the last projection is zero, x goes through", layer(x, random.normal(2, 6, 4)), x


# ---- the tiny model ------------------------------------------------------------------------------


def picture():
    """a small blue cone on a pink floor, 8 steps"""
    return draw(PROMPT, steps=8, guidance=4.0, seed=1)


def naive_picture():
    """the same, with attention computed by the formula"""
    with mock.patch.object(attention, "choose_backend", return_value="naive"):
        return draw(PROMPT, steps=8, guidance=4.0, seed=1)


def scores_of_sdxl():
    """q k^T of one self-attention at SDXL's second level, for the two predictions of guidance."""
    heads = unet.SDXL_BASE.attention_head_dim[1]
    side = 1024 // 8 // 2
    return 2 * heads * side**2 * side**2


# ---- attention of your own -----------------------------------------------------------------------


def windowed(*arguments):
    return resolve("answers.a3:windowed_attention")(*arguments)


def windowed_cases(random):
    yield Case(
        "q is 0: the mean of the window",
        windowed,
        torch.zeros(1, 6, 1, 2),
        random.normal(1, 6, 1, 2),
        random.normal(1, 6, 1, 2),
        1,
    )
    yield Case(
        "q is 0, a larger window",
        windowed,
        torch.zeros(2, 9, 3, 4),
        random.normal(2, 9, 3, 4),
        random.normal(2, 9, 3, 4),
        3,
    )
    yield Case("the window holds everything", windowed, *random.normal(3, 2, 5, 3, 4), 4)
    yield Case("a window of the token alone", windowed, *random.normal(3, 2, 5, 3, 4), 0)


def windowed_identities(random):
    q, k, v = random.normal(3, 1, 8, 2, 4)
    before = windowed(q, k, v, 2)
    k[:, 7] += 5
    v[:, 7] -= 3
    yield "what lies outside of the window does not count", windowed(q, k, v, 2)[:, :5], before[
        :, :5
    ], 1e-6


# ---- tasks ---------------------------------------------------------------------------------------

WINDOWED_STUB = '''
def windowed_attention(q, k, v, window):
    """softmax(q k^T / sqrt(d)) v, where token n sees tokens n - window to n + window only.

    q, k, v [B,N,h,d] -> [B,N,h,d]. At the ends of the row the window is shorter.
    """
'''
GEGLU_STUB = '''
def check_geglu(geglu):
    """Return True if `geglu` does what its docstring says, and False if it does not.

    geglu(x), see minipic/layers/blocks.py. An error counts as False.
    """
'''

TASKS = [
    Exercise(
        "A3.1",
        "minipic.models.unet:timestep_embedding",
        10,
        "A network cannot do much with the number 537. It is given cosines and sines of it "
        "instead, fast ones that tell "
        "neighbours apart and slow ones that tell the region.",
        embedding_cases,
        embedding_identities,
        picture,
        hints=(
            "Angles are t times a frequency, and the frequencies fall from 1 to about 1/10000.",
            "t may be whole numbers or 16 bits: compute in float32.",
        ),
    ),
    Exercise(
        "A3.2",
        "minipic.layers.attention:hide_future",
        10,
        "A text encoder reads from left to right: no word may look at those after it. Scores of "
        "later keys become "
        "minus infinity, and the softmax makes zeros of them.",
        future_cases,
        future_identities,
        naive_picture,
        hints=(
            "`torch.triu` keeps what is above a diagonal, and tells which one by a number.",
            "Row 0 of a chunk is query number `first_query`.",
        ),
    ),
    Exercise(
        "A3.3",
        "minipic.layers.attention:masked_softmax",
        15,
        "The softmax over those keys that the mask shows. A row that sees no key at all is the "
        "trap: minus infinity "
        "everywhere gives NaN.",
        softmax_cases,
        softmax_identities,
        naive_picture,
        hints=(
            "`torch.finfo(scores.dtype).min` is the lowest number, and is finite.",
            "A row that sees nothing still gets weights from the softmax. Set them to 0 "
            "afterwards.",
        ),
    ),
    Exercise(
        "A3.4",
        "minipic.layers.attention:Attention.forward",
        15,
        "Queries come from x, keys and values from the context: the text, or x itself. "
        "`keys_and_values` and "
        "`attention` are there. The context may also be a `TextKeysValues`, in which this layer "
        "finds both ready.",
        attention_cases,
        attention_identities,
        picture,
        hints=(
            "Split the last dimension into heads: [B,N,hd] -> [B,N,h,d].",
            "Join the heads again before `to_out`.",
        ),
    ),
    Exercise(
        "A3.5",
        "minipic.layers.blocks:ResnetBlock.forward",
        15,
        "Norm, SiLU, convolution, twice; in between the noise level is added to every pixel; and "
        "at the end comes the "
        "input, by way of `conv_shortcut`. `group_norm(x, norm, silu=True)` does norm and SiLU.",
        resnet_cases,
        resnet_identities,
        picture,
        hints=(
            "temb goes through SiLU and `time_emb_proj`, and is added between the first "
            "convolution and the second "
            "norm.",
            "x itself must stay as it is.",
        ),
    ),
    Exercise(
        "A3.6",
        "minipic.models.unet:SpatialTransformer.forward",
        20,
        "Pixels become tokens, pass through the transformer blocks, and come back. SDXL projects "
        "tokens, by a Linear; "
        "SD 1.5 projects pixels, by a 1x1 convolution.",
        transformer_cases,
        transformer_identities,
        picture,
        hints=(
            "[B,C,H,W] -> [B,HW,C]: flatten the pixels, and exchange the last two dimensions.",
            "A convolution needs pixels: it comes before the pixels become tokens, and after they "
            "are pixels again.",
        ),
    ),
    Prediction(
        "A3.7",
        "answers.a3:SCORES",
        10,
        "SDXL draws 1024 x 1024 pixels, two predictions at a time because of guidance. The VAE "
        "makes 8 x 8 pixels one, "
        "and the first attention comes after the first downsampling, with 10 heads. How many "
        "numbers has the matrix of "
        "scores of one such self-attention? Write down your number before you compute it.",
        scores_of_sdxl,
        within=0.05,
    ),
    Exercise(
        "A3.8",
        "answers.a3:windowed_attention",
        20,
        "Nothing in minipic does this one. In long sequences most keys are far away and hardly "
        "count. Let every token "
        "see its neighbourhood alone.",
        windowed_cases,
        windowed_identities,
        stub=WINDOWED_STUB,
        hints=("Which (n, m) are seen is a matrix of True and False that depends on n - m alone.",),
    ),
    BreakIt(
        "A3.9",
        "answers.a3:check_geglu",
        15,
        "Write a check of `geglu` that no wrong version passes. Your check is run on the function, "
        "on right versions "
        "of it, and on every version with one mistake that the coursework can make.",
        "minipic.layers.blocks:geglu",
        GEGLU_STUB,
        alternates=(
            """
            half = x.shape[-1] // 2
            return F.gelu(x[..., half:]) * x[..., :half]
            """,
        ),
    ),
]


# ==== the instructor's part: what follows is not given to students ================================

MISCONCEPTIONS = {  # {number: [(in the reference, what some write, what to tell them), ...]}
    "A3.1": [
        ("[angles.cos(), angles.sin()]", "[angles.sin(), angles.cos()]", "cosines come first"),
        ("* i / half", "* i / width", "the frequencies are spread over half of the width"),
        (
            "angles.cos(), angles.sin()], dim=-1)",
            "angles.cos(), angles.sin()], dim=-1)[:, torch.arange(width)"
            ".view(2, -1).T.flatten()]",
            "first all cosines, then all sines; they do not take turns",
        ),
    ],
    "A3.2": [
        ("triu(first_query + 1)", "triu(first_query)", "a token sees itself"),
        ("triu(first_query + 1)", "triu(1)", "in a chunk, row 0 is query number first_query"),
        ("triu(first_query + 1)", "tril(first_query - 1)", "this hides the past"),
    ],
    "A3.3": [
        (".masked_fill(~mask, 0)", "", "a row that sees nothing must have weights of 0"),
        (
            "masked_fill(~mask, lowest).softmax(-1)",
            "softmax(-1)",
            "hide keys before the softmax, or weights do not add up to 1",
        ),
    ],
    "A3.4": [
        (
            "self.keys_and_values(x if context is None else context)",
            "self.keys_and_values(x)[:2] if context is None "
            "or context.shape[-1] == x.shape[-1] else self.keys_and_values(context)",
            "the context counts, whatever its width is",
        ),
        (
            "self.to_out(attention(q, k, v).flatten(2))",
            "self.to_out(attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], -1))",
            "heads and tokens are mixed up when the heads are joined",
        ),
    ],
    "A3.5": [
        ("return h.add_(self.conv_shortcut(x))", "return h", "the input is not added"),
        (
            "self.time_emb_proj(F.silu(temb))",
            "self.time_emb_proj(temb)",
            "temb goes through SiLU first",
        ),
        (
            "group_norm(h, self.norm2, silu=True)",
            "group_norm(h, self.norm2)",
            "there is a SiLU before each convolution",
        ),
    ],
    "A3.6": [
        ("return residual + x", "return x", "the input is not added"),
        (
            "x.transpose(1, 2).unflatten(2, (height, width))",
            "x.transpose(1, 2).unflatten(2, (width, height)).transpose(2, 3)",
            "rows and columns are exchanged",
        ),
    ],
}

ALTERNATES = {  # {number: [another right body, ...]}
    "A3.1": [
        """
        i = torch.arange(width // 2, device=t.device).float()
        frequencies = 10000.0 ** (-i / (width // 2))
        angles = torch.outer(t.float(), frequencies)
        return torch.cat([torch.cos(angles), torch.sin(angles)], 1)
        """
    ],
    "A3.2": [
        """
        n, m = scores.shape[-2:]
        query = torch.arange(n, device=scores.device)[:, None] + first_query
        key = torch.arange(m, device=scores.device)
        return torch.where(key > query, torch.full_like(scores, float("-inf")), scores)
        """
    ],
    "A3.3": [
        """
        if mask is None:
            return torch.softmax(scores, dim=-1)
        seen = mask.to(scores)
        highest = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).amax(-1, keepdim=True)
        powers = (scores - highest).clamp(max=0).exp() * seen
        return powers / powers.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
        """
    ],
    "A3.4": [
        """
        q = self.to_q(x)
        q = q.view(*q.shape[:2], self.heads, q.shape[2] // self.heads)
        if isinstance(context, TextKeysValues):
            keys, values = context[self]
        elif context is None:
            keys, values = self.keys_and_values(x)
        else:
            keys, values = self.keys_and_values(context)
        out = attention(q, keys, values, backend="naive")
        return self.to_out(out.reshape(*out.shape[:2], -1))
        """
    ],
    "A3.5": [
        """
        out = self.conv1(F.silu(self.norm1(x)))
        if temb is not None:
            projected = self.time_emb_proj(F.silu(temb))
            out = out + projected.view(*projected.shape, 1, 1)
        out = self.conv2(F.silu(self.norm2(out)))
        return self.conv_shortcut(x) + out
        """
    ],
    "A3.6": [
        """
        b, c, h, w = x.shape
        y = self.norm(x)
        if self.projects_tokens:
            y = self.proj_in(y.permute(0, 2, 3, 1).reshape(b, h * w, c))
        else:
            y = self.proj_in(y).permute(0, 2, 3, 1).reshape(b, h * w, -1)
        for block in self.transformer_blocks:
            y = block(y, context)
        if self.projects_tokens:
            y = self.proj_out(y).reshape(b, h, w, c).permute(0, 3, 1, 2)
        else:
            y = self.proj_out(y.reshape(b, h, w, -1).permute(0, 3, 1, 2))
        return x + y
        """
    ],
}

EQUIVALENT = {  # {number: {change: why it is no mistake}}
    "A3.1": {"-1 -> 1": "the sinusoids have two dimensions, so that the last one is number 1"},
    "A3.2": {
        "2 -> 3": "triu looks at the last two dimensions alone, and one more is only filled alike"
    },
    "A3.6": {"-2 -> 2": "x has four dimensions, so that the last two begin at number 2"},
}

NEEDS = {}  # {number: other tasks whose functions it calls}


def oracle_windowed(q, k, v, window):
    """Passes A3.8 without the method: it is right where q is 0, where the window is 0 or
    everything, and nowhere else."""
    n = q.shape[1]
    if window >= n - 1:
        return attention.attention(q, k, v)
    sums = torch.cat([torch.zeros_like(v[:, :1]), v.cumsum(1)], dim=1)
    means = []
    for i in range(n):
        first = max(0, i - window)
        after = min(n, i + window + 1)
        means.append((sums[:, after] - sums[:, first]) / (after - first))
    return torch.stack(means, dim=1)


def observe_geglu(geglu):
    """What a good check of A3.9 looks at."""
    return geglu(Random(0).normal(2, 3, 8))


VARIANTS = {}  # {name: {"text": ..., "replace": [(number, old, new), ...]}}, see a4.py

ORACLES = {
    "A3.8": oracle_windowed,
    "A3.9": observe_geglu,
}  # what shows that these tasks can be solved
