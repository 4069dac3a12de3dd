"""What lies between the matrix products, in Triton, forward and backward: GroupNorm with SiLU, LayerNorm, GEGLU.

Each reads its input once or twice and writes its output once, where PyTorch makes a pass over memory for every step.
Arithmetic is in float32 whatever the tensors are, sums are made in a fixed order, so that results repeat bit for bit,
and only inputs are kept for the backward pass. blocks.py has the plain twins, which define what is right.

One group is too little work for a GPU's many processors, and in channels-last order its numbers lie apart. GroupNorm
(arXiv 1803.08494) therefore cuts [pixels, channels] into tiles, in either order: `moments_kernel` writes mean and
squared deviations of every tile's channels, `combine_kernel` makes the groups' of them, `apply_kernel` normalises.
"""

import torch
import triton
import triton.language as tl

TILE = {"PIXELS": 64, "CHANNELS": 64}  # of a program
ROWS = 16  # of LayerNorm's input, over which one program of the backward pass sums
SPAN = 1024  # of GEGLU's output, of a program


@triton.jit
def tile_of(sb, sc, sp, channels, pixels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's tile of x [B,C,P]: (offsets and mask, both [PIXELS, CHANNELS]; of its channels: which exist,
    offsets in a table [B,C] and in one [B,tiles,C])."""
    tile, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)  # 64 bits: x may have more than 2^31 numbers
    first, p, c = tl.program_id(1).to(tl.int64) * CHANNELS, tl.arange(0, PIXELS), tl.arange(0, CHANNELS)
    at = b * sb + first * sc + tile * PIXELS * sp + (p[:, None] * sp + c[None, :] * sc)
    c = first + c
    inside = (tile * PIXELS + p < pixels)[:, None] & (c < channels)[None, :]
    return at, inside, c < channels, b * channels + c, (b * tl.num_programs(0) + tile) * channels + c


@triton.jit
def moments_kernel(x, means, squares, sb, sc, sp, channels, pixels, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    at, inside, exists, _, cell = tile_of(sb, sc, sp, channels, pixels, PIXELS, CHANNELS)
    values = tl.load(x + at, inside, 0.0).to(tl.float32)
    mean = tl.sum(values, 0) / tl.minimum(pixels - tl.program_id(0) * PIXELS, PIXELS)
    apart = tl.where(inside, values - mean[None, :], 0.0)
    tl.store(means + cell, mean, exists)
    tl.store(squares + cell, tl.sum(apart * apart, 0), exists)


@triton.jit
def cells_of(first, c, exists, channels, pixels, tiles, PIXELS: tl.constexpr, TILES: tl.constexpr):
    """TILES tiles from `first` on, in a table [B,tiles,C]: (offsets, mask, how many pixels each tile has)."""
    t = first + tl.arange(0, TILES)
    at = (tl.program_id(0).to(tl.int64) * tiles + t)[:, None] * channels + c[None, :]
    return at, (t < tiles)[:, None] & exists[None, :], tl.minimum(pixels - t * PIXELS, PIXELS)[:, None]


@triton.jit
def combine_kernel(means, squares, weight, bias, scale, shift, mean, rstd, channels, pixels, tiles, eps,
                   PIXELS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr):
    """Tables [B,tiles,C] -> tables [B,C], one group of GROUP channels a program: mean, 1 / deviation, and the
    normalisation with weight and bias as one product and sum. Deviations from a tile's mean become those from the
    group's by adding the square of what lies between the two."""
    group = tl.arange(0, WIDTH)
    c, exists, numbers = tl.program_id(1) * GROUP + group, group < GROUP, 1.0 * pixels * GROUP
    total = tl.zeros([TILES, WIDTH], tl.float32)
    for first in range(0, tiles, TILES):
        at, inside, count = cells_of(first, c, exists, channels, pixels, tiles, PIXELS, TILES)
        total += tl.load(means + at, inside, 0.0) * count
    center = tl.sum(tl.sum(total, 1), 0) / numbers
    total = tl.zeros([TILES, WIDTH], tl.float32)
    for first in range(0, tiles, TILES):
        at, inside, count = cells_of(first, c, exists, channels, pixels, tiles, PIXELS, TILES)
        between = tl.load(means + at, inside, center) - center
        total += tl.load(squares + at, inside, 0.0) + between * between * count
    deviation = tl.rsqrt(tl.sum(tl.sum(total, 1), 0) / numbers + eps)
    gain = tl.load(weight + c, exists, 0.0).to(tl.float32) * deviation
    offset = tl.load(bias + c, exists, 0.0).to(tl.float32) - center * gain
    c += tl.program_id(0) * channels
    tl.store(scale + c, gain, exists)
    tl.store(shift + c, offset, exists)
    tl.store(mean + c, tl.zeros([WIDTH], tl.float32) + center, exists)
    tl.store(rstd + c, tl.zeros([WIDTH], tl.float32) + deviation, exists)


