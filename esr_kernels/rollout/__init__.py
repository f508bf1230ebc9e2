"""Rollouts -> one batch for a forward pass, and the rows of it that carry loss."""

from esr_kernels.rollout.api import gather_rows, rollout_batch
from esr_kernels.rollout.batch import PaddedBatch, RolloutBatch

__all__ = ["PaddedBatch", "RolloutBatch", "gather_rows", "rollout_batch"]
