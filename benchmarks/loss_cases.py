"""What is measured: shapes, inputs, and the float64 answer that every provider is held against."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from esr_kernels import LMHead
from esr_kernels.kl.reference import linear_reverse_kl_reference

FORWARD = "forward"  # under torch.no_grad()
TRAINING = "forward+backward"
PASSES = (FORWARD, TRAINING)

# Logits of this standard deviation in unrelated models are a mean KL of about 4 nats.
SPREAD = 2.0
# Elements of one float64 [rows, V] tensor of the answer, of which about ten live at once.
ANSWER_ELEMENTS = 2**25


@dataclass(frozen=True)
class Case:
    """One shape on one device."""

    name: str
    num_rows: int
    student_dim: int
    teacher_dim: int
    student_vocab: int
    teacher_vocab: int
    dtype: str = "bfloat16"
    device: str = "cuda"
    train_head: bool = False
    student_softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return min(self.student_vocab, self.teacher_vocab)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def gemm_flops(self, which: str) -> int:
        """Of the GEMMs that no implementation can leave out."""
        dims = self.student_dim + self.teacher_dim
        if which == TRAINING:
            dims += self.student_dim * (1 + self.train_head)
        return 2 * self.num_rows * self.vocab_size * dims


# Shape of a pair: Ds, Dt, Vs, Vt.
_SMALL_QWEN = (1536, 2048, 151936, 151936)
_LARGE_QWEN = (2560, 5120, 151936, 151936)
_GEMMA = (2304, 2560, 256000, 262208)

# The most telling first: what a time limit cuts off is the end.
CUDA_CASES = (
    Case("1.5B<-1.7B N=1600", 1600, *_SMALL_QWEN),
    Case("1.5B<-1.7B N=8192", 8192, *_SMALL_QWEN),
    Case("4B<-14B N=1600", 1600, *_LARGE_QWEN),
    Case("1.5B<-1.7B N=1600 trained head", 1600, *_SMALL_QWEN, train_head=True),
    Case("Gemma-2-2B<-Gemma-3-4B N=1600", 1600, *_GEMMA, student_softcap=30.0),
    Case("4B<-14B N=8192", 8192, *_LARGE_QWEN),
)
_CPU = (128, 160, 16001, 16001, "float32", "cpu")
CPU_CASES = (
    Case("small N=256", 256, *_CPU),
    Case("small N=256 trained head", 256, *_CPU, train_head=True),
    Case("small N=256 padded teacher", 256, 128, 160, 16001, 16064, "float32", "cpu"),
)
# Several GB and minutes: only with --cpu-full.
CPU_FULL_CASE = Case("full N=1600", 1600, 256, 320, 151936, 151936, "float32", "cpu")


@dataclass(frozen=True)
class Inputs:
    student_hidden: torch.Tensor
    student_head: LMHead
    teacher_hidden: torch.Tensor
    teacher_head: LMHead

    @property
    def leaves(self) -> list[torch.Tensor]:
        """What the loss is differentiated by."""
        weight = self.student_head.weight
        return [self.student_hidden, *([weight] if weight.requires_grad else [])]


def make_inputs(case: Case, seed: int) -> Inputs:
    """Two unrelated models, rounded to the case's dtype."""
    generator = torch.Generator(case.device).manual_seed(seed)

    def random(rows: int, dim: int, scale: float) -> torch.Tensor:
        values = torch.randn(rows, dim, generator=generator, device=case.device)
        return values.mul_(scale).to(case.torch_dtype)

    student_weight = random(case.student_vocab, case.student_dim, SPREAD / case.student_dim**0.5)
    teacher_weight = random(case.teacher_vocab, case.teacher_dim, SPREAD / case.teacher_dim**0.5)
    return Inputs(
        random(case.num_rows, case.student_dim, 1.0).requires_grad_(),
        LMHead(student_weight.requires_grad_(case.train_head), softcap=case.student_softcap),
        random(case.num_rows, case.teacher_dim, 1.0),
        LMHead(teacher_weight),
    )


@dataclass(frozen=True)
class Answer:
    """The mean reverse KL and its gradients by `Inputs.leaves`."""

    value: torch.Tensor
    grads: list[torch.Tensor]

    def errors(self, truth: Answer) -> tuple[float, float]:
        """Relative: of the value, and of the worst gradient in L2 norm."""
        value = (self.value.double() - truth.value).abs() / truth.value.abs()
        grads = [
            torch.linalg.vector_norm(actual.double() - true) / torch.linalg.vector_norm(true)
            for actual, true in zip(self.grads, truth.grads, strict=True)
        ]
        return value.item(), torch.stack(grads).max().item()


def float64_answer(inputs: Inputs) -> Answer:
    """The reference in float64 from the rounded inputs, a few rows at a time."""
    weight = inputs.student_head.weight
    student_weight = weight.detach().double().requires_grad_(weight.requires_grad)
    student_head = replace(inputs.student_head, weight=student_weight)
    teacher_head = replace(inputs.teacher_head, weight=inputs.teacher_head.weight.double())
    rows = max(1, ANSWER_ELEMENTS // student_weight.shape[0])
    num_rows = inputs.student_hidden.shape[0]
    value = student_weight.new_zeros(())
    grads = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in inputs.leaves]
    for start in range(0, num_rows, rows):
        chunk = slice(start, start + rows)
        hidden = inputs.student_hidden[chunk].detach().double().requires_grad_()
        part = linear_reverse_kl_reference(
            hidden,
            student_head,
            inputs.teacher_hidden[chunk].double(),
            teacher_head,
            reduction="sum",
        )
        part = part / num_rows
        leaves = [hidden, *([student_weight] if weight.requires_grad else [])]
        chunk_grads = torch.autograd.grad(part, leaves)
        grads[0][chunk] = chunk_grads[0]
        if weight.requires_grad:
            grads[1] += chunk_grads[1]
        value = value + part.detach()
    return Answer(value, grads)
