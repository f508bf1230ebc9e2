"""The rollout kernels as they are launched, for the ahead-of-time report."""

from __future__ import annotations

from collections.abc import Iterator

from esr_kernels.rollout import kernels
from esr_kernels.variant import Variant

_INPUTS = {"prompt_ptr": "*i64", "mask_ptr": "*u8", "responses_ptr": "*i64", "eos_ptr": "*i64"}


def variants() -> Iterator[Variant]:
    """Every kernel as it is launched."""
    for name, kernel in (
        ("rollout_lengths", kernels.lengths_kernel),
        ("rollout_pack", kernels.pack_kernel),
    ):
        outputs = {x: "*i64" for x in kernel.arg_names if x.endswith("_ptr") and x not in _INPUTS}
        types: dict[str, str | None] = dict.fromkeys(kernel.arg_names, "i32")
        types |= _INPUTS | outputs | {"BLOCK_SIZE": None}
        yield Variant(
            name,
            kernel,
            types,
            {"BLOCK_SIZE": kernels.BLOCK_SIZE},
            frozenset(types) - frozenset(outputs),
            kernels.NUM_WARPS,
        )
