"""Triton kernels of a decoding step alone: the cache is written, and read by one token a row.

Attention is split over the cache (flash-decoding): every split sums what its slots add, relative to
its own maximum, and a second kernel joins them.
"""

# mypy: disable-error-code="no-untyped-def"
# (jit bodies carry no types)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.launch import INTERPRETED, on_device_of
from esr_kernels.layers.kernels import turn
from esr_kernels.layers.reference import Norms

SLOTS_BYTES = 2**14  # of keys that a program takes at once
# Splits: as many as keep a large GPU busy, none of fewer slots of the cache than these.
PROGRAMS = 512
FEWEST_SLOTS = 128
ROWS = 16  # the least that a matrix product has


def num_splits(num_slots: int, num_pairs: int) -> int:
    """A power of two, from shapes alone. num_pairs: of rows and key heads."""
    wanted = min(PROGRAMS // max(num_pairs, 1), num_slots // FEWEST_SLOTS, 32)
    return 1 << (max(wanted, 1).bit_length() - 1)


def slots_block(dim_block: int, itemsize: int) -> int:
    return max(16, min(64, SLOTS_BYTES // (dim_block * itemsize)))


@triton.jit
def rotate_and_store_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, query_norm_ptr, key_norm_ptr,
    keys_ptr, values_ptr, rows_ptr, slots_ptr,
    query_token, query_head, key_token, key_head, value_token, value_head, cos_stride, sin_stride,
    keys_row, keys_head, keys_slot, values_row, values_head, values_slot,
    num_queries, num_keys, half, value_dim, eps, offset,
    HAS_NORMS: tl.constexpr, HAS_CACHE: tl.constexpr, HAS_ROWS: tl.constexpr,
    ONE_SLOT: tl.constexpr, HALF_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has one head of one token: queries, then keys, then with a cache values."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = token
    slot = token
    if HAS_CACHE:
        if HAS_ROWS:
            row = tl.load(rows_ptr + token)
        slot = tl.load(slots_ptr) if ONE_SLOT else tl.load(slots_ptr + token)
        if head >= num_queries + num_keys:
            value_of = head - num_queries - num_keys
            value_dims = tl.arange(0, VALUE_BLOCK)
            source = value_ptr + token * value_token + value_of * value_head
            value = tl.load(source + value_dims, mask=value_dims < value_dim)
            target = values_ptr + row * values_row + value_of * values_head + slot * values_slot
            tl.store(target + value_dims, value, mask=value_dims < value_dim)
            return

    dims = tl.arange(0, HALF_BLOCK)
    inside = dims < half
    key_of = head - num_queries
    is_key = key_of >= 0
    if is_key:
        place = key_ptr + token * key_token + key_of * key_head
    else:
        place = query_ptr + token * query_token + head * query_head
    low = tl.load(place + dims, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + half + dims, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORMS:
        norm_ptr = key_norm_ptr if is_key else query_norm_ptr
        factor = tl.rsqrt(tl.sum(low * low + high * high, 0) / (2 * half) + eps)
        weight = tl.load(norm_ptr + dims, mask=inside, other=0.0).to(tl.float32)
        low *= factor * (weight + offset)
        weight = tl.load(norm_ptr + half + dims, mask=inside, other=0.0).to(tl.float32)
        high *= factor * (weight + offset)
    cos_ptr += token * cos_stride
    sin_ptr += token * sin_stride
    turned_low, turned_high = turn(low, high, cos_ptr, sin_ptr, dims, half, BACKWARD=False)
    tl.store(place + dims, turned_low, mask=inside)
    tl.store(place + half + dims, turned_high, mask=inside)
    if HAS_CACHE:
        target = keys_ptr + row * keys_row + key_of * keys_head + slot * keys_slot + dims
        tl.store(target, turned_low, mask=inside & is_key)
        tl.store(target + half, turned_high, mask=inside & is_key)


@triton.jit
def decode_attention_kernel(
    query_ptr, keys_ptr, values_ptr, first_ptr, last_ptr, output_ptr, sums_ptr, stats_ptr,
    query_row, query_head, keys_row, keys_head, keys_slot, values_row, values_head, values_slot,
    num_key_heads, group, dim, value_dim, scale, softcap, window,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, DIM_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SLOTS_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has the query heads of one key head, and a share of the slots."""
    pair = tl.program_id(0)
    split = tl.program_id(1)
    row = (pair // num_key_heads).to(tl.int64)
    key_head = (pair % num_key_heads).to(tl.int64)
    last = tl.load(last_ptr).to(tl.int32)
    first = tl.load(first_ptr + row).to(tl.int32)
    if HAS_WINDOW:
        first = tl.maximum(first, last - window + 1)
    blocks = (last - first + SLOTS_BLOCK) // SLOTS_BLOCK
    share = (blocks + SPLITS - 1) // SPLITS * SLOTS_BLOCK
    start = first + split * share
    end = tl.minimum(start + share, last + 1)

    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_BLOCK)
    value_dims = tl.arange(0, VALUE_BLOCK)
    lanes = tl.arange(0, SLOTS_BLOCK)
    query_ptr += row * query_row + key_head * group * query_head
    query = tl.load(
        query_ptr + heads[:, None] * query_head + dims[None, :],
        mask=(heads[:, None] < group) & (dims[None, :] < dim),
        other=0.0,
    )
    if WIDE:
        query = query.to(tl.float32)
    keys_ptr += row * keys_row + key_head * keys_head
    values_ptr += row * values_row + key_head * values_head
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    mass = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, VALUE_BLOCK], dtype=tl.float32)
    for block in range(start, end, SLOTS_BLOCK):
        slots = block + lanes
        seen = slots < end
        keys = tl.load(
            keys_ptr + dims[:, None] + slots[None, :].to(tl.int64) * keys_slot,
            mask=(dims[:, None] < dim) & seen[None, :],
            other=0.0,
        )
        values = tl.load(
            values_ptr + slots[:, None].to(tl.int64) * values_slot + value_dims[None, :],
            mask=seen[:, None] & (value_dims[None, :] < value_dim),
            other=0.0,
        )
        if WIDE:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        scores = tl.dot(query, keys, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp(scores - new_peak[:, None])
        shrink = tl.exp(peak - new_peak)
        mass = mass * shrink + tl.sum(weights, 1)
        weighted = tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        sums = sums * shrink[:, None] + weighted
        peak = new_peak

    head = pair.to(tl.int64) * group + heads
    inside = (heads[:, None] < group) & (value_dims[None, :] < value_dim)
    if SPLITS == 1:
        target = output_ptr + head[:, None] * value_dim + value_dims[None, :]
        tl.store(target, sums / mass[:, None], mask=inside)
    else:
        place = head * SPLITS + split
        target = sums_ptr + place[:, None] * value_dim + value_dims[None, :]
        tl.store(target, sums, mask=inside)
        tl.store(stats_ptr + 2 * place, peak, mask=heads < group)
        tl.store(stats_ptr + 2 * place + 1, mass, mask=heads < group)


@triton.jit
def join_splits_kernel(
    sums_ptr, stats_ptr, output_ptr, value_dim, SPLITS: tl.constexpr, VALUE_BLOCK: tl.constexpr
):
    head = tl.program_id(0).to(tl.int64)
    splits = head * SPLITS + tl.arange(0, SPLITS)
    dims = tl.arange(0, VALUE_BLOCK)
    peaks = tl.load(stats_ptr + 2 * splits)
    factors = tl.exp(peaks - tl.max(peaks, 0))  # 0 of a split without slots
    mass = tl.sum(tl.load(stats_ptr + 2 * splits + 1) * factors, 0)
    sums = tl.load(
        sums_ptr + splits[:, None] * value_dim + dims[None, :],
        mask=dims[None, :] < value_dim,
        other=0.0,
    )
    output = tl.sum(sums * factors[:, None], 0) / mass
    tl.store(output_ptr + head * value_dim + dims, output, mask=dims < value_dim)


def run_rotate_and_store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    norms: Norms | None,
    cache: tuple[Tensor, Tensor] | None,
    rows: Tensor | None,
    slots: Tensor | None,
) -> None:
    num_tokens, num_queries, dim = query.shape
    num_keys, value_dim = value.shape[1:]
    if num_tokens == 0:
        return
    query_norm, key_norm, eps, offset = norms or (None, None, 0.0, 0.0)
    keys, values = cache or (None, None)
    num_heads = num_queries + num_keys + (num_keys if cache else 0)
    with on_device_of(query):
        rotate_and_store_kernel[(num_tokens, num_heads)](
            query,
            key,
            value,
            cos,
            sin,
            query_norm,
            key_norm,
            keys,
            values,
            rows,
            slots,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            *(keys.stride()[:3] if keys is not None else (0, 0, 0)),
            *(values.stride()[:3] if values is not None else (0, 0, 0)),
            num_queries,
            num_keys,
            dim // 2,
            value_dim,
            eps,
            offset,
            HAS_NORMS=norms is not None,
            HAS_CACHE=cache is not None,
            HAS_ROWS=rows is not None,
            ONE_SLOT=slots is not None and len(slots) == 1,
            HALF_BLOCK=triton.next_power_of_2(dim // 2),
            VALUE_BLOCK=triton.next_power_of_2(value_dim),
            num_warps=1,
        )


def run_decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    last: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    num_rows, num_heads, dim = query.shape
    num_key_heads, num_slots = keys.shape[1:3]
    value_dim = values.shape[3]
    group = num_heads // num_key_heads
    output = query.new_empty(num_rows, num_heads, value_dim)
    if num_rows == 0:
        return output
    splits = num_splits(num_slots, num_rows * num_key_heads)
    sums = stats = None
    if splits > 1:
        shape = num_rows * num_heads, splits
        sums = query.new_empty(*shape, value_dim, dtype=torch.float32)
        stats = query.new_empty(*shape, 2, dtype=torch.float32)
    dim_block = max(16, triton.next_power_of_2(dim))
    value_block = max(16, triton.next_power_of_2(value_dim))
    with on_device_of(query):
        decode_attention_kernel[(num_rows * num_key_heads, splits)](
            query,
            keys,
            values,
            first,
            last,
            output,
            sums,
            stats,
            *query.stride()[:2],
            *keys.stride()[:3],
            *values.stride()[:3],
            num_key_heads,
            group,
            dim,
            value_dim,
            scale,
            softcap or 0.0,
            window or 0,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            WIDE=INTERPRETED or query.dtype == torch.float32,
            SPLITS=splits,
            ROWS=max(ROWS, triton.next_power_of_2(group)),
            DIM_BLOCK=dim_block,
            VALUE_BLOCK=value_block,
            SLOTS_BLOCK=slots_block(max(dim_block, value_block), query.element_size()),
            num_warps=4,
        )
        if splits > 1:
            join_splits_kernel[(num_rows * num_heads,)](
                sums, stats, output, value_dim, SPLITS=splits, VALUE_BLOCK=value_block, num_warps=1
            )
    return output
