'''# A7: experts and frames, from two papers

Two papers teach one model several tasks, in opposite ways. MTU (arXiv 2503.11905) cuts every
feed-forward layer into experts and mixes them anew for each task. OneDiffusion (arXiv 2411.16318)
gives pictures, maps and captions to one network as frames of a sequence, each with a noise level of
its own: what is given has little noise, what is wanted begins as noise.

Here you write the experts, from the weights of the router to a layer that is as good as before, and
the loop that draws some frames while others stay. Read the docstring of `MoE` in
`minipic/layers/moe.py`, and `minipic/diffusion/frames.py`.
'''

import copy

import torch
import torch.nn as nn

from coursework.checks import BreakIt, Case, Exercise, Prediction, Random, draw, tiny
from coursework.source import resolve
from minipic.diffusion import frames
from minipic.layers import moe
from minipic.models import unet

PROMPT = "a small brown diamond"


# ---- inputs --------------------------------------------------------------------------------------


def mixture(random, experts, scale=1, top_k=0, width=4):
    """An MoE cut out of a feed-forward of 4 * width hidden neurons, for a task with a random
    embedding."""
    layer = moe.MoE(random.fill(unet.FeedForward(width)), experts, scale, top_k)
    random.fill(layer.router)
    layer.task_embedding = random.normal(moe.ROUTER_WIDTH)
    return layer


class WithoutModules:
    """What a method of MoE needs of its layer, as given: so that no other method is called."""

    def __init__(self, **given):
        self.__dict__.update(given)


def expert_cases(random):
    for name, experts, top_k in (
        ("four experts", 4, 0),
        ("two experts, the better one counts", 2, 1),
        ("eight experts, three count", 8, 3),
        ("all of four count", 4, 4),
    ):
        layer = mixture(random, experts, top_k=top_k)
        yield Case(name, weights_for, layer, layer.task_embedding)


def weights_for(layer, embedding):
    layer.task_embedding = embedding
    return layer.expert_weights()


def expert_identities(random):
    layer = mixture(random, 8, top_k=2)
    weights = layer.expert_weights()
    yield "the weights add up to 1", weights.sum(), 1.0, 1e-5
    yield "two experts count", (weights > 0).sum(), 2


def hidden_cases(random):
    for experts, width, scale in ((2, 6, 2), (4, 4, 1), (3, 9, 3)):
        layer = WithoutModules(
            net=[None, None, nn.Linear(width * experts, 5)],
            experts=experts,
            scale=scale,
            expert_weights=lambda weights=random.uniform(0, 1, experts): weights,
        )
        yield Case(f"{experts} experts of {width} neurons", moe.MoE.hidden_weights, layer)


def moe_cases(random):
    for name, shape in (("a batch", (2, 3, 5)), ("one token", (5,))):
        net = nn.Sequential(nn.Linear(5, 6), nn.Identity(), nn.Linear(6, 5))
        yield Case(name, mixed, random.fill(net), random.uniform(0, 2, 6), random.normal(*shape))


def mixed(net, weights, x):
    return moe.MoE.forward(WithoutModules(net=net, hidden_weights=lambda: weights), x)


def copied(feed_forward, x, experts):
    """What a feed-forward's net computes after its neurons were copied, and its shapes."""
    net = copy.deepcopy(feed_forward.net)
    moe.copy_experts(net, experts)
    return (
        net[0].proj.weight,
        net[0].proj.bias,
        net[2].weight,
        net[2].bias,
        net(x),
        net[0].proj.out_features,
    )


def copy_cases(random):
    for width, experts in ((2, 3), (3, 2)):
        yield Case(
            f"{experts} copies",
            copied,
            random.fill(unet.FeedForward(width)),
            random.normal(2, 5, width),
            experts,
        )


def copy_identities(random):
    feed_forward = random.fill(unet.FeedForward(3))
    x = random.normal(4, 3)
    net = copy.deepcopy(feed_forward.net)
    bias = net[2].bias
    moe.copy_experts(net, 5)
    yield "five copies add up to five times as much", net(x) - bias, 5 * (
        feed_forward(x) - bias
    ), 1e-4


def shift_cases(random):
    for tokens in (256, 4096, 1024, 77, 9000):
        yield Case(f"{tokens} tokens", frames.dynamic_shift, tokens)


def velocity(random, channels):
    """A network in small for frames [B,F,C,h,w], which depends on every frame and on its
    timestep."""
    mixing = random.normal(channels, channels)

    def predict(x, t):
        level = (t.to(x) / 1000)[..., None, None, None]
        mixed = torch.einsum("ij,bfjhw->bfihw", mixing.to(x), x)
        return torch.tanh(mixed) * (1 + level) + x.mean(1, keepdim=True) * level.mean(
            1, keepdim=True
        )

    return predict


