"""`sample_tokens`: choices, log-probabilities, and what becomes of the rows."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kl_cases import DEVICE, DTYPES, IMPLS
from sampling_cases import PAD, draw, ids, make_state

from esr_kernels import SamplingState, sample_tokens
from esr_kernels.sampling.filters import filtered

BUFFERS = ("tokens", "logprobs", "next_tokens", "lengths", "done", "steps")
INF, NAN = float("inf"), float("nan")
both = pytest.mark.parametrize("impl", IMPLS)


def truth(logits: torch.Tensor, tokens: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    logprobs = (logits.double() / temperature).log_softmax(1)
    return logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=3e-6, atol=3e-6)


def same_state(a: SamplingState, b: SamplingState) -> None:
    for name in BUFFERS:
        if name != "logprobs":
            assert torch.equal(getattr(a, name), getattr(b, name)), name
    torch.testing.assert_close(a.logprobs, b.logprobs, rtol=3e-6, atol=3e-6)


def test_a_new_state() -> None:
    state = make_state(3, 5, seed=-7, pad_token_id=9)
    assert torch.equal(state.tokens, torch.full((3, 5), 9, device=DEVICE))
    assert state.next_tokens.tolist() == [9] * 3
    assert not any(getattr(state, name).any() for name in ("logprobs", "lengths", "done", "steps"))
    assert state.seed.tolist() == [-7]
    dtypes = [getattr(state, name).dtype for name in BUFFERS]
    expected = [torch.int64, torch.float32, torch.int64, torch.int32, torch.bool, torch.int32]
    assert dtypes == expected


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(1, torch.float32), (131, torch.bfloat16), (4096, torch.float16), (4097, torch.float32),
     (8209, torch.bfloat16)],
)  # fmt: skip
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_kernel_chooses_as_the_reference(
    vocab: int, dtype: torch.dtype, temperature: float
) -> None:
    states = [make_state(3, 2) for _ in IMPLS]
    for _ in range(2):
        logits = (torch.randn(3, vocab, device=DEVICE) * 3).to(dtype)
        before = logits.clone()
        for impl, state in zip(IMPLS, states, strict=True):
            step = int(state.steps[0])
            tokens = draw(logits, state, impl, temperature=temperature)
            assert torch.equal(tokens, state.tokens[:, step])
            close(state.logprobs[:, step], truth(logits, tokens, temperature or 1.0))
        assert torch.equal(logits, before)
    same_state(*states)
    assert states[0].lengths.tolist() == [2, 2, 2]


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_greedy_takes_the_lowest_id_of_a_tie(impl: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 8300, device=DEVICE).to(dtype)
    for row, tied in enumerate(([8299], [8250, 77], [5000, 3000, 904], [1024, 0])):
        logits[row, tied] = 9.0
    state = make_state(4)
    assert draw(logits, state, impl, temperature=0).tolist() == [8299, 77, 904, 0]
    close(state.logprobs[:, 0], truth(logits, state.next_tokens))


@both
def test_finished_rows_stay_as_they_are(impl: str) -> None:
    logits = torch.randn(4, 50, device=DEVICE)
    logits[1, 7] = logits[3, 9] = 100.0
    state = make_state(4)
    assert sample_tokens(logits, state, eos_token_ids=ids(9, 7), impl=impl) is state.next_tokens
    assert state.done.tolist() == [False, True, False, True]
    logits[[1, 3]] = float("nan")
    assert draw(logits, state, impl, eos=(9, 7))[[1, 3]].tolist() == [PAD, PAD]
    assert state.lengths.tolist() == [2, 1, 2, 1]
    assert state.done.tolist() == [False, True, False, True]
    assert state.tokens[1].tolist() == [7, PAD, PAD, PAD]
    assert state.logprobs[1, 1:].tolist() == [0.0] * 3
    assert state.steps.tolist() == [2] * 4
    assert torch.equal(state.tokens[:, 1], state.next_tokens)


@both
@pytest.mark.parametrize("eos", [(), (3,), (8, 3, 5)])
def test_every_id_of_the_set_ends_a_row(impl: str, eos: tuple[int, ...]) -> None:
    logits = torch.eye(10, device=DEVICE)[[3, 4, 5, 8]] * 100
    state = make_state(4)
    assert draw(logits, state, impl, eos).tolist() == [3, 4, 5, 8]
    assert state.done.tolist() == [token in eos for token in (3, 4, 5, 8)]
    assert state.lengths.tolist() == [1] * 4


@both
def test_pad_may_be_an_eos(impl: str) -> None:
    logits = torch.eye(10, device=DEVICE)[[2, 6]] * 100
    state = make_state(2, pad_token_id=2)
    for _ in range(3):
        draw(logits, state, impl, eos=(2,))
    assert state.tokens.tolist() == [[2] * 4, [6, 6, 6, 2]]
    assert state.lengths.tolist() == [1, 3]
    assert state.done.tolist() == [True, False]


@both
def test_a_full_buffer_is_left_alone(impl: str) -> None:
    state = make_state(2, 2, pad_token_id=5)
    tokens = torch.full((8,), -1, device=DEVICE)
    logprobs = torch.full((8,), -1.0, device=DEVICE)
    state = replace(state, tokens=tokens[2:6].view(2, 2), logprobs=logprobs[2:6].view(2, 2))
    logits = torch.eye(10, device=DEVICE)[[3, 4]] * 100
    for _ in range(2):
        draw(logits, state, impl)
    kept = {name: getattr(state, name).clone() for name in ("tokens", "logprobs", "lengths")}
    assert tokens.tolist() == [-1, -1, 3, 3, 4, 4, -1, -1]
    for _ in range(2):
        assert draw(logits, state, impl, eos=(3, 5)).tolist() == [5, 5]
    assert all(torch.equal(kept[name], getattr(state, name)) for name in kept)
    assert tokens.tolist() == [-1, -1, 3, 3, 4, 4, -1, -1]
    assert logprobs[[0, 1, 6, 7]].tolist() == [-1] * 4
    assert not state.done.any()


@both
def test_a_seed_says_all(impl: str) -> None:
    logits = torch.randn(4, 300, device=DEVICE)
    state = make_state(4, 3, seed=11)

    def rollout() -> list[list[int]]:
        for _ in range(2):
            draw(logits, state, impl, eos=(3, 4, 5))
        return state.tokens.tolist()

    buffers = [getattr(state, name).data_ptr() for name in (*BUFFERS, "seed")]
    first = rollout()
    state.reset(12)
    same_state(state, make_state(4, 3))
    assert rollout() != first
    state.reset(torch.tensor(11, device=DEVICE))
    assert rollout() == first
    assert [getattr(state, name).data_ptr() for name in (*BUFFERS, "seed")] == buffers


@both
def test_batch_width_and_strides_change_nothing(impl: str) -> None:
    wide = torch.randn(8, 4200, device=DEVICE)
    wide[:, 4109:] = float("nan")
    dense = wide[:4, :4109].contiguous()
    expected = draw(dense, make_state(4), impl)
    assert torch.equal(draw(wide[:4, :4109], make_state(4), impl), expected)
    assert torch.equal(draw(dense[:2], make_state(2), impl), expected[:2])
    wide[:, 4109:] = -torch.inf
    assert torch.equal(draw(wide[:4], make_state(4), impl), expected)
    spread = torch.empty(8, 4110, device=DEVICE)
    spread[::2, 1:] = dense
    assert torch.equal(draw(spread[::2, 1:], make_state(4), impl), expected)


@both
def test_what_is_added_to_all_logits_changes_nothing(impl: str) -> None:
    """The noise is not rounded to the size of the logits."""
    logits = torch.randint(0, 3, (8, 8200), device=DEVICE).float()
    logits[:4] = -INF
    logits[:4, 5::1024] = 0.0  # ids that one lane of the kernel compares
    states = make_state(8), make_state(8)
    plain, lifted = draw(logits, states[0], impl), draw(logits + 2.0**23, states[1], impl)
    assert torch.equal(plain, lifted)
    same_state(*states)


@both
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [12, 4103])
def test_infinite_and_undefined_logits(impl: str, temperature: float, vocab: int) -> None:
    logits = torch.randn(8, vocab, device=DEVICE) * 0.1
    logits[0, :10] = logits[0, 11:] = -INF
    logits[1, [3, 9]] = INF
    logits[2] = -INF
    logits[3] = NAN
    logits[4, 4] = NAN
    logits[5, [2, 6]] = torch.tensor([NAN, INF], device=DEVICE)
    logits[6, 5:] = NAN
    logits[6, :5] = -INF
    logits[7, ::2] = -INF
    state = make_state(8)
    tokens = draw(logits, state, impl, temperature=temperature).tolist()
    logprobs = state.logprobs[:, 0]
    assert tokens[:4] == [10, 3, 0, 0]
    assert logprobs[:2].tolist() == [0.0, 0.0]
    assert logprobs[2:7].isnan().all()
    assert 0 <= tokens[4] < vocab
    assert tokens[4] != 4
    assert tokens[5:7] == [6, 0]
    assert tokens[7] % 2 == 1
    close(logprobs[7:], truth(logits[7:], state.next_tokens[7:]))


@both
def test_extreme_temperatures_and_logits(impl: str) -> None:
    logits = torch.randn(2, 40, device=DEVICE) * 1e4
    logits[:, ::3] = -INF
    for temperature in (1e-6, 1.0, 1e6):
        state = make_state(2)
        tokens = draw(logits, state, impl, temperature=temperature)
        assert (tokens % 3 != 0).all()
        if temperature <= 1:
            assert torch.equal(tokens, logits.argmax(1))
        close(state.logprobs[:, 0], truth(logits, tokens, temperature))


@both
def test_no_rows_and_logits_with_a_gradient(impl: str) -> None:
    assert draw(torch.ones(0, 7, device=DEVICE), make_state(0), impl).shape == (0,)
    state = make_state(2)
    draw(torch.ones(2, 7, device=DEVICE, requires_grad=True), state, impl)
    assert not state.logprobs.requires_grad


def test_auto_runs_what_the_device_can() -> None:
    logits = torch.randn(3, 60, device=DEVICE)
    named = "torch" if DEVICE == "cpu" else "triton"
    auto, same = make_state(3), make_state(3)
    assert torch.equal(draw(logits, auto, "auto"), draw(logits, same, named))
    assert torch.equal(auto.logprobs, same.logprobs)


FILTERS: list[dict[str, Any]] = [
    {"top_k": 1}, {"top_k": 7}, {"top_k": 500}, {"top_p": 0.6}, {"top_p": 1e-9}, {"min_p": 0.2},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.05},
]  # fmt: skip


@pytest.fixture
def _cumsum_allowed() -> None:
    torch.use_deterministic_algorithms(False)  # CUDA has no deterministic one


@both
@pytest.mark.usefixtures("_cumsum_allowed")
@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters_are_those_of_transformers(impl: str, options: dict[str, Any]) -> None:
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers: dict[str, Callable[..., Any]] = {
        "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper,
    }  # fmt: skip
    logits = (torch.randn(4, 101, device=DEVICE) * 2).round(decimals=1).bfloat16()  # with ties
    logits[1, 5:] = -INF
    scores = logits.float() / 0.7
    for name, value in options.items():
        scores = warpers[name](value)(None, scores)
    arguments = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    assert torch.equal(filtered(logits.float() / 0.7, **arguments), scores)
    state = make_state(4)
    tokens = draw(logits, state, impl, temperature=0.7, **options)
    assert torch.equal(tokens, draw(scores, make_state(4), impl))
    close(state.logprobs[:, 0], truth(scores, tokens))


@both
@pytest.mark.usefixtures("_cumsum_allowed")
def test_filters_leave_greedy_and_odd_rows_alone(impl: str) -> None:
    logits = torch.randn(5, 30, device=DEVICE)
    options = {"top_k": 3, "top_p": 0.5, "min_p": 0.3}
    state = make_state(5)
    tokens = draw(logits, state, impl, temperature=0, **options)
    close(state.logprobs[:, 0], truth(logits, tokens))
    logits[0] = -INF
    logits[1, 7] = NAN
    logits[2, 8] = INF
    logits[3] = NAN
    state.reset(0)
    state.done[4] = True
    tokens = draw(logits, state, impl, **options)
    assert tokens[[0, 2, 3, 4]].tolist() == [0, 8, 0, PAD]
    assert state.logprobs[:, 0].isnan().tolist() == [True, True, False, True, False]


ones = torch.ones
BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("logits", "list", {"logits": [[1.0]]}),
    ("logits", "[40]", {"logits": ones(40)}),
    ("logits", "[5, 0]", {"logits": ones(5, 0)}),
    ("logits", "float64", {"logits": ones(5, 40).double()}),
    ("logits", "strides [1, 5]", {"logits": ones(40, 5).T}),
    ("state", "dict", {"state": {}}),
    ("state", "5", {"logits": ones(4, 40)}),
    ("state", "cpu", {"logits": ones(5, 40, device="meta")}),
    ("eos_token_ids", "list", {"eos_token_ids": [3]}),
    ("eos_token_ids", "[]", {"eos_token_ids": torch.tensor(3)}),
    ("eos_token_ids", "[1, 2]", {"eos_token_ids": torch.tensor([[3, 4]])}),
    ("eos_token_ids", "strides [2]", {"eos_token_ids": torch.arange(6)[::2]}),
    ("eos_token_ids", "int32", {"eos_token_ids": torch.tensor([3], dtype=torch.int32)}),
    ("eos_token_ids", "meta", {"eos_token_ids": torch.tensor([3], device="meta")}),
    ("temperature", "-1", {"temperature": -1}),
    ("temperature", "nan", {"temperature": NAN}),
    ("temperature", "inf", {"temperature": INF}),
    ("temperature", "1e-07", {"temperature": 1e-7}),
    ("temperature", "'1'", {"temperature": "1"}),
    ("top_k", "-1", {"top_k": -1}),
    ("top_k", "2.0", {"top_k": 2.0}),
    ("top_p", "0", {"top_p": 0}),
    ("top_p", "1.1", {"top_p": 1.1}),
    ("min_p", "1", {"min_p": 1}),
    ("min_p", "nan", {"min_p": NAN}),
    ("impl", "cuda", {"impl": "cuda"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "got", "change"), BAD, ids=[f"{b[0]} {b[1]}" for b in BAD])
def test_bad_input(name: str, got: str, change: dict[str, Any]) -> None:
    state = SamplingState.create(5, 3, seed=0, pad_token_id=0, device="cpu")
    good = {"logits": ones(5, 40), "state": state, "eos_token_ids": torch.tensor([3])}
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got .*{re.escape(got)}"):
        sample_tokens(**(good | change))
    assert not state.steps.any()


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", -1), ("max_new_tokens", 0), ("pad_token_id", -100), ("pad_token_id", None),
     ("seed", 1 << 63), ("seed", 0.5), ("seed", torch.zeros(2).long()), ("seed", torch.zeros(1))],
)  # fmt: skip
def test_bad_state(name: str, value: Any) -> None:
    good = {"batch_size": 2, "max_new_tokens": 3, "seed": 0, "pad_token_id": 0, "device": "cpu"}
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        SamplingState.create(**(good | {name: value}))


@pytest.mark.gpu
@both
@pytest.mark.usefixtures("_cumsum_allowed")
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 40, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_of_a_cuda_graph(impl: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    head = torch.randn(6, 16, 50277, device=DEVICE).to(dtype)
    logits, eos = head[0].clone(), torch.arange(2000, device=DEVICE)
    captured, eager = make_state(16, 5), make_state(16, 5)

    def step(state: SamplingState) -> None:
        sample_tokens(logits, state, eos_token_ids=eos, impl=impl, **options)

    step(captured)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
    for seed in (1, 2):
        captured.reset(seed)
        eager.reset(seed)
        for rows in head:
            logits.copy_(rows)
            graph.replay()
            step(eager)
            assert all(torch.equal(getattr(captured, n), getattr(eager, n)) for n in BUFFERS)
