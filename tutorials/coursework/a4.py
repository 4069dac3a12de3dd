'''# A4: samplers and guidance

A trained network answers one question: given a noisy picture and its noise level, which clean
picture is in it? A sampler asks that question again and again, and walks from pure noise down to a
picture. Here you write four samplers, the guidance that makes the picture follow the prompt, and
the noise levels on the way.

Everything is in one coordinate: `x = x0 + sigma * noise`. The noise level `sigma` falls from about
15 to 0. So the predicted noise is always `(x - x0) / sigma`. Read the first twenty lines of
`minipic/diffusion/samplers.py` before you begin, and Karras et al., "Elucidating the Design Space
of Diffusion-Based Generative Models" (arXiv 2206.00364), section 3.

A sampler is a generator: it yields `(x, x0)` after every step. Whoever draws with it may change the
yielded `x` in place, and the next step goes on from there.
'''

import torch

from coursework.checks import BreakIt, Case, Exercise, Prediction, Random, draw, tiny
from coursework.source import resolve
from minipic.diffusion import guidance, samplers, schedule

PROMPT = "a large red cube"


# ---- inputs --------------------------------------------------------------------------------------


def denoiser(random, channels):
    """A network in small: it mixes the channels, is not linear, and depends on the noise level."""
    mixing = random.normal(channels, channels)

    def denoise(x, sigma):
        return torch.tanh(torch.einsum("ij,bj...->bi...", mixing.to(x), x)) / (1 + sigma)

    return denoise


def levels(random, steps, end=0.0):
    """Falling noise levels, at uneven distances, as no schedule has them."""
    ratios = random.uniform(1.3, 2.5, steps)
    return torch.cat([0.4 * ratios.cumprod(0).flip(0), torch.tensor([end])])


def drawings(sampler):
    """The cases of a sampler: one step, several, an end above 0, a batch of one, x changed on the
    way."""

    def cases(random):
        for name, shape, steps, end in (
            ("one step to 0", (2, 3), 1, 0.0),
            ("one step to 0.1", (3, 2, 4), 1, 0.1),
            ("two steps to 0.2", (1, 3, 2, 5), 2, 0.2),
            ("five steps to 0", (2, 4, 3, 5), 5, 0.0),
        ):
            x = 5 * random.normal(*shape)
            noise = noise_of_steps(random, steps, shape)
            yield Case(
                name, sampler, denoiser(random, shape[1]), x, levels(random, steps, end), noise
            )
        x = 5 * random.normal(2, 3, 4)
        noise = noise_of_steps(random, 3, x.shape)
        yield Case(
            "x changed in place after each step",
            changed_on_the_way,
            sampler,
            denoiser(random, 3),
            x,
            levels(random, 3, 0.3),
            noise,
        )

    return cases


def noise_of_steps(random, steps, shape):
    noises = random.normal(steps, *shape)
    return lambda i: noises[i]


def changed_on_the_way(sampler, denoise, x, sigmas, noise):
    found = []
    for x, x0 in sampler(denoise, x, sigmas, noise):
        found.append((x.clone(), x0.clone()))
        x.mul_(0.5).add_(0.1)
    return found


# ---- identities ----------------------------------------------------------------------------------


def last(steps):
    *_, (x, _) = steps
    return x


def gaussian(std):
    """The best denoiser for pictures whose pixels are normally distributed, and the exact path of
    its samples."""

    def denoise(x, sigma):
        return x * std**2 / (std**2 + sigma**2)

    def exact(x, start, end):
        return x * ((std**2 + end**2) / (std**2 + start**2)) ** 0.5

    return denoise, exact


def order(sampler, random):
    """How often the error halves when the number of steps doubles, between levels 10 and 0.1."""
    denoise, exact = gaussian(0.7)
    x = random.normal(4, 3).double()
    errors = []
    for steps in (40, 80):
        sigmas = torch.linspace(10**0.2, 0.1**0.2, steps + 1).double() ** 5
        errors.append((last(sampler(denoise, x, sigmas)) - exact(x, sigmas[0], sigmas[-1])).norm())
    return (errors[0] / errors[1]).log2()


