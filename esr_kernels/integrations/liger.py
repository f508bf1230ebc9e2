"""A stand-in for Liger-Kernel's fused linear JSD: change the import, keep the call.

Follows `liger_kernel.transformers.fused_linear_jsd` of Liger-Kernel 0.8.5, which need not be
installed.
"""

from __future__ import annotations

import torch

from esr_kernels.integrations.precision import match_dtype
from esr_kernels.kl import linear_reverse_kl
from esr_kernels.lm_head import LMHead

# Weight gradients are accumulated in float32, so these are honoured or bettered.
_ACCUM_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


class LigerFusedLinearJSD(torch.nn.Module):
    """Reverse KL of two LM heads with the constructor and the call of Liger's class of this name.

    Equivalent to Liger's at jsd_beta=1.0, with V the smaller of the two vocabularies::

        s = (student_input @ student_weight[:V].T / temperature).log_softmax(-1)
        t = (teacher_input @ teacher_weight[:V].T / temperature).log_softmax(-1)
        kl = (s.exp() * (s - t)).sum(-1)
        return kl[shift_labels != ignore_index].mean()  # 0 where nothing is left

    Args:
        jsd_beta: 1.0, the reverse KL. Liger's default, 0.5, is kept and refused like any other, so
            that an import changed without a look at beta fails instead of training on another loss.
        ignore_index: rows with this label are left out of value, gradient and divisor.
        temperature: divides both models' logits, > 0; no factor T**2.
        accum_dtype: None, float32, bfloat16 or float16. The head's gradient is always accumulated
            in float32.

    Raises:
        ValueError: another beta, a temperature <= 0, another accum_dtype; in the call, what
            `linear_reverse_kl` refuses.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if jsd_beta != 1.0:
            raise ValueError(
                f"jsd_beta: expected 1.0, the reverse KL, got {jsd_beta}; "
                "for another divergence keep Liger's class"
            )
        if not temperature > 0:
            raise ValueError(f"temperature: expected a number > 0, got {temperature}")
        if accum_dtype not in _ACCUM_DTYPES:
            raise ValueError(f"accum_dtype: expected one of {_ACCUM_DTYPES}, got {accum_dtype}")
        self.jsd_beta = jsd_beta
        self.temperature = temperature
        self.ignore_index = ignore_index
        self.accum_dtype = accum_dtype

    def forward(
        self,
        student_input: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_input: torch.Tensor,
        teacher_weight: torch.Tensor,
        shift_labels: torch.Tensor | None,
    ) -> torch.Tensor:
        """The mean over the rows that are not ignored, 0-d float32 (float64 from float64).

        Args:
            student_input: [N, Ds], the hidden states that predict the labels.
            student_weight: [Vs, Ds]; its gradient is made where it requires one.
            teacher_input: [N, Dt], without gradient.
            teacher_weight: [Vt, Dt], without gradient. Unlike in Liger, Vt may differ from Vs.
            shift_labels: [N] of any integer dtype, or None to count every row.
        """
        student_input, student_head = match_dtype(student_input, LMHead(student_weight))
        teacher_input, teacher_head = match_dtype(teacher_input, LMHead(teacher_weight))
        if shift_labels is not None and shift_labels.shape != student_input.shape[:1]:
            raise ValueError(
                f"shift_labels: expected shape {list(student_input.shape[:1])}, "
                f"got {list(shift_labels.shape)}"
            )
        return linear_reverse_kl(
            student_input,
            student_head,
            teacher_input,
            teacher_head,
            token_weights=None if shift_labels is None else shift_labels != self.ignore_index,
            temperature=self.temperature,
        )
