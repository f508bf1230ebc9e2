"""Public function of one sampling step: checks, filters, dispatch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from esr_kernels.checks import choose_impl, error
from esr_kernels.sampling.filters import filtered
from esr_kernels.sampling.reference import torch_sample
from esr_kernels.sampling.state import SamplingState

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Within these, differences of finite logits divided by it neither overflow nor vanish.
_TEMPERATURES = (1e-6, 1e6)


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    state: SamplingState,
    *,
    eos_token_ids: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """The next token of every row of a batch, written into `state`, in one launch.

    Equivalent to, for the rows that are not done::

        probs = (logits / temperature).softmax(-1)       # after top_k, top_p and min_p
        token = torch.multinomial(probs, 1).squeeze(1)   # argmax(log probs + Gumbel noise)
        tokens[row, step], logprobs[row, step] = token, probs[token].log()
        lengths += 1; done |= torch.isin(token, eos_token_ids); steps += 1

    The noise is Philox 4x32-10 of (seed, row, step, column) and nothing else: a row's tokens do not
    change with the batch size, the vocabulary's padding, strides or `impl` (but for near-ties that
    float32 rounds otherwise). Nothing waits for the device: after one call, which compiles, a CUDA
    graph can capture the next, and each replay is another step.

    Args:
        logits: [B, V], float32, bfloat16 or float16; rows may lie apart, as in
            `logits[:, :vocab_size]`, the ids of a row side by side.
        state: of B rows, from `SamplingState.create`; updated in place. A done row writes
            `pad_token_id`, keeps its length, and its logits are not read. So does a row whose
            buffer is full.
        eos_token_ids: 1-D int64 on the logits' device, may be empty. Such a token is written and
            counted, and ends its row.
        temperature: divides the logits, 1e-6 to 1e6. 0 takes the likeliest token, the lowest id of
            a tie, without filters.
        top_k, top_p, min_p: as Transformers' warpers, in this order, ties included; 0, 1.0 and 0.0
            are off. They are plain torch operations in front of the kernel, top_p a sort of
            [B, V], and much slower than the kernel itself.
        impl: "triton", "torch", or "auto": triton for tensors on a GPU, torch elsewhere.

    Returns:
        `state.next_tokens` [B] int64, the buffer itself: the next step overwrites it.
        The log-probabilities are those the tokens were drawn with, in float32: of the filtered
        softmax at `temperature`, at temperature 0 of the unfiltered one at 1.
        Logits beyond +-1e30 count as infinite. -inf is never chosen; +inf is, the lowest id of
        several, with log-probability 0. NaN is never chosen either and makes the row's
        log-probability NaN. A row of nothing but -inf and NaN writes id 0 with NaN.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """
    _check_logits(logits)
    _check_state(state, logits)
    _check_eos(eos_token_ids, logits.device)
    _check_options(temperature, top_k, top_p, min_p)
    chosen = choose_impl(impl, logits.device)
    if temperature and (top_k or top_p < 1 or min_p):
        logits = filtered(logits.float() / temperature, top_k, top_p, min_p)
        temperature = 1.0
    if chosen == "triton":
        from esr_kernels.sampling.kernels import triton_sample

        triton_sample(logits, state, eos_token_ids, temperature)
    else:
        torch_sample(logits, state, eos_token_ids, temperature)
    return state.next_tokens


def _check_logits(logits: Any) -> None:
    if not isinstance(logits, Tensor):
        raise error("logits", "a tensor [B, V]", type(logits).__name__)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise error("logits", "shape [B, V], V > 0", f"shape {list(logits.shape)}")
    if logits.dtype not in _DTYPES:
        raise error("logits", f"one of {_DTYPES}", logits.dtype)
    if logits.stride(1) != 1 and logits.shape[1] > 1:
        raise error("logits", "ids side by side (stride 1)", f"strides {list(logits.stride())}")


def _check_state(state: Any, logits: Tensor) -> None:
    if not isinstance(state, SamplingState):
        raise error("state", "a SamplingState", type(state).__name__)
    if len(state.done) != len(logits):
        raise error("state", f"{len(logits)} rows as in logits", len(state.done))
    if state.done.device != logits.device:
        raise error("state", f"device {logits.device} as in logits", state.done.device)


def _check_eos(eos_token_ids: Any, device: torch.device) -> None:
    if not isinstance(eos_token_ids, Tensor):
        raise error("eos_token_ids", "a tensor on the device", type(eos_token_ids).__name__)
    if eos_token_ids.ndim != 1 or not eos_token_ids.is_contiguous():
        got = f"shape {list(eos_token_ids.shape)}, strides {list(eos_token_ids.stride())}"
        raise error("eos_token_ids", "one contiguous dimension", got)
    if eos_token_ids.dtype != torch.int64:
        raise error("eos_token_ids", torch.int64, eos_token_ids.dtype)
    if eos_token_ids.device != device:
        raise error("eos_token_ids", f"device {device} as in logits", eos_token_ids.device)


def _check_options(temperature: Any, top_k: Any, top_p: Any, min_p: Any) -> None:
    low, high = _TEMPERATURES
    if not isinstance(temperature, (int, float)) or not (
        temperature == 0 or low <= temperature <= high
    ):
        raise error("temperature", f"0, or {low} to {high}", repr(temperature))
    if not isinstance(top_k, int) or top_k < 0:
        raise error("top_k", "an int >= 0", repr(top_k))
    if not isinstance(top_p, (int, float)) or not 0 < top_p <= 1:
        raise error("top_p", "a number in (0, 1]", repr(top_p))
    if not isinstance(min_p, (int, float)) or not 0 <= min_p < 1:
        raise error("min_p", "a number in [0, 1)", repr(min_p))
