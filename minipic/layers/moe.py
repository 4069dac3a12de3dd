"""Experts cut out of a UNet's own feed-forwards, mixed anew for each task (arXiv 2503.11905).

    parameters = upcycle(unet, ("t2i", "edit"), experts=4)      # what to train; all else is frozen
    select(unet, "edit")                                        # from now on it computes this task
    unet(torch.cat([x, source], dim=1), t, context)

papers/mtu.py tells what of this is the paper's, and what it leaves open.
"""

import copy
import re
from collections.abc import Sequence

import torch
import torch.nn as nn

from minipic.common import ParameterError
from minipic.layers.blocks import double_inputs
from minipic.layers.swap import swap

# The width of the task embedding and of the routers. The paper names none. Its parameter counts fit
# the width of the text, but the routers only ever see a handful of inputs: one for each task.
ROUTER_WIDTH = 128

TASK_LAYERS = r"conv_in|.*\.(norm3|ff)"  # what `upcycle` replaces in a UNet, and lets train


class MoE(nn.Module):
    """A GEGLU feed-forward as N experts E_i: y = scale * sum_i w_i E_i(x) + bias.

    x [...,D] -> y [...,D]. The weights w [N] are the softmax of a router that reads the embedding
    of the task and nothing else: they are the same for every token, timestep and prompt.

    Expert i owns slice i of N of the H hidden neurons: their value rows, their gate rows and their
    columns of the output. The output's bias counts once. So the sum over the experts is ONE dense
    feed-forward whose hidden activations are multiplied by scale * w, each over its slice.

    experts: N, which divides H.
    scale: N gives the feed-forward itself while all w are 1/N, as they are at first; 1 is the
        paper's equation 1 as it stands, which begins with an N-th of it.
    top_k: only so many experts count, those with the largest weights; 0: all.
    full_size: N copies of the whole feed-forward instead of N slices, with scale 1.
    """

    def __init__(
            self, feed_forward: nn.Module, experts: int, scale: int, top_k: int = 0,
            full_size: bool = False):
        super().__init__()
        self.experts = experts
        self.scale = scale
        self.top_k = top_k
        self.full_size = full_size
        self.net = feed_forward.net
        if full_size:
            copy_experts(self.net, experts)
        weight = self.net[2].weight
        about = {"device": weight.device, "dtype": weight.dtype}
        self.router = nn.Sequential(
            nn.Linear(ROUTER_WIDTH, ROUTER_WIDTH, **about), nn.ReLU(),
            nn.Linear(ROUTER_WIDTH, experts, **about))
        # Equal weights at first. But with equal experts too, as copies are, no router would ever
        # get a gradient; and equal weights say nothing about which experts are the top k.
        if not full_size and not top_k:
            nn.init.zeros_(self.router[2].weight)
            nn.init.zeros_(self.router[2].bias)
        self.task_embedding = None  # [ROUTER_WIDTH] of the task that `select` has chosen

    def expert_weights(self) -> torch.Tensor:
        """w [N] of the selected task. Their sum is 1."""
        logits = self.router(self.task_embedding)
        if self.top_k:
            chosen = logits.topk(self.top_k).indices
            is_left_out = torch.ones_like(logits, dtype=torch.bool).index_fill(0, chosen, False)
            logits = logits.masked_fill(is_left_out, float("-inf"))
        return logits.softmax(dim=0)

    def hidden_weights(self) -> torch.Tensor:
        """scale * w [H], each over its expert's hidden neurons."""
        neurons = self.net[2].in_features // self.experts
        return (self.scale * self.expert_weights()).repeat_interleave(neurons)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.net[0](x)
        hidden = hidden * self.hidden_weights().to(hidden.dtype)
        return self.net[2](hidden)

    def folded_weight(self) -> torch.Tensor:
        """The output weight [D,H] of the ordinary feed-forward that computes the selected task."""
        weight = self.net[2].weight
        return weight * self.hidden_weights().to(weight.dtype)


def copy_experts(net: nn.Sequential, experts: int):
    """Make the hidden layer of a feed-forward's `net` N times as wide: N copies of its neurons."""
    proj = net[0].proj
    out = net[2]
    # The rows of `proj` are the values of all neurons, then the gates of all.
    weight = proj.weight.detach().unflatten(0, (2, -1)).repeat(1, experts, 1).flatten(0, 1)
    bias = proj.bias.detach().unflatten(0, (2, -1)).repeat(1, experts).flatten()
    net[0].proj = nn.Linear(proj.in_features, len(weight), device="meta")
    net[0].proj.weight = nn.Parameter(weight)
    net[0].proj.bias = nn.Parameter(bias)
    net[2] = nn.Linear(experts * out.in_features, out.out_features, device="meta")
    net[2].weight = nn.Parameter(out.weight.detach().repeat(1, experts))
    net[2].bias = out.bias


