"""`rollout_batch` against a slow loop over tokens, `gather_rows` against float64 indexing."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kl_cases import DEVICE, IMPLS
from torch.utils._python_dispatch import TorchDispatchMode

from esr_kernels import RolloutBatch, gather_rows, rollout_batch
from esr_kernels.rollout.kernels import BLOCK_SIZE

EOS, OTHER_EOS, PAD = 0, 3, 4
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
each_impl = pytest.mark.parametrize("impl", IMPLS)


def oracle(
    prompt_ids: torch.Tensor,
    prompt_mask: torch.Tensor,
    response_ids: torch.Tensor,
    eos_token_ids: Any,
    rollout_tokens: int | None = None,
) -> dict[str, Any]:
    """Every field, a token at a time."""
    names = [field.name for field in fields(RolloutBatch)]
    batch: dict[str, Any] = {name: [] for name in names} | {"cu_seqlens": [0], "max_seqlen": 0}
    for row in range(len(prompt_ids)):
        sequence = [
            token
            for token, kept in zip(prompt_ids[row].tolist(), prompt_mask[row].tolist(), strict=True)
            if kept
        ]
        count = 0
        for token in response_ids[row].tolist():
            batch["loss_rows"].append(batch["cu_seqlens"][-1] + len(sequence) - 1)
            batch["targets"].append(token)
            batch["response_positions"].append(count)
            batch["sequence_ids"].append(row)
            sequence.append(token)
            count += 1
            if token in eos_token_ids or count == rollout_tokens:
                break
        batch["input_ids"] += sequence
        batch["position_ids"] += range(len(sequence))
        batch["response_lengths"].append(count)
        batch["cu_seqlens"].append(batch["cu_seqlens"][-1] + len(sequence))
        batch["max_seqlen"] = max(batch["max_seqlen"], len(sequence))
    return batch


def check(batch: RolloutBatch, expected: dict[str, Any]) -> None:
    for name, values in expected.items():
        actual = getattr(batch, name)
        if name == "max_seqlen":
            assert type(actual) is int
            assert actual == values
            continue
        assert actual.dtype == (torch.int32 if name == "cu_seqlens" else torch.int64), name
        assert actual.device.type == DEVICE, name
        assert actual.is_contiguous(), name
        assert actual.tolist() == values, name
    check_padded(batch, expected)


def check_padded(batch: RolloutBatch, expected: dict[str, Any]) -> None:
    starts, width = expected["cu_seqlens"], expected["max_seqlen"]
    for pad_token_id in (0, PAD):
        padded = batch.padded(pad_token_id)
        assert padded.input_ids.dtype == torch.int64
        rows = [
            expected["input_ids"][begin:end] + [pad_token_id] * (width - end + begin)
            for begin, end in pairwise(starts)
        ]
        assert padded.input_ids.shape == padded.attention_mask.shape == (len(rows), width)
        assert padded.input_ids.tolist() == rows
        assert padded.attention_mask.dtype == torch.bool
        assert padded.attention_mask.sum(1).tolist() == batch.cu_seqlens.diff().tolist()
        assert (padded.attention_mask.int().diff(dim=1) <= 0).all(), "pads are on the right"
        assert padded.position_ids.tolist() == [list(range(width))] * len(rows)
        assert padded.loss_rows.tolist() == [
            sequence * width + row - starts[sequence]
            for sequence, row in zip(expected["sequence_ids"], expected["loss_rows"], strict=True)
        ]


def run(inputs: tuple[torch.Tensor, ...], impl: str, **options: Any) -> RolloutBatch:
    batch = rollout_batch(*(x.to(DEVICE) for x in inputs), impl=impl, **options)
    check(batch, oracle(*inputs, **options))
    return batch


@st.composite
def cases(draw: Any) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Few ids, so that an EOS stands in prompts, twice in responses, and right after them."""
    num_rows, prompt, response = (
        draw(st.integers(low, high)) for low, high in ((0, 6), (1, 9), (0, 9))
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = (num_rows, prompt)
    sizes = torch.randint(1, prompt + 1, (num_rows, 1), generator=generator)
    columns = torch.arange(prompt).expand(shape)
    mask = {
        "none": columns >= 0,
        "left": columns >= prompt - sizes,
        "right": columns < sizes,
        "holes": (torch.rand(shape, generator=generator) < 0.5) | (columns == sizes - 1),
    }[draw(st.sampled_from(["none", "left", "right", "holes"]))]
    ids = [torch.randint(0, 6, (num_rows, n), generator=generator) for n in (prompt, response)]
    options = {
        "eos_token_ids": draw(st.lists(st.integers(0, 7), max_size=3)),
        "rollout_tokens": draw(st.none() | st.integers(1, 10)),
    }
    return (ids[0], mask, ids[1]), options


@each_impl
@settings(max_examples=80, deadline=None, derandomize=True, database=None)
@given(case=cases())
def test_ragged_batches(impl: str, case: tuple[tuple[torch.Tensor, ...], dict[str, Any]]) -> None:
    inputs, options = case
    run(inputs, impl, **options)


def make_inputs(
    num_rows: int = 3, prompt: int = 7, response: int = 8, num_ids: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask = torch.rand(num_rows, prompt) < 0.6
    mask[:, num_rows % prompt] = True
    ids = torch.randint(1, num_ids, (num_rows, prompt + response))
    return ids[:, :prompt], mask, ids[:, prompt:]


@each_impl
def test_rows_longer_than_a_block(impl: str) -> None:
    inputs = make_inputs(5, 2 * BLOCK_SIZE + 3, 2 * BLOCK_SIZE + 5)
    ends = (BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE + 4)
    for row, end in enumerate(ends):
        inputs[2][row, end] = EOS
        inputs[2][row, end + 1 :: 3] = EOS
    batch = run(inputs, impl, eos_token_ids=[EOS])
    assert batch.response_lengths.tolist() == [end + 1 for end in ends] + [2 * BLOCK_SIZE + 5]
    run(inputs, impl, eos_token_ids=[EOS], rollout_tokens=BLOCK_SIZE + 1)


@each_impl
def test_what_follows_an_eos_changes_nothing(impl: str) -> None:
    prompt_ids, prompt_mask, response_ids = make_inputs(4, 5, 8, num_ids=3)
    for row, end in enumerate((0, 3, 6)):
        response_ids[row, end] = (EOS, OTHER_EOS)[row % 2]
    results = []
    for filling in (EOS, OTHER_EOS, PAD, -100):
        for row, end in enumerate((0, 3, 6)):
            response_ids[row, end + 1 :] = filling
        inputs = prompt_ids, prompt_mask, response_ids
        results.append(run(inputs, impl, eos_token_ids=(EOS, OTHER_EOS)))
    assert results[0].response_lengths.tolist() == [1, 4, 7, 8]
    for field in fields(RolloutBatch):
        first, *others = (getattr(result, field.name) for result in results)
        assert all(torch.equal(torch.as_tensor(x), torch.as_tensor(first)) for x in others)


@each_impl
@pytest.mark.parametrize("rollout_tokens", [1, 3, 4, 5, 8, 9])
def test_the_cutoff_counts_response_tokens(impl: str, rollout_tokens: int) -> None:
    inputs = make_inputs()
    inputs[2][1, 3] = EOS  # the last token within, the first beyond, or neither
    batch = run(inputs, impl, eos_token_ids=[EOS], rollout_tokens=rollout_tokens)
    longest = min(rollout_tokens, 8)
    assert batch.response_lengths.tolist() == [longest, min(longest, 4), longest]


@each_impl
@pytest.mark.parametrize(("num_rows", "response"), [(0, 8), (0, 0), (3, 0), (1, 1), (1, 8)])
def test_few_rows_and_no_response(impl: str, num_rows: int, response: int) -> None:
    batch = run(make_inputs(num_rows, response=response), impl, eos_token_ids=[EOS])
    assert len(batch.targets) == num_rows * response


@each_impl
def test_every_response_is_an_eos_alone(impl: str) -> None:
    inputs = make_inputs()
    inputs[2][:] = EOS
    batch = run(inputs, impl, eos_token_ids=[EOS])
    assert batch.targets.tolist() == [EOS] * 3


@each_impl
def test_kinds_of_eos_sets(impl: str) -> None:
    inputs = make_inputs()
    inputs[2][0, 2], inputs[2][1, 4] = 10, 11
    lengths = []
    for ids in ((), [10], {10, 11}, torch.tensor([10, 9, 11, 9])[::2], torch.tensor([10, 11])):
        on_device = ids.to(DEVICE) if isinstance(ids, torch.Tensor) else ids
        batch = rollout_batch(*(x.to(DEVICE) for x in inputs), eos_token_ids=on_device, impl=impl)
        lengths.append(batch.response_lengths.tolist())
    assert lengths == [[8, 8, 8], [3, 8, 8], [3, 5, 8], [3, 5, 8], [3, 5, 8]]


@each_impl
def test_strided(impl: str) -> None:
    prompt_ids, _, response_ids = make_inputs(6, 7, 8)
    inputs = prompt_ids[::2].T.contiguous().T, torch.ones(7).bool().expand(3, 7), response_ids[::2]
    assert [x.stride(1) for x in inputs] == [3, 1, 1]
    run(inputs, impl, eos_token_ids=[1])
    every_other = tuple(x.repeat_interleave(2, dim=1)[:, ::2] for x in inputs)
    run(every_other, impl, eos_token_ids=[1], rollout_tokens=5)


@each_impl
def test_inputs_stay_as_they_are(impl: str) -> None:
    inputs = make_inputs()
    copies = [x.clone() for x in inputs]
    run(inputs, impl, eos_token_ids=[2])
    assert all(map(torch.equal, inputs, copies))


def test_auto_is_torch_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from esr_kernels.rollout import kernels

    monkeypatch.delattr(kernels, "triton_lengths")
    rollout_batch(*make_inputs(), eos_token_ids=[EOS])
    with pytest.raises(AttributeError):
        rollout_batch(*make_inputs(), eos_token_ids=[EOS], impl="triton")


class HostReads(TorchDispatchMode):
    """Operations for which the host would wait on a GPU: it must know a value, or a size."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if name == "index":  # by a mask alone
            waits = {x.dtype for x in args[1] if x is not None} & {torch.bool, torch.uint8}
        if name == "repeat_interleave":
            waits = {"output_size"} - {key for key in kwargs if kwargs[key] is not None}
        if waits:
            self.seen.append(name)
        return func(*args, **kwargs)


@contextmanager
def host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of what the host waits for, inside."""
    with monkeypatch.context() as patch, HostReads() as mode:
        for name in ("tolist", "cpu", "numpy"):
            original = getattr(torch.Tensor, name)

            def recorded(
                tensor: torch.Tensor, *args: Any, original: Any = original, name: str = name
            ) -> Any:
                mode.seen.append(name)
                return original(tensor, *args)

            patch.setattr(torch.Tensor, name, recorded)
        yield mode.seen


def test_host_reads_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    ones = torch.ones(3, dtype=torch.int64)
    with host_reads(monkeypatch) as seen:
        ones.max().item()
        int(ones[0])
        bool(ones.any())
        ones[ones > 0].cpu()
        torch.repeat_interleave(ones)
        torch.repeat_interleave(ones, output_size=3)[ones]
    assert seen == ["_local_scalar_dense"] * 3 + ["index", "cpu", "repeat_interleave"]


def test_the_host_reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs()
    with host_reads(monkeypatch) as seen:
        batch = rollout_batch(*inputs, eos_token_ids=[EOS], rollout_tokens=5, impl="torch")
        assert seen == ["tolist"]
        batch.padded()
        assert seen == ["tolist"]


@pytest.mark.gpu
@each_impl
def test_the_gpu_waits_once(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [x.to(DEVICE) for x in make_inputs()]
    expected = rollout_batch(*inputs, eos_token_ids=[EOS], impl=impl)  # compiled here
    reads = 0
    tolist = torch.Tensor.tolist

    def read(tensor: torch.Tensor) -> Any:
        nonlocal reads
        reads += 1
        torch.cuda.set_sync_debug_mode("default")
        try:
            return tolist(tensor)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", read)
        torch.cuda.set_sync_debug_mode("error")
        try:
            batch = rollout_batch(*inputs, eos_token_ids=[EOS], impl=impl)
            padded = batch.padded()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert reads == 1
    assert torch.equal(batch.input_ids, expected.input_ids)
    assert torch.equal(padded.loss_rows, expected.padded().loss_rows)


def causal_model(ids: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """[..., L] -> [..., L, D]: a hidden state depends on its token and on those before it alone."""
    return (table[ids] * (positions + 1).unsqueeze(-1)).cumsum(dim=-2)


@each_impl
def test_padded_and_packed_see_the_same(impl: str) -> None:
    batch = run(make_inputs(4, 9, 8), impl, eos_token_ids=[1], rollout_tokens=6)
    table = torch.randn(6, 5, dtype=torch.float64, device=DEVICE)
    sizes = batch.cu_seqlens.diff().tolist()
    sequences = zip(batch.input_ids.split(sizes), batch.position_ids.split(sizes), strict=True)
    packed = torch.cat([causal_model(*sequence, table) for sequence in sequences])
    padded = batch.padded(pad_token_id=5)
    hidden = causal_model(padded.input_ids, padded.position_ids, table)
    actual = gather_rows(hidden, padded.loss_rows)
    assert torch.equal(actual, gather_rows(packed.unsqueeze(0), batch.loss_rows))
    assert len(actual) == len(batch.targets) > 4


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's
def test_under_compile() -> None:
    def loss(hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return gather_rows(hidden * 2, rows).square().sum()

    make_batch = torch.compile(rollout_batch, backend="eager")
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for num_rows in (3, 5, 4):
        inputs = make_inputs(num_rows)
        batch = make_batch(*(x.to(DEVICE) for x in inputs), eos_token_ids=[2])
        check(batch, oracle(*inputs, [2]))
        hidden = torch.randn(len(batch.input_ids), 4, device=DEVICE, requires_grad=True)
        grads = [
            torch.autograd.grad(function(hidden, batch.loss_rows), hidden)[0]
            for function in (loss, compiled)
        ]
        assert torch.equal(*grads)
        assert grads[0].any()


ROWS = torch.tensor([5, 0, 11, 7])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(12, 5), (1, 12, 5), (3, 4, 5), (2, 3, 2, 5)])
@pytest.mark.parametrize("strided", [False, True])
def test_gathered_rows(dtype: torch.dtype, shape: tuple[int, ...], strided: bool) -> None:
    leaf = torch.randn(*shape[:-1], 10 if strided else 5, device=DEVICE).to(dtype)
    leaf.requires_grad_()
    hidden = leaf[..., ::2] if strided else leaf
    truth_leaf = leaf.detach().double().requires_grad_()
    truth_hidden = truth_leaf[..., ::2] if strided else truth_leaf
    rows = ROWS.to(DEVICE)
    upstream = torch.randn(5, len(rows), device=DEVICE).to(dtype).T
    actual = gather_rows(hidden, rows)
    truth = truth_hidden.reshape(-1, 5).index_select(0, rows)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert torch.equal(actual.double(), truth)
    (grad,) = torch.autograd.grad(actual, leaf, upstream)
    (truth_grad,) = torch.autograd.grad(truth, truth_leaf, upstream.double())
    assert grad.dtype == dtype
    assert torch.equal(grad.double(), truth_grad), "copied, so exact"


@pytest.mark.parametrize("shape", [(12, 5), (0, 5), (12, 0)])
def test_no_rows(shape: tuple[int, int]) -> None:
    hidden = torch.randn(shape, device=DEVICE, requires_grad=True)
    rows = torch.empty(0, dtype=torch.int64, device=DEVICE)
    gathered = gather_rows(hidden, rows)
    assert gathered.shape == (0, shape[1])
    (grad,) = torch.autograd.grad(gathered.sum(), hidden)
    assert torch.equal(grad, torch.zeros(shape, device=DEVICE))


def test_gather_gradcheck() -> None:
    hidden = torch.randn(3, 4, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    rows = ROWS.to(DEVICE)
    assert torch.autograd.gradcheck(gather_rows, (hidden, rows))
    assert torch.autograd.gradgradcheck(lambda x: gather_rows(x, rows) ** 3, (hidden,))


def test_gather_adds_nothing_up() -> None:
    """index_add, scatter_add and an accumulating index_put are atomics on a GPU."""

    class Names(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    hidden = torch.randn(12, 5, device=DEVICE, requires_grad=True)
    gathered = gather_rows(hidden, ROWS.to(DEVICE))
    with Names():
        gathered.backward(torch.ones_like(gathered))
    assert "index_copy_" in seen
    assert not [name for name in seen if re.search("add|put|scatter|embedding", name)]


def test_gather_in_autocast() -> None:
    hidden = torch.randn(12, 5, device=DEVICE, requires_grad=True)
    rows = ROWS.to(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        gathered = gather_rows(hidden, rows)
        (grad,) = torch.autograd.grad(gathered.sum(), hidden)
    assert gathered.dtype == grad.dtype == torch.float32
    assert torch.equal(gathered, hidden[rows])
    assert grad.sum() == 20


def ids(*shape: int, **options: Any) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.int64, **options)


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("prompt_ids", "list", {"prompt_ids": [[1]]}),
    ("prompt_ids", "shape [7]", {"prompt_ids": ids(7)}),
    ("prompt_ids", "torch.int32", {"prompt_ids": ids(3, 7).int()}),
    ("prompt_mask", "NoneType", {"prompt_mask": None}),
    ("prompt_mask", "shape [3, 6]", {"prompt_mask": ids(3, 6).bool()}),
    ("prompt_mask", "shape [2, 7]", {"prompt_mask": ids(2, 7).bool()}),
    ("prompt_mask", "torch.int64", {"prompt_mask": ids(3, 7)}),
    ("prompt_mask", "meta", {"prompt_mask": ids(3, 7, device="meta").bool()}),
    ("prompt_mask", "none in row 1", {"prompt_mask": ids(3, 7).index_fill(
        0, torch.tensor(1), 0).bool()}),
    ("prompt_mask", "none in row 0", {"prompt_ids": ids(3, 0), "prompt_mask": ids(3, 0).bool()}),
    ("response_ids", "tuple", {"response_ids": ()}),
    ("response_ids", "shape [3, 8, 1]", {"response_ids": ids(3, 8, 1)}),
    ("response_ids", "torch.float32", {"response_ids": ids(3, 8).float()}),
    ("response_ids", "4", {"response_ids": ids(4, 8)}),
    ("response_ids", "meta", {"response_ids": ids(3, 8, device="meta")}),
    ("eos_token_ids", "2", {"eos_token_ids": 2}),
    ("eos_token_ids", "None", {"eos_token_ids": None}),
    ("eos_token_ids", "'</s>'", {"eos_token_ids": "</s>"}),
    ("eos_token_ids", "[2.0]", {"eos_token_ids": [2.0]}),
    ("eos_token_ids", "shape []", {"eos_token_ids": ids()}),
    ("eos_token_ids", "torch.int32", {"eos_token_ids": ids(2).int()}),
    ("eos_token_ids", "meta", {"eos_token_ids": ids(2, device="meta")}),
    ("rollout_tokens", "0", {"rollout_tokens": 0}),
    ("rollout_tokens", "-1", {"rollout_tokens": -1}),
    ("rollout_tokens", "100.0", {"rollout_tokens": 100.0}),
    ("impl", "'cuda'", {"impl": "cuda"}),
]  # fmt: skip


@each_impl
@pytest.mark.parametrize(("name", "got", "change"), BAD, ids=[f"{b[0]} {b[1]}" for b in BAD])
def test_bad_input(impl: str, name: str, got: str, change: dict[str, Any]) -> None:
    good = {
        "prompt_ids": ids(3, 7),
        "prompt_mask": ids(3, 7).bool(),
        "response_ids": ids(3, 8),
        "eos_token_ids": [2],
        "impl": impl,
    }
    rollout_batch(**good)
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got {re.escape(got)}$"):
        rollout_batch(**(good | change))


def test_bad_pad_token_id() -> None:
    batch = rollout_batch(*make_inputs(), eos_token_ids=[EOS])
    with pytest.raises(ValueError, match=r"^pad_token_id: expected an int, got None$"):
        batch.padded(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "got", "hidden", "rows"),
    [
        ("hidden", "list", [[1.0]], ids(1)),
        ("hidden", "shape [5]", torch.ones(5), ids(1)),
        ("hidden", "torch.int64", ids(5, 2), ids(1)),
        ("rows", "list", torch.ones(5, 2), [1]),
        ("rows", "shape [2, 1]", torch.ones(5, 2), ids(2, 1)),
        ("rows", "torch.int32", torch.ones(5, 2), ids(2).int()),
        ("rows", "torch.bool", torch.ones(5, 2), ids(5).bool()),
        ("rows", "meta", torch.ones(5, 2), ids(2, device="meta")),
        ("rows", "0..5", torch.ones(5, 2), torch.tensor([5, 0])),
        ("rows", "-1..4", torch.ones(5, 2), torch.tensor([4, -1])),
        ("rows", "row 3 again", torch.ones(5, 2), torch.tensor([3, 1, 3])),
    ],
)
def test_bad_gather(name: str, got: str, hidden: Any, rows: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got {re.escape(got)}$"):
        gather_rows(hidden, rows)
