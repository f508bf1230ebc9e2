"""Bad input is refused by name, with what was expected and what came."""

import re
from typing import Any

import pytest
import torch
from kl_cases import workspace

from esr_kernels import LMHead, linear_reverse_kl
from esr_kernels.kl import checks

N, V, D = 5, 40, 8
ones = torch.ones
MAP = ones(V + 2).long()
GOOD: dict[str, Any] = {
    "student_hidden": ones(N, D),
    "student_head": ones(V, D),
    "teacher_hidden": ones(N, D + 1),
    "teacher_head": ones(V + 2, D + 1),
}
BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("student_hidden", "[1, 5, 8]", {"student_hidden": ones(1, N, D)}),
    ("student_hidden", "list", {"student_hidden": [[1.0]]}),
    ("student_hidden", "int64", {"student_hidden": ones(N, D, dtype=torch.int64)}),
    ("teacher_hidden", "[9]", {"teacher_hidden": ones(D + 1)}),
    ("teacher_hidden", "6", {"teacher_hidden": ones(N + 1, D + 1)}),
    ("teacher_hidden", "meta", {"teacher_hidden": ones(N, D + 1, device="meta"),
                                "teacher_head": ones(V, D + 1, device="meta")}),
    ("student_head", "[320]", {"student_head": ones(V * D)}),
    ("student_head", "int64", {"student_head": ones(V, D, dtype=torch.int64)}),
    ("student_head", "str", {"student_head": "lm_head"}),
    ("student_head", "[40, 9]", {"student_head": ones(V, D + 1)}),
    ("student_head", "bfloat16", {"student_head": ones(V, D, dtype=torch.bfloat16)}),
    ("student_head", "meta", {"student_head": ones(V, D, device="meta")}),
    ("student_head", "[0, 8]", {"student_head": ones(0, D)}),
    ("teacher_head", "[0, 9]", {"teacher_head": ones(0, D + 1), "vocab_map": ones(0).long()}),
    ("teacher_head", "[42, 8]", {"teacher_head": LMHead(ones(V + 2, D))}),
    ("teacher_head", "float16", {"teacher_head": LMHead(ones(V, D + 1).half())}),
    ("token_weights", "[4]", {"token_weights": ones(N - 1)}),
    ("token_weights", "[5, 1]", {"token_weights": ones(N, 1)}),
    ("token_weights", "list", {"token_weights": [1.0] * N}),
    ("token_weights", "complex64", {"token_weights": ones(N, dtype=torch.complex64)}),
    ("token_weights", "meta", {"token_weights": ones(N, device="meta")}),
    ("token_weights", "-0.5", {"token_weights": ones(N) * -0.5}),
    ("token_weights", "nan", {"token_weights": ones(N) * float("nan")}),
    ("vocab_map", "list", {"vocab_map": [0] * (V + 2)}),
    ("vocab_map", "[40]", {"vocab_map": ones(V).long()}),
    ("vocab_map", "int32", {"vocab_map": ones(V + 2).int()}),
    ("vocab_map", "float32", {"vocab_map": ones(V + 2)}),
    ("vocab_map", "meta", {"vocab_map": ones(V + 2, dtype=torch.int64, device="meta")}),
    ("vocab_map", "1..40", {"vocab_map": ones(V + 2).long().index_fill(0, torch.tensor(3), V)}),
    ("vocab_map", "-2..-2", {"vocab_map": ones(V + 2).long() * -2}),
    ("vocab_map", "-1 only", {"vocab_map": ones(V + 2).long() * -1}),
    ("student_map", "[40]", {"student_map": ones(V).long()}),
    ("student_map", "list", {"vocab_map": MAP, "student_map": [0] * V}),
    ("student_map", "[42]", {"vocab_map": MAP, "student_map": ones(V + 2).long()}),
    ("student_map", "int32", {"vocab_map": MAP, "student_map": ones(V).int()}),
    ("student_map", "meta", {"vocab_map": MAP,
                             "student_map": ones(V, dtype=torch.int64, device="meta")}),
    ("student_map", "1..40", {"vocab_map": MAP, "student_map": ones(V).long().index_fill(
        0, torch.tensor(3), V)}),
    ("student_map", "-2..-2", {"vocab_map": MAP, "student_map": ones(V).long() * -2}),
    ("student_map", "none (but -1)", {"vocab_map": MAP.index_fill(0, torch.tensor(3), -1),
                                      "student_map": -ones(V).long()}),
    ("student_map", "none (but -1)", {"vocab_map": MAP, "student_map": ones(V).long() * 2}),
    ("vocab_map", "-1 only", {"vocab_map": -MAP, "student_map": ones(V).long()}),
    ("vocab_size", "40", {"vocab_map": ones(V + 2).long(), "vocab_size": V}),
    ("max_workspace_bytes", "1023", {"vocab_map": MAP, "student_map": ones(V).long(),
                                     "max_workspace_bytes": 1023}),
    ("max_workspace_bytes", "767", {"vocab_map": ones(V + 2).long(), "max_workspace_bytes": 767}),
    ("temperature", "0", {"temperature": 0}),
    ("temperature", "-1.0", {"temperature": -1.0}),
    ("temperature", "nan", {"temperature": float("nan")}),
    ("temperature", "tensor", {"temperature": ones(())}),
    ("teacher_temperature", "0.0", {"teacher_temperature": 0.0}),
    ("vocab_size", "41", {"vocab_size": V + 1}),
    ("vocab_size", "0", {"vocab_size": 0}),
    ("vocab_size", "3.0", {"vocab_size": 3.0}),
    ("reduction", "batchmean", {"reduction": "batchmean"}),
    ("normalizer", "float", {"normalizer": 3.0}),
    ("normalizer", "[1]", {"normalizer": ones(1)}),
    ("normalizer", "complex64", {"normalizer": ones((), dtype=torch.complex64)}),
    ("normalizer", "meta", {"normalizer": ones((), device="meta")}),
    ("normalizer", "a normalizer", {"normalizer": ones(()), "reduction": "sum"}),
    ("max_workspace_bytes", "511", {"max_workspace_bytes": workspace(1, V) - 1}),
    ("max_workspace_bytes", "1000.0", {"max_workspace_bytes": 1e3}),
    ("impl", "cuda", {"impl": "cuda"}),
    ("impl", "triton", {"impl": "triton", "teacher_hidden": ones(N, D + 1).double(),
                        "teacher_head": ones(V, D + 1).double()}),
]  # fmt: skip


