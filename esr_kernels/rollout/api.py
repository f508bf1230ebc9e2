"""`rollout_batch` and `gather_rows`: the public functions."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.nn.functional import pad

from esr_kernels.checks import DTYPES, choose_impl, error, sees_values
from esr_kernels.opaque import opaque
from esr_kernels.rollout.batch import RolloutBatch
from esr_kernels.rollout.reference import torch_lengths, torch_pack


@opaque
def rollout_batch(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    response_ids: torch.Tensor,
    *,
    eos_token_ids: Collection[int] | torch.Tensor,
    rollout_tokens: int | None = None,
    impl: str = "auto",
) -> RolloutBatch:
    """Pack prompts and truncated responses without a pad, and say which rows carry loss.

    Equivalent to::

        first_row = 0
        for b in range(B):
            prompt, response = prompt_ids[b][prompt_mask[b]].tolist(), []
            for token in response_ids[b, :rollout_tokens].tolist():
                response.append(token)
                if token in eos_token_ids:
                    break
            input_ids += prompt + response
            position_ids += range(len(prompt + response))
            loss_rows += [first_row + len(prompt) - 1 + i for i in range(len(response))]
            targets += response
            response_positions += range(len(response))
            sequence_ids += [b] * len(response)
            first_row += len(prompt + response)

    An EOS is kept and trained on; what follows the first one is dropped. It is found by its place,
    so a pad id that equals EOS does no harm. No loop over sequences; on a GPU the host waits once,
    for the five numbers that it needs: T, n, max_seqlen, the shortest prompt and its row.

    Args:
        prompt_ids: [B, P] int64.
        prompt_mask: [B, P] bool, True on tokens: padded left, right, not at all, or with holes. At
            least one token in every row.
        response_ids: [B, R] int64 as generated; anything may follow an EOS. R may be 0.
        eos_token_ids: ints, or a tensor [E] int64; may be empty: then nothing ends early.
        rollout_tokens: how many response tokens count, at least 1; None for all R.
        impl: "triton", "torch", or "auto": triton for tensors on a GPU, torch elsewhere. The
            results are the same.

    Returns:
        RolloutBatch, on the device of the inputs; `.padded()` is its padded form.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _check_ids("prompt_ids", prompt_ids, "[B, P]")
    _check_mask(prompt_mask, prompt_ids)
    _check_ids("response_ids", response_ids, "[B, R]")
    num_sequences, device = prompt_ids.shape[0], prompt_ids.device
    if response_ids.shape[0] != num_sequences:
        expected = f"{num_sequences} rows as in prompt_ids"
        raise error("response_ids", expected, response_ids.shape[0])
    if response_ids.device != device:
        raise error("response_ids", f"device {device}", response_ids.device)
    eos_ids = _eos_ids(eos_token_ids, device)
    if rollout_tokens is not None and (not isinstance(rollout_tokens, int) or rollout_tokens < 1):
        raise error("rollout_tokens", "None or an int >= 1", repr(rollout_tokens))

    make_lengths, pack = torch_lengths, torch_pack
    if choose_impl(impl, device) == "triton":
        from esr_kernels.rollout import kernels

        make_lengths, pack = kernels.triton_lengths, kernels.triton_pack
    prompt_ids, prompt_mask = _side_by_side(prompt_ids), _side_by_side(prompt_mask)
    responses = _side_by_side(response_ids[:, :rollout_tokens])
    lengths = make_lengths(prompt_mask, responses, eos_ids)
    offsets = pad(lengths.cumsum(dim=1), (1, 0))
    num_tokens, num_targets, max_seqlen = _sizes(lengths, offsets)
    input_ids, position_ids, loss_rows, targets, response_positions, sequence_ids = pack(
        prompt_ids, prompt_mask, responses, offsets, num_tokens, num_targets
    )
    return RolloutBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        cu_seqlens=offsets[0].to(torch.int32),
        max_seqlen=max_seqlen,
        loss_rows=loss_rows,
        targets=targets,
        response_positions=response_positions,
        sequence_ids=sequence_ids,
        response_lengths=lengths[1],
    )


def _sizes(lengths: torch.Tensor, offsets: torch.Tensor) -> tuple[int, int, int]:
    """T, n and max_seqlen, in one copy to the host, which also finds an empty prompt."""
    if not lengths.shape[1]:
        return 0, 0, 0
    shortest, row = (lengths[0] - lengths[1]).min(dim=0)
    sizes = torch.stack([*offsets[:, -1], lengths[0].amax(), shortest, row])
    num_tokens, num_targets, max_seqlen, shortest, row = sizes.tolist()
    if not shortest:
        raise error("prompt_mask", "at least one token in every row", f"none in row {row}")
    return num_tokens, num_targets, max_seqlen


