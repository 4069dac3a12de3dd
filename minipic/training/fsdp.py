"""FSDP2: weights, gradients, optimizer and average in shards, one per process.

Whole weights exist only while their block computes. Parts that are not trained stay whole in every
process, because `data` calls them outside of the training step.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from minipic.common import ParameterError

# torch.distributed.fsdp and .tensor are imported where they are used: they take half a second, and
# without --fsdp nothing is in shards.


def check_fsdp():
    """ParameterError where this version of PyTorch lacks what `shard` needs."""
    from torch.distributed.fsdp import FSDPModule
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ParameterError(
            "fsdp", f"needs PyTorch 2.8 or newer, and this is {torch.__version__}; leave it out")


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` made it: PyTorch calls such a module an FSDPModule."""
    return hasattr(module, "set_requires_gradient_sync")


def is_in_shards(tensor: torch.Tensor) -> bool:
    """Whether each process has a part of it only: PyTorch calls such a tensor a DTensor."""
    return hasattr(tensor, "full_tensor")


def shard(module: nn.Module) -> nn.Module:
    """Shard what is trained in a module over all processes, block by block. Returns the module."""
    from torch.distributed.fsdp import fully_shard
    for name, param in module.named_parameters():
        if param.requires_grad and param.ndim == 0:
            raise ParameterError(
                "fsdp", f"cannot shard {name!r}, a single number; train this recipe without it")
    device = next(module.parameters()).device.type
    mesh = dist.init_device_mesh(device, (dist.get_world_size(),))
    frozen = {param for param in module.parameters() if not param.requires_grad}
    for block in [*blocks_to_shard(module, frozen), module]:
        fully_shard(block, mesh=mesh, ignored_params=frozen)
        # Gloo's average is a sum in PyTorch 2.8.
        block.set_force_sum_reduction_for_comms(device == "cpu")
    return module


def blocks_to_shard(module: nn.Module, frozen: set) -> list[nn.Module]:
    """What is gathered by itself: the innermost entries of module lists that train something.

    In the UNet these are each resnet, each transformer block, and each convolution that changes the
    resolution. What is outside of them is gathered with the whole module.
    """
    blocks = []
    for parent in module.modules():
        if not isinstance(parent, nn.ModuleList):
            continue
        for block in parent:
            holds_blocks = any(isinstance(child, nn.ModuleList) for child in block.modules())
            if not holds_blocks and set(block.parameters()) - frozen:
                blocks.append(block)
    return blocks


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on the CPU. Where it is in shards, every process must ask for it."""
    if is_in_shards(tensor):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's part in this process: its shard, or the tensor itself."""
    return tensor.to_local() if is_in_shards(tensor) else tensor


def copy_into(target: torch.Tensor, value: torch.Tensor):
    """Copy a whole CPU tensor into `target`, which may be in shards or on another device."""
    if is_in_shards(target):
        from torch.distributed.tensor import distribute_tensor
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


@contextmanager
def whole_parameters(model: nn.Module, params: dict, here: bool) -> Iterator[None]:
    """Inside, one process has whole parameters in the place of its shards.

    FSDP's hooks are off meanwhile, so this process can run and save the model without the others.
    params: {name: parameter}.
    here: whether this is the process; every process must enter, because whole parameters are
        gathered from all of them.
    """
    shards = {name: param for name, param in params.items() if is_in_shards(param)}
    sharded_modules = [module for module in model.modules() if is_sharded(module)]
    hooks = [(module._forward_pre_hooks, module._forward_hooks) for module in sharded_modules]

    for name, param in shards.items():
        whole = param.full_tensor()
        if here:
            set_parameter(model, name, nn.Parameter(whole, requires_grad=False))
    # FSDP gathers the shards in hooks. Whole weights leave nothing to gather.
    for module in sharded_modules:
        module._forward_pre_hooks = {}
        module._forward_hooks = {}
    try:
        yield
    finally:
        for module, (before, after) in zip(sharded_modules, hooks):
            module._forward_pre_hooks = before
            module._forward_hooks = after
        for name, param in shards.items():
            set_parameter(model, name, param)


def set_parameter(model: nn.Module, name: str, param: nn.Parameter):
    """Put a parameter in the place that `name` is the path of."""
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, param)
