"""Who computes the loss: ours, PyTorch, TRL, Liger-Kernel, orda-kernel, as their users call them.

A provider's package is imported when it is built, so that a missing one is a reported skip.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch.nn.functional as F

from benchmarks.loss_cases import FORWARD, Answer, Case, Inputs
from esr_kernels import LMHead, linear_reverse_kl

# The small-memory mode: workspace of at most this, and at most an eighth of all logits.
SMALL_WORKSPACE_BYTES = 128 * 2**20

Loss = Callable[[Inputs], torch.Tensor]  # -> the mean over rows, 0-d


@dataclass(frozen=True)
class Tolerance:
    """Largest relative errors against float64: of the mean KL, of a gradient in L2 norm."""

    value: float
    grad: float


# From float32 inputs nothing is rounded on the way; sums over V differ in their order.
EXACT = Tolerance(value=1e-4, grad=1e-3)
# bf16 inputs, float32 logits: what is left is the rounding of dlogits and of the result to bf16.
FLOAT32_LOGITS = Tolerance(value=1e-4, grad=3e-3)
# The same, with more bf16 on the way to the gradient: sums over V accumulated or split in bf16.
FLOAT32_LOGITS_LOOSE = Tolerance(value=1e-3, grad=2e-2)
# Logits, or the whole softmax, rounded to bf16: a logit of 8 is 0.03 wrong, so 3 % of its mass.
BF16_LOGITS = Tolerance(value=5e-2, grad=1e-1)


def _fits(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[[Case], Loss]
    bf16_tolerance: Tolerance
    package: str | None = None  # what must be importable
    why_not: Callable[[Case], str | None] = _fits  # the reason it cannot run a case

    def tolerance(self, case: Case) -> Tolerance:
        return EXACT if case.dtype == "float32" else self.bf16_tolerance

    def skip_reason(self, case: Case) -> str | None:
        if self.package is not None and find_spec(self.package) is None:
            return f"package {self.package} is not installed"
        return self.why_not(case)


def run(loss: Loss, inputs: Inputs, which: str) -> Answer:
    """One pass; gradients are fresh tensors, never added to older ones."""
    if which == FORWARD:
        with torch.no_grad():
            return Answer(loss(inputs), [])
    value = loss(inputs)
    return Answer(value.detach(), list(torch.autograd.grad(value, inputs.leaves)))


def _ours(case: Case) -> Loss:
    return lambda inputs: linear_reverse_kl(*_arguments(inputs))


def small_workspace(case: Case) -> int:
    row_bytes = 8 * 32 * math.ceil(case.vocab_size / 32)
    return min(SMALL_WORKSPACE_BYTES, row_bytes * math.ceil(case.num_rows / 8))


def _ours_small(case: Case) -> Loss:
    workspace = small_workspace(case)
    return lambda inputs: linear_reverse_kl(*_arguments(inputs), max_workspace_bytes=workspace)


def _arguments(inputs: Inputs) -> tuple[torch.Tensor, LMHead, torch.Tensor, LMHead]:
    return inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head


def _logprobs(
    hidden: torch.Tensor, head: LMHead, vocab_size: int, dtype: torch.dtype | None
) -> torch.Tensor:
    # Rows past the common ids are cut off the weight, so that the GEMM leaves them out.
    logits = F.linear(hidden, head.weight[:vocab_size])
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return F.log_softmax(logits, dim=-1, dtype=dtype)


def _eager_loss(inputs: Inputs, dtype: torch.dtype | None = torch.float32) -> torch.Tensor:
    """What people write who know PyTorch; `dtype` of the log-softmaxes, None: the inputs'."""
    vocab_size = min(inputs.student_head.weight.shape[0], inputs.teacher_head.weight.shape[0])
    student = _logprobs(inputs.student_hidden, inputs.student_head, vocab_size, dtype)
    with torch.no_grad():
        teacher = _logprobs(inputs.teacher_hidden, inputs.teacher_head, vocab_size, dtype)
    # kl_div(input, target) is KL(target || input).
    return F.kl_div(teacher, student, reduction="none", log_target=True).sum(dim=-1).mean()


