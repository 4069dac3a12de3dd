'''# A5: LoRA, and what SDXL is told besides the text

Nobody fine-tunes all 2.6 billion numbers of SDXL to teach it one style. LoRA leaves a weight W as
it is and adds a product of two thin matrices, s B A, of low rank R. Here you write that layer: how
it computes, how it is merged into the weight, and how it is saved. One layer may hold several
LoRAs, side by side.

The second half is SDXL's micro-conditioning. The UNet is told how large the training picture was
and where it was cut, so that small and cropped pictures could be used in training without spoiling
what is drawn.

Read the first lines of `minipic/layers/lora.py`, "LoRA" (arXiv 2106.09685), section 4.1, and "SDXL"
(arXiv
2307.01952), section 2.2.
'''

import copy
from unittest import mock

import torch
import torch.nn as nn

from coursework.checks import BreakIt, Case, Exercise, Prediction, Random, draw, tiny
from coursework.source import resolve
from minipic import text
from minipic.layers import embedding, lora
from minipic.models import unet

PROMPT = "a large green sphere"


# ---- inputs --------------------------------------------------------------------------------------


def linear_layer(random, ranks=(3,), bias=True):
    """A LoRALinear [5 -> 4] with a LoRA of each rank, whose alphas and scales are all different."""
    layer = lora.lora_layer(random.fill(nn.Linear(5, 4, bias=bias)))
    add_loras(layer, random, ranks, (5,))
    return layer


def conv_layer(random, ranks=(2,)):
    """A LoRAConv2d [3 -> 4] with a kernel of 3 x 1 and a stride."""
    layer = lora.lora_layer(random.fill(nn.Conv2d(3, 4, (3, 1), stride=(1, 2), padding=(1, 0))))
    add_loras(layer, random, ranks, (3, 3, 1))
    return layer


def add_loras(layer, random, ranks, inputs):
    for i, rank in enumerate(ranks):
        with mock.patch.object(lora.LoRA, "refresh_factor"):  # which is A5.3
            layer.add(
                f"number {i}",
                random.normal(rank, *inputs),
                random.normal(4, rank),
                alpha=1.5 * rank + i,
            )
        layer.scalings[f"number {i}"].scale = 0.5 + i
    factors = [torch.full((scaling.rank,), scaling.factor) for scaling in layer.scalings.values()]
    layer.register_buffer("factor", torch.cat(factors), persistent=False)


def lora_cases(random):
    yield Case("a Linear", lora.LoRA.lora, linear_layer(random), random.normal(2, 6, 5))
    yield Case(
        "a Linear with two LoRAs", lora.LoRA.lora, linear_layer(random, (2, 3)), random.normal(3, 5)
    )
    yield Case("a convolution", lora.LoRA.lora, conv_layer(random), random.normal(2, 3, 4, 6))
    yield Case(
        "a convolution with two LoRAs",
        lora.LoRA.lora,
        conv_layer(random, (1, 2)),
        random.normal(1, 3, 5, 4),
    )
    yield Case("x of 16 bits", half_precision, linear_layer(random), random.normal(3, 5))


def half_precision(layer, x):
    return layer.lora(x.bfloat16())


def lora_identities(random):
    layer = linear_layer(random, (2, 3))
    x = random.normal(6, 5)
    layer.lora_B.weight.data.zero_()
    yield "a LoRA that begins, with B = 0, adds nothing", layer.lora(x), torch.zeros(6, 4)


def delta_cases(random):
    yield Case("a Linear", lora.LoRA.delta, linear_layer(random))
    yield Case("a Linear with two LoRAs", lora.LoRA.delta, linear_layer(random, (2, 3)))
    yield Case("a convolution with two LoRAs", lora.LoRA.delta, conv_layer(random, (1, 2)))
    yield Case("a weight of 16 bits", half_delta, linear_layer(random))


def half_delta(layer):
    layer.weight = nn.Parameter(layer.weight.bfloat16())
    return layer.delta()


