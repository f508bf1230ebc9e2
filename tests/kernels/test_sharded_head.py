"""A DTensor head, as FSDP2 leaves it, is gathered once; here on a mesh of one process."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from kl_cases import make_inputs
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from esr_kernels import LMHead, linear_reverse_kl


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[dist.DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_bias_beside_a_weight_that_is_not(mesh: dist.DeviceMesh) -> None:
    inputs = make_inputs(bias=True)
    head = inputs.student_head
    assert head.bias is not None
    sharded = LMHead(head.weight, distribute_tensor(head.bias, mesh, [Shard(0)])).local()
    assert type(sharded.bias) is torch.Tensor
    assert torch.equal(sharded.bias, head.bias)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_value_and_gradients(mesh: dist.DeviceMesh, reduction: str) -> None:
    inputs, leaves = make_inputs(bias=True).leaves(train_head=True)
    shards = {
        name: distribute_tensor(leaves[name].detach(), mesh, [Shard(0)]).requires_grad_()
        for name in ("weight", "bias")
    }
    gathered = []
    for head in (inputs.student_head, LMHead(**shards)):
        value = linear_reverse_kl(
            leaves["hidden"], head, inputs.teacher_hidden, inputs.teacher_head, reduction=reduction
        )
        value.sum().backward()
        gathered.append(value.detach())
    assert torch.equal(gathered[0], gathered[1])
    for name, shard in shards.items():
        assert isinstance(shard.grad, DTensor)
        assert shard.grad.placements == shard.placements
        assert torch.equal(shard.grad.full_tensor(), leaves[name].grad), name
