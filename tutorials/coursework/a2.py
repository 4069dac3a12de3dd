'''# A2: the autoencoder

SDXL does not draw pixels. It draws latents: pictures of four channels with an eighth of the height
and width, which an autoencoder has learnt to make and to read. Here you write its parts: attention
over all pixels, halving and doubling, the mean and spread of a latent, and the tiles by which large
pictures are decoded in little memory.

Shapes are written in brackets: B pictures, C channels, H x W pixels. Read section 3.1 of
"High-Resolution Image Synthesis with Latent Diffusion Models" (arXiv 2112.10752), and the first
lines of `minipic/models/vae.py`.
'''

import torch
import torch.nn as nn

from coursework.checks import BreakIt, Case, Exercise, Prediction, Random, tiny
from coursework.source import resolve
from minipic.layers import blocks
from minipic.models import vae

# ---- inputs --------------------------------------------------------------------------------------


class Doubling(nn.Module):
    """In the place of attention or of a projection: easy to follow, and different for each head and
    token."""

    def forward(self, x, *context):
        return 2 * x + torch.arange(x.shape[1]).to(x)[:, None]


def pixel_cases(random):
    for channels, groups, shape in ((4, 2, (2, 4, 2, 3)), (6, 3, (1, 6, 4, 2))):
        layer = random.fill(vae.PixelAttention(channels, groups))
        yield Case(
            f"{shape[2]} x {shape[3]} pixels",
            vae.PixelAttention.forward,
            layer,
            random.normal(*shape),
        )


def pixel_identities(random):
    layer = random.fill(vae.PixelAttention(4, 2))
    layer.to_out[0].weight.data.zero_()
    layer.to_out[0].bias.data.zero_()
    x = random.normal(2, 4, 3, 2)
    yield "when the last projection is zero, x goes through", layer(x), x


def down_cases(random):
    for one_sided in (True, False):
        for shape in ((2, 3, 4, 6), (1, 3, 5, 7)):
            layer = random.fill(blocks.Downsample(3, one_sided))
            name = f"{'one-sided' if one_sided else 'both sides'}, {shape[2]} x {shape[3]} pixels"
            yield Case(name, blocks.Downsample.forward, layer, random.normal(*shape))


def up_cases(random):
    layer = random.fill(blocks.Upsample(3))
    yield Case("doubled", blocks.Upsample.forward, layer, random.normal(2, 3, 2, 4))
    yield Case(
        "to a size that halving had rounded",
        blocks.Upsample.forward,
        layer,
        random.normal(1, 3, 3, 2),
        (5, 4),
    )


def up_identities(random):
    layer = random.fill(blocks.Upsample(2))
    layer.conv.weight.data.zero_()
    layer.conv.weight.data[[0, 1], [0, 1], 1, 1] = 1.0  # does nothing
    layer.conv.bias.data.zero_()
    x = random.normal(1, 2, 3, 4)
    yield "every pixel becomes four", layer(x)[:, :, ::2, 1::2], x


