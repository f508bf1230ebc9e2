"""Triton: prompts, their mask and responses as generated -> one packed batch.

    prompt length   = sum(mask)
    response length = min(1 + index of the first EOS, columns)
    place of a prompt token in its sequence = number of mask bits before it

Two launches, one program a sequence: the first finds the lengths, whose running sums are where each
sequence starts; the second writes every output once. The mask may have holes, so the second carries
the number of tokens so far from block to block. Integers only: both impls agree to the last bit.
"""

# mypy: disable-error-code="no-untyped-def"
# (jit bodies carry no types)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from esr_kernels.launch import on_device_of

# A response cut at about 100 tokens, and a prompt of a few hundred, are one step each.
BLOCK_SIZE = 512
NUM_WARPS = 4


# Widths and numbers change with every batch, and the inputs may be views that start anywhere.
@triton.jit(
    do_not_specialize=[
        "mask_stride", "response_stride", "num_prompt_columns", "num_response_columns", "num_eos"
    ],
    do_not_specialize_on_alignment=["mask_ptr", "responses_ptr", "eos_ptr"],
)  # fmt: skip
def lengths_kernel(
    mask_ptr,
    responses_ptr,
    eos_ptr,
    lengths_ptr,
    mask_stride,
    response_stride,
    num_prompt_columns,
    num_response_columns,
    num_eos,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    mask_ptr += row * mask_stride
    responses_ptr += row * response_stride
    lanes = tl.arange(0, BLOCK_SIZE)

    prompt_length = tl.full([], 0, tl.int32)
    for start in range(0, num_prompt_columns, BLOCK_SIZE):
        columns = start + lanes
        kept = tl.load(mask_ptr + columns, mask=columns < num_prompt_columns, other=0)
        prompt_length += tl.sum(kept.to(tl.int32), 0)
    response_length = tl.full([], 0, tl.int32) + num_response_columns
    for start in range(0, num_response_columns, BLOCK_SIZE):
        columns = start + lanes
        tokens = tl.load(responses_ptr + columns, mask=columns < num_response_columns, other=0)
        is_eos = columns < 0
        for index in range(num_eos):
            is_eos |= tokens == tl.load(eos_ptr + index)
        # A lane past the row may think that it ends there: too late to be the minimum.
        ends = tl.where(is_eos, columns + 1, num_response_columns)
        response_length = tl.minimum(response_length, tl.min(ends, 0))

    length = prompt_length.to(tl.int64) + response_length
    tl.store(lengths_ptr + row, length)
    tl.store(lengths_ptr + tl.num_programs(0) + row, response_length.to(tl.int64))


@triton.jit(
    do_not_specialize=["prompt_stride", "mask_stride", "response_stride", "num_prompt_columns"],
    do_not_specialize_on_alignment=["prompt_ptr", "mask_ptr", "responses_ptr"],
)
def pack_kernel(
    prompt_ptr,
    mask_ptr,
    responses_ptr,
    offsets_ptr,
    input_ids_ptr,
    position_ids_ptr,
    loss_rows_ptr,
    targets_ptr,
    response_positions_ptr,
    sequence_ids_ptr,
    prompt_stride,
    mask_stride,
    response_stride,
    num_prompt_columns,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    prompt_ptr += row * prompt_stride
    mask_ptr += row * mask_stride
    responses_ptr += row * response_stride
    sequence_start = tl.load(offsets_ptr + row)
    offsets_ptr += tl.num_programs(0) + 1
    response_start = tl.load(offsets_ptr + row)
    response_length = tl.load(offsets_ptr + row + 1) - response_start
    lanes = tl.arange(0, BLOCK_SIZE)

    before = tl.full([], 0, tl.int64)
    for start in range(0, num_prompt_columns, BLOCK_SIZE):
        columns = start + lanes
        inside = columns < num_prompt_columns
        kept = tl.load(mask_ptr + columns, mask=inside, other=0)
        counts = kept.to(tl.int32)
        positions = before + tl.cumsum(counts, 0) - counts
        tokens = tl.load(prompt_ptr + columns, mask=inside, other=0)
        taken = kept != 0
        tl.store(input_ids_ptr + sequence_start + positions, tokens, mask=taken)
        tl.store(position_ids_ptr + sequence_start + positions, positions, mask=taken)
        before += tl.sum(counts, 0)

    for start in range(0, response_length, BLOCK_SIZE):
        columns = start + lanes
        inside = columns < response_length
        tokens = tl.load(responses_ptr + columns, mask=inside, other=0)
        positions = before + columns
        tl.store(input_ids_ptr + sequence_start + positions, tokens, mask=inside)
        tl.store(position_ids_ptr + sequence_start + positions, positions, mask=inside)
        # The row before a token predicts it: the last of the prompt does the first of the response.
        places = response_start + columns
        tl.store(loss_rows_ptr + places, sequence_start + positions - 1, mask=inside)
        tl.store(targets_ptr + places, tokens, mask=inside)
        tl.store(response_positions_ptr + places, columns.to(tl.int64), mask=inside)
        tl.store(sequence_ids_ptr + places, row, mask=inside)


def _bytes(mask: torch.Tensor) -> torch.Tensor:
    """Bytes of 0 and 1 widen to an integer in one way only; bits might sign-extend."""
    return mask.view(torch.uint8)


def triton_lengths(
    prompt_mask: torch.Tensor, responses: torch.Tensor, eos_ids: torch.Tensor
) -> torch.Tensor:
    """As `torch_lengths`."""
    num_sequences, num_prompt_columns = prompt_mask.shape
    lengths = prompt_mask.new_empty(2, num_sequences, dtype=torch.int64)
    with on_device_of(prompt_mask):
        lengths_kernel[(num_sequences,)](
            _bytes(prompt_mask),
            responses,
            eos_ids,
            lengths,
            prompt_mask.stride(0),
            responses.stride(0),
            num_prompt_columns,
            responses.shape[1],
            eos_ids.shape[0],
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
    return lengths


def triton_pack(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    responses: torch.Tensor,
    offsets: torch.Tensor,
    num_tokens: int,
    num_targets: int,
) -> tuple[torch.Tensor, ...]:
    """As `torch_pack`."""
    num_sequences, num_prompt_columns = prompt_mask.shape
    sizes = 2 * (num_tokens,) + 4 * (num_targets,)
    outputs = tuple(prompt_ids.new_empty(size) for size in sizes)
    with on_device_of(prompt_ids):
        pack_kernel[(num_sequences,)](
            prompt_ids,
            _bytes(prompt_mask),
            responses,
            offsets,
            *outputs,
            prompt_ids.stride(0),
            prompt_mask.stride(0),
            responses.stride(0),
            num_prompt_columns,
            BLOCK_SIZE=BLOCK_SIZE,
            num_warps=NUM_WARPS,
        )
    return outputs
