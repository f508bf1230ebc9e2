"""Generation: what is kept of a rollout, and that nothing but our sampling settings decides it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_student

from esr_train.rollout import HFEngine, Rollout, Sampling, make_rollout

GREEDY = Sampling(
    temperature=0.0, top_p=1.0, top_k=0, eos_token_ids=(999,), pad_token_id=0, suppress_from=300
)


def sampling(**changes):
    return Sampling(**{**vars(GREEDY), **changes})


def kept(response: list[int], eos: set[int]) -> list[bool]:
    """Slow and obvious: everything up to the first EOS, and that EOS."""
    mask, ended = [], False
    for token in response:
        mask.append(not ended)
        ended = ended or token in eos
    return mask


@given(
    st.lists(st.lists(st.integers(0, 5), min_size=7, max_size=7), min_size=1, max_size=5),
    st.sets(st.integers(0, 5), min_size=1, max_size=3),
)
def test_only_what_follows_the_first_eos_is_dropped(responses, eos):
    prompts = torch.tensor([[0, 4]] * len(responses))
    mask = torch.tensor([[False, True]] * len(responses))
    # The pad id 0 may be an EOS: only its place tells them apart.
    rollout = make_rollout(prompts, mask, torch.tensor(responses), tuple(eos))
    expected = [kept(response, eos) for response in responses]
    assert rollout.response_mask.tolist() == expected
    assert rollout.attention_mask.tolist() == [[False, True, *row] for row in expected]
    assert rollout.responses.tolist() == responses


def test_loss_rows_predict_the_response_tokens():
    rollout = make_rollout(
        torch.tensor([[0, 0, 11], [12, 13, 14]]),
        torch.tensor([[False, False, True], [True, True, True]]),
        torch.tensor([[21, 2, 0], [22, 23, 24]]),
        (2,),
    )
    # A "hidden state" that is its own position in the batch shows which rows are taken.
    hidden = torch.arange(12.0).reshape(2, 6, 1)
    rows = rollout.loss_rows(hidden).flatten().long().tolist()
    assert rows == [2, 3, 8, 9, 10]
    following = rollout.input_ids.flatten()[torch.tensor(rows) + 1]
    assert following.tolist() == [21, 2, 22, 23, 24]
    assert rollout.response_positions.tolist() == [0, 1, 0, 1, 2]
    assert rollout.position_ids.tolist() == [[0, 0, 0, 1, 2, 2], [0, 1, 2, 3, 4, 5]]


def test_left_padding_does_not_change_hidden_states():
    model = make_student().eval()

    def states(ids, mask):
        rollout = Rollout(ids, mask, torch.ones(len(ids), 2, dtype=torch.bool))
        hidden = model.get_decoder()(
            input_ids=ids, attention_mask=mask.long(), position_ids=rollout.position_ids
        ).last_hidden_state
        return rollout.loss_rows(hidden)

    alone = states(torch.tensor([[7, 8, 9, 10]]), torch.ones(1, 4, dtype=torch.bool))
    padded = states(
        torch.tensor([[0, 0, 7, 8, 9, 10]]), torch.tensor([[False, False, True, True, True, True]])
    )
    torch.testing.assert_close(padded, alone)


def test_the_models_own_generation_config_does_not_leak():
    """repetition_penalty=1.5 and top_k=2 in the model's config must not bend the rollouts."""
    model = make_student().eval()
    own = model.generation_config
    prompt = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(prompt, dtype=torch.bool)
    written = HFEngine(model, GREEDY).generate(prompt, mask, max_new_tokens=12)

    ids = prompt
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == ids[:, 3:].tolist()
    assert model.generation_config is own
    assert own.repetition_penalty == 1.5

    many = HFEngine(model, sampling(temperature=1.0)).generate(
        prompt.repeat(64, 1), mask.repeat(64, 1), max_new_tokens=1
    )
    assert len(many.unique()) > 10


def test_samples_follow_the_models_distribution():
    model = make_student().eval()
    model.lm_head.weight.data.mul_(10)
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        probs = (model(input_ids=prompt).logits[0, -1] / 0.7).softmax(-1).double()
    torch.manual_seed(0)
    count = 20_000
    prompts = prompt.repeat(count, 1)
    drawn = HFEngine(model, sampling(temperature=0.7)).generate(
        prompts, torch.ones_like(prompts, dtype=torch.bool), max_new_tokens=1
    )
    seen = torch.bincount(drawn.flatten(), minlength=300).double()
    likely = probs * count >= 5
    chi_square = ((seen - probs * count) ** 2 / (probs * count))[likely].sum()
    degrees = int(likely.sum()) - 1
    assert degrees > 5
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


def test_ids_outside_the_common_vocabulary_are_never_sampled():
    model = make_student().eval()
    prompts = torch.full((64, 2), 7)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    torch.manual_seed(0)
    engine = HFEngine(model, sampling(temperature=5.0, suppress_from=40))
    assert engine.generate(prompts, mask, max_new_tokens=8).max() < 40


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(training):
    model = make_student().train(training)
    prompts = torch.full((1, 2), 7)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    HFEngine(model, GREEDY).generate(prompts, mask, max_new_tokens=1)
    assert model.training is training