def small_vae(random, **changes):
    config = vae.VAEConfig(
        block_out_channels=(4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=3,
        **changes,
    )
    return random.fill(vae.VAE(config))


class Moments(nn.Module):
    """In the place of an encoder: numbers of all sizes, some of them extreme."""

    def forward(self, x):
        return torch.cat([x, 30 * x], dim=1)


def encode_cases(random):
    network = small_vae(random)
    network.encoder = Moments()
    yield Case("with quant_conv", vae.VAE.encode, network, random.normal(2, 3, 4, 5))
    network = small_vae(random, use_quant_conv=False)
    network.encoder = Moments()
    yield Case("some variances are extreme", vae.VAE.encode, network, random.normal(1, 3, 6, 4))


def encode_identities(random):
    network = small_vae(random, use_quant_conv=False)
    network.encoder = Moments()
    _, logvar = network.encode(100 * random.normal(1, 3, 4, 4))
    yield "the variance is finite, and not 0", (
        logvar.exp().isfinite() & (logvar.exp() > 0)
    ).all(), True


def starts_cases(random):
    for length, side, overlap in (
        (10, 4, 1),
        (9, 4, 2),
        (7, 4, 1),
        (3, 4, 1),
        (4, 4, 2),
        (100, 32, 8),
        (5, 4, 1),
        (3, 4, 3),
    ):
        yield Case(
            f"{length} long, tiles of {side} that share {overlap}",
            vae.tile_starts,
            length,
            side,
            overlap,
        )


def starts_identities(random):
    for length in (5, 16, 33):
        starts = vae.tile_starts(length, 5, 2)
        covered = {start + i for start in starts for i in range(5)}
        yield f"tiles cover all of {length}", sorted(covered) == list(range(length)), True
        neighbours = [after - before for before, after in zip(starts, starts[1:])]
        yield f"neighbours in {length} share at least 2", all(
            step <= 3 for step in neighbours
        ), True


def fade_cases(random):
    for length, border in ((6, 2), (7, 3), (5, 9), (1, 4)):
        yield Case(
            f"{length} long, a border of {border}", vae.fade, length, border, torch.device("cpu")
        )


def fade_identities(random):
    weights = vae.fade(9, 3, torch.device("cpu"))
    yield "both edges are alike", weights, weights.flip(0)
    yield "no weight is 0", (weights > 0).all(), True


# ---- the tiny model ------------------------------------------------------------------------------


def latent():
    """What the tiny model draws before it is decoded."""
    *_, x = tiny().latents("a large cyan torus", steps=6, guidance=4.0, seed=3)
    return x


def decoded():
    """a large cyan torus, decoded"""
    network = tiny().vae
    return (network.decode(network.unscale(latent()))[0] / 2 + 0.5).clamp(0, 1)


def round_trip():
    """a large cyan torus, decoded, encoded and decoded again"""
    network = tiny().vae
    mean, _ = network.encode(2 * decoded()[None] - 1)
    return (network.decode(mean)[0] / 2 + 0.5).clamp(0, 1)


def tiled():
    """a large cyan torus, decoded in tiles"""
    network = tiny().vae
    return (network.decode_tiles(network.unscale(latent()), side=12, overlap=4)[0] / 2 + 0.5).clamp(
        0, 1
    )


def ratio_of_numbers():
    """Numbers of a picture of 1024 x 1024 pixels over numbers of its latent."""
    config = vae.SDXL_VAE
    side = 1024 // config.factor
    return 3 * 1024 * 1024 / (config.latent_channels * side**2)


# ---- a preview -----------------------------------------------------------------------------------

MIXING = torch.tensor([[2.0, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0.5], [1, 0, 0, 1]])


def preview(latents, pictures):
    return resolve("answers.a2:fit_preview")(latents, pictures)


def latents_and_pictures(random, count, height, width, noise):
    """Latents whose channels are mixed and shifted, and pictures that are nearly a linear map of
    them."""
    flat, _ = torch.linalg.qr(random.normal(count * height * width, 5))
    flat = flat - flat.mean(0)
    flat, _ = torch.linalg.qr(flat)  # five columns at right angles to each other, and to a constant
    channels, rest = flat[:, :4], flat[:, 4:]
    size = (count * height * width) ** 0.5
    latents = size * channels @ MIXING + torch.tensor([1.0, -2.0, 0.5, 0.0])
    pictures = size * channels @ random.normal(4, 3) + random.normal(3) + noise * size * rest

    def as_pictures(rows):
        return rows.reshape(count, height, width, -1).permute(0, 3, 1, 2)

    return as_pictures(latents), as_pictures(pictures)


def preview_cases(random):
    for name, count, height, width, noise in (
        ("exactly linear", 1, 3, 5, 0.0),
        ("with a rest that no line explains", 2, 4, 3, 0.3),
        ("several pictures", 3, 2, 4, 0.1),
    ):
        yield Case(name, preview, *latents_and_pictures(random, count, height, width, noise))


# ---- tasks ---------------------------------------------------------------------------------------

PREVIEW_STUB = '''
def fit_preview(latents, pictures):
    """The linear map from latents to colours that fits best.

    latents [B,4,h,w], pictures [B,3,h,w] -> weight [3,4] and bias [3]. With them the colour of a
    pixel is weight @ latent + bias. Of all such maps, theirs has the smallest sum of squared errors
    over all pixels of all pictures.
    """
'''
SCALE_STUB = '''
def check_scale(scale):
    """Return True if `VAE.scale` does what its docstring says, and False if it does not.

    Make a VAE, see minipic/models/vae.py, and call its `scale`. An error counts as False.
    """
'''

TASKS = [
    Exercise(
        "A2.1",
        "minipic.models.vae:PixelAttention.forward",
        15,
        "In the middle of the autoencoder every pixel looks at every other. Pixels become tokens "
        "for that, and tokens "
        "pixels again. The class inherits from `Attention`, whose forward takes tokens.",
        pixel_cases,
        pixel_identities,
        decoded,
        hints=(
            "[B,C,H,W] -> [B,HW,C]: flatten the pixels, and exchange the last two dimensions.",
            "What attention gives is added to x, not to the norm of x.",
        ),
    ),
    Exercise(
        "A2.2",
        "minipic.layers.blocks:Downsample.forward",
        10,
        "A convolution that moves two pixels at a time. The VAE's encoder pads the right and the "
        "bottom edge alone; the "
        "convolution does not pad then.",
        down_cases,
        picture=round_trip,
        hints=("`F.pad` takes left, right, top, bottom.",),
    ),
    Exercise(
        "A2.3",
        "minipic.layers.blocks:Upsample.forward",
        10,
        "Every pixel becomes four, and a convolution smoothes them.",
        up_cases,
        up_identities,
        decoded,
        hints=("`F.interpolate(..., mode=\"nearest\")`.",),
    ),
    Exercise(
        "A2.4",
        "minipic.models.vae:VAE.encode",
        10,
        "A picture is not one latent but a cloud of them: the encoder gives a mean and the "
        "logarithm of a variance for "
        "each number. The logarithm is kept between -30 and 20, so that its exponential stays "
        "finite.",
        encode_cases,
        encode_identities,
        round_trip,
        hints=("The channels hold the means, and then the logarithms.",),
    ),
    Exercise(
        "A2.5",
        "minipic.models.vae:tile_starts",
        15,
        "A large picture is decoded in tiles that overlap. Where do they begin, along one side?",
        starts_cases,
        starts_identities,
        tiled,
        hints=(
            "A new tile begins every side - overlap.",
            "The last tile is moved back to end where the picture ends.",
            "A picture that is smaller than a tile has one, which begins at 0.",
        ),
    ),
    Exercise(
        "A2.6",
        "minipic.models.vae:fade",
        10,
        "Where tiles overlap, each counts more the farther from its edge.",
        fade_cases,
        fade_identities,
        tiled,
        hints=("The middle of pixel i is at i + 0.5.",),
    ),
    Prediction(
        "A2.7",
        "answers.a2:RATIO",
        5,
        "How many times as many numbers has a picture of 1024 x 1024 pixels as its latent? Write "
        "down your number before "
        "you compute it.",
        ratio_of_numbers,
        within=0.01,
    ),
    Exercise(
        "A2.8",
        "answers.a2:fit_preview",
        20,
        "Nothing in minipic does this one. User interfaces show a preview after every step of a "
        "drawing, and decoding each "
        "would be slow. A linear map from four channels to three colours is nearly free, and good "
        "enough. Fit it.",
        preview_cases,
        stub=PREVIEW_STUB,
        hints=("A column of ones makes the bias one more weight.",),
    ),
    BreakIt(
        "A2.9",
        "answers.a2:check_scale",
        15,
        "Write a check of `VAE.scale` that no wrong version passes. Some autoencoders have a "
        "`shift_factor`, SDXL's has "
        "none.",
        "minipic.models.vae:VAE.scale",
        SCALE_STUB,
        alternates=(
            """
            shift = self.config.shift_factor
            if shift is not None:
                z = z - shift
            return self.config.scaling_factor * z
            """,
        ),
    ),
]


# ==== the instructor's part: what follows is not given to students ================================

MISCONCEPTIONS = {  # {number: [(in the reference, what some write, what to tell them), ...]}
    "A2.1": [
        (
            "group_norm(x, self.group_norm).flatten(2).transpose(1, 2)",
            "group_norm(x, self.group_norm).flatten(2)" ".reshape(x.shape[0], -1, x.shape[1])",
            "reshaping mixes pixels and channels; exchange the dimensions",
        ),
        ("return x + tokens", "return tokens", "what attention gives is added to x"),
        ("group_norm(x, self.group_norm)", "x", "attention reads a norm of x"),
    ],
    "A2.2": [
        (
            "(0, 1, 0, 1)",
            "(1, 0, 1, 0)",
            "the right and the bottom edge are padded, not the left and the top",
        ),
        (
            "(0, 1, 0, 1)",
            "(0, 0, 1, 1)",
            "F.pad begins with the last dimension: left, right, top, bottom",
        ),
    ],
    "A2.3": [
        ('mode="nearest"', 'mode="bilinear"', "every pixel becomes four that are equal"),
        (
            "self.conv(F.interpolate(x, size=size, mode=\"nearest\"))",
            "F.interpolate(x, size=size, mode=\"nearest\")",
            "a convolution follows",
        ),
    ],
    "A2.4": [
        (
            "chunk(2, dim=1)",
            "unflatten(1, (-1, 2)).unbind(2)",
            "first all means, then all logarithms",
        ),
        (
            "logvar.clamp(-30, 20)",
            "logvar",
            "the logarithm of the variance is kept between -30 and 20",
        ),
        ("logvar.clamp(-30, 20)", "logvar.clamp(-20, 30)", "the bounds are -30 and 20"),
    ],
    "A2.5": [
        (
            "max(1, length - overlap)",
            "length",
            "a last tile that only holds what its neighbour has already is one too many",
        ),
        (
            "min(start, length - side)",
            "start",
            "the last tile is moved back to end where the picture ends",
        ),
    ],
    "A2.6": [
        (" + 0.5", "", "the distance is that of a pixel's middle"),
        (".clamp(max=border)", "", "farther inside than the border, all weights are alike"),
    ],
}

ALTERNATES = {  # {number: [another right body, ...]}
    "A2.1": [
        """
        b, c, h, w = x.shape
        rows = self.group_norm(x).permute(0, 2, 3, 1).reshape(b, h * w, c)
        rows = super().forward(rows, rows)
        return rows.reshape(b, h, w, c).permute(0, 3, 1, 2) + x
        """
    ],
    "A2.2": [
        """
        if not self.one_sided:
            return self.conv(x)
        right = torch.zeros_like(x[..., :1])
        x = torch.cat([x, right], dim=3)
        return self.conv(torch.cat([x, torch.zeros_like(x[..., :1, :])], dim=2))
        """
    ],
    "A2.3": [
        """
        h, w = x.shape[2:]
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if size is not None and tuple(size) != (2 * h, 2 * w):
            rows = (torch.arange(size[0]) * h / size[0]).long()
            columns = (torch.arange(size[1]) * w / size[1]).long()
            x = x[:, :, ::2, ::2][:, :, rows][:, :, :, columns]
        return self.conv(x)
        """
    ],
    "A2.4": [
        """
        moments = self.quant_conv(self.encoder(image))
        channels = moments.shape[1] // 2
        return moments[:, :channels], torch.clip(moments[:, channels:], -30.0, 20.0)
        """
    ],
    "A2.5": [
        """
        if length <= side:
            return [0]
        starts = [0]
        while starts[-1] + side < length:
            starts.append(min(starts[-1] + side - overlap, length - side))
        return starts
        """
    ],
    "A2.6": [
        """
        from_left = torch.arange(1, length + 1, device=device) - 0.5
        borders = torch.full_like(from_left, border)
        return torch.stack([from_left, from_left.flip(0), borders]).amin(0)
        """
    ],
}

EQUIVALENT = {  # {number: {change: why it is no mistake}}
    "A2.1": {"-2 -> 2": "x has four dimensions, so that the last two begin at number 2"},
    "A2.3": {"-2 -> 2": "x has four dimensions, so that the last but one is number 2"},
}

NEEDS = {}  # {number: other tasks whose functions it calls}


def oracle_preview(latents, pictures):
    """Passes A2.8 without the method, because it knows how the latents of its cases are mixed."""
    rows = latents.permute(0, 2, 3, 1).flatten(0, 2)
    colours = pictures.permute(0, 2, 3, 1).flatten(0, 2)
    channels = (rows - rows.mean(0)) @ MIXING.to(rows).inverse()
    weight = MIXING.to(rows).inverse() @ (channels.T @ colours / len(rows))
    return weight.T, colours.mean(0) - rows.mean(0) @ weight


def observe_scale(scale):
    """What a good check of A2.9 looks at."""
    found = []
    for shift in (None, 0.3):
        network = small_vae(Random(0), shift_factor=shift, scaling_factor=0.7)
        found.append(network.scale(torch.tensor([1.0, 2.0])))
    return found


VARIANTS = {}  # {name: {"text": ..., "replace": [(number, old, new), ...]}}, see a4.py

ORACLES = {
    "A2.8": oracle_preview,
    "A2.9": observe_scale,
}  # what shows that these tasks can be solved
