"""Experts cut out of feed-forwards: the identities that hold without any training (arXiv 2503.11905)."""

import itertools

import peers
import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minipic.common import ParameterError
from minipic.layers.moe import ROUTER_WIDTH, MoE, PerTask, select, task_state_dict, upcycle
from minipic.models.unet import SD15, SDXL_BASE, FeedForward, UNet
from minipic.weights.layouts import build_empty

WIDTH, HIDDEN = 16, 64
TASKS = ("t2i", "edit", "sr", "inpaint")


def feed_forward() -> FeedForward:
    """One with fixed weights in float64."""
    return peers.fill(FeedForward(WIDTH)).double()


def with_router(moe: MoE, seed: int = 5) -> MoE:
    """The same with a random router and a random task."""
    for i, param in enumerate(moe.router.parameters()):
        param.data = peers.numbers(param.shape, seed + i) / ROUTER_WIDTH**0.5
    moe.task_embedding = 2 * peers.numbers((ROUTER_WIDTH,), seed + 9)
    return moe


def by_hand(net, x, value_rows, gate_rows, columns):
    """A GEGLU of some of the rows of a feed-forward, without the output's bias."""
    weight, bias = net[0].proj.weight, net[0].proj.bias
    value = x @ weight[value_rows].T + bias[value_rows]
    gate = x @ weight[gate_rows].T + bias[gate_rows]
    return (value * F.gelu(gate)) @ net[2].weight[:, columns].T


def experts_by_hand(net, x, experts):
    """What each expert makes of x, without the output's bias: slice i of the hidden neurons."""
    size = HIDDEN // experts
    outputs = []
    for i in range(experts):
        own = slice(i * size, (i + 1) * size)
        gates = slice(HIDDEN + i * size, HIDDEN + (i + 1) * size)
        outputs.append(by_hand(net, x, own, gates, own))
    return outputs


x = peers.numbers((3, 7, WIDTH), 1)


# The cut ------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("experts", [1, 2, 4, 8])
def test_the_slices_add_up_to_the_feed_forward(experts):
    whole = feed_forward()
    total = sum(experts_by_hand(whole.net, x, experts)) + whole.net[2].bias
    assert (total - whole(x)).abs().max() < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("experts", [2, 4])
def test_a_cut_of_the_fused_rows_in_pieces_is_wrong(experts):
    """Such a piece takes values for gates, or gates of other neurons."""
    whole = feed_forward()
    piece = 2 * HIDDEN // experts
    total = whole.net[2].bias
    for i in range(experts):
        first = slice(i * piece, i * piece + piece // 2)
        second = slice(i * piece + piece // 2, (i + 1) * piece)
        columns = slice(i * piece // 2, (i + 1) * piece // 2)
        total = total + by_hand(whole.net, x, first, second, columns)
    assert (total - whole(x)).norm() / whole(x).norm() > 0.5


@torch.no_grad()
@pytest.mark.parametrize("experts, scale", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4), (8, 8)])
def test_the_dense_layer_is_the_loop_over_experts(experts, scale):
    """For any weights; so is the folded feed-forward; and the bias is always the whole bias."""
    moe = with_router(MoE(feed_forward(), experts, scale))
    weights = moe.expert_weights()
    assert weights.shape == (experts,) and weights.sum().item() == pytest.approx(1)
    assert experts == 1 or weights.std() > 0.02
    expected = moe.net[2].bias
    for weight, output in zip(weights, experts_by_hand(moe.net, x, experts)):
        expected = expected + scale * weight * output
    assert (moe(x) - expected).abs().max() < 1e-12
    folded = feed_forward()
    folded.net[2].weight.data = moe.folded_weight()
    assert (folded(x) - expected).abs().max() < 1e-12
    nothing = torch.zeros(1, WIDTH, dtype=torch.float64)
    moe.net[0].proj.bias.zero_()
    assert torch.equal(moe(nothing)[0], moe.net[2].bias)


@torch.no_grad()
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 8])
def test_scale_n_is_the_feed_forward_and_scale_1_an_nth_of_it(experts):
    whole = peers.fill(FeedForward(24 if experts == 3 else WIDTH))
    given = torch.randn(5, 24 if experts == 3 else WIDTH)
    kept = whole(given)
    bias = whole.net[2].bias
    for scale in {1, experts}:
        moe = MoE(whole, experts, scale)
        moe.task_embedding = torch.randn(ROUTER_WIDTH)
        if scale == experts:
            assert torch.equal(moe(given), kept)  # bit for bit
        else:
            assert torch.allclose(moe(given), (kept - bias) / experts + bias, atol=1e-6)