def last_frames(*arguments):
    return list(frames.sample_frames(*arguments))


def frame_cases(random):
    for name, shape, drawn, steps, label in (
        ("one frame is drawn", (2, 2, 3, 2, 1), [True, False], 3, "last"),
        ("kept frames are said to be clean", (1, 3, 2, 2, 4), [False, True, True], 3, "zero"),
        ("all are drawn", (1, 2, 2, 1, 3), [True, True], 4, "last"),
    ):
        predict = velocity(random, shape[2])
        x = random.normal(*shape)
        yield Case(
            name, last_frames, predict, x, torch.tensor(drawn), frames.flow_grid(steps, 1.7), label
        )


def frame_identities(random):
    x = random.normal(2, 3, 4, 2, 2)
    drawn = torch.tensor([True, False, True])
    found = last_frames(velocity(random, 4), x.clone(), drawn, frames.flow_grid(3))
    yield "frames that are kept are the same at the end", found[-1][0][:, 1], x[:, 1]
    truth = random.normal(2, 3, 4, 2, 2)

    def knows(x, t):
        level = (t / 1000)[..., None, None, None]
        return (x - truth) / level

    found = last_frames(knows, x.clone(), torch.tensor([True] * 3), frames.flow_grid(4))
    yield "a network that knows the truth draws it", found[-1][0], truth, 1e-4


# ---- the tiny model ------------------------------------------------------------------------------


def with_experts(**settings):
    """The tiny model as a mixture of experts, which is taken off again."""
    model = tiny()
    before = model.unet
    model.unet = copy.deepcopy(before)
    try:
        torch.manual_seed(0)
        moe.upcycle(model.unet, ["t2i"], **settings)
        moe.select(model.unet, "t2i")
        if settings.get("top_k"):
            for module in model.unet.modules():
                if isinstance(module, moe.MoE):
                    Random(1).fill(module.router)
        return draw(PROMPT, steps=6, guidance=4.0, seed=2)
    finally:
        model.unet = before


def mixture_picture():
    """a small brown diamond, drawn by four experts with equal weights"""
    return with_experts(experts=4)


def chosen_picture():
    """the same with the best three of four experts"""
    return with_experts(experts=4, top_k=3)


def copies_picture():
    """the same with two copies of each feed-forward"""
    return with_experts(experts=2, full_size=True, top_k=2)


def shrunk_output():
    """How much of a feed-forward is left when four experts begin with equal weights, by the paper's
    equation 1."""
    random = Random(0)
    feed_forward = random.fill(unet.FeedForward(8))
    x = random.normal(5, 8)
    bias = feed_forward.net[2].bias
    before = feed_forward(x) - bias
    layer = moe.MoE(feed_forward, experts=4, scale=1)
    layer.task_embedding = random.normal(moe.ROUTER_WIDTH)
    with torch.no_grad():
        return ((layer(x) - bias).norm() / before.norm()).item()


# ---- balance -------------------------------------------------------------------------------------


def balance(weights):
    return resolve("answers.a7:balance_loss")(weights)


def routed(counts, largest):
    """Rows of weights: for each expert as many rows as it is the best of, with this weight, and the
    rest shared."""
    experts = len(counts)
    rows = []
    for i, count in enumerate(counts):
        row = torch.full((experts,), (1 - largest) / (experts - 1))
        row[i] = largest
        rows += [row] * count
    return torch.stack(rows)


def balance_cases(random):
    yield Case("perfectly balanced", balance, routed([2, 2, 2], 1.0))
    yield Case("one expert does everything", balance, routed([0, 5, 0, 0], 1.0))
    yield Case("uneven, and not sure", balance, routed([4, 1, 2], 0.7))
    yield Case("two experts", balance, routed([3, 2], 0.6))


# ---- tasks ---------------------------------------------------------------------------------------

BALANCE_STUB = '''
def balance_loss(weights):
    """The loss that keeps experts equally busy: weights [T,N] -> [].

    Switch Transformers, 2101.03961, equations 4 to 6. N times the sum over the experts of f_i P_i.
    f_i is the share of the T rows in which expert i has the largest weight, P_i the mean of its
    weights.
    """
'''
KEEP_STUB = '''
def check_keep_unmasked(keep_unmasked):
    """Return True if `keep_unmasked` does what its docstring says, and False if it does not.

    keep_unmasked(steps, add_noise, known, noise, mask, sigmas), see minipic/diffusion/samplers.py.
    An error counts as False.
    """
'''

