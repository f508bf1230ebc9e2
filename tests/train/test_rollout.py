"""Generation: nothing but our sampling settings decides it, and the engines write the same."""

import warnings
from threading import Lock

import pytest
import torch
from architectures import ARCHITECTURES, make_model
from peft import LoraConfig, get_peft_model
from tiny_models import make_student

from esr_train import rollout
from esr_train.attention import accept_layouts
from esr_train.errors import UserError
from esr_train.rollout import GraphEngine, HFEngine, Sampling, local_engine

GREEDY = Sampling(
    temperature=0.0, top_p=1.0, top_k=0, eos_token_ids=(999,), pad_token_id=0, suppress_from=300
)
PROMPTS = torch.tensor([[0, 0, 0, 7, 8, 9], [11, 12, 13, 14, 15, 16], [0, 0, 0, 0, 0, 21]])
MASK = PROMPTS > 0
BOTH = pytest.mark.parametrize("make", [HFEngine, GraphEngine])


def sampling(**changes):
    return Sampling(**{**vars(GREEDY), **changes})


def student():
    model = make_student().eval()
    accept_layouts(model)
    return model


def upto_eos(responses, eos_token_ids):
    """Rows as lists, cut behind their first EOS."""
    rows = []
    for row in responses.tolist():
        ends = [i for i, token in enumerate(row) if token in eos_token_ids]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_of_both_engines_are_the_same(name):
    model = make_model(name)
    accept_layouts(model)
    free = HFEngine(model, GREEDY).generate(PROMPTS, MASK, max_new_tokens=40)
    assert free.unique().numel() > 10
    # An EOS that one row meets soon, another late or never; and an id that may not be written.
    eos = (int(free[0, 3]), int(free[1, 20]))
    narrow = sampling(eos_token_ids=eos, suppress_from=int(free.max()))
    for words in (GREEDY, narrow):
        rows = [
            make(model, words).generate(PROMPTS, MASK, max_new_tokens=40)
            for make in (HFEngine, GraphEngine)
        ]
        first, second = (upto_eos(row, words.eos_token_ids) for row in rows)
        assert first == second
    assert len({len(row) for row in first}) > 1
    assert max(map(max, first)) < narrow.suppress_from


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_logprobs_are_those_of_a_fresh_pass(name):
    model = make_model(name)
    accept_layouts(model)
    engine = GraphEngine(model, sampling(temperature=0.7, eos_token_ids=tuple(range(60))))
    responses = engine.generate(PROMPTS, MASK, max_new_tokens=30)
    (session,) = engine.sessions.values()
    lengths = session.state.lengths.tolist()
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        prompt = PROMPTS[row][MASK[row]]
        ids = torch.cat([prompt, responses[row, :length]])
        logits = model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1] / 0.7
        expected = logits.log_softmax(-1).gather(1, ids[len(prompt) :, None]).squeeze(1)
        found = session.state.logprobs[row, :length]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@BOTH
def test_the_models_own_generation_config_does_not_leak(make):
    """repetition_penalty=1.5 and top_k=2 in the model's config must not bend the rollouts."""
    model = student()
    own = model.generation_config
    prompt = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(prompt, dtype=torch.bool)
    written = make(model, GREEDY).generate(prompt, mask, max_new_tokens=12)

    ids = prompt
    with torch.no_grad():
        for _ in range(12):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert written.tolist() == ids[:, 3:].tolist()
    assert model.generation_config is own
    assert own.repetition_penalty == 1.5

    many = make(model, sampling(temperature=1.0)).generate(
        prompt.repeat(64, 1), mask.repeat(64, 1), max_new_tokens=1
    )
    assert len(many.unique()) > 10


@BOTH
@pytest.mark.parametrize("filters", [{}, {"top_k": 7}, {"top_p": 0.95}])
def test_samples_follow_the_models_distribution(make, filters):
    model = student()
    model.lm_head.weight.data.mul_(10)
    prompt = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        probs = (model(input_ids=prompt).logits[0, -1] / 0.7).softmax(-1).double()
    if "top_k" in filters:
        probs[probs < probs.topk(7).values[-1]] = 0
    if "top_p" in filters:
        ranked = probs.sort(descending=True)
        probs[ranked.indices[ranked.values.cumsum(0) - ranked.values >= 0.95]] = 0
    probs /= probs.sum()
    torch.manual_seed(0)
    count = 8_000
    prompts = prompt.repeat(count, 1)
    drawn = make(model, sampling(temperature=0.7, **filters)).generate(
        prompts, torch.ones_like(prompts, dtype=torch.bool), max_new_tokens=1
    )
    seen = torch.bincount(drawn.flatten(), minlength=300).double()
    assert seen[probs == 0].sum() == 0
    likely = probs * count >= 5
    chi_square = ((seen - probs * count) ** 2 / (probs * count))[likely].sum()
    degrees = int(likely.sum()) - 1
    assert degrees > 3
    assert chi_square < degrees + 5 * (2 * degrees) ** 0.5


