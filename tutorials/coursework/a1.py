'''# A1: tokens and text encoders

A prompt is letters; the UNet reads vectors. On the way lie a tokenizer, which cuts the text into
pieces of a fixed vocabulary, and two CLIP text encoders, which let each piece look at those before
it. Here you write the frame around the tokens, the encoder's layers, what SDXL takes out of them,
and the loss that CLIP was trained with.

Every row of ids is 77 long: START, up to 75 tokens, END, and padding. Read "Learning Transferable
Visual Models From Natural Language Supervision" (arXiv 2103.00020), section 2, and the first lines
of `minipic/text.py`.
'''

from types import SimpleNamespace

import torch
import torch.nn as nn

from coursework.checks import BreakIt, Case, Exercise, Prediction, draw, tiny
from coursework.source import resolve
from minipic import text
from minipic.models import clip

PROMPT = "a large yellow cylinder under a purple sky"


# ---- inputs --------------------------------------------------------------------------------------


def chunk_of(random, length):
    ids = random.integers(40, length).tolist()
    return [(id, weight) for id, weight in zip(ids, random.uniform(0.5, 2, length).tolist())]


def pad_cases(random):
    frame = SimpleNamespace(pad=41, start=42, end=43)
    for name, lengths in (
        ("one chunk", (3,)),
        ("chunks of several lengths", (2, 5, 1)),
        ("full and empty", (75, 0)),
    ):
        chunks = [chunk_of(random, length) for length in lengths]
        yield Case(name, text.Tokenizer.pad_chunks, frame, chunks)


def pad_identities(random):
    ids, weights = text.Tokenizer.pad_chunks(SimpleNamespace(pad=0, start=8, end=9), [[(5, 2.0)]])
    yield "START, the token, END, padding", ids[0, :4], torch.tensor([8, 5, 9, 0])
    yield "what is no token weighs 1", weights.sum(), 76 + 2.0


def self_attention_cases(random):
    for name, shape, heads, causal in (
        ("two heads", (2, 5, 8), 2, False),
        ("causal", (1, 4, 6), 3, True),
        ("one token", (3, 1, 4), 1, True),
    ):
        layer = random.fill(clip.SelfAttention(shape[2], heads))
        yield Case(name, clip.SelfAttention.forward, layer, random.normal(*shape), causal)


def self_attention_identities(random):
    layer = random.fill(clip.SelfAttention(6, 2))
    x = random.normal(2, 5, 6)
    before = layer(x, causal=True)
    x[:, 4] += 1
    yield "when it is causal, no token sees a later one", layer(x, causal=True)[:, :4], before[
        :, :4
    ], 1e-6


class Double(nn.Module):
    """In the place of attention: easy to follow, and different when it is causal."""

    def forward(self, x, causal):
        return 2 * x + (1 if causal else 0)


def layer_of(random):
    config = clip.CLIPTextConfig(
        hidden_size=6,
        intermediate_size=10,
        num_attention_heads=2,
        num_hidden_layers=1,
        vocab_size=9,
    )
    layer = random.fill(clip.Layer(config))
    layer.self_attn = Double()
    return layer


def layer_cases(random):
    yield Case("causal", clip.Layer.forward, layer_of(random), random.normal(2, 3, 6), True)
    yield Case("not causal", clip.Layer.forward, layer_of(random), random.normal(1, 4, 6), False)


class Running(nn.Module):
    """In the place of a layer: every token becomes the sum of those before it."""

    def forward(self, x, causal):
        return x.cumsum(1) if causal else x.flip(1).cumsum(1).flip(1)


def encoder_of(random, projection):
    config = clip.CLIPTextConfig(
        hidden_size=6,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=20,
        projection_dim=5,
        with_projection=projection,
    )
    encoder = random.fill(clip.CLIPText(config))
    encoder.text_model.encoder.layers = nn.ModuleList([Running(), Running()])
    return encoder