@triton.jit
def apply_kernel(x, y, scale, shift, sb, sc, sp, channels, pixels, SILU: tl.constexpr, PIXELS: tl.constexpr,
                 CHANNELS: tl.constexpr):
    at, inside, exists, c, _ = tile_of(sb, sc, sp, channels, pixels, PIXELS, CHANNELS)
    values = tl.load(x + at, inside, 0.0).to(tl.float32)
    values = values * tl.load(scale + c, exists, 0.0)[None, :] + tl.load(shift + c, exists, 0.0)[None, :]
    tl.store(y + at, (values * tl.sigmoid(values) if SILU else values).to(y.dtype.element_ty), inside)


@triton.jit
def group_norm_grad_kernel(x, grad, scale, shift, mean, rstd, first, second, dx, sb, sc, sp, channels, pixels,
                           SILU: tl.constexpr, SUM: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """SUM: `first` and `second` [B,tiles,C] become the sums of dz and dz * n over a tile's pixels, z what SiLU is given
    and n the normalised x. Otherwise they are the means [B,C] of both, times weight, over the group, and make dx."""
    at, inside, exists, c, cell = tile_of(sb, sc, sp, channels, pixels, PIXELS, CHANNELS)
    values, dz = tl.load(x + at, inside, 0.0).to(tl.float32), tl.load(grad + at, inside, 0.0).to(tl.float32)
    gain = tl.load(scale + c, exists, 0.0)[None, :]
    if SILU:
        z = values * gain + tl.load(shift + c, exists, 0.0)[None, :]
        gate = tl.sigmoid(z)
        dz = dz * gate * (1 + z * (1 - gate))
    deviation = tl.load(rstd + c, exists, 0.0)[None, :]
    n = (values - tl.load(mean + c, exists, 0.0)[None, :]) * deviation
    if SUM:
        tl.store(first + cell, tl.sum(dz, 0), exists)
        tl.store(second + cell, tl.sum(dz * n, 0), exists)
    else:
        common = tl.load(first + c, exists, 0.0)[None, :] + n * tl.load(second + c, exists, 0.0)[None, :]
        tl.store(dx + at, (gain * dz - deviation * common).to(dx.dtype.element_ty), inside)


class GroupNorm(torch.autograd.Function):
    """x [B,C,P], P pixels, contiguous in this order or as [B,P,C] -> like x, in the same order."""

    @staticmethod
    def forward(ctx, x, weight, bias, groups, eps, silu):
        b, channels, pixels = x.shape
        tiles, blocks = triton.cdiv(pixels, TILE["PIXELS"]), triton.cdiv(channels, TILE["CHANNELS"])
        moments = x.new_empty(2, b, tiles, channels, dtype=torch.float32)
        table, y = x.new_empty(4, b, channels, dtype=torch.float32), torch.empty_like(x)
        ctx.layout, ctx.groups, ctx.silu = (*x.stride(), channels, pixels), groups, silu
        moments_kernel[tiles, blocks, b](x, *moments, *ctx.layout, **TILE)
        combine_kernel[b, groups](
            *moments, weight, bias, *table, channels, pixels, tiles, eps, PIXELS=TILE["PIXELS"],
            GROUP=channels // groups, WIDTH=triton.next_power_of_2(channels // groups), TILES=32)
        apply_kernel[tiles, blocks, b](x, y, *table[:2], *ctx.layout, SILU=silu, **TILE)
        ctx.save_for_backward(x, weight, table)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, table = ctx.saved_tensors
        (b, channels, pixels), dx = x.shape, torch.empty_like(x)
        grad = grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)
        tiles, blocks = triton.cdiv(pixels, TILE["PIXELS"]), triton.cdiv(channels, TILE["CHANNELS"])
        parts = x.new_empty(2, b, tiles, channels, dtype=torch.float32)
        group_norm_grad_kernel[tiles, blocks, b](
            x, grad, *table, *parts, dx, *ctx.layout, SILU=ctx.silu, SUM=True, **TILE)
        sums = parts.sum(2)  # [2,B,C]
        means = (sums * weight).unflatten(2, (ctx.groups, -1)).sum(3) / (pixels * channels // ctx.groups)
        group_norm_grad_kernel[tiles, blocks, b](
            x, grad, *table, *means.repeat_interleave(channels // ctx.groups, 2), dx, *ctx.layout, SILU=ctx.silu,
            SUM=False, **TILE)
        dbias, dweight = sums.sum(1).to(weight.dtype)
        return dx, dweight, dbias, None, None, None


def group_norm(x, weight, bias, groups, eps, silu):
    """x [B,C,H,W], weight and bias [C] -> like x; contiguous and channels-last are read as they are."""
    flat = x.flatten(2)
    flat = flat if flat.is_contiguous() or flat.mT.is_contiguous() else flat.contiguous()
    return GroupNorm.apply(flat, weight, bias, groups, eps, silu).unflatten(2, x.shape[2:])


@triton.jit
def layer_norm_kernel(x, more, total, weight, bias, y, mean, rstd, width, eps, ADD: tl.constexpr, WIDTH: tl.constexpr):
    """ADD: `total` becomes x + more, and y its norm, not that of x."""
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
    values = tl.load(x + row * width + d, d < width, 0.0).to(tl.float32)
    if ADD:
        values = values + tl.load(more + row * width + d, d < width, 0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)
        tl.store(total + row * width + d, values, d < width)
        values = values.to(tl.float32)  # as rounded, for that is what the backward pass will see
    center = tl.sum(values, 0) / width
    apart = tl.where(d < width, values - center, 0.0)
    deviation = tl.rsqrt(tl.sum(apart * apart, 0) / width + eps)
    gain = tl.load(weight + d, d < width, 0.0).to(tl.float32)
    values = apart * deviation * gain + tl.load(bias + d, d < width, 0.0).to(tl.float32)
    tl.store(y + row * width + d, values.to(y.dtype.element_ty), d < width)
    tl.store(mean + row, center)
    tl.store(rstd + row, deviation)


@triton.jit
def layer_norm_grad_kernel(x, grad, more, weight, mean, rstd, dx, dweight, dbias, rows, width, ADD: tl.constexpr,
                           ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """dx of ROWS rows, and what they add to the gradients of weight and bias. ADD: dx gets `more` besides."""
    d, gain_grad, offset_grad = tl.arange(0, WIDTH), tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    gain, first = tl.load(weight + d, d < width, 0.0).to(tl.float32), tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        dy, deviation = tl.load(grad + row * width + d, d < width, 0.0).to(tl.float32), tl.load(rstd + row)
        apart = tl.load(x + row * width + d, d < width, 0.0).to(tl.float32) - tl.load(mean + row)
        n = tl.where(d < width, apart * deviation, 0.0)
        dn = dy * gain
        dn = (dn - tl.sum(dn, 0) / width - n * (tl.sum(dn * n, 0) / width)) * deviation
        if ADD:
            dn = dn + tl.load(more + row * width + d, d < width, 0.0).to(tl.float32)
        tl.store(dx + row * width + d, dn.to(dx.dtype.element_ty), d < width)
        gain_grad, offset_grad = gain_grad + dy * n, offset_grad + dy
    tl.store(dweight + tl.program_id(0) * width + d, gain_grad, d < width)
    tl.store(dbias + tl.program_id(0) * width + d, offset_grad, d < width)


class LayerNorm(torch.autograd.Function):
    """x [...,D] contiguous, `more` like x or None, weight and bias [D] -> (x + more, its norm), or the norm of x."""

    @staticmethod
    def forward(ctx, x, more, weight, bias, eps):
        width, y, total = x.shape[-1], torch.empty_like(x), x if more is None else torch.empty_like(x)
        moments = x.new_empty(2, x.numel() // width, dtype=torch.float32)
        layer_norm_kernel[(moments.shape[1],)](x, more, total, weight, bias, y, *moments, width, eps,
                                               ADD=more is not None, WIDTH=triton.next_power_of_2(width))
        ctx.save_for_backward(total, weight, moments)
        return y if more is None else (total, y)

    @staticmethod
    def backward(ctx, *grads):
        x, weight, moments = ctx.saved_tensors
        *more, grad = (grad.contiguous() for grad in grads)
        width, rows, dx = x.shape[-1], moments.shape[1], torch.empty_like(x)
        parts = x.new_empty(2, triton.cdiv(rows, ROWS), width, dtype=torch.float32)
        layer_norm_grad_kernel[(parts.shape[1],)](
            x, grad, *(more or [None]), weight, *moments, dx, *parts, rows, width, ADD=bool(more), ROWS=ROWS,
            WIDTH=triton.next_power_of_2(width))
        return dx, dx if more else None, *parts.sum(1).to(weight.dtype), None


@triton.jit
def geglu_kernel(x, grad, out, width, BACKWARD: tl.constexpr, SPAN: tl.constexpr):
    """out [rows,D] = value * gelu(gate) of x [rows,2D], value first; BACKWARD: out [rows,2D] is the gradient of x."""
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    here, inside = row * 2 * width + d, d < width
    value = tl.load(x + here, inside, 0.0).to(tl.float32)
    gate = tl.load(x + here + width, inside, 0.0).to(tl.float32)
    cdf = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))  # of the normal distribution
    if BACKWARD:
        dy = tl.load(grad + row * width + d, inside, 0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        tl.store(out + here, (dy * gate * cdf).to(out.dtype.element_ty), inside)
        tl.store(out + here + width, (dy * value * (cdf + gate * density)).to(out.dtype.element_ty), inside)
    else:
        tl.store(out + row * width + d, (value * gate * cdf).to(out.dtype.element_ty), inside)


class GEGLU(torch.autograd.Function):
    """x [...,2D] contiguous -> [...,D]."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.empty_like(x[..., :x.shape[-1] // 2], memory_format=torch.contiguous_format)
        rows, width = x.numel() // x.shape[-1], out.shape[-1]
        geglu_kernel[rows, triton.cdiv(width, SPAN)](x, x, out, width, BACKWARD=False, SPAN=SPAN)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        rows, width, dx = x.numel() // x.shape[-1], grad.shape[-1], torch.empty_like(x)
        geglu_kernel[rows, triton.cdiv(width, SPAN)](x, grad.contiguous(), dx, width, BACKWARD=True, SPAN=SPAN)
        return dx
