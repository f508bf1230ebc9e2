"""Prompts: reading, templates, order, padding."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_tokenizer

from esr_train.align import Vocabulary
from esr_train.data import (
    encode_prompts,
    is_templated,
    load_prompts,
    pad_left,
    prompt_order,
    read_prompts,
)
from esr_train.errors import UserError

VOCABULARY = Vocabulary(make_tokenizer(), 300, (2,), 0, None)


def with_file(config, path, text):
    path.write_text(text, encoding="utf-8")
    return dataclasses.replace(config, dataset_name=str(path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"line 2: not JSON"),
        ('{"prompt": "a"}\n\n["prompt"]\n', r"line 3: expected a JSON object"),
        ("[" * 100_000 + "\n", "line 1: not JSON"),
        ('{"question": "a", "id": 1}\n', r"line 1: no column prompt; it has question, id"),
        ('{"prompt": "a"}\n{"prompt": []}\n', "line 2: column prompt must hold strings only"),
        ("", "no prompts in it"),
        ("\n\n", "no prompts in it"),
        ('{"prompt": "a"}\n{"prompt": 5}\n', "line 2: column prompt must hold strings only"),
    ],
)
def test_bad_jsonl_is_named(config, tmp_path, text, expected):
    with pytest.raises(UserError, match=expected):
        read_prompts(with_file(config, tmp_path / "bad.jsonl", text))


def test_not_utf8_and_missing_files(config, tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "cafe"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        read_prompts(dataclasses.replace(config, dataset_name=str(path)))
    with pytest.raises(UserError, match="no such file"):
        read_prompts(dataclasses.replace(config, dataset_name=str(tmp_path / "none.parquet")))
    with pytest.raises(UserError, match="could not be loaded"):
        read_prompts(dataclasses.replace(config, dataset_name=str(tmp_path / "none")))


def test_parquet_is_read(config, tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "prompts.parquet"
    messages = [[{"role": "user", "content": f"q{i}"}] for i in range(3)]
    pyarrow.parquet.write_table(pyarrow.table({"prompt": messages}), path)
    named = dataclasses.replace(config, dataset_name=str(path))
    assert read_prompts(named) == messages
    with pytest.raises(UserError, match="no column question; it has prompt"):
        read_prompts(dataclasses.replace(named, prompt_column="question"))
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="could not be loaded"):
        read_prompts(named)


def test_chat_template():
    tokenizer = make_tokenizer()
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    messages = [{"role": "user", "content": "Hi"}]
    plain, templated = tokenizer(["Hi"])["input_ids"], tokenizer([text])["input_ids"]
    assert is_templated(["Hi"], tokenizer, None)
    assert not is_templated(["Hi"], tokenizer, False)
    assert is_templated([messages], tokenizer, False)
    assert encode_prompts(["Hi"], tokenizer, True) == templated
    assert encode_prompts([messages], tokenizer, True) == templated
    assert encode_prompts(["Hi"], tokenizer, False) == plain
    with pytest.raises(UserError, match="prompt 2: the student's chat template refused it"):
        encode_prompts([messages, [{"role": "user"}, 5]], tokenizer, True)
    tokenizer.chat_template = None
    assert not is_templated(["Hi"], tokenizer, None)
    with pytest.raises(UserError, match="the student's tokenizer has no chat template"):
        encode_prompts([messages], tokenizer, True)
    with pytest.raises(UserError, match="the teacher's tokenizer has no chat template"):
        encode_prompts(["Hi"], tokenizer, True, "teacher")


def test_too_long_and_empty_prompts_are_dropped_and_counted(config, tmp_path):
    rows = [{"prompt": text} for text in ("abc", "", "x" * 500, "def")]
    config = with_file(config, tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    config = dataclasses.replace(config, apply_chat_template=False)
    prompts = load_prompts(config, VOCABULARY, max_prompt_tokens=20)
    assert (len(prompts.train), len(prompts.eval), prompts.num_dropped) == (2, 0, 2)
    with pytest.raises(UserError, match="each of its 4 prompts is empty or longer than the 1"):
        load_prompts(config, VOCABULARY, max_prompt_tokens=1)


def test_too_long_prompts_are_cut_on_the_left_where_asked(config, tmp_path):
    rows = [{"prompt": text} for text in ("abc", "y" * 90 + "x" * 500, "z" * 40 + "x" * 500, "d")]
    config = with_file(config, tmp_path / "p.jsonl", "\n".join(map(json.dumps, rows)))
    config = dataclasses.replace(config, apply_chat_template=False, long_prompts="truncate")
    prompts = load_prompts(config, VOCABULARY, max_prompt_tokens=20)
    assert (prompts.num_truncated, prompts.num_dropped) == (2, 0)
    assert prompts.num_repeated == 1  # the two have the same end
    texts = {VOCABULARY.tokenizer.decode(ids) for ids in prompts.train}
    assert texts == {"abc", "x" * 20, "d"}


def test_prompts_that_cannot_be_read_by_both_models(config, tmp_path):
    surrogate = with_file(config, tmp_path / "p.jsonl", '{"prompt": "a \\ud800 b"}\n')
    with pytest.raises(UserError, match="prompt 1 holds half a character"):
        load_prompts(surrogate, VOCABULARY, max_prompt_tokens=100)
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(301 - len(tokenizer))], special_tokens=True)
    rare = with_file(config, tmp_path / "q.jsonl", '{"prompt": "a"}\n{"prompt": "<extra0>"}\n')
    vocabulary = Vocabulary(tokenizer, len(tokenizer) - 1, (2,), 0, None)
    load_prompts(rare, vocabulary, max_prompt_tokens=100)
    last = tokenizer.convert_ids_to_tokens(300)
    rare = with_file(config, tmp_path / "q.jsonl", json.dumps({"prompt": last}))
    with pytest.raises(
        UserError, match=f"prompt 1: the student's token '{last}' is id 300, past the 300 ids"
    ):
        load_prompts(rare, vocabulary, max_prompt_tokens=100)


def test_a_byte_order_mark_is_no_error(config, tmp_path):
    path = tmp_path / "bom.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n')
    assert read_prompts(dataclasses.replace(config, dataset_name=str(path))) == ["a"]


def test_repeated_prompts_are_not_held_out_and_trained_on(config, tmp_path):
    rows = "".join(json.dumps({"prompt": f"same {i % 20}"}) + "\n" for i in range(60))
    named = with_file(config, tmp_path / "p.jsonl", rows)
    prompts = load_prompts(named, VOCABULARY, max_prompt_tokens=100)
    assert (len(prompts.train), len(prompts.eval), prompts.num_repeated) == (18, 2, 40)


def test_held_out_prompts_are_no_training_prompts(config):
    prompts = load_prompts(config, VOCABULARY, max_prompt_tokens=100)
    assert (len(prompts.train), len(prompts.eval)) == (27, 3)
    assert not {tuple(p) for p in prompts.train} & {tuple(p) for p in prompts.eval}


@given(st.integers(1, 40), st.integers(0, 100), st.integers(1, 60), st.integers(0, 5))
def test_prompt_order_resumes_where_it_was(num_prompts, start, count, seed):
    whole = prompt_order(num_prompts, 0, start + count, seed)
    assert prompt_order(num_prompts, start, count, seed) == whole[start:]
    for first in range(0, len(whole) - num_prompts + 1, num_prompts):
        assert sorted(whole[first : first + num_prompts]) == list(range(num_prompts))


def test_epochs_are_shuffled_anew():
    order = prompt_order(50, 0, 100, seed=0)
    assert order[:50] != order[50:]
    assert order[:50] != prompt_order(50, 0, 50, seed=1)


def test_pad_left():
    ids, mask = pad_left([[5, 6], [7], [8, 9, 10]], 0, torch.device("cpu"))
    assert ids.tolist() == [[0, 5, 6], [0, 0, 7], [8, 9, 10]]
    assert mask.tolist() == [[False, True, True], [False, False, True], [True, True, True]]
