"""The demo's task, its builder, and what the shipped models are claimed to do."""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from esr_train.align import Aligner, ByteTokenizer
from esr_train.demo import build, pieces_teacher_path, student_path, task, teacher_path

ROLES = {"student": student_path(), "teacher": teacher_path()}
SHIPPED = {**ROLES, "teacher-pieces": pieces_teacher_path()}
MODEL_FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Steps this small gain nothing from threads, and lose a lot where others compete for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def words():
    return AutoTokenizer.from_pretrained(student_path())


@pytest.fixture(scope="module")
def pieces():
    return AutoTokenizer.from_pretrained(pieces_teacher_path())


@pytest.fixture(params=["words", "pieces"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def test_splits_are_disjoint_whatever_the_seeds():
    prompts = {
        split: {p.prompt for seed in range(3) for p in task.make_problems(split, 300, seed=seed)}
        for split in task.SPLITS
    }
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["validation"] & prompts["test"]
    for split, members in prompts.items():
        assert {task.split_of(prompt) for prompt in members} == {split}


def test_problems_are_deterministic_different_and_extend():
    short, long = (task.make_problems("train", count, seed=3) for count in (20, 50))
    assert long[:20] == short
    assert len({p.prompt for p in long}) == 50
    assert task.make_problems("train", 50, seed=4) != long
    assert task.make_problems("test", 0) == []


def test_problems_do_not_depend_on_the_process():
    code = "from esr_train.demo.task import *; print(make_problems('test', 5, seed=7))"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert run.strip() == str(task.make_problems("test", 5, seed=7))


def test_task_needs_no_torch():
    code = "import sys, esr_train.demo.task; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("bad", ["Train", "dev", ""])
def test_unknown_split_is_refused(bad):
    with pytest.raises(ValueError, match="split must be one of"):
        task.make_problems(bad, 1)


def test_negative_count_is_refused():
    with pytest.raises(ValueError, match="count must be at least 0"):
        task.make_problems("train", -1)


def test_careful_writer_is_always_right():
    for problem in task.make_problems("train", 500):
        response = task.write_careful(problem)
        assert task.grade(response, problem.answer)
        assert task.plan_result(response) == problem.answer


def test_hasty_writer_is_right_only_with_the_right_plan():
    rng = random.Random(0)
    num_wrong = 0
    for problem in task.make_problems("train", 500):
        response = task.write_hasty(problem, rng)
        right_plan = response.split("\n")[0] == task.write_careful(problem).split("\n")[0]
        assert task.grade(response, problem.answer) == right_plan
        assert task.grade(response, task.plan_result(response))
        num_wrong += not right_plan
    assert num_wrong > 450


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("Plan: ...\n#### 12", True),
        ("#### 12\n \n", True),
        ("", False),
        ("12", False),
        ("####12", False),
        ("####  12", False),
        ("#### 12.", False),
        ("#### 12 pens", False),
        ("#### 012", False),
        ("#### 1", False),
        (" #### 12", False),
        ("so #### 12", False),
        ("#### 12\nAnn has 12 pens.", False),
        ("#### 12\n#### 12", False),
        ("#### 3\n#### 12", False),
    ],
)
def test_grade(response, right):
    assert task.grade(response, 12) is right


@pytest.mark.parametrize(
    ("response", "result"),
    [
        ("Plan: Ann start 7, Ben times 3, Cal take 5, Dan add 2.\n#### 1", 18),
        ("Plan: Ann start 7, Ben times 3", None),
        ("Plan: Ann start 7.\n#### 7", None),
        ("Plan: Ann start 7, Ben halve 3.", None),
        ("Ann has 7 pens.", None),
        ("", None),
    ],
)
def test_plan_result(response, result):
    assert task.plan_result(response) == result


def test_tokenizer_round_trips(tokenizer):
    rng = random.Random(0)
    for problem in task.make_problems("test", 100):
        prompt = tokenizer(problem.prompt).input_ids
        assert tokenizer.decode(prompt[-1:]) == "\n"
        for response in (task.write_careful(problem), task.write_hasty(problem, rng)):
            together = tokenizer(problem.prompt + response).input_ids
            assert together == prompt + tokenizer(response).input_ids
            assert tokenizer.decode(together) == problem.prompt + response
    ascii_text = "\n" + "".join(map(chr, range(32, 127)))
    assert tokenizer.decode(tokenizer(ascii_text).input_ids) == ascii_text


