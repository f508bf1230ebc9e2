"""The alignment's benchmark measures the same thing for everyone."""

from benchmarks.bench_align import batches, floor, gold, ours, tokenizer


def test_both_find_the_same_runs():
    student, teacher = tokenizer("qwen", 1000), tokenizer("llama3", 2000)
    (batch,) = batches(student, 30, 1)
    assert [len(row) for row in batch] == [30] * 16
    alignment = ours(student, teacher)(batch)
    found = list(
        zip(alignment.student_rows.tolist(), alignment.student_stops.tolist(), strict=True)
    )
    expected = []
    for row, (student_runs, teacher_runs) in enumerate(gold(student, teacher)(batch)):
        pairs = zip(student_runs, teacher_runs, strict=True)
        expected += [(run[0] + 30 * row, run[-1] + 1 + 30 * row) for run, other in pairs if run]
    # GOLD has its runs one after another, and one at the end that the closing EOS may leave empty.
    assert set(expected) == set(found)
    assert len(floor(student, teacher)(batch)) == 16