def test_good_input_passes() -> None:
    linear_reverse_kl(**GOOD, max_workspace_bytes=workspace(1, V), impl="triton")


@pytest.mark.parametrize(("name", "got", "change"), BAD, ids=[f"{b[0]} {b[1]}" for b in BAD])
def test_bad_input(name: str, got: str, change: dict[str, Any]) -> None:
    pattern = rf"^{name}: expected .*, got .*{re.escape(got)}"
    with pytest.raises(ValueError, match=pattern):
        linear_reverse_kl(**(GOOD | change))


def test_messages_say_what_to_do() -> None:
    for change, advice in (
        ({"max_workspace_bytes": 1}, "None for the default, or an int from 512, the logits of one"),
        ({"student_hidden": ones(1, N, D)}, r"\(flatten batch and time\)"),
        ({"student_head": ones(V, D).half()}, r"\(cast one of them\)"),
        ({"student_head": ones(V, D, device="meta")}, r"\(move one of them\)"),
        ({"normalizer": 3}, r"\(torch.tensor\(count\)\)"),
    ):
        with pytest.raises(ValueError, match=advice):
            linear_reverse_kl(**(GOOD | change))


def test_values_on_a_gpu_are_looked_at_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.sees_values(ones(1))
    assert not checks.sees_values(ones(1, device="meta"))
    monkeypatch.setenv("ESR_KERNELS_CHECK_VALUES", "1")
    assert checks.sees_values(ones(1, device="meta"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("weight", (ones(3),)),
        ("weight", (ones(3, 2, dtype=torch.int64),)),
        ("weight", (None,)),
        ("bias", (ones(3, 2), ones(2))),
        ("bias", (ones(3, 2), ones(3).double())),
        ("bias", (ones(3, 2), ones(3, device="meta"))),
        ("softcap", (ones(3, 2), None, 0.0)),
        ("softcap", (ones(3, 2), None, float("inf"))),
        ("softcap", (ones(3, 2), None, "30")),
        ("softcap", (ones(3, 2), None, ones(()))),
        ("scale", (ones(3, 2), None, None, float("nan"))),
        ("scale", (ones(3, 2), None, None, None)),
    ],
)
def test_bad_head(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=f"^LMHead {name}: expected .*, got "):
        LMHead(*arguments)
