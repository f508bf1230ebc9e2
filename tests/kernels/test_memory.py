"""What a call holds at its peak, beyond its inputs: the cap on the workspace and little else."""

import gc
import weakref
from typing import Any

import pytest
import torch
from kl_cases import DEVICE, IMPLS, evaluate, make_inputs, workspace
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from esr_kernels import LMHead, linear_reverse_kl, reverse_kl
from esr_kernels.kl.rows import CPU_BLOCK

VOCAB, DIM = 20_000, 4


class LiveBytes(TorchDispatchMode):
    """The most that storages made under it took at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._see((args, kwargs), made=False)  # an input of the call
        result = func(*args, **(kwargs or {}))
        self._see(result, made=True)
        return result

    def _see(self, tensors: Any, made: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self.sizes:
                self.sizes[key] = storage.nbytes() if made else 0
                self.live += self.sizes[key]
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def test_live_bytes_are_counted() -> None:
    given = torch.ones(1000)
    with LiveBytes() as memory:
        part = (given * 2)[:10]  # 4000 bytes, as long as a part of them is in use
        given.view(-1).add_(1)
        assert memory.live == 4000
        del part
        torch.ones(300)
    assert (memory.live, memory.peak) == (0, 4000)


# Blocks of rows that the PyTorch step holds beside the workspace (docs/kernels.md).
OPTIONS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "plain": (1, {}, {}),
    "bias and softcap": (2, {"bias": True, "softcap": 3.0}, {}),
    "statistics": (3, {}, {"return_stats": True}),
    "map": (4, {}, {"vocab_map": torch.arange(VOCAB) // 2 - 1}),
    "both maps": (
        4,
        {"bias": True},
        {"vocab_map": torch.arange(VOCAB) // 2 - 1, "student_map": torch.arange(VOCAB) // 3 - 1},
    ),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.skipif(DEVICE != "cpu", reason="blocks of a CPU")
def test_the_peak_is_the_documented_one(impl: str, option: str, train_head: bool) -> None:
    # A row takes the interpreter 30 ms.
    num_rows, rows = (600, 24) if impl == "torch" else (12, 1)
    blocks, head, options = OPTIONS[option]
    inputs = make_inputs(num_rows, VOCAB, VOCAB, student_dim=DIM, teacher_dim=DIM, **head)
    mapped, both = "vocab_map" in options, "student_map" in options
    cap = workspace(rows, VOCAB) + (4 * rows * (VOCAB + 32) if mapped else 0)
    cap += 4 * rows * (VOCAB + 32) if both else 0  # peaks, and the shared-out row's last column
    inputs, leaves = inputs.leaves(train_head)
    with LiveBytes() as memory:
        result = linear_reverse_kl(
            inputs.student_hidden,
            inputs.student_head,
            inputs.teacher_hidden,
            inputs.teacher_head,
            impl=impl,
            max_workspace_bytes=cap,
            **options,
        )
        value = result[0] if "return_stats" in options else result
        del result
        torch.autograd.grad(value, list(leaves.values()))
    documented = cap + 4 * rows * DIM + 2 * 4 * num_rows * DIM
    documented += (32 if "return_stats" in options else 4) * num_rows
    if impl == "torch":
        documented += blocks * 4 * CPU_BLOCK
    if mapped:
        documented += (12 if impl == "triton" else 28) * VOCAB
    if both:
        documented += (16 if impl == "triton" else 21) * VOCAB
    if train_head:
        documented += 4 * VOCAB * (DIM + 1)  # dW and dbias
    # The sort of a map, next to the other one, or dW on its way to the caller: no workspace then.
    sort = (92 if both else 72) * VOCAB if mapped else 0
    documented = max(documented, sort, 3 * 4 * VOCAB * (DIM + 1))
    assert memory.peak <= documented + 1024
    assert memory.peak > cap / 2, "nothing was counted"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("train_head", [False, True])
def test_backward_frees_what_was_saved(impl: str, reduction: str, train_head: bool) -> None:
    """A training loop holds on to its loss until the next one is there."""
    inputs, leaves = make_inputs().leaves(train_head)
    with LiveBytes() as memory:
        hidden = inputs.student_hidden * 1
        heads = LMHead(inputs.student_head.weight * 1), inputs.teacher_head
        arguments = hidden, heads[0], inputs.teacher_hidden, heads[1]
        value = linear_reverse_kl(*arguments, reduction=reduction, impl=impl)
        del hidden, heads, arguments
        torch.autograd.grad(value.sum(), list(leaves.values()))
        gc.collect()  # Triton's interpreter holds its arguments in cycles
        assert memory.live == value.nbytes


@pytest.mark.parametrize("impl", IMPLS)
def test_a_graph_of_the_teacher_is_not_kept(impl: str) -> None:
    inputs, _ = make_inputs().leaves(train_head=True)
    inner = inputs.teacher_hidden.requires_grad_() * 2
    teacher_hidden = inner.square()  # whose graph saves what it squares
    saved = weakref.ref(inner.untyped_storage())
    heads = inputs.student_head, inputs.teacher_head
    sides = inputs.student_hidden, heads[0], teacher_hidden, heads[1]
    value = linear_reverse_kl(*sides, reduction="none", impl=impl)
    del sides, teacher_hidden, inner
    gc.collect()
    assert value.requires_grad
    assert saved() is None


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
def test_backward_frees_the_gradient_of_the_logits(impl: str, inplace: bool) -> None:
    student, teacher = (torch.randn(5, 131, device=DEVICE) for _ in range(2))
    student.requires_grad_()
    with LiveBytes() as memory:
        value = reverse_kl(student * 1, teacher, inplace=inplace, impl=impl)
        torch.autograd.grad(value, student)
        gc.collect()
        # The inverse of the normalizer, 4 bytes, stays.
        assert memory.live == value.nbytes + 4


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1600, 8192])
def test_small_memory_at_a_real_vocabulary(num_rows: int) -> None:
    inputs = make_inputs(num_rows, 151_936, 151_936, 1024, 1024, torch.bfloat16)
    options = {"train_head": False, "impl": "triton", "max_workspace_bytes": 150_000_000}
    evaluate(linear_reverse_kl, inputs, **options)  # cuBLAS takes its workspace once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    evaluate(linear_reverse_kl, inputs, **options)
    outputs = 3 * num_rows * 1024 * 2  # the leaf, dHidden in forward and in backward
    assert torch.cuda.max_memory_allocated() - before - outputs < 0.2e9
