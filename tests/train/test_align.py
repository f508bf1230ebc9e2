"""Which pairs of tokenizers count as one."""

import dataclasses
import json
import re

import pytest
from tiny_models import make_student, make_tokenizer, save
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from esr_train.align import load_vocabulary, tokenizer_difference
from esr_train.errors import UserError


def test_padded_vocabularies_are_no_difference():
    assert tokenizer_difference(make_tokenizer(), make_tokenizer(), 300) is None


def test_added_tokens_at_the_end_are_no_difference():
    teacher = make_tokenizer()
    teacher.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert tokenizer_difference(make_tokenizer(), teacher, 300) is None


def test_other_tokens_at_one_id_are():
    other = make_tokenizer("Quite another text, with different merges altogether.")
    found = tokenizer_difference(make_tokenizer(), other, 300)
    assert re.fullmatch(r"id \d+ is '.*' for the student and '.*' for the teacher", found)


def test_a_longer_vocabulary_of_real_tokens_is():
    found = tokenizer_difference(make_tokenizer(), make_tokenizer(), 270)
    assert found.startswith("only one of the two has")


def test_another_cut_of_the_text_is():
    other = make_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    found = tokenizer_difference(make_tokenizer(), other, 300)
    assert found == "the same ids, but text is cut in another way"


def test_one_file_under_two_model_types_is_one_tokenizer(student_path, teacher_path):
    """Transformers rebuilds the tokenizer of a Qwen2 folder, not that of a Qwen3 folder."""
    student, teacher = map(AutoTokenizer.from_pretrained, (student_path, teacher_path))
    assert tokenizer_difference(student, teacher, 300) is None


def test_saved_tokenizers_differ_too(tmp_path, student_path):
    other = make_tokenizer("Quite another text, with different merges altogether.")
    path = save(tmp_path / "other", make_student(), other)
    student, teacher = map(AutoTokenizer.from_pretrained, (student_path, path))
    assert "for the student and" in tokenizer_difference(student, teacher, 300)


def test_eos_ids_come_from_the_generation_config(config, tmp_path):
    assert load_vocabulary(config).eos_token_ids == (2, 0)
    assert load_vocabulary(dataclasses.replace(config, eos_token_ids=[5])).eos_token_ids == (5,)
    path = save(tmp_path / "m", make_student(), make_tokenizer())
    named = dataclasses.replace(config, model_name_or_path=str(path))
    (path / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match="no eos_token_id in its .*--eos_token_ids"):
        load_vocabulary(named)
    (path / "generation_config.json").unlink()
    with pytest.raises(UserError, match="has no generation_config.json.*--eos_token_ids"):
        load_vocabulary(named)


@pytest.mark.parametrize("eos", [300, -5, 99999])
def test_an_eos_that_cannot_be_sampled_is_refused(config, tmp_path, eos):
    """Suppressed or absent, it would let every rollout run to its cutoff, unseen."""
    named = dataclasses.replace(config, eos_token_ids=[2, eos])
    with pytest.raises(UserError, match=f"eos_token_ids must be ids from 0 to 299, got {eos}"):
        load_vocabulary(named)
    path = save(tmp_path / "m", make_student(), make_tokenizer())
    saved = dataclasses.replace(config, model_name_or_path=str(path))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 2]}))
    assert load_vocabulary(saved).eos_token_ids == (2,)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    with pytest.raises(UserError, match=f"eos_token_id {eos} .* is not among the 300 ids"):
        load_vocabulary(saved)


def test_a_pad_token_past_either_model_is_replaced(config, tmp_path):
    """[PAD] added to a tokenizer without a row for it in the other model's embedding."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(303 - len(tokenizer))], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 303
    path = save(tmp_path / "m", make_student(), tokenizer)
    named = dataclasses.replace(config, model_name_or_path=str(path))
    assert load_vocabulary(named).pad_token_id == 2


def test_a_saved_checkpoint_can_be_a_student_again(config, student_path, tmp_path):
    """Transformers writes its own normalizer into what it saves of a Qwen2 tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(student_path)
    path = save(tmp_path / "again", make_student(), tokenizer)
    assert load_vocabulary(dataclasses.replace(config, model_name_or_path=str(path))).size == 300
