"""The row step: both models' logits of some rows -> KL, its gradient and statistics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

# What a logit of -inf counts as: exp() of it is 0, and no sum, difference or product of it is NaN.
NO_MASS = -1e30
# Elements of a block of rows in the PyTorch step: a core's cache on the CPU, 64 MiB on a device.
CPU_BLOCK = 1 << 18
DEVICE_BLOCK = 1 << 24


@dataclass(frozen=True)
class Activation:
    """z = softcap * tanh(scale * (x + bias) / softcap) / temperature of raw logits x; bias [V]."""

    bias: torch.Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0

    @property
    def factors(self) -> tuple[float, float]:
        """(before the tanh, after it); without softcap their product is all that counts."""
        if self.softcap is None:
            return self.scale, 1.0 / self.temperature
        return self.scale / self.softcap, self.softcap / self.temperature


@dataclass(frozen=True)
class Rows:
    """What a row step reads and writes beside the logits.

    values [rows] = weight * KL; stats [len(STATS), rows] or None; grad [rows, V] = the gradient of
    weight * KL with respect to the raw student logits, or None; it may share their storage. mapped:
    the teacher's logits [rows, V + 1] are z already, -inf where the map reaches no id, and end in
    the log-sum-exp of the ids that the map leaves out. padded: rows may be read and written up to
    their stride.
    """

    student: Activation
    teacher: Activation
    weights: torch.Tensor | None
    values: torch.Tensor
    stats: torch.Tensor | None = None
    grad: torch.Tensor | None = None
    mapped: bool = False
    padded: bool = False

    def block(self, rows: slice) -> Rows:
        return replace(
            self,
            weights=None if self.weights is None else self.weights[rows],
            values=self.values[rows],
            stats=None if self.stats is None else self.stats[:, rows],
            grad=None if self.grad is None else self.grad[rows],
        )


@dataclass(frozen=True)
class Backend:
    """`row_step`, `group` and `share` of an implementation.

    The first two may consume the logits. overwrites: the row step writes a gradient of the
    student's dtype over the student's float32 logits; otherwise it has the logits' dtype.
    """

    row_step: Callable[[torch.Tensor, torch.Tensor, Rows], None]
    group: Callable[[torch.Tensor, torch.Tensor, Activation, torch.Tensor | None, Any], None]
    share: Callable[[torch.Tensor, Any], None]
    overwrites: bool


def torch_row_step(student_logits: torch.Tensor, teacher_logits: torch.Tensor, rows: Rows) -> None:
    """The row step in eager PyTorch, any device; consumes both; all of one dtype."""
    for block in row_blocks(student_logits):
        _step(student_logits[block], teacher_logits[block], rows.block(block))


def row_blocks(logits: torch.Tensor) -> list[slice]:
    """Of some rows at a time: temporaries stay small, and in the cache of a CPU."""
    num_rows, num_columns = logits.shape
    elements = CPU_BLOCK if logits.device.type == "cpu" else DEVICE_BLOCK
    size = max(1, elements // num_columns)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _step(student_logits: torch.Tensor, teacher_logits: torch.Tensor, rows: Rows) -> None:
    slope = activate(student_logits, rows.student, with_slope=rows.grad is not None)
    rest = None
    if rows.mapped:
        teacher_logits, teacher_rest = teacher_logits[:, :-1], teacher_logits[:, -1]
        uncovered = teacher_logits == -torch.inf
        if rows.stats is not None:
            student_rest = student_logits.masked_fill(~uncovered, -torch.inf).logsumexp(dim=1)
            rest = student_rest, teacher_rest
        student_logits.masked_fill_(uncovered, NO_MASS)
        teacher_logits.masked_fill_(uncovered, NO_MASS)
    else:
        activate(teacher_logits, rows.teacher, with_slope=False)
    # Each model's logits relative to its own maximum: what is added to all of them costs no digits.
    student_max = student_logits.amax(dim=1, keepdim=True)
    teacher_max = teacher_logits.amax(dim=1, keepdim=True)
    student_logits -= student_max
    teacher_logits -= teacher_max
    probs = student_logits.exp()
    student_sum = probs.sum(dim=1, keepdim=True)
    probs /= student_sum
    if rows.stats is not None:
        _distributions(rows.stats, student_logits, teacher_logits, probs, student_sum)
    difference = student_logits.sub_(teacher_logits)
    teacher_sum = teacher_logits.exp_().sum(dim=1, keepdim=True)
    mean_difference = torch.mul(probs, difference, out=teacher_logits).sum(dim=1, keepdim=True)
    divergence = mean_difference + (teacher_sum / student_sum).log()
    rows.values.copy_(divergence.squeeze(1))
    if rows.stats is not None:
        rows.stats[0] = rows.values
        rows.stats[5:] = 1
        if rest is not None:
            rows.stats[5] = torch.sigmoid((student_max + student_sum.log()).squeeze(1) - rest[0])
            rows.stats[6] = torch.sigmoid((teacher_max + teacher_sum.log()).squeeze(1) - rest[1])
    skipped = None
    if rows.weights is not None:
        skipped = rows.weights == 0
        rows.values.mul_(rows.weights).masked_fill_(skipped, 0)
        if rows.stats is not None:
            rows.stats.masked_fill_(skipped, 0)
    if rows.grad is None:
        return
    factor = probs.new_full((), rows.student.scale / rows.student.temperature)
    if rows.weights is not None:
        factor = (factor * rows.weights).unsqueeze(1)
    torch.mul(difference.sub_(mean_difference), probs.mul_(factor), out=rows.grad)
    if slope is not None:
        rows.grad.mul_(slope)
    if skipped is not None:
        rows.grad.masked_fill_(skipped.unsqueeze(1), 0)


def _distributions(
    stats: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    probs: torch.Tensor,
    student_sum: torch.Tensor,
) -> None:
    """Rows 1 to 4 of the statistics; logits relative to their maxima."""
    masses = teacher.exp()
    teacher_sum = masses.sum(dim=1)
    stats[1] = student_sum.log().squeeze(1) - (probs * student).sum(dim=1)
    stats[2] = teacher_sum.log() - masses.mul_(teacher).sum(dim=1) / teacher_sum
    stats[3] = student_sum.reciprocal().squeeze(1)
    choice = student.argmax(dim=1, keepdim=True)
    stats[4] = (teacher > teacher.gather(1, choice)).sum(dim=1)


def activate(logits: torch.Tensor, side: Activation, with_slope: bool) -> torch.Tensor | None:
    """Bias, scale, softcap and temperature, in place; the softcap's derivative where asked for."""
    slope = None
    inner, outer = side.factors
    if side.bias is not None:
        logits += side.bias
    if side.softcap is None:
        if inner * outer != 1.0:
            logits *= inner * outer
    else:
        logits.mul_(inner).tanh_()
        slope = 1 - logits.square() if with_slope else None
        logits *= outer
    logits.clamp_(min=NO_MASS)
    return slope
