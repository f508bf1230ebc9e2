"""Triton kernels of a layer's norms, rotations and gated products, and of their gradients.

Each is one pass over its rows, computed in float32 and rounded once.
"""

# mypy: disable-error-code="no-untyped-def"
# (jit bodies carry no types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.launch import on_device_of

GATED_BLOCK = 1024
WEIGHT_PROGRAMS = 512  # that sum a norm's weight gradient: a few rows on each multiprocessor


def norm_warps(num_columns: int, backward: bool = False) -> int:
    per_warp = 256 if backward else 512  # backward keeps several times the columns in registers
    return min(16, max(1, triton.next_power_of_2(num_columns) // per_warp))


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, residual_ptr, total_ptr, y_ptr, x_stride, residual_stride, total_stride,
    num_columns, eps, offset, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        residual = tl.load(
            residual_ptr + row * residual_stride + columns, mask=inside, other=0.0
        ).to(tl.float32)
        total = (x + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * total_stride + columns, total, mask=inside)
        x = total.to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x, 0) / num_columns + eps)
    tl.store(y_ptr + row * num_columns + columns, x * factor * (weight + offset), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    grad_ptr, grad_total_ptr, x_ptr, weight_ptr, grad_x_ptr, grad_weight_ptr,
    grad_stride, grad_total_stride, x_stride, num_rows, num_columns, eps, offset,
    HAS_TOTAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has every so-many-th row, and with HAS_WEIGHT writes its share of that gradient."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    gain = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32) + offset
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(program, num_rows, tl.num_programs(0)):
        x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0.0)
        grad = grad.to(tl.float32)
        factor = tl.rsqrt(tl.sum(x * x, 0) / num_columns + eps)
        normed = x * factor
        scaled = grad * gain
        along = tl.sum(scaled * normed, 0) / num_columns
        grad_x = (scaled - normed * along) * factor
        if HAS_TOTAL:
            more = tl.load(
                grad_total_ptr + row * grad_total_stride + columns, mask=inside, other=0.0
            )
            grad_x += more.to(tl.float32)
        tl.store(grad_x_ptr + row * num_columns + columns, grad_x, mask=inside)
        if HAS_WEIGHT:
            grad_weight += grad * normed
    if HAS_WEIGHT:
        tl.store(grad_weight_ptr + program * num_columns + columns, grad_weight, mask=inside)


