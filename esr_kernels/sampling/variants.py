"""The sampling kernel as it is launched, for the ahead-of-time report."""

from __future__ import annotations

from collections.abc import Iterator

from esr_kernels.sampling import kernels
from esr_kernels.sampling.state import LANES
from esr_kernels.variant import Variant


def variants() -> Iterator[Variant]:
    """Every kernel as it is launched."""
    # name, logits, temperature 0, V not a multiple of 16
    for name, logits, greedy, odd in (
        ("bf16", "bf16", False, False),
        ("bf16, odd V", "bf16", False, True),
        ("bf16, greedy", "bf16", True, False),
        ("fp16", "fp16", False, False),
        ("fp32", "fp32", False, False),
        ("fp32, greedy, odd V", "fp32", True, True),
    ):
        types: dict[str, str | None] = {
            "logits_ptr": f"*{logits}",
            "logprobs_ptr": "*fp32",
            "done_ptr": "*i1",
            "inverse": "fp32",
        }
        types |= dict.fromkeys(("tokens_ptr", "next_tokens_ptr", "seed_ptr", "eos_ptr"), "*i64")
        types |= dict.fromkeys(("lengths_ptr", "steps_ptr"), "*i32")
        integers = ("logits_stride", "num_columns", "num_tokens", "num_eos", "pad_token_id")
        types |= dict.fromkeys(integers, "i32")
        unaligned = {"eos_ptr", "num_tokens", "num_eos", "pad_token_id"}
        yield Variant(
            f"sample_tokens ({name})",
            kernels.sample_tokens_kernel,
            types,
            {"GREEDY": greedy, "LANES": kernels.GREEDY_LANES if greedy else LANES},
            frozenset(unaligned | ({"num_columns"} if odd else set())),
            kernels.NUM_WARPS,
        )
