"""The meaning of `rollout_batch` in eager PyTorch: the path of impl="torch", on any device.

Two steps, as the sizes of the second's results are the sums of the first's.
"""

from __future__ import annotations

import torch


def torch_lengths(
    prompt_mask: torch.Tensor, responses: torch.Tensor, eos_ids: torch.Tensor
) -> torch.Tensor:
    """[2, B] int64: tokens of each sequence, and of its response.

    A response [B, C] ends with its first EOS, or counts whole; its pads are not looked at.
    """
    is_eos = (responses.unsqueeze(-1) == eos_ids).any(dim=-1)
    eos_before = is_eos.cumsum(dim=1) - is_eos.long()
    response_lengths = (eos_before == 0).sum(dim=1)
    return torch.stack([prompt_mask.sum(dim=1) + response_lengths, response_lengths])


def torch_pack(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    responses: torch.Tensor,
    offsets: torch.Tensor,
    num_tokens: int,
    num_targets: int,
) -> tuple[torch.Tensor, ...]:
    """input_ids, position_ids, loss_rows, targets, response_positions, sequence_ids.

    offsets [2, B + 1] int64: where each sequence starts, and each response in `targets`.
    """
    device = prompt_ids.device
    (starts, response_starts), (lengths, response_lengths) = offsets, offsets.diff()
    counted = torch.arange(responses.shape[1], device=device) < response_lengths.unsqueeze(1)
    kept = torch.cat([prompt_mask, counted], dim=1)
    # Every row's columns with those that are kept in front, in their order.
    columns = torch.sort(kept.byte(), dim=1, descending=True, stable=True).indices

    row = torch.repeat_interleave(lengths, output_size=num_tokens)
    position_ids = torch.arange(num_tokens, device=device) - starts[row]
    tokens = torch.cat([prompt_ids, responses], dim=1)
    input_ids = tokens[row, columns[row, position_ids]]

    sequence_ids = torch.repeat_interleave(response_lengths, output_size=num_targets)
    response_positions = torch.arange(num_targets, device=device) - response_starts[sequence_ids]
    response_begin = starts[1:] - response_lengths
    # The row before a token predicts it: the last of the prompt does the first of the response.
    loss_rows = response_begin[sequence_ids] + response_positions - 1
    targets = responses[sequence_ids, response_positions]
    return input_ids, position_ids, loss_rows, targets, response_positions, sequence_ids