@BOTH
def test_ids_outside_the_common_vocabulary_are_never_sampled(make):
    prompts = torch.full((64, 2), 7)
    mask = torch.ones_like(prompts, dtype=torch.bool)
    engine = make(student(), sampling(temperature=5.0, suppress_from=40))
    assert engine.generate(prompts, mask, max_new_tokens=8).max() < 40


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_restored(make, training):
    model = student().train(training)
    make(model, GREEDY).generate(PROMPTS, MASK, max_new_tokens=1)
    assert model.training is training


@BOTH
def test_the_random_state_decides(make):
    engine = make(student(), sampling(temperature=1.0))
    rollouts = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        rollouts.append(engine.generate(PROMPTS, MASK, max_new_tokens=16))
        rollouts.append(engine.generate(PROMPTS, MASK, max_new_tokens=16))
    assert torch.equal(rollouts[0], rollouts[4])
    assert torch.equal(rollouts[1], rollouts[5])
    different = [rollouts[0], rollouts[1], rollouts[2]]
    for first in range(3):
        for second in range(first):
            assert (different[first] != different[second]).float().mean() > 0.5


@pytest.mark.parametrize("merge", [True, False])
def test_adapters_and_their_updates_are_written_with(merge):
    torch.manual_seed(1)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.5)
    model = get_peft_model(make_student(), lora)
    core = model.get_base_model()
    core.lm_head.weight.data.mul_(10)
    accept_layouts(core)
    graph, hf = GraphEngine(core, GREEDY, merge_adapters=merge), HFEngine(core, GREEDY)
    before = graph.generate(PROMPTS, MASK, max_new_tokens=20)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    graph.update_weights()
    hf.update_weights()
    after = graph.generate(PROMPTS, MASK, max_new_tokens=20)
    assert not torch.equal(before, after)
    assert torch.equal(after, hf.generate(PROMPTS, MASK, max_new_tokens=20))


@pytest.mark.parametrize("make", [HFEngine, GraphEngine])
def test_bfloat16_computes_in_bfloat16(make):
    model = make_student().eval()
    accept_layouts(model)
    dtypes = set()
    layer = make(model, GREEDY, torch.bfloat16)
    core = layer.model if make is HFEngine else layer.weights.model
    core.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda _module, _inputs, output: dtypes.add(output.dtype)
    )
    layer.generate(PROMPTS, MASK, max_new_tokens=2)
    assert dtypes == {torch.bfloat16}


def test_ends_with_the_last_row(monkeypatch):
    model = student()
    free = GraphEngine(model, GREEDY).generate(PROMPTS, MASK, max_new_tokens=30)
    steps = []
    step = rollout.Session.step
    monkeypatch.setattr(rollout.Session, "step", lambda self: (steps.append(1), step(self)))
    eos = tuple(set(free[:, 4].tolist()))
    ended = GraphEngine(model, sampling(eos_token_ids=eos)).generate(
        PROMPTS, MASK, max_new_tokens=30
    )
    longest = max(map(len, upto_eos(free, eos)))
    assert ended.shape[1] == longest <= 5
    assert len(steps) == longest - 1
    assert GraphEngine(model, GREEDY).generate(PROMPTS, MASK, max_new_tokens=1).shape == (3, 1)


def test_sessions_depend_on_the_batch_alone():
    """A resumed run must meet the shapes that it would have met, and few of them."""
    engine = GraphEngine(student(), GREEDY)

    def session(rows, new_tokens):
        engine.generate(PROMPTS[:rows], MASK[:rows], max_new_tokens=new_tokens)
        return engine.sessions[next(reversed(engine.sessions))]

    short = session(3, 20)
    assert short.num_slots == rollout.FEWEST_SLOTS
    assert session(3, rollout.FEWEST_SLOTS - 6) is short  # to the last slot
    longer = session(3, rollout.FEWEST_SLOTS - 5)
    assert longer.num_slots == 2 * rollout.FEWEST_SLOTS
    assert session(3, 20) is short
    assert session(3, 300) is longer
    assert session(2, 20).batch_size == 2
    assert len(engine.sessions) == rollout.MOST_SESSIONS
    assert session(3, 20) is not short
    engine.release()
    assert not engine.sessions