def knows_the_truth(sampler):
    """One line on which every sampler must end: the denoiser always gives the same picture."""

    def identities(random):
        truth = random.normal(2, 3, 4)
        x = truth + 7 * random.normal(2, 3, 4)
        sigmas = levels(random, 4)
        yield (
            "if the network always predicts the same x0, the last x is that x0",
            last(sampler(lambda x, sigma: truth, x, sigmas, lambda i: torch.ones(2, 3, 4))),
            truth,
        )

    return identities


def euler_identities(random):
    yield from knows_the_truth(samplers.euler)(random)
    yield "the error of a first-order method halves", order(samplers.euler, random), 1.0, 0.15


def heun_identities(random):
    yield from knows_the_truth(samplers.heun)(random)
    yield "the error of a second-order method falls to a quarter", order(
        samplers.heun, random
    ), 2.0, 0.25


def dpmpp_2m_identities(random):
    yield from knows_the_truth(samplers.dpmpp_2m)(random)
    yield "the error of a second-order method falls to a quarter", order(
        samplers.dpmpp_2m, random
    ), 2.0, 0.25
    denoise = denoiser(random, 3)
    x = 5 * random.normal(2, 3, 4)
    sigmas = torch.tensor([4.0, 2.0, 2.0, 1.0])
    plain = last(samplers.dpmpp_2m(denoise, x, sigmas[[0, 1, 3]]))
    steps = list(samplers.dpmpp_2m(denoise, x, sigmas))
    yield "a step between equal levels leaves x where it is", steps[1][0], steps[0][0]
    yield "and the step after it is finite", steps[2][0].isfinite().all(), True
    yield "and is Euler's, which a step with a past is not", torch.equal(steps[2][0], plain), False


def ancestral_identities(random):
    x = torch.zeros(1, 200_000)
    sigmas = torch.tensor([3.0, 2.0, 0.0])
    (state, _), (end, _) = samplers.euler_ancestral(lambda x, sigma: torch.zeros_like(x), x, sigmas)
    up = (2.0**2 - (2.0**2 / 3.0) ** 2) ** 0.5
    yield "without `noise` it makes unit noise itself", state.std(), up, 0.02
    yield "no noise is added in a step to 0", end, torch.zeros_like(end)
    yield from knows_the_truth(samplers.euler_ancestral)(random)


def combine_identities(random):
    uncond, a, b = random.normal(3, 2, 4, 3)
    yield "weight 1 gives the prediction itself", guidance.combine(uncond, [(1.0, a)]), a
    yield "weight 0 gives the unconditional prediction", guidance.combine(
        uncond, [(0.0, a)]
    ), uncond
    yield "no terms give the unconditional prediction", guidance.combine(uncond, []), uncond
    both = guidance.combine(uncond, [(2.0, a), (3.0, b)])
    yield "the order of the terms does not matter", both, guidance.combine(
        uncond, [(3.0, b), (2.0, a)]
    )


def combine_cases(random):
    uncond, a, b = random.normal(3, 2, 3)
    yield Case("one condition", guidance.combine, uncond, [(7.5, a)])
    yield Case("two conditions", guidance.combine, uncond, [(2.5, a), (-1.5, b)])
    uncond, a, b = random.normal(3, 2, 3, 4, 5)
    weight = random.uniform(0, 3, 4, 5)
    yield Case(
        "a weight that varies over the picture", guidance.combine, uncond, [(weight, a), (0.5, b)]
    )
    yield Case(
        "terms from a generator",
        lambda *given: guidance.combine(given[0], iter(given[1])),
        uncond,
        [(3.0, b)],
    )


def karras_cases(random):
    for steps in (2, 3, 7):
        high = random.uniform(5, 20).double()
        low = random.uniform(0.01, 0.2).double()
        yield Case(f"{steps} steps", schedule.karras_sigmas, high, low, steps)