def _compiled(case: Case) -> Loss:
    torch._dynamo.reset()  # each case compiles for its own, static shapes
    return torch.compile(_eager_loss, dynamic=False)


def _same_in_float32(case: Case) -> str | None:
    return "is the same as eager from float32 inputs" if case.dtype == "float32" else None


def _trl(case: Case) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(inputs: Inputs) -> torch.Tensor:
        student, teacher = inputs.student_head, inputs.teacher_head
        divergence, _ = ChunkedDivergenceFunction.apply(
            inputs.student_hidden,
            student.weight,
            None,
            inputs.teacher_hidden,
            teacher.weight,
            None,
            1.0,  # beta: reverse KL
            1.0,  # temperature
            1.0,
            student.softcap,
            1.0,
            teacher.softcap,
        )
        return divergence.mean()

    return loss


def _liger_fused(case: Case) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    # The head's gradient summed in float32, as ours and TRL's are.
    module = LigerFusedLinearJSD(jsd_beta=1.0, accum_dtype=torch.float32)
    return lambda inputs: module(
        inputs.student_hidden,
        inputs.student_head.weight,
        inputs.teacher_hidden,
        inputs.teacher_head.weight,
        None,
    )


def _liger_chunked(case: Case) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Compiled is its default; on a CPU compiling takes longer than all else here.
    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=case.device == "cuda"
    )
    labels = torch.zeros(case.num_rows, dtype=torch.long, device=case.device)
    return lambda inputs: module(
        inputs.student_hidden,
        inputs.student_head.weight,
        inputs.teacher_hidden,
        inputs.teacher_head.weight,
        labels,
    )


def orda(case: Case, backend: str = "triton") -> Loss:
    from orda_kernel import SeparateTeacher, distillation_loss

    labels = torch.zeros(case.num_rows, dtype=torch.long, device=case.device)

    def loss(inputs: Inputs) -> torch.Tensor:
        return distillation_loss(
            inputs.student_hidden,
            inputs.student_head.weight,
            labels,
            SeparateTeacher(inputs.teacher_hidden, inputs.teacher_head.weight),
            student_ce_weight=0.0,
            teacher_ce_weight=0.0,
            kl_weight=1.0,
            kl_divergence="reverse",
            backend=backend,
        ).loss

    return loss


def _equal_vocabularies(case: Case) -> str | None:
    if case.student_vocab != case.teacher_vocab:
        return f"needs equal vocabularies, not {case.student_vocab} and {case.teacher_vocab}"
    return None


def _plain_head(case: Case) -> str | None:
    if case.student_softcap is not None:
        return "has no softcap"
    return _equal_vocabularies(case)


def _gpu_and_plain_head(case: Case) -> str | None:
    return "needs a GPU" if case.device != "cuda" else _plain_head(case)


PROVIDERS = (
    Provider("ours", _ours, FLOAT32_LOGITS),
    Provider("ours, small memory", _ours_small, FLOAT32_LOGITS),
    Provider("eager", lambda case: _eager_loss, BF16_LOGITS),
    Provider(
        "eager, bf16 softmax",
        lambda case: lambda inputs: _eager_loss(inputs, dtype=None),
        BF16_LOGITS,
        why_not=_same_in_float32,
    ),
    Provider("torch.compile", _compiled, BF16_LOGITS),
    Provider("TRL", _trl, FLOAT32_LOGITS_LOOSE, "trl", _equal_vocabularies),
    Provider(
        "Liger fused JSD", _liger_fused, FLOAT32_LOGITS_LOOSE, "liger_kernel", _gpu_and_plain_head
    ),
    Provider("Liger chunked JSD", _liger_chunked, BF16_LOGITS, "liger_kernel", _plain_head),
    Provider("orda", orda, BF16_LOGITS, "orda_kernel", _gpu_and_plain_head),
)
