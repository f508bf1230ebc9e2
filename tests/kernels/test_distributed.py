"""DDP and FSDP2 over two gloo processes: gradients are those of one process with the whole batch.

Each rank holds some of the tokens, one case none at all. What a rank passes as normalizer is the
count of all tokens over the number of ranks, as gradients are averaged over the ranks.
"""

import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from esr_kernels import LMHead, linear_reverse_kl
from esr_kernels.kl.reference import linear_reverse_kl_reference

WORLD_SIZE = 2
VOCAB, DIM = 37, 6
# Tokens of each rank: uneven, and the vocabulary does not divide by two either.
SPLITS = {"uneven": (4, 7), "one rank without tokens": (5, 0)}
# Float32 sums over 37 ids and 11 tokens against float64.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}


class Student(torch.nn.Module):
    """Hidden states of tokens; the head stands beside it, as the loss applies it."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, DIM)
        self.layer = torch.nn.Linear(DIM, DIM)
        self.lm_head = torch.nn.Linear(DIM, VOCAB, bias=head == "trained")
        self.lm_head.requires_grad_(head != "frozen")
        if head == "tied":
            self.lm_head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(self.embed(tokens)))


def ddp(student: Student) -> Any:
    return DistributedDataParallel(student)


def shard(module: torch.nn.Module, **options: Any) -> Any:
    # A mesh of its own, as the default one is of GPUs where there are any.
    return fully_shard(module, mesh=dist.init_device_mesh("cpu", (WORLD_SIZE,)), **options)


def sharded_head(student: Student) -> Any:
    """The head in a group of its own, whose forward never runs: it stays a DTensor."""
    shard(student.lm_head)
    return shard(student, reshard_after_forward=True)


def resharded_root(student: Student) -> Any:
    """The head in the root's group, which is sharded again after the forward."""
    return shard(student, reshard_after_forward=True)


def gathered_root(student: Student) -> Any:
    """FSDP2's default of a root: after its forward the head is a plain, gathered tensor."""
    return shard(student)


WRAPPERS = (ddp, sharded_head, resharded_root, gathered_root)
CASES = [
    (wrap.__name__, split, head)
    for wrap in WRAPPERS
    for split in SPLITS
    for head in ("trained", "frozen", "tied")
    if (wrap, head) != (sharded_head, "tied")  # FSDP2 keeps a shared weight in one group
]


def gradients(rank: int, name: str, split: str, head: str) -> dict[str, Any]:
    """Of one rank, beside those of the whole batch in float64 on one process."""
    torch.manual_seed(0)
    sizes = SPLITS[split]
    num_tokens = sum(sizes)
    tokens = torch.randint(VOCAB, (num_tokens,))
    teacher_hidden, teacher_head = torch.randn(num_tokens, DIM), LMHead(torch.randn(VOCAB, DIM))
    student = Student(head)

    whole = Student(head)
    whole.load_state_dict(student.state_dict())
    whole.double()
    whole_head = LMHead(whole.lm_head.weight, whole.lm_head.bias)
    hidden = whole(tokens)
    hidden.retain_grad()
    double_teacher = teacher_hidden.double(), LMHead(teacher_head.weight.double())
    linear_reverse_kl_reference(hidden, whole_head, *double_teacher).backward()
    expected = {n: p.grad for n, p in whole.named_parameters() if p.grad is not None}

    mine = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], num_tokens)
    wrapped = {wrap.__name__: wrap for wrap in WRAPPERS}[name](student)
    expected["hidden"] = hidden.grad[mine] * WORLD_SIZE
    hidden = wrapped(tokens[mine])
    hidden.retain_grad()
    was_sharded = isinstance(student.lm_head.weight, DTensor)
    linear_reverse_kl(
        hidden,
        LMHead(student.lm_head.weight, student.lm_head.bias),
        teacher_hidden[mine],
        teacher_head,
        normalizer=torch.tensor(num_tokens / WORLD_SIZE),
    ).backward()
    actual = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    actual = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in actual.items()}
    actual["hidden"] = hidden.grad
    return {"actual": actual, "expected": expected, "was_sharded": was_sharded}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=60),
    )
    torch.save({case: gradients(rank, *case) for case in CASES}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """Of every rank, all cases in one start of the processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        torch.multiprocessing.spawn(run_rank, (str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("case", CASES, ids=map(", ".join, CASES))
def test_gradients_are_those_of_the_whole_batch(results: list[Any], case: Any) -> None:
    wrapper, _, head = case
    for rank in results:
        actual, expected = rank[case]["actual"], rank[case]["expected"]
        assert rank[case]["was_sharded"] == (wrapper in ("sharded_head", "resharded_root"))
        assert ("lm_head.weight" in actual) == (head == "trained")  # tied: it is the embedding's
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name].double(), expected[name], **TOLERANCE, msg=name)
