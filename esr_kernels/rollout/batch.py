"""`RolloutBatch`: prompts and responses in one packed row; and the same, padded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from esr_kernels.checks import error


@dataclass(frozen=True, eq=False)
class PaddedBatch:
    """A `RolloutBatch` as a rectangle, pads on the right; L = max_seqlen.

    Under causal attention no token sees a pad to its right, so the rows that carry loss are the
    same with or without the mask.
    """

    input_ids: torch.Tensor  # [B, L] int64
    attention_mask: torch.Tensor  # [B, L] bool, True on tokens
    # [B, L] int64: 0, 1, ... in every row, pads too. A step back would read as a packed sequence.
    position_ids: torch.Tensor
    loss_rows: torch.Tensor  # [n] int64: rows of hidden.reshape(B * L, D), in the packed order


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """B sequences, each its prompt and what counts of its response, one after the other.

    T tokens, n of them of responses. int64 but for `cu_seqlens`.
    """

    input_ids: torch.Tensor  # [T]
    position_ids: torch.Tensor  # [T]: 0 at the first token of each sequence
    cu_seqlens: torch.Tensor  # [B + 1] int32: where each sequence starts; the last one is T
    max_seqlen: int
    loss_rows: torch.Tensor  # [n]: rows of the packed hidden states that predict a response token
    targets: torch.Tensor  # [n]: that token
    response_positions: torch.Tensor  # [n]: 0 for the first token of a response
    sequence_ids: torch.Tensor  # [n]: in 0..B-1, ascending
    response_lengths: torch.Tensor  # [B]

    def padded(self, pad_token_id: int = 0) -> PaddedBatch:
        """The padded form, made on the device without a host sync."""
        if not isinstance(pad_token_id, int):
            raise error("pad_token_id", "an int", repr(pad_token_id))
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff()
        num_sequences, width = lengths.shape[0], self.max_seqlen
        position_ids = torch.arange(width, device=starts.device).repeat(num_sequences, 1)
        mask = position_ids < lengths.unsqueeze(1)
        packed_rows = torch.where(mask, starts.unsqueeze(1) + position_ids, 0)
        input_ids = torch.where(mask, self.input_ids[packed_rows], pad_token_id)
        shift = torch.arange(num_sequences, device=starts.device) * width - starts
        loss_rows = self.loss_rows + shift[self.sequence_ids]
        return PaddedBatch(input_ids, mask, position_ids, loss_rows)