def rows_of(ids, length):
    """Rows of ids that begin with START, 18, and end with END, 19."""
    rows = [[18, *row, 19] + [19] * (length - len(row) - 2) for row in ids]
    return torch.tensor(rows)


def clip_cases(random):
    ids = rows_of([[3], [4, 5, 1], [7, 7]], 7)
    yield Case(
        "the last id of the vocabulary ends a text",
        clip.CLIPText.forward,
        encoder_of(random, True),
        ids,
    )
    yield Case("without projection", clip.CLIPText.forward, encoder_of(random, False), ids[:2])
    grown = torch.tensor([[16, 19, 2, 17, 1, 17], [16, 3, 17, 19, 19, 0]])
    yield Case(
        "an end token of its own, below words that were added",
        clip.CLIPText.forward,
        encoder_of(random, True),
        grown,
        torch.full((2, 1), 17),
    )


def clip_identities(random):
    encoder = encoder_of(random, True)
    ids = rows_of([[3, 8], [4, 5]], 6)
    _, pooled = encoder(ids)
    ids[:, 5] = 0
    yield "what comes after the first end token does not count", encoder(ids)[1], pooled


class Spoken(nn.Module):
    """In the place of a text encoder: states that tell the layer, and a pooled vector that tells
    the end token."""

    def __init__(self, random):
        super().__init__()
        self.table = nn.Parameter(random.normal(30, 4))

    def forward(self, ids, end_token):
        x = self.table[ids]
        return [x, 2 * x, 3 * x, 4 * x], self.table[end_token[:, 0]]

    def last(self, hidden_states):
        return hidden_states[-1] + 100


def states_cases(random):
    ids = torch.cat([torch.full((3, 1), 7), random.integers(7, 3, 5)], dim=1)
    yield Case("SDXL", text.text_states, ids, Spoken(random), True)
    yield Case("SD 1.5", text.text_states, ids[:2], Spoken(random), False)


def loss_cases(random):
    for name, shape in (("one pair", (1, 3)), ("two pairs", (2, 4)), ("five pairs", (5, 3))):
        images, texts = random.normal(2, *shape)
        yield Case(name, clip.contrastive_loss, 3 * images, texts, random.uniform(0, 2))


def loss_identities(random):
    images, texts = random.normal(2, 4, 6)
    scale = torch.tensor(1.5)
    loss = clip.contrastive_loss(images, texts, scale)
    yield "the length of a vector does not count", clip.contrastive_loss(
        5 * images, 0.1 * texts, scale
    ), loss, 1e-5
    yield "pictures and texts may be exchanged", clip.contrastive_loss(
        texts, images, scale
    ), loss, 1e-5
    same = random.normal(1, 6).expand(4, 6)
    yield "where all look alike, one guesses: log 4", clip.contrastive_loss(
        same, same, scale
    ), torch.tensor(4.0).log(), 1e-5


# ---- the tiny model ------------------------------------------------------------------------------


def picture():
    """a large yellow cylinder under a purple sky, 6 steps"""
    return draw(PROMPT, steps=6, guidance=4.0, seed=1)


def vocabulary():
    return tiny().tokenizer.size


# ---- byte-pair encoding --------------------------------------------------------------------------


def random_merges(random, count):
    """Pairs of tokens, the most frequent first; every token of a pair is a letter or was made by an
    earlier pair."""
    letters = [*"abc"]
    known = letters + [letter + "</w>" for letter in letters]
    merges = []
    while len(merges) < count:
        first, second = (known[i] for i in random.integers(len(known), 2).tolist())
        joined = first + second
        if not first.endswith("</w>") and joined not in known:
            merges.append((first, second))
            known.append(joined)
    return merges


def merge(word, merges):
    return list(resolve("answers.a1:merge_word")(word, merges))