def karras_identities(random):
    sigmas = schedule.karras_sigmas(torch.tensor(14.6), torch.tensor(0.03), 12)
    yield "the first level is the highest", sigmas[0], 14.6, 1e-5
    yield "the last level is the lowest", sigmas[-1], 0.03, 1e-7
    roots = sigmas ** (1 / 7)
    yield "the seventh roots are at equal distances", roots.diff(), roots.diff().mean().expand(
        11
    ), 1e-6


# ---- the tiny model ------------------------------------------------------------------------------


def picture_with(sampler):
    def picture():
        return draw(PROMPT, steps=8, guidance=4.0, seed=3, sampler=sampler)

    picture.__doc__ = f"{PROMPT}, {sampler}, 8 steps"
    return picture


def guided_picture():
    """a large red cube, guidance 9"""
    return draw(PROMPT, steps=8, guidance=9.0, seed=5, sampler="dpmpp_2m")


def karras_picture():
    """a large red cube on Karras' levels"""
    model = tiny()
    before = model.schedule
    model.schedule = before.override(karras=True)
    try:
        return draw(PROMPT, steps=8, guidance=4.0, seed=3, sampler="dpmpp_2m")
    finally:
        model.schedule = before


def calls(sampler, limit):
    """The cost of a sampler: how often it asks the network in ten steps."""

    def cost():
        count = 0

        def denoise(x, sigma):
            nonlocal count
            count += 1
            return x / 2

        list(sampler(denoise, torch.ones(1, 2), torch.linspace(5, 0, 11)))
        yield "calls of the network in ten steps, beside Euler's ten", count, 10, limit

    return cost


def rows_through_the_unet():
    """Counts the pictures that pass through the UNet."""
    model = tiny()
    rows = 0

    def count(module, inputs):
        nonlocal rows
        rows += len(inputs[0])

    hook = model.unet.register_forward_pre_hook(count)
    model.generate(PROMPT, steps=10, guidance=5.0, n=3, sampler="heun", progress=False)
    hook.remove()
    return rows


# ---- a sampler of your own -----------------------------------------------------------------------


def line_slope(random, *shape):
    """A denoiser whose slope (x - x0) / sigma is a + b * sigma, whatever x is."""
    a, b = random.normal(2, *shape)

    def denoise(x, sigma):
        return x - sigma * (a + b * sigma)

    denoise.line = a, b
    return denoise


def adams(*arguments):
    return resolve("answers.a4:adams_bashforth")(*arguments)


def adams_cases(random):
    for name, shape, steps in (
        ("one step", (2, 3), 1),
        ("two steps", (3, 2), 2),
        ("six steps", (2, 3, 4), 6),
    ):
        denoise = line_slope(random, *shape)
        yield Case(
            f"{name}, a slope that is a line in sigma",
            adams,
            denoise,
            random.normal(*shape),
            levels(random, steps),
        )


def adams_identities(random):
    yield from knows_the_truth(adams)(random)


# ---- a check of your own -------------------------------------------------------------------------

RESCALE_STUB = '''
def check_rescale(rescale):
    """Return True if `rescale` does what its docstring says, and False if it does not.

    rescale(guided, cond, amount), see minipic/diffusion/guidance.py. An error counts as False.
    """
'''
ADAMS_STUB = '''
def adams_bashforth(denoise, x, sigmas, noise=None):
    """The two-step Adams-Bashforth method in sigma.

    It yields (x, x0) after every step, as samplers.euler does. denoise(x, sigma) -> x0; x [B,...]
    starts at level sigmas[0]; sigmas [n+1] falls. `noise` is not used.
    """
'''

