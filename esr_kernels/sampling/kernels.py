"""Triton sampling step: logits of a row -> token, its log-probability, and the row's bookkeeping.

    token   = argmax(x / temperature + g),      g = -log(-log(1 - v)) from Philox
    logprob = (x_token - c) / temperature - log(sum exp((x - c) / temperature)),     any c

One program a row, one pass over V. Each lane keeps its best column so far, that column's logit and
noise, and the sum of exp() relative to that logit: it may lie below the lane's maximum, but by no
more than noises differ, 26 nats. Lanes meet once, at the end: no barrier stands in the loop.
Candidates meet as (x - x') / temperature + (g - g'): no noise is rounded to the size of the logits.

A Philox call has four words. Four tiles of LANES columns take one each: every tile is loaded in the
order of memory, and no noise moves between threads.
"""

# mypy: disable-error-code="no-untyped-def"
# (jit bodies carry no types)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from esr_kernels.launch import on_device_of
from esr_kernels.sampling import state as constants
from esr_kernels.sampling.state import SamplingState

# Sampling has 4 columns a thread of each tile: with 8, for 16-byte loads of 16-bit logits, it takes
# 200 registers and more, or spills, and arithmetic takes longer than the loads.
# Greedy has 8: with 4, ptxas squeezes it into 64 registers and spills.
GREEDY_LANES = 2048
NUM_WARPS = 8

_NO_MASS = tl.constexpr(constants.NO_MASS)
_INFINITE = tl.constexpr(constants.INFINITE)


@triton.jit
def _log1p(x):
    """For x in sqrt(1/2) - 1 .. sqrt(2) - 1, to a relative error of 1e-7."""
    # Fitted to (log1p(x) - x + x**2 / 2) / x**3, all but equal relative errors.
    series = -0.142674862 + x * 0.0870043057
    series = -0.165775848 + x * (0.149147692 + x * series)
    series = -0.25001337 + x * (0.199630637 + x * series)
    return x + x * x * (-0.5 + x * (0.333339107 + x * series))


@triton.jit
def _split(x):
    """(e, f) with x = 2**e * (1 + f), for a normal x > 0, and f where `_log1p` wants it."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the bits of sqrt(1/2)
    return exponent, (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0


@triton.jit
def gumbel(words):
    """-log(-log(1 - v)), v = (word + 0.5) / 2**32, to a few units in the last place in both tails.

    `tl.log` would branch, in each of a lane's 8 calls a block.
    """
    v = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    # 1 - v from the other end, so that it is never rounded to 0; but for a small v it has lost the
    # digits that make the upper tail, and log1p takes -v itself.
    rest = ((words ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    exponent, fraction = _split(rest)  # exponent 0 where v < 0.25
    fraction = tl.where(v < 0.25, -v, fraction)
    exponential = -0.6931471805599453 * exponent.to(tl.float32) - _log1p(fraction)
    exponent, fraction = _split(exponential)
    return -0.6931471805599453 * exponent.to(tl.float32) - _log1p(fraction)


@triton.jit
def _load(logits_ptr, columns, num_columns, MASKED: tl.constexpr):
    if MASKED:
        x = tl.load(logits_ptr + columns, mask=columns < num_columns, other=-float("inf"))
    else:
        x = tl.load(logits_ptr + columns)
    return x.to(tl.float32)


@triton.jit
def _finite(x):
    # Comparisons, not a maximum, to know what becomes of NaN.
    return tl.where(x > _NO_MASS, tl.where(x < _INFINITE, x, _INFINITE), _NO_MASS)


@triton.jit
def _mass(raw, x, best, inverse):
    return tl.where(raw == raw, tl.exp((x - best) * inverse), raw)


@triton.jit
def _challenge(x, words, columns, inverse, best, best_noise, best_columns, GREEDY: tl.constexpr):
    """The better of each lane's best and x, with its noise and column."""
    if GREEDY:
        noise = best_noise
        better = x > best
    else:
        noise = tl.where(x < _INFINITE, gumbel(words), 0.0)
        better = (x - best) * inverse + (noise - best_noise) > 0.0
    best = tl.where(better, x, best)
    best_noise = tl.where(better, noise, best_noise)
    return best, best_noise, tl.where(better, columns, best_columns)