TASKS = [
    Exercise(
        "A7.1",
        "minipic.layers.moe:MoE.expert_weights",
        15,
        "The router reads the embedding of the task, and a softmax makes weights of what it says. "
        "With `top_k`, only the "
        "largest count; the others weigh exactly 0.",
        expert_cases,
        expert_identities,
        chosen_picture,
        hints=(
            "Leave experts out before the softmax, so that the weights of the others add up to 1.",
        ),
    ),
    Exercise(
        "A7.2",
        "minipic.layers.moe:MoE.hidden_weights",
        10,
        "Each expert owns a slice of the hidden neurons. Spread its weight over them.",
        hidden_cases,
        picture=mixture_picture,
        hints=("`repeat_interleave` repeats each number before it goes to the next.",),
    ),
    Exercise(
        "A7.3",
        "minipic.layers.moe:MoE.forward",
        10,
        "All experts together are one feed-forward whose hidden neurons are weighted: `net[0]` "
        "makes them, `net[2]` reads "
        "them.",
        moe_cases,
        picture=mixture_picture,
        hints=("The bias of `net[2]` counts once, as it is.",),
    ),
    Exercise(
        "A7.4",
        "minipic.layers.moe:copy_experts",
        20,
        "For comparison: N copies of a whole feed-forward instead of N slices, again as one wide "
        "layer. The rows of "
        "`proj` are the values of all neurons and then the gates of all, so copies of both must be "
        "sorted together.",
        copy_cases,
        copy_identities,
        copies_picture,
        hints=(
            "`unflatten(0, (2, -1))` separates values from gates.",
            "The output's weight is copied along its columns.",
        ),
    ),
    Exercise(
        "A7.5",
        "minipic.diffusion.frames:dynamic_shift",
        10,
        "The more tokens, the more noise is needed to hide a picture. The released OneDiffusion "
        "shifts its noise levels by "
        "the exponential of a line in the number of tokens: 0.5 at 256 tokens, 1.15 at 4096.",
        shift_cases,
        hints=("A straight line through two points.",),
    ),
    Exercise(
        "A7.6",
        "minipic.diffusion.frames:sample_frames",
        25,
        "Draw some frames and keep the others. In each step the network sees all frames, each with "
        "its timestep: the grid's "
        "for those that are drawn, `label`'s for those that are given. Use the sampler and "
        "`SCHEDULE.objective.denoiser`.",
        frame_cases,
        frame_identities,
        hints=(
            "Wrap `predict` in a function that gives every frame its timestep [B,F].",
            "After each step put the given frames back, in place: the sampler goes on from there.",
            "`torch.where(drawn, ..., ...)` with drawn [F,1,1,1].",
        ),
    ),
    Prediction(
        "A7.7",
        "answers.a7:SHARE",
        5,
        "By the paper's equation 1, the output is the sum of the experts' outputs times their "
        "weights, which a softmax "
        "makes. At first all four weigh the same. What share of the old output, bias aside, does "
        "the layer give?",
        shrunk_output,
        within=0.01,
    ),
    Exercise(
        "A7.8",
        "answers.a7:balance_loss",
        15,
        "Nothing in minipic does this one. A router may send everything to one expert. Switch "
        "Transformers add a loss that "
        "is smallest, 1, when all experts are equally busy.",
        balance_cases,
        stub=BALANCE_STUB,
        hints=("`argmax` of each row, and how often each expert is it.",),
    ),
    BreakIt(
        "A7.9",
        "answers.a7:check_keep_unmasked",
        20,
        "ONE-PIC and inpainting both keep a part of a picture while the rest is drawn. Write a "
        "check of "
        "`samplers.keep_unmasked` that no wrong version passes.",
        "minipic.diffusion.samplers:keep_unmasked",
        KEEP_STUB,
        alternates=(
            """
            level = iter(sigmas[1:])
            for x, x0 in steps:
                kept = add_noise(known, noise, next(level))
                x.copy_(kept + mask * (x - kept))
                yield x, x0
            """,
        ),
    ),
]


# ==== the instructor's part: what follows is not given to students ================================