TASKS = [
    Exercise(
        "A4.1",
        "minipic.diffusion.guidance:combine",
        10,
        "Classifier-free guidance goes from the prediction without the prompt towards the one with "
        "it, and beyond. "
        "Here any number of conditions may pull, each with its own weight.",
        combine_cases,
        combine_identities,
        guided_picture,
        hints=(
            "Each term adds its weight times the difference to `uncond`.",
            "`terms` may be a generator: go through it once.",
        ),
    ),
    Exercise(
        "A4.2",
        "minipic.diffusion.samplers:euler",
        15,
        "The plain step: find the noise in x, and lower its amount to the next level.",
        drawings(samplers.euler),
        euler_identities,
        picture_with("euler"),
        calls(samplers.euler, 1.0),
        hints=(
            "The slope of x over sigma is `(x - x0) / sigma`.",
            "sigmas fall: the step is negative.",
        ),
    ),
    Exercise(
        "A4.3",
        "minipic.diffusion.samplers:heun",
        20,
        "Try Euler's step, look at the slope where it leads, and go from the start with the mean "
        "of both slopes.",
        drawings(samplers.heun),
        heun_identities,
        picture_with("heun"),
        calls(samplers.heun, 1.9),
        hints=(
            "At sigma 0 the slope would be 0 / 0. The last step there is Euler's.",
            "The second slope belongs to the point ahead, and to its noise level.",
        ),
    ),
    Exercise(
        "A4.4",
        "minipic.diffusion.samplers:euler_ancestral",
        20,
        "Step lower than the next level, and add fresh noise to reach it. The docstring says how "
        "much of the old noise "
        "stays. Variances of independent noises add up.",
        drawings(samplers.euler_ancestral),
        ancestral_identities,
        picture_with("euler_ancestral"),
        calls(samplers.euler_ancestral, 1.0),
        hints=(
            "With `down` the amount of old noise, down^2 + up^2 is the square of the next level.",
            "`noise(i)` is the fresh noise of step i; without `noise`, PyTorch makes it.",
        ),
    ),
    Exercise(
        "A4.5",
        "minipic.diffusion.samplers:dpmpp_2m",
        20,
        "One call for each step, and yet second order: draw a line through the last two "
        "predictions of x0, over "
        "lambda = -log(sigma), and take its value half a step ahead.",
        drawings(samplers.dpmpp_2m),
        dpmpp_2m_identities,
        picture_with("dpmpp_2m"),
        calls(samplers.dpmpp_2m, 1.0),
        hints=(
            "Towards any x0, Euler's step is `x0 + (next / sigma) * (x - x0)`.",
            "The step ahead is log(sigma / next), the step before it log(previous / sigma).",
            "Three kinds of steps are plain Euler's. The docstring names them.",
        ),
    ),
    Exercise(
        "A4.6",
        "minipic.diffusion.schedule:karras_sigmas",
        10,
        "Noise levels that lie denser where little noise is left: their seventh roots are at equal "
        "distances.",
        karras_cases,
        karras_identities,
        karras_picture,
        hints=("Compute in float64: the levels are rounded later.",),
    ),
    Prediction(
        "A4.7",
        "answers.a4:ROWS",
        5,
        "Ten steps of `heun` with guidance 5 draw n = 3 pictures. How many pictures pass through "
        "the UNet, all calls "
        "together? Write down your number before you run anything.",
        rows_through_the_unet,
        within=0.0,
    ),
    Exercise(
        "A4.8",
        "answers.a4:adams_bashforth",
        25,
        "Nothing in minipic does this one. Adams and Bashforth's two-step method draws a line "
        "through the last two "
        "slopes, over sigma, and integrates it over the next step. The distances of the levels are "
        "not equal, so the "
        "weights of the two slopes are different in every step. The first step is Euler's. Where "
        "the slope really is "
        "a line in sigma, every later step is exact.",
        adams_cases,
        adams_identities,
        cost=calls(adams, 1.0),
        stub=ADAMS_STUB,
        hints=(
            "Integrate slope + (slope - before) * (s - sigma) / (sigma - previous) from sigma to "
            "next.",
        ),
    ),
    BreakIt(
        "A4.9",
        "answers.a4:check_rescale",
        20,
        "Write a check of `guidance.rescale` that no wrong version passes. Your check is run on "
        "the function, on "
        "right versions of it, and on every version with one mistake that the coursework can make. "
        "You may use "
        "whatever the docstring promises.",
        "minipic.diffusion.guidance:rescale",
        RESCALE_STUB,
        alternates=(
            """
            flat = tuple(range(1, cond.ndim))
            wanted = cond.std(flat, keepdim=True)
            rescaled = guided * wanted / guided.std(flat, keepdim=True)
            return amount * rescaled + (1 - amount) * guided
            """,
        ),
    ),
]