@triton.jit
def _block(
    logits_ptr, start, num_columns, seed, row, step, inverse,
    best, best_noise, best_columns, sums,
    LANES: tl.constexpr, GREEDY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What the lanes keep, after another 4 * LANES columns."""
    lanes = tl.arange(0, LANES)
    columns0 = start + lanes
    columns1 = columns0 + LANES
    columns2 = columns1 + LANES
    columns3 = columns2 + LANES
    raw0 = _load(logits_ptr, columns0, num_columns, MASKED)
    raw1 = _load(logits_ptr, columns1, num_columns, MASKED)
    raw2 = _load(logits_ptr, columns2, num_columns, MASKED)
    raw3 = _load(logits_ptr, columns3, num_columns, MASKED)
    x0, x1, x2, x3 = _finite(raw0), _finite(raw1), _finite(raw2), _finite(raw3)
    if GREEDY:
        words0, words1, words2, words3 = lanes, lanes, lanes, lanes
    else:
        # The comparison is never true. It ties the counters to the layout of the loads; otherwise
        # the compiler makes the noise in another and moves all of it through shared memory.
        calls = start // 4 + lanes + (best < _NO_MASS).to(tl.int32)
        words0, words1, words2, words3 = tl.philox(seed, calls, row, step, 0)
    before = best
    best, best_noise, best_columns = _challenge(
        x0, words0, columns0, inverse, best, best_noise, best_columns, GREEDY
    )
    best, best_noise, best_columns = _challenge(
        x1, words1, columns1, inverse, best, best_noise, best_columns, GREEDY
    )
    best, best_noise, best_columns = _challenge(
        x2, words2, columns2, inverse, best, best_noise, best_columns, GREEDY
    )
    best, best_noise, best_columns = _challenge(
        x3, words3, columns3, inverse, best, best_noise, best_columns, GREEDY
    )
    sums *= tl.exp((before - best) * inverse)
    sums += _mass(raw0, x0, best, inverse) + _mass(raw1, x1, best, inverse)
    sums += _mass(raw2, x2, best, inverse) + _mass(raw3, x3, best, inverse)
    return best, best_noise, best_columns, sums


@triton.jit(
    do_not_specialize=["num_tokens", "num_eos", "pad_token_id"],
    do_not_specialize_on_alignment=["eos_ptr"],
)
def sample_tokens_kernel(
    logits_ptr,
    tokens_ptr,
    logprobs_ptr,
    next_tokens_ptr,
    lengths_ptr,
    done_ptr,
    steps_ptr,
    seed_ptr,
    eos_ptr,
    logits_stride,
    num_columns,
    num_tokens,
    num_eos,
    pad_token_id,
    inverse,
    GREEDY: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    offset = row.to(tl.int64)
    step = tl.load(steps_ptr + offset)
    done = tl.load(done_ptr + offset)
    if done | (step >= num_tokens):  # The row's logits may hold NaN: they are not read.
        # A done row's buffers hold pad and 0 from the start.
        tl.store(next_tokens_ptr + offset, pad_token_id)
        tl.store(steps_ptr + offset, step + 1)
        return

    seed = tl.load(seed_ptr)
    logits_ptr += offset * logits_stride
    best = tl.full([LANES], _NO_MASS, tl.float32)
    best_noise = tl.zeros([LANES], dtype=tl.float32)
    best_columns = tl.zeros([LANES], dtype=tl.int32)
    sums = tl.zeros([LANES], dtype=tl.float32)
    # The tail alone is masked: a mask of an odd V would make every load as narrow as a logit.
    tail = num_columns // (4 * LANES) * (4 * LANES)
    for start in range(0, tail, 4 * LANES):
        best, best_noise, best_columns, sums = _block(
            logits_ptr, start, num_columns, seed, row, step, inverse,
            best, best_noise, best_columns, sums, LANES, GREEDY, False,
        )  # fmt: skip
    if tail < num_columns:
        best, best_noise, best_columns, sums = _block(
            logits_ptr, tail, num_columns, seed, row, step, inverse,
            best, best_noise, best_columns, sums, LANES, GREEDY, True,
        )  # fmt: skip

    # Lanes without mass have summed exp(0): their factor here is 0, unless the row has none at all.
    peak = tl.max(best, 0)
    total = tl.sum(sums * tl.exp((best - peak) * inverse), 0)
    scores = (best - peak) * inverse + best_noise
    token = tl.min(tl.where(scores == tl.max(scores, 0), best_columns, num_columns), 0)
    logit = tl.max(tl.where(best_columns == token, best, _NO_MASS), 0)
    log_total = tl.where(peak < _INFINITE, tl.log(total), total * 0.0)  # NaN stays
    logprob = (logit - peak) * inverse - log_total
    token = tl.where(peak > _NO_MASS, token, 0)
    logprob = tl.where(peak > _NO_MASS, logprob, float("nan"))

    is_eos = token < 0
    for i in range(num_eos):
        is_eos |= tl.load(eos_ptr + i) == token
    tl.store(tokens_ptr + offset * num_tokens + step, token)
    tl.store(logprobs_ptr + offset * num_tokens + step, logprob)
    tl.store(next_tokens_ptr + offset, token)
    tl.store(lengths_ptr + offset, tl.load(lengths_ptr + offset) + 1)
    tl.store(done_ptr + offset, is_eos)
    tl.store(steps_ptr + offset, step + 1)


def triton_sample(
    logits: Tensor, state: SamplingState, eos_token_ids: Tensor, temperature: float
) -> None:
    """One step of all rows, [B, V]; writes the state."""
    num_rows, num_columns = logits.shape
    if num_rows == 0:
        return
    with on_device_of(logits):
        sample_tokens_kernel[(num_rows,)](
            logits,
            state.tokens,
            state.logprobs,
            state.next_tokens,
            state.lengths,
            state.done,
            state.steps,
            state.seed,
            eos_token_ids,
            logits.stride(0),
            num_columns,
            state.tokens.shape[1],
            len(eos_token_ids),
            state.pad_token_id,
            1.0 / (temperature or 1.0),
            GREEDY=temperature == 0,
            LANES=constants.LANES if temperature else GREEDY_LANES,
            num_warps=NUM_WARPS,
        )