def merge_cases(random):
    yield Case("no merges", merge, "abc", [])
    yield Case(
        "the first pair of the list counts, not the first of the word",
        merge,
        "abcb",
        [("b", "c"), ("a", "b"), ("bc", "b</w>"), ("ab", "c")],
    )
    yield Case(
        "a pair that is there twice", merge, "ababab", [("a", "b"), ("a", "b</w>"), ("ab", "ab")]
    )
    yield Case("overlapping pairs", merge, "aaaaa", [("a", "a"), ("aa", "a</w>")])
    for length in (1, 6, 12, 20):
        merges = random_merges(random, 12)
        word = "".join("abc"[i] for i in random.integers(3, length).tolist())
        yield Case(f"a word of {length} letters", merge, word, merges)


# ---- tasks ---------------------------------------------------------------------------------------

MERGE_STUB = '''
def merge_word(word, merges):
    """The tokens of a word by byte-pair encoding, a list of texts.

    The word begins as its letters, the last one with "</w>" after it. Of all pairs of neighbours,
    that which comes first in `merges` is joined, wherever it stands, from left to right. This is
    repeated until no pair is in `merges`.

    merges: [(first, second), ...], no pair twice.
    """
'''
PARSE_STUB = '''
def check_parse_weights(parse_weights):
    """Return True if `parse_weights` does what its docstring says, and False if it does not.

    parse_weights(prompt), see minipic/text.py. An error counts as False.
    """
'''

TASKS = [
    Exercise(
        "A1.1",
        "minipic.text:Tokenizer.pad_chunks",
        15,
        "The encoders read rows of 77 ids. A row begins with START; then come the ids of a chunk, "
        "END, and padding. Each "
        "id has a weight, and what is no token weighs 1.",
        pad_cases,
        pad_identities,
        picture,
        hints=("Begin with a full tensor of padding, and write into it.",),
    ),
    Exercise(
        "A1.2",
        "minipic.models.clip:SelfAttention.forward",
        15,
        "Queries, keys and values all come from x, each by a projection, and are cut into heads "
        "for `attention`.",
        self_attention_cases,
        self_attention_identities,
        picture,
        hints=("[B,N,D] -> [B,N,h,d], and back before the last projection.",),
    ),
    Exercise(
        "A1.3",
        "minipic.models.clip:Layer.forward",
        10,
        "Attention lets tokens look at each other, the MLP thinks about each alone. Each reads a "
        "norm of x, and is added "
        "to x.",
        layer_cases,
        picture=picture,
        hints=("The MLP reads the norm of what attention has been added to.",),
    ),
    Exercise(
        "A1.4",
        "minipic.models.clip:CLIPText.forward",
        20,
        "The states of all layers, and one vector for the whole text: the state of its end token, "
        "which alone has seen "
        "everything. Padding may repeat the end token, so take the first.",
        clip_cases,
        clip_identities,
        picture,
        hints=(
            "`argmax` of a row of zeros and ones finds the first one.",
            "The final norm comes before the projection; `last` does it.",
        ),
    ),
    Exercise(
        "A1.5",
        "minipic.text:text_states",
        10,
        "What the UNet takes of an encoder. SDXL takes the last layer but one, without the final "
        "norm; SD 1.5 the last "
        "one, after it.",
        states_cases,
        picture=picture,
        hints=("The end token's id follows that of START, with which every row begins.",),
    ),
    Exercise(
        "A1.6",
        "minipic.models.clip:contrastive_loss",
        15,
        "CLIP was trained to find, for each picture of a batch, its text among all texts, and the "
        "other way round. The "
        "logits are cosines times a learnt scale.",
        loss_cases,
        loss_identities,
        hints=("Picture i belongs to text i: the right class of row i is i.",),
    ),
    Prediction(
        "A1.7",
        "answers.a1:TOKENS",
        5,
        "The vocabulary of a CLIP tokenizer has the 256 bytes, the 256 bytes as the ends of words, "
        "one token for each "
        "merge, and START and END. The tiny model's `weights/tiny/tokenizer/merges.txt` has one "
        "line for each merge, and "
        "a first line that is none. How many tokens are there?",
        vocabulary,
        within=0.0,
    ),
    Exercise(
        "A1.8",
        "answers.a1:merge_word",
        25,
        "minipic leaves this one to a library. Write byte-pair encoding yourself, without it.",
        merge_cases,
        stub=MERGE_STUB,
        hints=("A dictionary {pair: its place in the list} finds the best pair quickly.",),
    ),
    BreakIt(
        "A1.9",
        "answers.a1:check_parse_weights",
        25,
        "`parse_weights` reads brackets as AUTOMATIC1111's web UI does. Write a check of it that "
        "no wrong version passes.",
        "minipic.text:parse_weights",
        PARSE_STUB,
    ),
]


