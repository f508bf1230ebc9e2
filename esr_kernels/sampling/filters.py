"""top_k, top_p and min_p in front of the sampling: plain torch, no host sync, a sort for top_p."""

from __future__ import annotations

import torch
from torch import Tensor


def filtered(scores: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Scores [B, V] that temperature has divided, -inf where a filter takes the token away.

    In the order, and with the ties, of Transformers' warpers: all tokens that tie with the k-th
    stay; of those that tie at top_p's border, the last in sorting order stay.
    """
    if top_k:
        last = scores.topk(min(top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < last, -torch.inf)
    if top_p < 1:
        ascending, order = scores.sort()
        rest = ascending.softmax(dim=1).cumsum(dim=1) <= 1 - top_p
        rest[:, -1] = False
        scores = scores.masked_fill(rest.scatter(1, order, rest), -torch.inf)
    if min_p:
        probs = scores.softmax(dim=1)
        scores = scores.masked_fill(probs < min_p * probs.amax(dim=1, keepdim=True), -torch.inf)
    return scores