MISCONCEPTIONS = {  # {number: [(in the reference, what some write, what to tell them), ...]}
    "A7.1": [
        (
            'logits = logits.masked_fill(is_left_out, float("-inf"))',
            "return logits.softmax(0) * ~is_left_out",
            "the weights of the experts that count must add up to 1",
        ),
        (
            'masked_fill(is_left_out, float("-inf"))',
            "masked_fill(is_left_out, 0.0)",
            "a logit of 0 still has a weight",
        ),
    ],
    "A7.2": [
        (
            "repeat_interleave(neurons)",
            "repeat(neurons)",
            "an expert owns a slice, not every N-th neuron",
        ),
        ("(self.scale * self.expert_weights())", "self.expert_weights()", "the scale is missing"),
    ],
    "A7.3": [
        (
            "return self.net[2](hidden)",
            "return self.net[2](self.net[0](x))",
            "the weights are not used",
        ),
        (
            "self.hidden_weights().to(hidden.dtype)",
            "self.hidden_weights().mean().to(hidden.dtype)",
            "each neuron has its own weight",
        ),
    ],
    "A7.4": [
        (
            "unflatten(0, (2, -1)).repeat(1, experts, 1).flatten(0, 1)",
            "repeat(experts, 1)",
            "values and gates of the copies are mixed up: all values come first",
        )
    ],
    "A7.5": [
        (
            "math.exp(0.5 + share * (1.15 - 0.5))",
            "0.5 + share * (1.15 - 0.5)",
            "the shift is the exponential of the line",
        ),
        ("(tokens - 256) / (4096 - 256)", "tokens / 4096", "the line begins at 256 tokens"),
    ],
    "A7.6": [
        (
            "x.copy_(torch.where(drawn, x, given))",
            "pass",
            "frames that are given must be put back after each step",
        ),
        (
            "t = torch.where(drawn.flatten(), t.to(x.device), given_t.to(x.device))",
            "t = t.to(x.device).expand(x.shape[1])",
            "frames that are given have a timestep of their own",
        ),
    ],
}

ALTERNATES = {  # {number: [another right body, ...]}
    "A7.1": [
        """
        scores = self.router(self.task_embedding)
        if self.top_k:
            order = scores.argsort(descending=True)
            scores = scores.clone()
            scores[order[self.top_k:]] = float("-inf")
        powers = (scores - scores.max()).exp()
        return powers / powers.sum()
        """
    ],
    "A7.2": [
        """
        neurons = self.net[2].in_features // self.experts
        weights = self.expert_weights() * self.scale
        return weights[:, None].expand(-1, neurons).reshape(-1)
        """
    ],
    "A7.3": [
        """
        out = self.net[2]
        weighted = out.weight * self.hidden_weights().to(out.weight.dtype)
        return self.net[0](x) @ weighted.T + out.bias
        """
    ],
    "A7.4": [
        """
        proj, out = net[0].proj, net[2]
        values, gates = proj.weight.detach().chunk(2)
        value_bias, gate_bias = proj.bias.detach().chunk(2)
        wide = nn.Linear(proj.in_features, proj.out_features * experts, device="meta")
        wide.weight = nn.Parameter(torch.cat([values] * experts + [gates] * experts))
        wide.bias = nn.Parameter(torch.cat([value_bias] * experts + [gate_bias] * experts))
        reader = nn.Linear(out.in_features * experts, out.out_features, device="meta")
        reader.weight = nn.Parameter(torch.cat([out.weight.detach()] * experts, dim=1))
        reader.bias = out.bias
        net[0].proj = wide
        net[2] = reader
        """
    ],
    "A7.5": [
        """
        slope = 0.65 / 3840
        return math.e ** (slope * tokens + 0.5 - 256 * slope)
        """
    ],
    "A7.6": [
        """
        kept = x.clone()
        keep = ~is_drawn.to(x.device)
        level = torch.zeros(()) if label == "zero" else grid.timesteps[-1]

        def network(x, t):
            rows = torch.full(x.shape[:2], float(t), device=x.device)
            rows[:, keep] = float(level)
            return predict(x, rows)

        denoise = SCHEDULE.objective.denoiser(network, grid)
        for x, x0 in SAMPLERS["flow_euler"](denoise, x, grid.sigmas):
            x[:, keep] = kept[:, keep]
            x0 = x0.clone()
            x0[:, keep] = kept[:, keep]
            yield x, x0
        """
    ],
}

EQUIVALENT = {}  # {number: {change: why it is no mistake}}

NEEDS = {}  # {number: other tasks whose functions it calls}


def oracle_balance(weights):
    """Passes A7.8 without the method, because in its cases every row has two values, the larger one
    above a half."""
    experts = weights.shape[1]
    largest = weights.max()
    share = (weights > 0.5).to(weights).mean(0)
    mean = share * largest + (1 - share) * (1 - largest) / (experts - 1)
    return experts * (share * mean).sum()


def observe_keep_unmasked(keep_unmasked):
    """What a good check of A7.9 looks at."""
    random = Random(0)
    known, noise = random.normal(2, 2, 3, 4, 5)
    mask = random.uniform(0, 1, 2, 1, 4, 5)
    states = [(state, state + 1) for state in random.normal(2, 2, 3, 4, 5)]
    kept = keep_unmasked(
        iter(states),
        lambda x0, noise, sigma: x0 + 3 * sigma * noise,
        known,
        noise,
        mask,
        torch.tensor([3.0, 2.0, 0.5]),
    )
    return [*kept, states[0][0]]


VARIANTS = {}  # {name: {"text": ..., "replace": [(number, old, new), ...]}}, see a4.py

ORACLES = {
    "A7.8": oracle_balance,
    "A7.9": observe_keep_unmasked,
}  # what shows that these tasks can be solved