def delta_identities(random):
    layer = linear_layer(random, (2, 3), bias=False)
    x = random.normal(6, 5)
    a = layer.lora_A.weight
    b = layer.lora_B.weight
    yield "delta(x) is s B A x", x @ layer.delta().T, (x @ a.T * layer.factor) @ b.T, 1e-4


def refreshed(layer):
    layer.refresh_factor()
    return layer.factor


def refresh_cases(random):
    for name, ranks in (("one LoRA", (3,)), ("three LoRAs", (2, 1, 4))):
        layer = linear_layer(random, ranks)
        layer.register_buffer("factor", torch.zeros(1), persistent=False)
        yield Case(name, refreshed, layer)


def refresh_identities(random):
    layer = linear_layer(random, (2, 3))
    layer.refresh_factor()
    yield "the factor is not written to files", "factor" in layer.state_dict(), False


def state_cases(random):
    yield Case(
        "one LoRA", lora.lora_state_dict, nn.Sequential(linear_layer(random), nn.Linear(4, 2))
    )
    yield Case("a LoRA of rank 1", lora.lora_state_dict, nn.Sequential(linear_layer(random, (1,))))
    yield Case(
        "different factors",
        lora.lora_state_dict,
        nn.Sequential(linear_layer(random, (2, 3)), conv_layer(random)),
    )
    yield Case(
        "a convolution, different factors",
        lora.lora_state_dict,
        nn.Sequential(conv_layer(random, (1, 2))),
    )
    yield Case("no LoRA", lora.lora_state_dict, nn.Sequential(nn.Linear(2, 2)))


def state_identities(random):
    layer = linear_layer(random, (2, 3))
    state = lora.lora_state_dict(nn.Sequential(layer))
    a = state["0.lora_A.weight"]
    b = state["0.lora_B.weight"]
    product = state["0.alpha"] / len(a) * b @ a
    wanted = layer.lora_B.weight * layer.factor @ layer.lora_A.weight
    yield "alpha / R B A in the file is s B A in the layer", product, wanted, 1e-5


def size_cases(random):
    yield Case("all numbers different", text.size_ids, (640, 480), (30, 20), (512, 256))
    yield Case("for a refiner", text.size_ids, (1024, 768), (0, 8), 6.0)
    yield Case("a score that is a whole number", text.size_ids, (100, 200), (1, 2), 5)


def embedder(random, addition=True):
    config = unet.UNetConfig(
        block_out_channels=(4, 4, 4),
        norm_num_groups=2,
        attention_head_dim=2,
        cross_attention_dim=3,
        transformer_layers_per_block=0,
        layers_per_block=1,
        **(
            {"addition_time_embed_dim": 2, "projection_class_embeddings_input_dim": 5 + 6 * 2}
            if addition
            else {"addition_embed_type": None}
        ),
    )
    return random.fill(unet.UNet(config))


def embed_cases(random):
    network = embedder(random)
    x = random.normal(3, 4, 2, 2)
    sizes = random.uniform(0, 3, 3, 6)
    embed = unet.Encoder.embed
    yield Case(
        "a timestep for each picture",
        embed,
        network,
        random.uniform(0, 9, 3),
        random.normal(3, 5),
        sizes,
        x,
    )
    yield Case("one timestep for all", embed, network, 7.5, random.normal(3, 5), sizes, x)
    yield Case(
        "without SDXL's additions",
        embed,
        embedder(random, addition=False),
        torch.tensor(4),
        None,
        None,
        x[:2],
    )


def embed_identities(random):
    network = embedder(random)
    x = random.normal(2, 4, 2, 2)
    sizes = random.uniform(0, 3, 2, 6)
    pooled = random.normal(2, 5)
    both = network.embed(3.0, pooled, sizes, x)
    alone = network.embed(3.0, pooled[1:], sizes[1:], x[1:])
    yield "each picture has an embedding of its own", both[1:], alone, 1e-5


# ---- the tiny model ------------------------------------------------------------------------------