def test_plan_fits_the_rollout(words):
    """The plan line and its newline are at most the demo's 32 tokens, a tenth of an answer."""
    for problem in task.make_problems("test", 200):
        plan = task.write_careful(problem).split("\n")[0] + "\n"
        assert len(words(plan).input_ids) <= 32


def test_answers_fit_the_model(tokenizer):
    for problem in task.make_problems("test", 200):
        num_tokens = len(tokenizer(task.write_careful(problem)).input_ids)
        assert num_tokens < build.LONGEST_RESPONSE
        assert num_tokens + len(tokenizer(problem.prompt).input_ids) < build.MAX_POSITIONS


ODD_TEXTS = [
    "caf\u00e9 na\u00efve \ufb01 a\u0301\u00a0b",
    "\u65e5\u672c\u8a9e \U0001f600\u200d\U0001f525 \u0645\u0631\u062d\u0628\u0627",
    " \t\r\n  \n\n  two  ",
    "\x00\x1b\x7f\ufffd\uffff\U0010ffff",
    "<0x41><0xFF> <pad <|endoftext|>",
    "4567 890, 12.5",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_pieces_keep_any_text(pieces, text):
    assert pieces.decode(pieces(text).input_ids) == text


def test_pieces_stay_within_a_word_and_know_every_byte(pieces):
    pieces = ByteTokenizer(pieces, "teacher")
    assert set(map(bytes, zip(range(256), strict=True))) <= set(pieces.token_bytes)
    for piece in pieces.token_bytes:
        assert b" " not in piece[1:]
        assert b"\n" not in piece or piece == b"\n"


def test_pieces_split_words_and_join_digits(words, pieces):
    for word in (" times", " minus", " start", " first", " fewer"):
        assert len(words.tokenize(word)) == 1 < len(pieces.tokenize(word)) <= 3
    for number in range(10, 100):
        assert len(words.tokenize(f" {number}")) == 2
        assert len(pieces.tokenize(f" {number}")) == 1
    assert len(words.tokenize(" all.")) == 2
    assert len(pieces.tokenize(" all.")) == 1


def test_the_tokenizers_share_no_special_token(words, pieces):
    for tokenizer, specials in ((words, 2), (pieces, 3)):
        assert len(set(tokenizer.all_special_ids)) == specials
    assert not {*words.all_special_ids} & {*pieces.all_special_ids}
    assert not {*words.all_special_tokens} & {*pieces.all_special_tokens}


def test_pieces_align_with_words_in_part(words, pieces):
    """Three in four of `words`' tokens are tokens of `pieces`; nine in ten begin where one does."""
    rng = random.Random(0)
    responses = []
    for problem in task.make_problems("test", 100):
        responses += [task.write_careful(problem), task.write_hasty(problem, rng)]
    aligner = Aligner(
        words,
        pieces,
        student_eos_token_ids=[words.eos_token_id],
        teacher_eos_token_ids=[pieces.eos_token_id],
        starts_text=False,
    )
    alignment = aligner.align([[*i, words.eos_token_id] for i in words(responses).input_ids])
    assert 0.72 < alignment.span_coverage < 0.78
    assert 0.86 < alignment.start_coverage < 0.92


@pytest.mark.parametrize("role", SHIPPED)
def test_shipped_files(role):
    path = SHIPPED[role]
    assert {file.name for file in path.iterdir()} == MODEL_FILES
    assert (path / "model.safetensors").stat().st_size < 1.2e6
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert model.dtype == build.SAVED_DTYPE
    assert model.config.vocab_size == len(tokenizer)
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    saved = Tokenizer.from_file(str(path / "tokenizer.json"))
    assert tokenizer.backend_tokenizer.to_str() == saved.to_str()


def test_shipped_student_and_teacher_share_a_tokenizer():
    student, teacher = (
        (file / "tokenizer.json").read_text(encoding="utf-8") for file in ROLES.values()
    )
    assert student == teacher


@pytest.mark.parametrize(
    ("role", "lowest", "highest"),
    [("student", 0.25, 0.6), ("teacher", 0.97, 1.0), ("teacher-pieces", 0.97, 1.0)],
)
def test_shipped_models_do_what_is_claimed(role, lowest, highest):
    path = SHIPPED[role]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    problems = task.make_problems("validation", 64, seed=1)
    responses = build.respond(model, tokenizer, problems, temperature=0.0)
    right, executed = build.score(responses, problems)
    assert lowest <= right <= highest
    assert executed >= 0.97


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Two steps of each phase, seed 0. Its tests may not change it."""
    folder = tmp_path_factory.mktemp("built")
    build.build(folder, max_steps=2)
    return folder


def weights(folder: Path) -> dict[str, bytes]:
    return {role: (folder / role / "model.safetensors").read_bytes() for role in ROLES}


def test_build_writes_models_that_load(built):
    assert {file.name for file in built.iterdir()} == set(ROLES)
    for role in ROLES:
        assert {file.name for file in (built / role).iterdir()} == MODEL_FILES
        model = AutoModelForCausalLM.from_pretrained(built / role)
        assert len(AutoTokenizer.from_pretrained(built / role)) == model.config.vocab_size
    assert weights(built)["student"] != weights(built)["teacher"]


def test_build_makes_the_shipped_tokenizer(built):
    name = "tokenizer.json"
    assert (built / "student" / name).read_bytes() == (student_path() / name).read_bytes()


def test_build_with_pieces(tmp_path, monkeypatch):
    reported = []
    monkeypatch.setattr(build, "report", lambda path, problems: reported.append(path))
    arguments = ["--tokenizer=pieces", "--steps=2", f"--output={tmp_path}"]
    monkeypatch.setattr("sys.argv", ["build", *arguments])
    build.main()
    assert reported == [tmp_path / role for role in ROLES]
    shipped = (pieces_teacher_path() / "tokenizer.json").read_bytes()
    for role in ROLES:
        assert {file.name for file in (tmp_path / role).iterdir()} == MODEL_FILES
        assert (tmp_path / role / "tokenizer.json").read_bytes() == shipped
        model = AutoModelForCausalLM.from_pretrained(tmp_path / role)
        assert len(AutoTokenizer.from_pretrained(tmp_path / role)) == model.config.vocab_size


def test_build_with_pieces_leaves_the_shipped_folder_alone(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["build", "--tokenizer=pieces", "--steps=1", "--overwrite"])
    with pytest.raises(SystemExit):
        build.main()
    assert "needs an --output" in capsys.readouterr().err


def test_build_is_seeded(built, tmp_path):
    build.build(tmp_path, max_steps=2, seed=0)
    assert weights(tmp_path) == weights(built)


def test_build_overwrites_only_when_told(tmp_path, monkeypatch, capsys, built):
    kept = tmp_path / "teacher" / "kept"
    kept.parent.mkdir()
    kept.touch()
    monkeypatch.setattr("sys.argv", ["build", f"--output={tmp_path}", "--steps=2", "--seed=1"])
    with pytest.raises(SystemExit) as refusal:
        build.main()
    assert refusal.value.code == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert kept.exists()
    build.build(tmp_path, max_steps=2, seed=1, overwrite=True)
    assert {file.name for file in (tmp_path / "teacher").iterdir()} == MODEL_FILES
    assert {file.name for file in tmp_path.iterdir()} == set(ROLES)
    assert weights(tmp_path)["student"] != weights(built)["student"]


def test_a_build_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, name, **kwargs):
        if name == "teacher":
            raise KeyboardInterrupt

    monkeypatch.setattr(build, "train", fail)
    with pytest.raises(KeyboardInterrupt):
        build.build(tmp_path, max_steps=1)
    assert not list(tmp_path.iterdir())


def test_build_refuses_no_steps(tmp_path):
    with pytest.raises(ValueError, match="max_steps must be at least 1"):
        build.build(tmp_path, max_steps=0)