@torch.no_grad()
def test_the_norm_before_it_folds_too():
    """FFN(gamma * n + beta) is the FFN with weights W gamma and biases b + W beta."""
    whole, folded = feed_forward(), feed_forward()
    gamma, beta = peers.numbers((2, WIDTH), 3)
    proj = folded.net[0].proj
    proj.bias += proj.weight @ beta
    proj.weight *= gamma
    assert (whole(gamma * x + beta) - folded(x)).abs().max() < 1e-12


# The router ---------------------------------------------------------------------------------------

@torch.no_grad()
def test_top_k_leaves_the_others_out():
    moe = with_router(MoE(feed_forward(), 4, 4))
    dense = moe.expert_weights()
    moe.top_k = 2
    sparse = moe.expert_weights()
    is_top = dense >= dense.sort().values[2]
    assert (sparse > 0).tolist() == is_top.tolist() and sparse.sum().item() == pytest.approx(1)
    assert torch.allclose(sparse[is_top], dense[is_top] / dense[is_top].sum())
    moe.top_k = 4
    assert torch.equal(moe.expert_weights(), dense)


def gradients(moe: MoE) -> list[torch.Tensor]:
    """Of the router's parameters and of the task embedding, for some loss."""
    moe.task_embedding.requires_grad_()
    wanted = [*moe.router.parameters(), moe.task_embedding]
    return torch.autograd.grad((moe(x) * peers.numbers(x.shape, 2)).sum(), wanted)


def test_one_expert_leaves_the_router_without_gradient():
    assert all((gradient == 0).all() for gradient in gradients(with_router(MoE(feed_forward(), 1, 1))))
    assert all((gradient != 0).any() for gradient in gradients(with_router(MoE(feed_forward(), 2, 1))))


def test_full_size_copies_are_the_feed_forward_and_their_router_must_not_start_at_zero():
    whole = feed_forward()
    copies = MoE(feed_forward(), 3, 1, full_size=True).double()
    assert copies.net[0].proj.weight.shape == (2 * 3 * HIDDEN, WIDTH)
    assert copies.router[2].weight.abs().max() > 0.01
    for seed in (5, 50):  # whatever the weights
        assert (with_router(copies, seed)(x) - whole(x)).abs().max() < 1e-12

    # Equal experts: the output does not depend on the weights. Exactly so, but for rounding.
    assert max(gradient.abs().max() for gradient in gradients(copies)) < 1e-10
    copies.net[2].weight.data += peers.numbers(copies.net[2].weight.shape, 7)
    assert min(gradient.abs().max() for gradient in gradients(copies)) > 1e-3
    # Different experts, but a last layer of zeros: the layers before it get no gradient.
    for param in copies.router[2].parameters():
        param.data.zero_()
    first_layer = gradients(copies)[0]
    assert (first_layer == 0).all()


def test_equal_weights_say_nothing_of_the_top_k():
    assert MoE(feed_forward(), 4, 4, top_k=2).router[2].weight.abs().max() > 0.01
    assert MoE(feed_forward(), 4, 4).router[2].weight.abs().max() == 0


# A whole UNet -------------------------------------------------------------------------------------

def given(unet: UNet, channels: int = 4) -> tuple:
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    shapes = (2, channels, 16, 16), (2, 7, config.cross_attention_dim), (2, pooled)
    x, context, pooled = (peers.numbers(shape, i).float() for i, shape in enumerate(shapes))
    return x, torch.tensor([5.0, 600.0]), context, pooled, torch.ones(2, 6)