# ==== the instructor's part: what follows is not given to students ================================

MISCONCEPTIONS = {  # {number: [(in the reference, what some write, what to tell them), ...]}
    "A1.1": [
        (
            "inside = slice(1, 1 + len(chunk))",
            "inside = slice(0, len(chunk)); self.start = ids[row, 0]",
            "the tokens begin after START",
        ),
        (
            "ids[row, 1 + len(chunk)] = self.end",
            "ids[row, -1] = self.end",
            "END follows the last token; padding comes after",
        ),
        (
            "torch.ones(len(chunks), LENGTH)",
            "torch.zeros(len(chunks), LENGTH)",
            "what is no token weighs 1",
        ),
    ],
    "A1.2": [
        ("causal=causal", "causal=True", "whether it is causal is a parameter"),
        (
            "attention(q, k, v, causal=causal)",
            "attention(q, v, k, causal=causal)",
            "keys and values are exchanged",
        ),
    ],
    "A1.3": [
        ("x + self.mlp(self.layer_norm2(x))", "x + self.mlp(x)", "the MLP reads a norm of x"),
        (
            "x + self.mlp(self.layer_norm2(x))",
            "self.mlp(self.layer_norm2(x))",
            "what the MLP makes is added to x",
        ),
    ],
    "A1.4": [
        (
            "(ids == end_token).int().argmax(dim=1)",
            "ids.argmax(dim=1)",
            "an added word has a larger id than the end token",
        ),
        (
            "(ids == end_token).int().argmax(dim=1)",
            "ids.shape[1] - 1 - (ids == end_token).flip(1).int().argmax(dim=1)",
            "padding may repeat the end token: the first one counts",
        ),
        (
            "pooled = self.last(hidden_states)[rows, end]",
            "pooled = hidden_states[-1][rows, end]",
            "the final norm comes before the projection",
        ),
    ],
    "A1.5": [
        (
            "hidden_states[-2], pooled",
            "encoder.last(hidden_states), pooled",
            "SDXL takes the last layer but one",
        ),
        (
            "return encoder.last(hidden_states), None",
            "return hidden_states[-1], None",
            "SD 1.5 takes it after the final norm",
        ),
    ],
    "A1.6": [
        ("logit_scale.exp() * ", "logit_scale * ", "logit_scale is the logarithm of the scale"),
        (
            "F.cross_entropy(logits.T, target)",
            "F.cross_entropy(logits, target)",
            "texts must find their pictures too",
        ),
        ("F.normalize(texts, dim=-1).T", "texts.T", "cosines need both vectors to have length 1"),
    ],
}