@triton.jit
def turn(low, high, cos_ptr, sin_ptr, dims, half, BACKWARD: tl.constexpr):
    """Both halves of a head by the angles of its token, or by the transposed rotation."""
    inside = dims < half
    low_cos = tl.load(cos_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    high_cos = tl.load(cos_ptr + half + dims, mask=inside, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_ptr + dims, mask=inside, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_ptr + half + dims, mask=inside, other=0.0).to(tl.float32)
    if BACKWARD:
        turned_low = low * low_cos + high * high_sin
        turned_high = high * high_cos - low * low_sin
    else:
        turned_low = low * low_cos - high * low_sin
        turned_high = high * high_cos + low * high_sin
    return turned_low, turned_high


@triton.jit
def rotate_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, turned_query_ptr, turned_key_ptr,
    query_token, query_head, key_token, key_head, cos_stride, sin_stride,
    num_queries, num_keys, half, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has one head of one token: queries, then keys."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK)
    inside = dims < half
    if head >= num_queries:
        head -= num_queries
        place = key_ptr + token * key_token + head * key_head + dims
        target = turned_key_ptr + (token * num_keys + head) * 2 * half + dims
    else:
        place = query_ptr + token * query_token + head * query_head + dims
        target = turned_query_ptr + (token * num_queries + head) * 2 * half + dims
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
    cos_ptr += token * cos_stride
    sin_ptr += token * sin_stride
    turned_low, turned_high = turn(low, high, cos_ptr, sin_ptr, dims, half, BACKWARD)
    tl.store(target, turned_low, mask=inside)
    tl.store(target + half, turned_high, mask=inside)


@triton.jit
def openness(x, SILU: tl.constexpr):
    """What an activation multiplies x by."""
    # Of GELU: (1 + tanh(y)) / 2 = sigmoid(2 y).
    inner = x if SILU else 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return tl.sigmoid(tl.maximum(inner, -80.0))  # beyond, exp() overflows


@triton.jit
def gated_kernel(
    gate_ptr, up_ptr, output_ptr, gate_stride, up_stride, num_columns,
    SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    x = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    output = x * openness(x, SILU) * up
    tl.store(output_ptr + row * num_columns + columns, output, mask=inside)


@triton.jit
def gated_backward_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, product_ptr,
    grad_stride, gate_stride, up_stride, num_columns,
    SILU: tl.constexpr, HAS_PRODUCT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < num_columns
    grad = tl.load(grad_ptr + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate_ptr + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    near = tl.minimum(tl.maximum(x, -80.0), 80.0)  # beyond, the slope is 0 or 1
    slope = 1.0 if SILU else 1.5957691216057308 * (1.0 + 0.134145 * near * near)
    share = openness(near, SILU)
    active = x * share
    derivative = share + near * share * (1.0 - share) * slope
    place = row * num_columns + columns
    tl.store(grad_gate_ptr + place, grad * up * derivative, mask=inside)
    tl.store(grad_up_ptr + place, grad * active, mask=inside)
    if HAS_PRODUCT:
        tl.store(product_ptr + place, active * up, mask=inside)


def run_rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """total: where residual + x goes, which may be the residual."""
    num_rows, num_columns = x.shape
    y = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    if num_rows == 0:
        return y
    with on_device_of(x):
        rms_norm_kernel[(num_rows,)](
            x,
            weight,
            residual,
            total,
            y,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            0 if total is None else total.stride(0),
            num_columns,
            eps,
            offset,
            HAS_RESIDUAL=residual is not None,
            BLOCK=triton.next_power_of_2(num_columns),
            num_warps=norm_warps(num_columns),
        )
    return y


def run_rms_norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """grad_total: what reaches x beside the norm."""
    num_rows, num_columns = x.shape
    grad_x = torch.empty(num_rows, num_columns, dtype=x.dtype, device=x.device)
    programs = min(num_rows, WEIGHT_PROGRAMS) if needs_weight else num_rows
    grad_weight = None
    if needs_weight:
        grad_weight = torch.empty(programs, num_columns, dtype=torch.float32, device=x.device)
    if num_rows > 0:
        with on_device_of(x):
            rms_norm_backward_kernel[(programs,)](
                grad,
                grad_total,
                x,
                weight,
                grad_x,
                grad_weight,
                grad.stride(0),
                0 if grad_total is None else grad_total.stride(0),
                x.stride(0),
                num_rows,
                num_columns,
                eps,
                offset,
                HAS_TOTAL=grad_total is not None,
                HAS_WEIGHT=needs_weight,
                BLOCK=triton.next_power_of_2(num_columns),
                num_warps=norm_warps(num_columns, backward=True),
            )
    return grad_x, None if grad_weight is None else grad_weight.sum(dim=0).to(weight.dtype)


def run_rotate(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, backward: bool = False
) -> tuple[Tensor, Tensor]:
    """backward: by the transposed rotation."""
    num_tokens, num_queries, dim = query.shape
    num_keys = key.shape[1]
    turned = query.new_empty(query.shape), key.new_empty(key.shape)
    if num_tokens == 0:
        return turned
    with on_device_of(query):
        rotate_kernel[(num_tokens, num_queries + num_keys)](
            query,
            key,
            cos,
            sin,
            *turned,
            *query.stride()[:2],
            *key.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            num_queries,
            num_keys,
            dim // 2,
            BACKWARD=backward,
            BLOCK=triton.next_power_of_2(dim // 2),
            num_warps=1,
        )
    return turned


def run_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    num_rows, num_columns = gate.shape
    output = torch.empty(num_rows, num_columns, dtype=gate.dtype, device=gate.device)
    if num_rows == 0:
        return output
    with on_device_of(gate):
        gated_kernel[(num_rows, triton.cdiv(num_columns, GATED_BLOCK))](
            gate,
            up,
            output,
            gate.stride(0),
            up.stride(0),
            num_columns,
            SILU=activation == "silu",
            BLOCK=GATED_BLOCK,
            num_warps=4,
        )
    return output


def run_gated_backward(
    grad: Tensor, gate: Tensor, up: Tensor, activation: str, wants_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    num_rows, num_columns = gate.shape
    shape = num_rows, num_columns
    grad_gate, grad_up = gate.new_empty(shape), up.new_empty(shape)
    product = gate.new_empty(shape) if wants_product else None
    if num_rows == 0:
        return grad_gate, grad_up, product
    with on_device_of(gate):
        gated_backward_kernel[(num_rows, triton.cdiv(num_columns, GATED_BLOCK))](
            grad,
            gate,
            up,
            grad_gate,
            grad_up,
            product,
            grad.stride(0),
            gate.stride(0),
            up.stride(0),
            num_columns,
            SILU=activation == "silu",
            HAS_PRODUCT=wants_product,
            BLOCK=GATED_BLOCK,
            num_warps=4,
        )
    return grad_gate, grad_up, product