def test_capturing_needs_room_for_two_steps(monkeypatch):
    engine = GraphEngine(student(), GREEDY)
    width = rollout.FEWEST_SLOTS - 1
    prompts = torch.arange(width).reshape(1, -1) % 300
    mask = torch.ones_like(prompts, dtype=torch.bool)
    assert engine.generate(prompts, mask, max_new_tokens=1).shape == (1, 1)
    (session,) = engine.sessions.values()
    for _ in range(2):
        session._step()


def test_callers_autocast_does_not_reach_the_decoder():
    engine = GraphEngine(student(), sampling(temperature=1.0))
    rows = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            engine.generate(PROMPTS, MASK, max_new_tokens=8)
        (session,) = engine.sessions.values()
        rows.append(session.state.logprobs[:, :8].clone())
    assert torch.equal(*rows)


def test_no_eos_at_all():
    engine = GraphEngine(student(), sampling(eos_token_ids=()))
    assert engine.generate(PROMPTS, MASK, max_new_tokens=9).shape == (3, 9)


def test_old_tokens_in_the_buffers_do_no_harm():
    model = student()
    eos = (int(GraphEngine(model, GREEDY).generate(PROMPTS, MASK, max_new_tokens=9)[1, 2]),)
    engine = GraphEngine(model, sampling(eos_token_ids=eos))
    longer = torch.arange(30).reshape(3, 10) + 100
    everywhere = torch.ones_like(longer, dtype=torch.bool)
    fresh = engine.generate(PROMPTS, MASK, max_new_tokens=20)
    engine.generate(longer, everywhere, max_new_tokens=60)
    assert torch.equal(engine.generate(PROMPTS, MASK, max_new_tokens=20), fresh)


def test_which_engine():
    model = make_student().eval()
    model.lock = Lock()  # which cannot be copied
    assert isinstance(local_engine("hf", model, GREEDY), HFEngine)
    with pytest.warns(UserWarning, match=r"graph cannot decode Qwen2ForCausalLM: cannot pickle"):
        assert isinstance(local_engine("auto", model, GREEDY), HFEngine)
    with pytest.raises(UserError, match=r"rollout_engine graph cannot decode Qwen2.*; use hf, or"):
        local_engine("graph", model, GREEDY)
    del model.lock
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("auto", "graph"):
            assert isinstance(local_engine(name, model, GREEDY), GraphEngine)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_replays_write_what_the_steps_do(name, temperature, monkeypatch):
    """A captured graph against the same steps launched one by one, and no recapture."""
    model = make_model(name).cuda()
    accept_layouts(model)
    prompts, mask = PROMPTS.cuda(), MASK.cuda()
    words = sampling(temperature=temperature)
    captured, eager = GraphEngine(model, words), GraphEngine(model, words)
    first = captured.generate(prompts, mask, max_new_tokens=40)
    (session,) = captured.sessions.values()
    graph = session.graph
    assert graph is not None
    monkeypatch.setattr(rollout.Session, "_capture", lambda *_: None)
    for seed in (1, 2):
        torch.manual_seed(seed)
        replayed = captured.generate(prompts, mask, max_new_tokens=40)
        torch.manual_seed(seed)
        assert torch.equal(replayed, eager.generate(prompts, mask, max_new_tokens=40))
    assert [s.graph for s in captured.sessions.values()] == [graph]
    assert [s.graph for s in eager.sessions.values()] == [None]
    assert first.shape == (3, 40)


@pytest.mark.gpu
def test_on_a_gpu_too_it_ends_soon_after_the_last_row():
    model = student().cuda()
    words = sampling(eos_token_ids=tuple(range(300)))
    engine = GraphEngine(model, words)
    ended = engine.generate(PROMPTS.cuda(), MASK.cuda(), max_new_tokens=100)
    assert ended.shape[1] <= 1 + 2 * rollout.CHECK_EVERY
    (session,) = engine.sessions.values()
    assert session.state.lengths.tolist() == [1, 1, 1]
