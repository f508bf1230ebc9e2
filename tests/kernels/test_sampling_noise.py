"""The noise of `sample_tokens`: its generator, both tails, and what it draws."""

import math

import pytest
import torch
import triton
import triton.language as tl
from kl_cases import DEVICE, IMPLS
from sampling_cases import draw, make_state

from esr_kernels.sampling import kernels
from esr_kernels.sampling.reference import drawn_noise, exponential, philox, random_words

WORD = 0xFFFFFFFF
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)


def word(seed: int, row: int, step: int, column: int) -> int:
    """Philox 4x32-10 in Python's integers, and the word of it that a column takes."""
    block, rest = divmod(column, 4096)
    counter, key = [block * 1024 + rest % 1024, row, step, 0], [seed & WORD, seed >> 32 & WORD]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second & WORD,
                   first >> 32 ^ counter[3] ^ key[1], first & WORD]  # fmt: skip
        key = [key[0] + 0x9E3779B9 & WORD, key[1] + 0xBB67AE85 & WORD]
    return counter[rest // 1024]


def gumbel(words: torch.Tensor) -> torch.Tensor:
    return -exponential(words).log()


def noise(seed: int, row: int, step: int, column: int) -> float:
    return -math.log(-math.log1p(-(word(seed, row, step, column) + 0.5) / 2**32))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (PI[:4], PI[4:], (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_known_answers_of_philox(
    counter: tuple[int, ...], key: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """The published ones of Random123."""
    seed = key[1] << 32 | key[0]
    seed -= (seed >> 63) << 64
    words = philox(torch.tensor(seed), *(torch.tensor(c) for c in counter))
    assert tuple(w.item() for w in words) == expected


@pytest.mark.parametrize("seed", [0, 5, -1, 1 << 40, -(1 << 63)])
def test_words_follow_seed_row_step_and_column(seed: int) -> None:
    steps = torch.tensor([0, 3, 1 << 20], dtype=torch.int32)
    words = random_words(torch.tensor([seed]), steps, 9000)
    assert words.shape == (3, 9000)
    for row, step in enumerate(steps.tolist()):
        for column in (0, 1, 1023, 1024, 4095, 4096, 5121, 8999):
            assert words[row, column] == word(seed, row, step, column), (row, column)
    assert torch.equal(random_words(torch.tensor([seed]), steps[:2], 700), words[:2, :700])


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (3, 700), (8, 4096), (2, 9000), (1, 1 << 17)]
)
def test_noise_of_later_steps_is_drawn_ahead_and_no_other(rows: int, columns: int) -> None:
    state = make_state(rows, 40)
    for seed in (7, -8):
        state.reset(seed)
        for step in [0, 1, 2, 3, 7, 8, 9, 30, 1 << 20, 2]:
            state.steps.fill_(step)
            expected = exponential(random_words(state.seed, state.steps, columns))
            assert torch.equal(drawn_noise(state, columns), expected), step
    state.steps.copy_(torch.arange(rows))
    expected = exponential(random_words(state.seed, state.steps, columns))
    assert torch.equal(drawn_noise(state, columns), expected)


def test_noise_follows_no_default_device() -> None:
    state = make_state(2, seed=12345)
    with torch.device("meta"):
        noise = drawn_noise(state, 50)
    assert torch.equal(noise, exponential(random_words(state.seed, state.steps, 50)))


@triton.jit
def gumbel_kernel(words_ptr, noise_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    words = tl.load(words_ptr + offsets).to(tl.uint32)
    tl.store(noise_ptr + offsets, kernels.gumbel(words))


@pytest.mark.parametrize("impl", IMPLS)
def test_gumbel_in_both_tails(impl: str) -> None:
    words = [0, 1, 2, 56, 1000, 1 << 20, 1 << 29, (1 << 30) - 1, 1 << 30, 1 << 31]
    words += [WORD - w for w in words]
    words += torch.randint(0, 1 << 32, (1024 - len(words),)).tolist()
    given = torch.tensor(words, device=DEVICE)
    actual = torch.empty(1024, device=DEVICE)
    if impl == "triton":
        gumbel_kernel[(1,)](given, actual, BLOCK=1024)
    else:
        actual = gumbel(given)
    truth = [-math.log(-math.log1p(-(w + 0.5) / 2**32)) for w in words]
    expected = torch.tensor(truth, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-7, atol=3e-7)


@pytest.mark.parametrize("threshold", [15.5, 16.0, 18.0, 20.0, 21.0])
def test_rare_tokens_are_drawn_at_their_rate(threshold: float) -> None:
    """Of all 2**32 words, those that lift a token by 16 nats are exp(-16) of them: to one word."""
    lifted = (gumbel(torch.arange(2000)) > threshold).sum().item()
    assert abs(lifted - 2**32 * -math.expm1(-math.exp(-threshold))) <= 1


# seed, row, step, column, the column that it meets, temperature. The first's word is 56 of 2**32,
# the second's 2**32 - 26.
MEETINGS = [
    (20524, 0, 0, 388, 7, 1.0),
    (33865, 0, 0, 1075, 2000, 1.0),
    (13045, 0, 0, 2082, 2083, 0.25),
    (1, 2, 5, 0, 4096, 1.0),
    (1, 1, 3, 4097, 5200, 3.0),
    (-3 << 33, 2, 1, 4100, 1023, 1.0),
]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("seed", "row", "step", "column", "other", "temperature"), MEETINGS)
def test_the_noise_decides(
    impl: str, seed: int, row: int, step: int, column: int, other: int, temperature: float
) -> None:
    """A token wins from where its logit makes up for what the other's noise is ahead, to 1e-5."""
    behind = noise(seed, row, step, other) - noise(seed, row, step, column)
    for margin, winner in ((1e-5, column), (-1e-5, other)):
        logits = torch.full((row + 1, max(column, other) + 1), -torch.inf, device=DEVICE)
        logits[:, other] = 0.0
        logits[:, column] = temperature * (behind + margin)
        state = make_state(row + 1, step + 1, seed=seed)
        state.steps.fill_(step)
        state.done[:row] = True  # nothing to do there
        assert draw(logits, state, impl, temperature=temperature)[row] == winner


def test_word_of_the_upper_tail_is_what_the_meetings_say() -> None:
    assert word(20524, 0, 0, 388) == 56
    assert word(33865, 0, 0, 1075) == WORD - 25


def excess(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """Chi-square above its mean, in its standard deviations."""
    expected = probs * counts.sum()
    degrees = counts.numel() - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees).item() / (2 * degrees) ** 0.5


def tokens_of(impl: str, logits: torch.Tensor, rows: int, steps: int, seed: int) -> torch.Tensor:
    """[rows, steps] tokens of one row of logits [V]."""
    state = make_state(rows, steps, seed=seed)
    for _ in range(steps):
        draw(logits.expand(rows, -1), state, impl, temperature=0.8)
    return state.tokens


@pytest.mark.parametrize(
    ("impl", "vocab", "rows", "steps"), [("torch", 12, 4096, 16), ("triton", 4, 8, 5)]
)
def test_tokens_follow_the_softmax(impl: str, vocab: int, rows: int, steps: int) -> None:
    logits = torch.randn(vocab, device=DEVICE) * 0.8
    tokens = tokens_of(impl, logits, rows, steps, 0)
    counts = tokens.flatten().bincount(minlength=vocab).double()
    probs = (logits.double() / 0.8).softmax(0)
    assert abs(excess(counts, probs)) < 4


def test_a_token_of_one_in_a_thousand() -> None:
    logits = torch.tensor([0.0, 0.8 * math.log(1e-3 / (1 - 1e-3))], device=DEVICE)
    seen = tokens_of("torch", logits, 4096, 16, 3).sum().item()
    expected = 4096 * 16 * 1e-3
    assert abs(seen - expected) < 4 * expected**0.5


def test_rows_steps_seeds_and_columns_are_independent() -> None:
    uniform = torch.zeros(8, device=DEVICE)
    tokens = tokens_of("torch", uniform, 4096, 4, 3)
    other = tokens_of("torch", uniform, 4096, 4, 4)
    # The first columns of two tiles: their noise is of the same Philox calls.
    state = make_state(1024, 1, seed=3)
    wide = torch.full((1024, 2048), -torch.inf, device=DEVICE)
    wide[:, :8] = 0
    first = draw(wide, state, "torch")
    state.reset(3)
    second = draw(wide.roll(1024, dims=1), state, "torch") - 1024
    for a, b in (
        (tokens[:-1], tokens[1:]),
        (tokens[:, :-1], tokens[:, 1:]),
        (tokens, other),
        (first, second),
    ):
        counts = (a * 8 + b).flatten().bincount(minlength=64).double()
        assert abs(excess(counts, torch.full_like(counts, 1 / 64))) < 4


def test_no_noise_is_used_twice() -> None:
    tokens = tokens_of("triton", torch.zeros(8191, device=DEVICE), 8, 3, 1)
    assert len(tokens.unique()) == 24