@torch.no_grad()
@pytest.mark.parametrize("experts, scale", [(1, 1), (4, 4), (8, None)])
def test_an_upcycled_unet_computes_at_first_what_it_did_for_every_task(experts, scale):
    base, unet = tiny.model().unet, tiny.build().unet
    upcycle(unet, TASKS, experts, scale)
    x, *others = given(base)
    expected = base(x, *others)
    for task in TASKS:
        select(unet, task)
        sources = [()] if task == "t2i" else [(torch.randn_like(x),), (torch.zeros_like(x),)]
        for source in sources:  # bit for bit, whatever the picture
            assert torch.equal(unet(torch.cat([x, *source], dim=1), *others), expected)


@torch.no_grad()
def test_as_the_paper_has_it_the_unet_starts_as_another():
    base, unet = tiny.model().unet, tiny.build().unet
    upcycle(unet, TASKS, 4, 1)
    select(unet, "t2i")
    expected = base(*given(base))
    assert (unet(*given(base)) - expected).norm() / expected.norm() > 0.05


@torch.no_grad()
def test_the_weights_of_experts_depend_on_the_task_alone():
    unet = tiny.build().unet
    torch.manual_seed(0)  # of the routers
    upcycle(unet, TASKS, 4)
    layers = [layer for layer in unet.modules() if isinstance(layer, MoE)]
    for layer in layers:
        layer.router[2].weight.normal_(generator=torch.Generator().manual_seed(0))
    weights, rows = {}, []
    for layer in layers:  # what the hidden activations of every token are multiplied by
        layer.net[0].register_forward_hook(lambda module, given, hidden: rows.append([hidden]))
        layer.net[2].register_forward_pre_hook(lambda module, given: rows[-1].append(given[0]))
    x, t, context, pooled, ids = given(unet)
    for task, prompt in itertools.product(("t2i", "t2i", "edit"), (context, -context)):
        select(unet, task)
        rows.clear()
        source = () if task == "t2i" else (x,)
        unet(torch.cat([x, *source], dim=1), t, prompt, pooled, ids)
        for layer, (before, after) in zip(layers, rows):
            expected = layer.hidden_weights()
            assert torch.equal(after, before * expected)
            assert torch.equal(weights.setdefault((task, layer), expected), expected)
            assert layer.expert_weights().sum().item() == pytest.approx(1)
    for layer in layers:
        assert (weights["t2i", layer] - weights["edit", layer]).abs().max() > 0.01


def test_gradients_reach_what_is_trained_and_only_the_tasks_of_the_batch():
    unet = tiny.build().unet
    params = upcycle(unet, TASKS, 4)
    names = {name for name, param in unet.named_parameters() if param.requires_grad}
    assert names == task_state_dict(unet).keys() and len(params) == len(names)
    assert all("task" in name or ".ff." in name for name in names)
    for layer in unet.modules():
        if isinstance(layer, MoE):
            nn.init.normal_(layer.router[2].weight)
    select(unet, "sr")
    x, *others = given(unet, channels=8)
    unet(x, *others).square().sum().backward()
    for name, param in unet.named_parameters():
        is_of_another = any(f".tasks.{task}." in name for task in TASKS if task != "sr")
        is_reached = name in names and not is_of_another
        assert (param.grad is not None and param.grad.abs().max() > 0) == is_reached, name
    assert unet.task_embedding.weight.grad.abs().amax(1).gt(0).tolist() == [False, False, True, False]
    assert unet.conv_in.tasks["sr"].weight.grad[:, 4:].abs().max() > 0


FULL_SIZE = [  # config, parameters of all feed-forwards, of a task's norms, TFLOP a step in the paper
    pytest.param(SD15, 148_797_120, 24_960, 0.67, id="SD 1.5"),
    pytest.param(SDXL_BASE, 1_229_548_800, 166_400, 1.53, id="SDXL", marks=pytest.mark.slow)]


