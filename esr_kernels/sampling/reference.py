"""The meaning of `sample_tokens` in eager PyTorch: what runs where there is no GPU, and the oracle.

It draws the kernel's noise, so that both choose the same tokens from the same seed.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from esr_kernels.sampling.state import INFINITE, LANES, NO_MASS, SamplingState

_WORD = 0xFFFFFFFF
# Of noise on a CPU, where a small tensor's operation is mostly its call: so many numbers are drawn
# at once, for later steps too, but for no more steps than these.
_NUMBERS, _STEPS = 1 << 17, 8


def torch_sample(
    logits: Tensor, state: SamplingState, eos_token_ids: Tensor, temperature: float
) -> None:
    """One step of all rows, [B, V]; writes the state."""
    num_tokens = state.tokens.shape[1]
    x = logits.float()
    peak = x.amax(dim=1, keepdim=True)
    noise = None
    if temperature:
        noise = drawn_noise(state, logits.shape[1])
    # Where looking is free, rows without NaN, +inf or nothing but -inf save themselves the care.
    is_free = logits.device.type == "cpu"
    if is_free and all(abs(value) < INFINITE for value in peak.flatten().tolist()):
        token, logprob = _choose(x, peak, noise, temperature)
    else:
        is_nan = x.isnan()
        x = x.masked_fill(is_nan, NO_MASS).clamp(NO_MASS, INFINITE)
        peak = x.amax(dim=1, keepdim=True)
        if noise is not None:
            noise = noise.masked_fill(x >= INFINITE, 1)
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
    """The token of every row, and its log-probability.

    noise: E of `exponential`, or None: greedy. exp(z) / E is largest where z - log(E) is, the
    kernel's score, and spares a second logarithm. What exp rounds to 0 is 87 nats below the peak:
    noises differ by 26.
    """
    z = x - peak
    if temperature not in (0, 1):
        z.div_(temperature)
    weights = z.exp()
    total = weights.sum(dim=1)
    scores = z if noise is None else weights.div_(noise)
    token = scores.max(dim=1, keepdim=True).indices  # the first; argmax takes three times as long
    return token.squeeze(1), z.gather(1, token).squeeze(1) - total.log()


def drawn_noise(state: SamplingState, num_columns: int) -> Tensor:
    """E of `exponential`, [B, V], for the next step; not to be written to."""
    num_rows = len(state.steps)
    num_steps = min(_NUMBERS // max(num_rows * num_columns, 1), _STEPS)
    if state.steps.device.type == "cpu" and num_steps > 1:
        steps = set(state.steps.tolist())
        if len(steps) == 1:
            first, later = divmod(steps.pop(), num_steps)
            seed = int(state.seed)
            return _several_steps(seed, first * num_steps, num_steps, num_rows, num_columns)[later]
    return exponential(random_words(state.seed, state.steps, num_columns))


@lru_cache(maxsize=4)  # rollouts that take turns
def _several_steps(
    seed: int, first: int, num_steps: int, num_rows: int, num_columns: int
) -> Tensor:
    """Noise [S, B, V] of as many steps from the first on."""
    steps = torch.arange(first, first + num_steps, device="cpu").unsqueeze(1)
    key = torch.tensor([seed], device="cpu")
    return exponential(random_words(key, steps.expand(-1, num_rows), num_columns))


def random_words(seed: Tensor, steps: Tensor, num_columns: int) -> Tensor:
    """[..., B, V] int64 in 0..2**32 - 1, steps being [..., B]: a word a column.

    From (seed, row, step, column) alone.
    """
    lanes = min(LANES, num_columns)
    num_blocks = -(-num_columns // (4 * LANES))
    blocks = torch.arange(num_blocks, device=seed.device).unsqueeze(1) * LANES
    calls = blocks + torch.arange(lanes, device=seed.device)
    rows = torch.arange(steps.shape[-1], device=seed.device).reshape(-1, 1, 1)
    words = philox(seed, calls, rows, steps.long()[..., None, None], torch.zeros_like(calls))
    return torch.stack(words, dim=-2).flatten(-3)[..., :num_columns]


def philox(seed: Tensor, *counter: Tensor) -> tuple[Tensor, ...]:
    """Philox 4x32-10 (Salmon et al. 2011): a counter of four words -> four words of 32 bits.

    Lower halves of products are cut to 32 bits only where upper halves meet them: of a product's 64
    bits, int64 takes the uppermost for the sign, which that cut mends too.
    """
    c0, c1, c2, c3 = (words.clone() for words in torch.broadcast_tensors(*counter))
    product0, product1 = torch.empty_like(c0), torch.empty_like(c0)
    rounds = torch.arange(10, device=seed.device)
    keys0 = (seed & _WORD) + rounds * 0x9E3779B9
    keys1 = (seed >> 32) + rounds * 0xBB67AE85
    for k0, k1 in zip(keys0.unbind(), keys1.unbind(), strict=True):
        torch.mul(c0, 0xD2511F53, out=product0)
        torch.mul(c2, 0xCD9E8D57, out=product1)
        for word, product, low, key in ((c0, product1, c1, k0), (c2, product0, c3, k1)):
            torch.bitwise_right_shift(product, 32, out=word)
            word.bitwise_xor_(low).bitwise_xor_(key).bitwise_and_(_WORD)
        c1, product1, c3, product0 = product1, c1, product0, c3
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


def exponential(words: Tensor) -> Tensor:
    """E = -log(1 - v), v = (word + 0.5) / 2**32, float32; -log(E) is the kernel's noise.

    By way of float64, in which 1 - v is exact: so are both tails.
    """
    rest = words.double().sub_(2.0**32 - 0.5).mul_(-(2.0**-32))
    return rest.log_().neg_().float()