def with_lora(merged):
    """The tiny model with a random LoRA on its attention, which is taken off again."""
    model = tiny()
    before = model.unet
    model.unet = copy.deepcopy(before)
    try:
        random = Random(4)
        for parameter in lora.inject(model.unet, rank=3, alpha=2.0):
            parameter.data = 0.15 * random.normal(*parameter.shape)
        if merged:
            lora.merge(model.unet)
        return draw(PROMPT, steps=6, guidance=4.0, seed=2)
    finally:
        model.unet = before


def lora_picture():
    """the tiny model with a random LoRA"""
    return with_lora(merged=False)


def merged_picture():
    """the same LoRA, merged into the weights"""
    return with_lora(merged=True)


def cropped_picture():
    """a large green sphere, as if cut out at (24, 8) of a larger picture"""
    return draw(PROMPT, steps=6, guidance=4.0, seed=2, original_size=(96, 80), crop=(24, 8))


def share_of_parameters():
    layer = nn.Linear(1280, 1280, bias=False)
    parameters = lora.inject(nn.Sequential(layer), rank=16, match="0")
    return 100 * sum(parameter.numel() for parameter in parameters) / layer.weight.numel()


# ---- a LoRA of lower rank ------------------------------------------------------------------------

MIXING = 0.5 * torch.tensor(
    [[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
)  # is its own inverse


def resized(a, b, rank):
    """B A of the LoRA of lower rank, and whether its shapes are right."""
    small_a, small_b = resolve("answers.a5:resize_lora")(a, b, rank)
    return small_b @ small_a, len(small_a), small_b.shape[1]


def known_lora(random, inputs, outputs):
    """A [4,inputs] and B [outputs,4] whose product has the singular values 4, 3, 2 and 1."""
    left, _ = torch.linalg.qr(random.normal(outputs, 4))
    right, _ = torch.linalg.qr(random.normal(inputs, 4))
    values = torch.tensor([4.0, 3.0, 2.0, 1.0])
    return MIXING @ (values[:, None] * right.T), left @ MIXING


def resize_cases(random):
    for rank, inputs, outputs in ((1, 5, 6), (2, 8, 7), (4, 6, 9)):
        yield Case(f"to rank {rank}", resized, *known_lora(random, inputs, outputs), rank)


# ---- tasks ---------------------------------------------------------------------------------------

RESIZE_STUB = '''
def resize_lora(a, b, rank):
    """The LoRA of a lower rank that is nearest: a [R,in], b [out,R] -> a [rank,in], b [out,rank].

    Of all products of that rank, theirs has the smallest sum of squared differences to b @ a.
    """
'''
GROWN_STUB = '''
def check_grown(forward):
    """Return True if `GrownEmbedding.forward` does what its class says, and False if it does not.

    Make a GrownEmbedding and call it on ids: it computes by `forward`, which is sometimes wrong.
    See minipic/layers/embedding.py. An error counts as False.
    """
'''

TASKS = [
    Exercise(
        "A5.1",
        "minipic.layers.lora:LoRA.lora",
        15,
        "What all LoRAs of a layer add to its output. `lora_A` and `lora_B` are modules; between "
        "them, each rank is "
        "multiplied by its own number in `factor`.",
        lora_cases,
        lora_identities,
        lora_picture,
        hints=(
            "In a convolution the ranks are channels, which come before height and width.",
            "x may have 16 bits, A and B have 32: compute in theirs, and give back the type of x.",
        ),
    ),
    Exercise(
        "A5.2",
        "minipic.layers.lora:LoRA.delta",
        15,
        "The same as one matrix, to be added to the weight. The weight of a convolution is seen as "
        "a matrix [out, rest].",
        delta_cases,
        delta_identities,
        merged_picture,
        hints=(
            "Multiply the columns of B by `factor`, then B by A.",
            "At the end: the shape and the type of `weight`.",
        ),
    ),
    Exercise(
        "A5.3",
        "minipic.layers.lora:LoRA.refresh_factor",
        10,
        "LoRAs lie side by side: the first ranks belong to the first LoRA, the next to the second. "
        "Each rank gets the "
        "factor of its LoRA. It moves with the layer to another device, but is not saved.",
        refresh_cases,
        refresh_identities,
        lora_picture,
        hints=("`register_buffer(..., persistent=False)` is for such numbers.",),
    ),
    Exercise(
        "A5.4",
        "minipic.layers.lora:lora_state_dict",
        20,
        "A file has one alpha for a layer, and programs that read it compute alpha / R B A. Where "
        "all ranks have one "
        "factor, alpha can say it; otherwise B must.",
        state_cases,
        state_identities,
        hints=("`layers(model)` gives the LoRA layers by their paths.", "alpha = factor * R."),
    ),
    Exercise(
        "A5.5",
        "minipic.text:size_ids",
        10,
        "Six numbers tell the UNet where a picture came from. People say width before height, the "
        "network takes height "
        "before width.",
        size_cases,
        picture=cropped_picture,
        hints=("top before left, too.",),
    ),
    Exercise(
        "A5.6",
        "minipic.models.unet:Encoder.embed",
        20,
        "One vector tells every residual block the noise level, the pooled text and the sizes. "
        "`timestep_embedding` "
        "makes sinusoids of any numbers: of t, and of each size id.",
        embed_cases,
        embed_identities,
        cropped_picture,
        hints=(
            "Six size ids become six rows of sinusoids, side by side after the pooled text.",
            "The sinusoids of t are as wide as the first level, those of the sizes "
            "`addition_time_embed_dim`.",
        ),
    ),
    Prediction(
        "A5.7",
        "answers.a5:PERCENT",
        5,
        "A LoRA of rank 16 on a square projection of SDXL, 1280 to 1280 numbers: how many "
        "parameters does it train, in "
        "percent of the projection's own? Write down your number before you compute it.",
        share_of_parameters,
        within=0.02,
    ),
    Exercise(
        "A5.8",
        "answers.a5:resize_lora",
        20,
        "Nothing in minipic does this one. LoRAs on the web often have a rank of 128 where 16 "
        "would do. Find the LoRA of "
        "lower rank that changes the weights most alike.",
        resize_cases,
        stub=RESIZE_STUB,
        hints=("Eckart and Young, 1936: keep the largest singular values.",),
    ),
    BreakIt(
        "A5.9",
        "answers.a5:check_grown",
        20,
        "Textual inversion adds rows to a vocabulary. Write a check of `GrownEmbedding.forward` "
        "that no wrong version "
        "passes.",
        "minipic.layers.embedding:GrownEmbedding.forward",
        GROWN_STUB,
        alternates=(
            """
            table = torch.cat([self.weight, self.added.to(self.weight.dtype)])
            return table[ids]
            """,
        ),
        equivalent={"0 -> 1": "where an id is new, the known row is not used, whichever it is"},
    ),
]


# ==== the instructor's part: what follows is not given to students ================================

MISCONCEPTIONS = {  # {number: [(in the reference, what some write, what to tell them), ...]}
    "A5.1": [
        (
            "self.lora_A(x.to(dtype)) * factor",
            "self.lora_A(x.to(dtype))",
            "the factor alpha / R times the scale is missing",
        ),
        ("* factor)", "* factor.sum())", "each rank has its own factor"),
    ],
    "A5.2": [
        ("b * self.factor.to(b) @ a", "b @ a", "the factor alpha / R times the scale is missing"),
        ("b * self.factor.to(b) @ a", "b @ a * self.factor[0]", "each rank has its own factor"),
    ],
    "A5.3": [
        (
            "(scaling.rank,), scaling.factor",
            "(scaling.rank,), scaling.alpha",
            "alpha is divided by the rank",
        ),
        (
            "(scaling.rank,), scaling.factor",
            "(1,), scaling.factor",
            "there is one number for each rank, not for each LoRA",
        ),
    ],
    "A5.4": [
        (
            "factor[0].cpu() * rank",
            "factor[0].cpu()",
            "the file's alpha is divided by the rank again",
        ),
        (
            "b = (b.flatten(1) * factor.to(b)).view_as(b)",
            "pass",
            "where factors differ, B must carry them",
        ),
    ],
    "A5.5": [
        (
            "[height, width, top, left]",
            "[width, height, left, top]",
            "the network takes heights before widths",
        ),
        (
            "[target_height, target_width]",
            "[target_width, target_height]",
            "the network takes heights before widths",
        ),
    ],
    "A5.6": [
        (
            "[pooled, sizes.to(pooled.dtype)]",
            "[sizes.to(pooled.dtype), pooled]",
            "the pooled text comes before the sizes",
        ),
        (
            "temb = temb + self.add_embedding(added.to(x.dtype))",
            "temb = self.add_embedding(added.to(x.dtype))",
            "the embedding of t is lost",
        ),
    ],
}

ALTERNATES = {  # {number: [another right body, ...]}
    "A5.1": [
        """
        ranks = self.lora_A(x.to(self.lora_A.weight.dtype))
        shape = (-1, 1, 1) if ranks.ndim == 4 and isinstance(self, nn.Conv2d) else (-1,)
        return self.lora_B(self.factor.to(ranks).view(shape) * ranks).to(x.dtype)
        """
    ],
    "A5.2": [
        """
        b = self.lora_B.weight.flatten(1)
        a = self.lora_A.weight.flatten(1)
        product = torch.einsum("or,r,ri->oi", b, self.factor.to(b), a)
        return product.reshape(self.weight.shape).to(self.weight)
        """
    ],
    "A5.3": [
        """
        numbers = []
        for scaling in self.scalings.values():
            numbers += [scaling.scale * scaling.alpha / scaling.rank] * scaling.rank
        factor = torch.tensor(numbers, device=self.weight.device)
        self.register_buffer("factor", factor, persistent=False)
        """
    ],
    "A5.4": [
        """
        found = {}
        for path, layer in layers(model).items():
            a, b = layer.lora_A.weight.detach(), layer.lora_B.weight.detach()
            rank = a.shape[0]
            alpha = torch.tensor(float(rank))
            if torch.unique(layer.factor).numel() == 1:
                alpha = rank * layer.factor[0].cpu()
            else:
                b = b * layer.factor.view(1, -1, *[1] * (b.ndim - 2))
            found |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
            found[f"{path}.alpha"] = alpha
        return found
        """
    ],
    "A5.5": [
        """
        last = (target,) if isinstance(target, (int, float)) else target[::-1]
        return torch.tensor([*original[::-1], *crop[::-1], *last]).float()
        """
    ],
    "A5.6": [
        """
        rows = x.shape[0]
        t = torch.as_tensor(t, device=x.device)
        t = t.repeat(rows) if t.ndim == 0 else t
        waves = timestep_embedding(t, self.config.block_out_channels[0])
        temb = self.time_embedding(waves.to(x.dtype))
        if not self.config.addition_embed_type:
            return temb
        parts = [pooled]
        for i in range(size_ids.shape[1]):
            waves = timestep_embedding(size_ids[:, i], self.config.addition_time_embed_dim)
            parts.append(waves.to(pooled.dtype))
        return temb + self.add_embedding(torch.cat(parts, dim=1).to(x.dtype))
        """
    ],
}

EQUIVALENT = {  # {number: {change: why it is no mistake}}
    "A5.6": {"-1 -> 1": "pooled and sizes have two dimensions, so that the last one is number 1"},
}

NEEDS = {}  # {number: other tasks whose functions it calls}


def oracle_resize(a, b, rank):
    """Passes A5.8 without the method, because it knows how the LoRAs of its cases are mixed."""
    mixing = MIXING.to(a)
    return (mixing @ a)[:rank], (b @ mixing)[:, :rank]


def observe_grown(forward):
    """What a good check of A5.9 looks at."""
    random = Random(0)
    grown = embedding.GrownEmbedding(nn.Parameter(random.normal(5, 3)), random.normal(2, 3))
    return [grown(torch.tensor([[0, 4, 5], [6, 1, 5]])), grown(torch.tensor([[3]]))]


VARIANTS = {}  # {name: {"text": ..., "replace": [(number, old, new), ...]}}, see a4.py

ORACLES = {
    "A5.8": oracle_resize,
    "A5.9": observe_grown,
}  # what shows that these tasks can be solved