@pytest.mark.parametrize("config, feed_forwards, norms, paper_tflop", FULL_SIZE)
def test_parameters_and_operations_at_full_size(config, feed_forwards, norms, paper_tflop):
    """Of 512x512 pictures. The paper has 0.67 and 1.53 TFLOP a step before, 0.68 and 1.54 after.

    Its numbers are those of all layers with weights; attention's other two products are left out.
    """
    unet = build_empty(UNet, config)
    x = torch.zeros(1, 8, 64, 64, device="meta")
    others = [torch.zeros((), device="meta"), torch.zeros(1, 77, config.cross_attention_dim, device="meta")]
    if config.addition_embed_type:
        others += [torch.zeros(1, 1280, device="meta"), torch.zeros(1, 6, device="meta")]

    def operations(x):
        """(all, those of layers with weights)."""
        with FlopCounterMode(display=False) as counter:
            unet(x, *others)
        total = counter.get_total_flops()
        return total, total - counter.get_flop_counts()["Global"][torch.ops.aten.bmm]

    before, before_weights = operations(x[:, :4])
    assert before_weights / 1e12 == pytest.approx(paper_tflop, abs=0.01)
    build_empty(lambda unet: upcycle(unet, TASKS, 4), unet)
    sizes = {"feed-forward": 0, "norms": 0, "router": 0, "": 0}
    for name, param in unet.named_parameters():
        kind = "router" if ".router." in name else "feed-forward" if ".ff." in name else ""
        kind = "norms" if ".norm3.tasks.edit." in name else kind
        sizes[kind] += param.numel()
    assert sizes["feed-forward"] == feed_forwards and sizes["norms"] == norms
    blocks = sum(isinstance(layer, MoE) for layer in unet.modules())
    assert sizes["router"] == blocks * (ROUTER_WIDTH**2 + 5 * ROUTER_WIDTH + 4)
    for task, count in (("t2i", 11_840), ("edit", 23_360)):
        assert sum(param.numel() for param in unet.conv_in.tasks[task].parameters()) == count
    select(unet, "edit")
    after, _ = operations(x)
    assert before < after < 1.01 * before


# Mistakes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, words", [
    (dict(tasks=()), "tasks: expected a list of different names, not ()"),
    (dict(tasks="edit"), "tasks: expected a list of different names, not 'edit'"),
    (dict(tasks=("edit", "edit")), "tasks: expected a list of different names"),
    (dict(tasks=("my.task",)), "tasks: 'my.task' cannot be a name"),
    (dict(tasks=("items",)), "tasks: 'items' cannot be a name"),
    (dict(tasks=("",)), "tasks: '' cannot be a name"),
    (dict(experts=0), "experts: choose 1 or more, not 0"),
    (dict(experts=3), "experts: 3 does not divide the 128 hidden neurons of down_blocks.1"),
    (dict(scale=2), "scale: of 4 experts must be 4, their number, or 1, not 2"),
    (dict(scale=0), "scale: of 4 experts must be 4"),
    (dict(scale=4, full_size=True), "scale: of 4 experts must be 1, because they are copies"),
    (dict(top_k=5), "top_k: choose 1 to 4, or 0 for all, not 5"),
    (dict(top_k=-1), "top_k: choose 1 to 4")])
def test_what_cannot_be_upcycled_is_refused(settings, words):
    unet = build_empty(UNet, tiny.model().unet.config)
    names = [name for name, _ in unet.named_parameters()]
    with pytest.raises(ParameterError) as error:
        upcycle(unet, **{"tasks": TASKS, "experts": 4, **settings})
    assert str(error.value).startswith(words)
    assert [name for name, _ in unet.named_parameters()] == names  # nothing was changed


def test_a_task_must_be_selected_and_known_and_a_unet_upcycled_once():
    unet = tiny.build().unet
    upcycle(unet, TASKS, 2)
    with pytest.raises(ParameterError, match="task: none is selected yet"):
        unet(*given(unet))
    with pytest.raises(ParameterError, match="task: 'paint' is unknown; choose one of t2i, edit, sr"):
        select(unet, "paint")
    with pytest.raises(ParameterError, match="unet: is upcycled already"):
        upcycle(unet, TASKS, 2)


@pytest.mark.slow
def test_pictures_are_for_all_but_t2i_or_for_those_named():
    for pictures, expected in ((None, [4, 8, 8, 8]), (("sr", "t2i"), [8, 4, 8, 4]), ((), [4, 4, 4, 4])):
        unet = tiny.build().unet
        upcycle(unet, TASKS, 2, pictures=pictures)
        assert isinstance(unet.conv_in, PerTask)
        assert [conv.in_channels for conv in unet.conv_in.tasks.values()] == expected
        assert [conv.weight.shape[1] for conv in unet.conv_in.tasks.values()] == expected