class PerTask(nn.Module):
    """A layer of its own for each task; the one of the selected task computes."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        self.tasks = nn.ModuleDict(layers)
        self.task = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.task is None:
            raise ParameterError("task", "none is selected yet; call select(unet, task) first")
        return self.tasks[self.task](x)


def upcycle(
        unet: nn.Module, tasks: Sequence[str], experts: int, scale: int | None = None,
        pictures: Sequence[str] | None = None, top_k: int = 0,
        full_size: bool = False) -> list[nn.Parameter]:
    """Turn a UNet into one for several tasks; returns the parameters to train, all else is frozen.

    Every feed-forward becomes an `MoE`. Every norm before one, and conv_in, gets a copy for each
    task. conv_in of a task with a picture also takes the latent of that picture, in as many
    channels again; they count nothing at first. `select` must then choose a task.

    tasks: their names.
    experts, scale (N if None, and 1 of copies), top_k, full_size: see MoE.
    pictures: which of the tasks are given a picture; None: all but "t2i".
    With scale N, every task computes at first what the UNet did.
    Raises ParameterError for a name that cannot be one, for experts that do not divide every
    feed-forward, and for a scale other than N and 1.
    """
    if scale is None:
        scale = 1 if full_size else experts
    if pictures is None:
        pictures = [task for task in tasks if task != "t2i"]
    check_tasks(tasks)
    check_experts(unet, experts, scale, top_k, full_size)

    def matches(path, module):
        return re.fullmatch(TASK_LAYERS, path)

    def build(path, module):
        if path.endswith(".ff"):
            return MoE(module, experts, scale, top_k, full_size)
        layers = {}
        for task in tasks:
            layers[task] = copy.deepcopy(module)
            if path == "conv_in" and task in pictures:
                double_inputs(layers[task])
        return PerTask(layers)

    unet.requires_grad_(False)
    weight = unet.conv_in.weight
    swap(unet, matches, build)
    unet.task_embedding = nn.Embedding(
        len(tasks), ROUTER_WIDTH, device=weight.device, dtype=weight.dtype)
    names = task_state_dict(unet).keys()
    return [param.requires_grad_() for name, param in unet.named_parameters() if name in names]


def check_tasks(tasks: Sequence[str]):
    """ParameterError unless these can be the names of tasks."""
    if isinstance(tasks, str) or not tasks or len(set(tasks)) < len(tasks):
        raise ParameterError("tasks", f"expected a list of different names, not {tasks!r}")
    for task in tasks:
        # The names become attributes of a ModuleDict, which has some already.
        if not re.fullmatch(r"[\w-]+", task) or hasattr(nn.ModuleDict(), task):
            raise ParameterError("tasks", f"{task!r} cannot be a name; use letters, as in t2i")


def check_experts(unet: nn.Module, experts: int, scale: int, top_k: int, full_size: bool):
    """ParameterError unless the feed-forwards of a UNet can be cut and mixed so."""
    if hasattr(unet, "task_embedding"):
        raise ParameterError("unet", "is upcycled already; load it anew")
    if experts < 1:
        raise ParameterError("experts", f"choose 1 or more, not {experts}")
    if scale not in (1, experts) or (full_size and scale != 1):
        allowed = "1, because they are copies" if full_size else f"{experts}, their number, or 1"
        raise ParameterError("scale", f"of {experts} experts must be {allowed}, not {scale}")
    if not 0 <= top_k <= experts:
        raise ParameterError("top_k", f"choose 1 to {experts}, or 0 for all, not {top_k}")
    for path, module in unet.named_modules():
        if path.endswith(".ff") and not full_size and module.net[2].in_features % experts:
            raise ParameterError(
                "experts", f"{experts} does not divide the {module.net[2].in_features} hidden "
                f"neurons of {path}; choose a power of 2")


def select(unet: nn.Module, task: str):
    """Let an upcycled UNet compute this task from now on, with a gradient to its embedding."""
    tasks = list(unet.conv_in.tasks)
    if task not in tasks:
        raise ParameterError("task", f"{task!r} is unknown; choose one of {', '.join(tasks)}")
    embedding = unet.task_embedding.weight[tasks.index(task)]
    for module in unet.modules():
        if isinstance(module, PerTask):
            module.task = task
        elif isinstance(module, MoE):
            module.task_embedding = embedding


def task_state_dict(unet: nn.Module) -> dict[str, torch.Tensor]:
    """{name: tensor} of all that `upcycle` lets train, for a file."""
    state = {"task_embedding.weight": unet.task_embedding.weight.detach()}
    for path, module in unet.named_modules():
        if isinstance(module, (PerTask, MoE)):
            for name, tensor in module.state_dict().items():
                state[f"{path}.{name}"] = tensor
    return state