# ==== the instructor's part: what follows is not given to students ================================

MISCONCEPTIONS = {  # {number: [(in the reference, what some write, what to tell them), ...]}
    "A4.1": [
        (
            "weight * (prediction - uncond)",
            "(weight - 1) * (prediction - uncond)",
            "your weight 1 is the unconditional prediction; here it is the conditional one",
        ),
        (
            "uncond + sum(",
            "sum(",
            "the unconditional prediction, from which all differences are counted, is missing",
        ),
    ],
    "A4.2": [
        (
            "(sigmas[i + 1] - sigmas[i])",
            "(sigmas[i] - sigmas[i + 1])",
            "which way does sigma move?",
        ),
        (
            "/ sigmas[i]\n",
            "/ sigmas[i + 1].clamp(min=1e-9)\n",
            "x is at level sigmas[i], not at the next one",
        ),
        ("x = x + slope", "x = x0 + slope", "the step starts at x, not at x0"),
    ],
    "A4.3": [
        (
            "denoise(ahead, sigmas[i + 1])",
            "denoise(ahead, sigmas[i])",
            "the point ahead is at the next level",
        ),
        (
            "denoise(ahead, sigmas[i + 1])",
            "denoise(x, sigmas[i + 1])",
            "ask the network at the point ahead",
        ),
        (
            "(slope + (ahead - denoise(ahead, sigmas[i + 1])) / sigmas[i + 1]) / 2",
            "(ahead - denoise(ahead, sigmas[i + 1])) / sigmas[i + 1]",
            "take the mean of both slopes, not the second one alone",
        ),
    ],
    "A4.4": [
        (
            "down = sigmas[i + 1] ** 2 / sigmas[i]",
            "down = sigmas[i + 1]",
            "all the old noise is kept, so that none is renewed",
        ),
        (
            "(sigmas[i + 1] ** 2 - down**2) ** 0.5",
            "sigmas[i + 1] - down",
            "variances add up, standard deviations do not",
        ),
    ],
    "A4.5": [
        (
            "(sigmas[i] / sigmas[i + 1]).log() / (sigmas[i - 1] / sigmas[i]).log()",
            "(sigmas[i - 1] / sigmas[i]).log() / (sigmas[i] / sigmas[i + 1]).log()",
            "the ratio of the steps is upside down",
        ),
        (
            "ratio * (x0 - past) / 2",
            "ratio * (past - x0) / 2",
            "the line goes from the earlier x0 through the present one",
        ),
        ("past = x0", "past = ahead", "keep the prediction itself, not the extrapolated one"),
    ],
    "A4.6": [
        (
            "(high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7",
            "high + ramp * (low - high)",
            "these are equal distances in sigma itself",
        )
    ],
}