ALTERNATES = {  # {number: [another right body, ...]}
    "A1.1": [
        """
        all_ids = []
        all_weights = []
        for chunk in chunks:
            rest = LENGTH - 2 - len(chunk)
            all_ids.append([self.start] + [id for id, _ in chunk] + [self.end] + rest * [self.pad])
            all_weights.append([1.0] + [weight for _, weight in chunk] + [1.0] * (rest + 1))
        return torch.tensor(all_ids), torch.tensor(all_weights)
        """
    ],
    "A1.2": [
        """
        shape = *x.shape[:2], self.heads, x.shape[2] // self.heads
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (projection(x).view(shape) for projection in projections)
        out = attention(q, k, v, causal, backend="naive")
        return self.out_proj(out.reshape(x.shape))
        """
    ],
    "A1.3": [
        """
        attended = self.self_attn(self.layer_norm1(x), causal) + x
        return attended + self.mlp(self.layer_norm2(attended))
        """
    ],
    "A1.4": [
        """
        if end_token is None:
            end_token = torch.full((len(ids), 1), self.config.vocab_size - 1, device=ids.device)
        states = self.text_model.encoder(self.text_model.embeddings(ids), True)
        final = self.text_model.final_layer_norm(states[-1])
        found = []
        for row in range(len(ids)):
            first = (ids[row] == end_token[row]).nonzero()[0, 0]
            found.append(final[row, first])
        return states, self.text_projection(torch.stack(found))
        """
    ],
    "A1.5": [
        """
        device = next(encoder.parameters()).device
        rows = ids.to(device)
        states, vector = encoder(rows, rows[:, 0].unsqueeze(1) + 1)
        return (states[len(states) - 2], vector) if sdxl else (encoder.last(states), None)
        """
    ],
    "A1.6": [
        """
        a = images / images.norm(dim=1, keepdim=True)
        b = texts / texts.norm(dim=1, keepdim=True)
        logits = torch.exp(logit_scale) * torch.einsum("id,jd->ij", a, b)
        right = logits.diagonal()
        return ((logits.logsumexp(1) - right).mean() + (logits.logsumexp(0) - right).mean()) / 2
        """
    ],
}

EQUIVALENT = {  # {number: {change: why it is no mistake}}
    "A1.5": {
        "True -> False": "the ids are the same, also if the CPU waits until they are on the device"
    },
    "A1.6": {
        "-1 -> 1": "vectors lie in rows: the last dimension is number 1",
        "-1 -> 1 #2": "vectors lie in rows: the last dimension is number 1",
    },
}

NEEDS = {}  # {number: other tasks whose functions it calls}


def oracle_merge(word, merges):
    """Passes A1.8 by the library that students must do without."""
    from tokenizers import Tokenizer, models

    letters = "abc"
    tokens = [
        *letters,
        *(letter + "</w>" for letter in letters),
        *(first + second for first, second in merges),
    ]
    model = models.BPE(
        {token: i for i, token in enumerate(dict.fromkeys(tokens))},
        merges,
        end_of_word_suffix="</w>",
    )
    return Tokenizer(model).encode(word).tokens


def observe_parse_weights(parse_weights):
    """What a good check of A1.9 looks at."""
    prompts = [
        "a red cube",
        "a (red) cube",
        "a (red:1.3) cube",
        "[red]",
        "((a) b:2)",
        "(a [b] c",
        "a ) ] b",
        r"\(a\) \[b",
        "a BREAK b",
        "(a BREAK b:1.5)",
        "(a:-2)",
        "(a: .5 )",
        "a:2)",
        "a:b",
        "BREAK",
        "",
        "(a",
        "[[a",
        "(a:1000)",
        "[a:1.5)",
        "x (a) y (a) z",
        "(BREAK:2) c",
    ]
    found = []
    for prompt in prompts:
        found.append(parse_weights(prompt))
    for prompt in ("(a:1000.5)", "(a:-1001)", "(((a:999)))", "<lora:a:1>", 20_001 * "a"):
        try:
            found.append(str(parse_weights(prompt)))
        except text.ParameterError as error:
            found.append(str(error))
    found.append(len(parse_weights(20_000 * "a")))
    return found


VARIANTS = {}  # {name: {"text": ..., "replace": [(number, old, new), ...]}}, see a4.py

ORACLES = {
    "A1.8": oracle_merge,
    "A1.9": observe_parse_weights,
}  # what shows that these tasks can be solved
