"""The stand-in for Liger's fused linear JSD, against Liger's own kernels and float64."""

import inspect

import pytest
import torch
from numerics import relative_error

from esr_kernels import LMHead, linear_reverse_kl
from esr_kernels.integrations.liger import LigerFusedLinearJSD
from esr_kernels.integrations.precision import match_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LABELS = [3, -100, 5, 7, 1, -100, 2]
# Float32 sums of 20 products and of 131 probabilities: some ten roundings of 6e-8, either way.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def liger():
    """Liger's class; without a GPU its Triton kernels run in the interpreter, as ours do."""
    module = pytest.importorskip("liger_kernel.transformers.fused_linear_jsd")
    return module.LigerFusedLinearJSD


def make_leaves(dtype=torch.float32, student_vocab=131, teacher_vocab=131):
    shapes = (7, 20), (student_vocab, 20), (7, 12), (teacher_vocab, 12)
    tensors = [torch.randn(*shape, device=DEVICE).to(dtype) for shape in shapes]
    return [tensor.requires_grad_(i < 2) for i, tensor in enumerate(tensors)]


def run(loss, leaves, labels, upstream=1.0):
    """Value and gradients of the student's two tensors."""
    leaves = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    value = loss(*leaves, labels)
    (value * upstream).backward()
    return value.detach(), leaves[0].grad, leaves[1].grad


def truth(leaves, labels, upstream=1.0, temperature=1.0, ignore_index=-100):
    def definition(student_input, student_weight, teacher_input, teacher_weight, labels):
        vocab = min(len(student_weight), len(teacher_weight))
        s = (student_input @ student_weight[:vocab].T / temperature).log_softmax(-1)
        t = (teacher_input @ teacher_weight[:vocab].T / temperature).log_softmax(-1)
        kl = (s.exp() * (s - t)).sum(-1)
        return (kl if labels is None else kl[labels != ignore_index]).mean()

    doubles = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    return run(definition, doubles, labels, upstream)


@pytest.mark.parametrize(
    ("labels", "ignore_index", "temperature", "upstream"),
    [
        (None, -100, 1.0, 1.0),
        (LABELS, -100, 1.0, 1.0),
        (LABELS, 7, 0.7, 3.0),
    ],
    ids=["all-rows", "ignored-rows", "other-index-and-temperature"],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # Liger's -inf lanes
def test_equals_liger_and_float64(liger, labels, ignore_index, temperature, upstream):
    labels = None if labels is None else torch.tensor(labels, device=DEVICE)
    options = {"ignore_index": ignore_index, "temperature": temperature}
    leaves = make_leaves()
    expected = truth(leaves, labels, upstream, **options)
    for cls in (LigerFusedLinearJSD, liger):
        actual = run(cls(jsd_beta=1.0, **options), leaves, labels, upstream)
        for name, ours, true in zip(("loss", "input", "weight"), actual, expected, strict=True):
            assert relative_error(ours, true) < TOLERANCE, (cls.__module__, name)
        assert actual[0].dtype == torch.float32


def test_has_the_signatures_of_liger(liger):
    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(LigerFusedLinearJSD, method)).parameters
        theirs = inspect.signature(getattr(liger, method)).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]
    ours, theirs = LigerFusedLinearJSD(1.0), liger(1.0)
    public = {name: value for name, value in vars(theirs).items() if not name.startswith("_")}
    assert public.items() <= vars(ours).items()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_all_rows_ignored_is_zero_as_in_liger(liger):
    labels = torch.full((7,), -100, device=DEVICE)
    for cls in (LigerFusedLinearJSD, liger):
        value, *gradients = run(cls(jsd_beta=1.0), make_leaves(), labels)
        assert value == 0
        assert not any(gradient.any() for gradient in gradients)


def test_nan_in_an_ignored_row_stays_there():
    """Liger's gradient of the head turns NaN here."""
    labels = torch.tensor(LABELS, device=DEVICE)
    leaves = make_leaves()
    expected = run(LigerFusedLinearJSD(1.0), leaves, labels)
    with torch.no_grad():
        leaves[0][1] = torch.nan
        leaves[2][5] = torch.nan
    for actual, clean in zip(run(LigerFusedLinearJSD(1.0), leaves, labels), expected, strict=True):
        assert torch.equal(actual, clean)


@pytest.mark.parametrize("vocabularies", [(131, 140), (140, 131)])
def test_padded_vocabularies_use_the_common_prefix(vocabularies):
    leaves = make_leaves(torch.float32, *vocabularies)
    actual = run(LigerFusedLinearJSD(1.0), leaves, None)
    for ours, true in zip(actual, truth(leaves, None), strict=True):
        assert relative_error(ours, true) < TOLERANCE


def test_a_float32_head_under_autocast():
    """As in a mixed-precision trainer: both are rounded to bfloat16, the logits are not."""
    student, head, teacher, teacher_head = make_leaves()
    rounded = [x.detach().bfloat16().requires_grad_(x.requires_grad) for x in (student, head)]
    rounded += [teacher.bfloat16(), teacher_head.bfloat16()]
    expected = run(LigerFusedLinearJSD(1.0), rounded, None)
    with torch.autocast(DEVICE, torch.bfloat16):
        actual = run(LigerFusedLinearJSD(1.0), [student, head, teacher, teacher_head], None)
    for ours, other in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, other.float())


def test_a_head_with_a_bias_takes_the_dtype_of_its_hidden_states():
    weight, bias = torch.randn(131, 20, device=DEVICE), torch.randn(131, device=DEVICE)
    head = LMHead(weight.requires_grad_(), bias.requires_grad_())
    hidden, head = match_dtype(torch.randn(7, 20, device=DEVICE).bfloat16(), head)
    linear_reverse_kl(hidden, head, hidden, torch.flip(head.weight, [0])).backward()
    assert (head.weight.dtype, head.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (weight.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "jsd_beta: expected 1.0, the reverse KL, got 0.5"),
        ({"jsd_beta": 0.0}, "jsd_beta: expected 1.0, the reverse KL, got 0.0"),
        ({"jsd_beta": 1.0, "temperature": 0.0}, "temperature: expected a number > 0, got 0.0"),
        ({"jsd_beta": 1.0, "accum_dtype": torch.float64}, "accum_dtype: expected one of"),
    ],
)
def test_refuses_what_it_does_not_compute(options, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearJSD(**options)


def test_labels_of_another_length():
    labels = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"shift_labels: expected shape \[7\], got \[8\]"):
        LigerFusedLinearJSD(1.0)(*make_leaves(), labels)
