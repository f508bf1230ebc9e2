"""The meaning of `sample_tokens` in eager PyTorch: what runs where there is no GPU, and the oracle.

It draws the kernel's noise, so that both choose the same tokens from the same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esr_kernels.sampling.state import INFINITE, LANES, NO_MASS, SamplingState

_WORD = 0xFFFFFFFF


def torch_sample(
    logits: Tensor, state: SamplingState, eos_token_ids: Tensor, temperature: float
) -> None:
    """One step of all rows, [B, V]; writes the state."""
    num_tokens = state.tokens.shape[1]
    x = logits.float()
    peak = x.amax(dim=1, keepdim=True)
    noise = None
    if temperature:
        noise = gumbel(random_words(state.seed, state.steps, logits.shape[1]))
    # Where looking is free, rows without NaN, +inf or nothing but -inf save themselves the care.
    if logits.device.type == "cpu" and bool((peak.abs() < INFINITE).all()):
        token, logprob = _choose(x, peak, noise, temperature)
    else:
        is_nan = x.isnan()
        x = x.masked_fill(is_nan, NO_MASS).clamp(NO_MASS, INFINITE)
        peak = x.amax(dim=1, keepdim=True)
        if noise is not None:
            noise.masked_fill_(x >= INFINITE, 0)
        token, logprob = _choose(x, peak, noise, temperature)
        massless = peak.squeeze(1) <= NO_MASS
        token = token.masked_fill(massless, 0)
        logprob = logprob.masked_fill(peak.squeeze(1) >= INFINITE, 0)
        logprob = logprob.masked_fill(massless | is_nan.any(dim=1), torch.nan)

    live = ~state.done & (state.steps < num_tokens)
    token = token.masked_fill(~live, state.pad_token_id)
    column = state.steps.clamp(max=num_tokens - 1).long().unsqueeze(1)
    for buffer, value in ((state.tokens, token), (state.logprobs, logprob)):
        kept = torch.where(live, value, buffer.gather(1, column).squeeze(1))
        buffer.scatter_(1, column, kept.unsqueeze(1))
    state.next_tokens.copy_(token)
    state.lengths.add_(live)
    is_eos = (token.unsqueeze(1) == eos_token_ids).any(dim=1)
    state.done.logical_or_(live & is_eos)
    state.steps.add_(1)


def _choose(
    x: Tensor, peak: Tensor, noise: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    """The token of every row, and its log-probability; `noise` is consumed."""
    z = (x - peak).div_(temperature or 1.0)
    score = z if noise is None else noise.add_(z)
    token = score.argmax(dim=1)
    logprob = z.gather(1, token.unsqueeze(1)).squeeze(1)
    return token, logprob - z.exp_().sum(dim=1).log()


def random_words(seed: Tensor, steps: Tensor, num_columns: int) -> Tensor:
    """[B, V] int64 in 0..2**32 - 1: a word a column, from (seed, row, step, column) alone."""
    lanes = min(LANES, num_columns)
    num_blocks = -(-num_columns // (4 * LANES))
    blocks = torch.arange(num_blocks, device=seed.device).unsqueeze(1) * LANES
    calls = (blocks + torch.arange(lanes, device=seed.device)).unsqueeze(0)
    rows = torch.arange(len(steps), device=seed.device).reshape(-1, 1, 1)
    words = philox(seed, calls, rows, steps.long().reshape(-1, 1, 1), torch.zeros_like(calls))
    return torch.stack(torch.broadcast_tensors(*words), dim=2).flatten(1)[:, :num_columns]


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """Philox 4x32-10 (Salmon et al. 2011): a counter of four words -> four words of 32 bits."""
    c0, c1, c2, c3 = counter
    rounds = torch.arange(10, device=seed.device)
    keys0 = ((seed & _WORD) + rounds * 0x9E3779B9) & _WORD
    keys1 = (((seed >> 32) & _WORD) + rounds * 0xBB67AE85) & _WORD
    for k0, k1 in zip(keys0.unbind(), keys1.unbind(), strict=True):
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def _multiply(words: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Both halves of the product: of its 64 bits int64 takes the uppermost for the sign."""
    product = words * factor
    return (product >> 32).bitwise_and_(_WORD), product.bitwise_and_(_WORD)


def gumbel(words: Tensor) -> Tensor:
    """-log(-log(1 - v)), v = (word + 0.5) / 2**32, float32; exact in both tails."""
    lower = words.float().add_(0.5).mul_(2.0**-32)
    upper = (_WORD - words).float().add_(0.5).mul_(2.0**-32)
    below_half = lower < 0.5
    exponential = torch.where(below_half, lower.neg_().log1p_(), upper.log_()).neg_()
    return exponential.log_().neg_()