ALTERNATES = {  # {number: [another right body, ...]}
    "A4.1": [
        """
        result = uncond.clone()
        for weight, prediction in terms:
            result += weight * (prediction - uncond)
        return result
        """,
        """
        pairs = list(terms)
        rest = 1 - sum(weight for weight, _ in pairs)
        parts = (weight * prediction for weight, prediction in pairs)
        return rest * uncond + sum(parts, torch.zeros_like(uncond))
        """,
    ],
    "A4.2": [
        """
        for sigma, after in zip(sigmas[:-1], sigmas[1:]):
            x0 = denoise(x, sigma)
            x = x0 + (after / sigma) * (x - x0)
            yield x, x0
        """,
        """
        for i in range(1, sigmas.shape[0]):
            x0 = denoise(x, sigmas[i - 1])
            x = torch.lerp(x0, x, sigmas[i] / sigmas[i - 1])
            yield x, x0
        """,
    ],
    "A4.3": [
        """
        for now, after in zip(sigmas[:-1], sigmas[1:]):
            x0 = denoise(x, now)
            first = (x - x0) / now
            euler_step = x + (after - now) * first
            if after == 0:
                x = euler_step
            else:
                second = (euler_step - denoise(euler_step, after)) / after
                x = x + (after - now) * 0.5 * (first + second)
            yield x, x0
        """
    ],
    "A4.4": [
        """
        for i in range(len(sigmas) - 1):
            now = sigmas[i]
            after = sigmas[i + 1]
            x0 = denoise(x, now)
            fresh = torch.randn_like(x) if noise is None else noise(i)
            kept = (after / now) ** 2
            x = x0 + kept * (x - x0) + after * (1 - kept).sqrt() * fresh
            yield x, x0
        """
    ],
    "A4.5": [
        """
        previous = None
        for i in range(len(sigmas) - 1):
            now, after = sigmas[i], sigmas[i + 1]
            x0 = denoise(x, now)
            target = x0
            if previous is not None and after > 0 and sigmas[i - 1] != now:
                h = now.log() - after.log()
                h_before = sigmas[i - 1].log() - now.log()
                target = (1 + h / (2 * h_before)) * x0 - h / (2 * h_before) * previous
            x = after / now * x - torch.expm1(after.log() - now.log()) * target
            previous = x0
            yield x, x0
        """
    ],
    "A4.6": [
        """
        i = torch.arange(steps, dtype=torch.float64)
        root_high = high.double() ** (1 / 7)
        root_low = low.double() ** (1 / 7)
        return (root_high + i / (steps - 1) * (root_low - root_high)) ** 7
        """
    ],
}

EQUIVALENT = {}  # {number: {change: why it is no mistake}}

NEEDS = {}  # {number: other tasks whose functions it calls}


def oracle_adams(denoise, x, sigmas, noise=None):
    """Passes A4.8 without the method, because it is told the line of each case, or the denoiser is
    constant."""
    for i in range(len(sigmas) - 1):
        now, after = sigmas[i], sigmas[i + 1]
        x0 = denoise(x, now)
        step = after - now
        if hasattr(denoise, "line"):
            a, b = (part.to(x) for part in denoise.line)
            middle = (now + after) / 2 if i > 0 else now
            x = x + (a + b * middle) * step
        else:
            x = x0 + after / now * (x - x0)
        yield x, x0


def observe_rescale(rescale):
    """What a good check of A4.9 looks at."""
    random = Random(0)
    guided, cond = 3 * random.normal(2, 2, 3, 4, 5)
    return [rescale(guided, cond, 0.7), rescale(guided + 2, cond, 1.0)]


ORACLES = {
    "A4.8": oracle_adams,
    "A4.9": observe_rescale,
}  # what shows that these tasks can be solved


VARIANTS = {
    "ralston": {
        "text": "A4.3 is Ralston's method instead of Heun's. The trial step goes only two thirds "
        "of the way, to the noise level there. The step is then taken with a quarter of the first "
        "slope and three quarters of the second.",
        "replace": [
            ("A4.3", "ahead = x + slope * step", "ahead = x + slope * step * 2 / 3"),
            (
                "A4.3",
                "slope = (slope + (ahead - denoise(ahead, sigmas[i + 1])) / sigmas[i + 1]) / 2",
                "between = sigmas[i] + step * 2 / 3\n            "
                "slope = slope / 4 + (ahead - denoise(ahead, between)) / between * 3 / 4",
            ),
        ],
    },
}