def _side_by_side(tensor: torch.Tensor) -> torch.Tensor:
    """The kernels have no stride for columns."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _check_ids(name: str, ids: Any, shape: str) -> None:
    if not isinstance(ids, torch.Tensor):
        raise error(name, f"a tensor {shape}", type(ids).__name__)
    if ids.ndim != 2:
        raise error(name, f"shape {shape}", f"shape {list(ids.shape)}")
    if ids.dtype != torch.int64:
        raise error(name, "torch.int64", ids.dtype)


def _check_mask(mask: Any, prompt_ids: torch.Tensor) -> None:
    if not isinstance(mask, torch.Tensor):
        raise error("prompt_mask", "a tensor [B, P]", type(mask).__name__)
    if mask.shape != prompt_ids.shape:
        expected = f"shape {list(prompt_ids.shape)} as prompt_ids"
        raise error("prompt_mask", expected, f"shape {list(mask.shape)}")
    if mask.dtype != torch.bool:
        raise error("prompt_mask", "torch.bool (mask.bool())", mask.dtype)
    if mask.device != prompt_ids.device:
        raise error("prompt_mask", f"device {prompt_ids.device}", mask.device)


def _eos_ids(ids: Any, device: torch.device) -> torch.Tensor:
    if isinstance(ids, torch.Tensor):
        if ids.ndim != 1:
            raise error("eos_token_ids", "shape [E]", f"shape {list(ids.shape)}")
        if ids.dtype != torch.int64:
            raise error("eos_token_ids", "torch.int64", ids.dtype)
        if ids.device != device:
            raise error("eos_token_ids", f"device {device}", ids.device)
        return ids.contiguous()
    if not isinstance(ids, Collection) or not all(isinstance(x, int) for x in ids):
        raise error("eos_token_ids", "ints in a sequence or a tensor", repr(ids))
    # From memory that is not pinned: the copy is queued, and the host does not wait for it.
    return torch.tensor(list(ids), dtype=torch.int64).to(device, non_blocking=True)


def gather_rows(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The hidden states that carry loss: `hidden.flatten(0, -2)[rows]`.

    Its gradient is zero but for the rows, which are written once each: no sum, so no atomics, and
    calling twice gives bitwise equal gradients, unlike index_select's on a GPU. It may be
    differentiated again, and torch.compile traces it.

    Args:
        hidden: [T, D], or with more leading dimensions, as [1, T, D] or [B, L, D]; float32,
            bfloat16, float16 or float64.
        rows: [n] int64, each row once: `RolloutBatch.loss_rows`, or those of its padded form.

    Returns:
        [n, D], contiguous, the dtype of `hidden`.

    Raises:
        ValueError: naming the argument, what was expected and what came. Rows that are out of range
            or repeated are found on the CPU, outside torch.compile; on a GPU, where it would wait
            for the values, only if the environment has ESR_KERNELS_CHECK_VALUES=1.
    """
    if not isinstance(hidden, torch.Tensor):
        raise error("hidden", "a tensor [T, D]", type(hidden).__name__)
    if hidden.ndim < 2:
        raise error("hidden", "shape [T, D] or [B, L, D]", f"shape {list(hidden.shape)}")
    if hidden.dtype not in DTYPES:
        raise error("hidden", f"one of {DTYPES}", hidden.dtype)
    if not isinstance(rows, torch.Tensor):
        raise error("rows", "a tensor [n]", type(rows).__name__)
    if rows.ndim != 1:
        raise error("rows", "shape [n]", f"shape {list(rows.shape)}")
    if rows.dtype != torch.int64:
        raise error("rows", "torch.int64", rows.dtype)
    if rows.device != hidden.device:
        raise error("rows", f"device {hidden.device}", rows.device)
    hidden = hidden.flatten(0, -2)
    if not torch.compiler.is_compiling() and sees_values(rows) and len(rows):
        ordered = rows.sort().values
        low, high = ordered[[0, -1]].tolist()
        if low < 0 or high >= hidden.shape[0]:
            raise error("rows", f"rows in 0..{hidden.shape[0] - 1}", f"{low}..{high}")
        if (repeated := ordered[1:][ordered.diff() == 0]).numel():
            raise error("rows", "each row once", f"row {repeated[0].item()} again")
    return _GatherRows.apply(hidden, rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = hidden.shape
        return hidden.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        return upstream.new_zeros(ctx.shape).index_copy_(0, rows, upstream), None
