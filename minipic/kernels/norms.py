"""What lies between the matrix products, in Triton: GroupNorm with SiLU, LayerNorm of a sum, GEGLU.

Each kernel reads its input once or twice and writes its output once, where PyTorch makes a pass
over memory for every operation. Arithmetic is in float32 whatever the tensors are. Sums are made in
a fixed order, so that results repeat bit for bit. layers/blocks.py has the plain versions, which
define what is right.

The kernels are for drawing and have no backward pass: every function raises InputError where one
would be needed.
"""

import torch
import triton
import triton.language as tl

from minipic.common import InputError

PIXELS = 64  # of GroupNorm's input, per tile
CHANNELS = 64  # of GroupNorm's input, per tile
SPAN = 1024  # numbers of GEGLU's output, per program


def check_no_gradients(*tensors: torch.Tensor):
    """InputError if autograd would want a backward pass through these tensors."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise InputError("norm backend 'triton' has no backward pass; use 'plain' to train")


# GroupNorm (arXiv 1803.08494) ---------------------------------------------------------------------
#
# One group is too little work for the many processors of a GPU, and in channels-last order its
# numbers lie apart. So x [B,C,P] is cut into tiles of [PIXELS, CHANNELS], in either memory order:
#   moments_kernel  writes the mean and the sum of squared deviations of each channel of each tile,
#   combine_kernel  makes the moments of each group from them, as a factor and a shift per channel,
#   apply_kernel    computes x * factor + shift.

@triton.jit
def tile_of(stride_b, stride_c, stride_p, channels, pixels, PIXELS: tl.constexpr,
            CHANNELS: tl.constexpr):
    """This program's tile of x [B,C,P]: (offsets [PIXELS,CHANNELS], which of them exist, channels).

    Programs count tiles of pixels along axis 0, tiles of channels along axis 1, pictures along 2.
    """
    # 64 bits, because x may have more than 2^31 numbers.
    first_pixel = tl.program_id(0).to(tl.int64) * PIXELS
    first_channel = tl.program_id(1).to(tl.int64) * CHANNELS
    picture = tl.program_id(2).to(tl.int64)
    p = tl.arange(0, PIXELS)
    c = tl.arange(0, CHANNELS)
    start = picture * stride_b + first_channel * stride_c + first_pixel * stride_p
    offsets = start + (p[:, None] * stride_p + c[None, :] * stride_c)
    exist = (first_pixel + p < pixels)[:, None] & (first_channel + c < channels)[None, :]
    return offsets, exist, first_channel + c


@triton.jit
def moments_kernel(x, means, squares, stride_b, stride_c, stride_p, channels, pixels,
                   PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """x [B,C,P] -> tables [B,tiles,C]: the mean, and the sum of squared deviations from it."""
    offsets, exist, c = tile_of(stride_b, stride_c, stride_p, channels, pixels, PIXELS, CHANNELS)
    values = tl.load(x + offsets, exist, 0.0).to(tl.float32)
    count = tl.minimum(pixels - tl.program_id(0) * PIXELS, PIXELS)
    mean = tl.sum(values, 0) / count
    deviations = tl.where(exist, values - mean[None, :], 0.0)
    tile = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(means + tile * channels + c, mean, c < channels)
    tl.store(squares + tile * channels + c, tl.sum(deviations * deviations, 0), c < channels)


@triton.jit
def tiles_of(first, c, exists, channels, pixels, tiles, PIXELS: tl.constexpr, TILES: tl.constexpr):
    """TILES tiles of a table [B,tiles,C], from tile `first` on, for channels c.

    Returns (offsets [TILES, WIDTH], which of them exist, how many pixels each tile has [TILES, 1]).
    """
    t = first + tl.arange(0, TILES)
    tile = tl.program_id(0).to(tl.int64) * tiles + t
    offsets = tile[:, None] * channels + c[None, :]
    exist = (t < tiles)[:, None] & exists[None, :]
    return offsets, exist, tl.minimum(pixels - t * PIXELS, PIXELS)[:, None]


@triton.jit
def combine_kernel(means, squares, weight, bias, factors, shifts, channels, pixels, tiles, eps,
                   PIXELS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
                   TILES: tl.constexpr):
    """Tables [B,tiles,C] -> tables [B,C]: factor and shift to normalise, weight and bias included.

    A program owns one group of GROUP channels, in a block of WIDTH, the next power of 2. It reads
    TILES tiles at a time.
    """
    in_group = tl.arange(0, WIDTH)
    exists = in_group < GROUP
    c = tl.program_id(1) * GROUP + in_group
    numbers = 1.0 * pixels * GROUP

    total = tl.zeros([TILES, WIDTH], tl.float32)
    for first in range(0, tiles, TILES):
        offsets, exist, count = tiles_of(first, c, exists, channels, pixels, tiles, PIXELS, TILES)
        total += tl.load(means + offsets, exist, 0.0) * count
    mean = tl.sum(tl.sum(total, 1), 0) / numbers

    # Squared deviations from the group's mean: those from the tile's mean, and the square of the
    # distance between the two means once for every pixel.
    total = tl.zeros([TILES, WIDTH], tl.float32)
    for first in range(0, tiles, TILES):
        offsets, exist, count = tiles_of(first, c, exists, channels, pixels, tiles, PIXELS, TILES)
        distance = tl.load(means + offsets, exist, mean) - mean
        total += tl.load(squares + offsets, exist, 0.0) + distance * distance * count
    variance = tl.sum(tl.sum(total, 1), 0) / numbers

    factor = tl.load(weight + c, exists, 0.0).to(tl.float32) * tl.rsqrt(variance + eps)
    shift = tl.load(bias + c, exists, 0.0).to(tl.float32) - mean * factor
    cell = tl.program_id(0) * channels + c
    tl.store(factors + cell, factor, exists)
    tl.store(shifts + cell, shift, exists)


@triton.jit
def apply_kernel(x, y, factors, shifts, stride_b, stride_c, stride_p, channels, pixels,
                 SILU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """y = x * factor + shift; SILU: the activation of that."""
    offsets, exist, c = tile_of(stride_b, stride_c, stride_p, channels, pixels, PIXELS, CHANNELS)
    cell = tl.program_id(2).to(tl.int64) * channels + c
    factor = tl.load(factors + cell, c < channels, 0.0)
    shift = tl.load(shifts + cell, c < channels, 0.0)
    values = tl.load(x + offsets, exist, 0.0).to(tl.float32) * factor[None, :] + shift[None, :]
    if SILU:
        values = values * tl.sigmoid(values)
    tl.store(y + offsets, values.to(y.dtype.element_ty), exist)


def group_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int, eps: float,
               silu: bool) -> torch.Tensor:
    """x [B,C,H,W], weight and bias [C] -> like x, in its memory format if that is a usual one."""
    check_no_gradients(x, weight, bias)
    size = x.shape[2:]
    x = x.flatten(2)
    if not (x.is_contiguous() or x.mT.is_contiguous()):
        x = x.contiguous()
    b, channels, pixels = x.shape
    tiles = triton.cdiv(pixels, PIXELS)
    grid = (tiles, triton.cdiv(channels, CHANNELS), b)
    means, squares = x.new_empty(2, b, tiles, channels, dtype=torch.float32)
    factors, shifts = x.new_empty(2, b, channels, dtype=torch.float32)
    y = torch.empty_like(x)

    moments_kernel[grid](x, means, squares, *x.stride(), channels, pixels,
                         PIXELS=PIXELS, CHANNELS=CHANNELS)
    group = channels // groups
    combine_kernel[b, groups](
        means, squares, weight, bias, factors, shifts, channels, pixels, tiles, eps,
        PIXELS=PIXELS, GROUP=group, WIDTH=triton.next_power_of_2(group), TILES=32)
    apply_kernel[grid](x, y, factors, shifts, *x.stride(), channels, pixels,
                       SILU=silu, PIXELS=PIXELS, CHANNELS=CHANNELS)
    return y.unflatten(2, size)


# LayerNorm ----------------------------------------------------------------------------------------

@triton.jit
def layer_norm_kernel(x, added, total, weight, bias, y, width, eps, ADD: tl.constexpr,
                      WIDTH: tl.constexpr):
    """y = the norm of x; ADD: total = x + added, and y = the norm of that. A program owns one row.

    width: of a row, in a block of WIDTH, the next power of 2.
    """
    start = tl.program_id(0).to(tl.int64) * width
    d = tl.arange(0, WIDTH)
    exist = d < width
    values = tl.load(x + start + d, exist, 0.0).to(tl.float32)
    if ADD:
        values = values + tl.load(added + start + d, exist, 0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)
        tl.store(total + start + d, values, exist)
        values = values.to(tl.float32)  # the norm of the rounded sum, as in the plain version
    mean = tl.sum(values, 0) / width
    deviations = tl.where(exist, values - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(deviations * deviations, 0) / width + eps)
    factor = tl.load(weight + d, exist, 0.0).to(tl.float32)
    shift = tl.load(bias + d, exist, 0.0).to(tl.float32)
    tl.store(y + start + d, (deviations * rstd * factor + shift).to(y.dtype.element_ty), exist)


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
               eps: float) -> torch.Tensor:
    """x [...,D], weight and bias [D] -> like x."""
    check_no_gradients(x, weight, bias)
    x = x.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    grid = (x.numel() // width,)
    layer_norm_kernel[grid](x, x, x, weight, bias, y, width, eps,  # only the first x is used
                            ADD=False, WIDTH=triton.next_power_of_2(width))
    return y


def add_norm(x: torch.Tensor, added: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor,
             eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x and `added` [...,D], weight and bias [D] -> (their sum, its norm), both like x."""
    check_no_gradients(x, added, weight, bias)
    x = x.contiguous()
    total = torch.empty_like(x)
    y = torch.empty_like(x)
    width = x.shape[-1]
    grid = (x.numel() // width,)
    layer_norm_kernel[grid](x, added.contiguous(), total, weight, bias, y, width, eps,
                            ADD=True, WIDTH=triton.next_power_of_2(width))
    return total, y


# GEGLU --------------------------------------------------------------------------------------------

@triton.jit
def geglu_kernel(x, y, width, SPAN: tl.constexpr):
    """y [rows,D] = value * gelu(gate) of x [rows,2D]. A program owns SPAN numbers of a row of y."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    exist = d < width
    start = row * 2 * width
    value = tl.load(x + start + d, exist, 0.0).to(tl.float32)
    gate = tl.load(x + start + width + d, exist, 0.0).to(tl.float32)
    cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))  # of the normal distribution; 1 / sqrt(2)
    tl.store(y + row * width + d, (value * gate * cdf).to(y.dtype.element_ty), exist)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """x [...,2D] -> [...,D]."""
    check_no_gradients(x)
    x = x.contiguous()
    width = x.shape[-1] // 2
    y = torch.empty_like(x[..., :width], memory_format=torch.contiguous_format)
    grid = (x.numel() // x.shape[-1], triton.cdiv(width, SPAN))
    geglu_kernel[grid](x, y, width, SPAN=SPAN)
    return y
