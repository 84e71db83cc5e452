"""Metrics against literal float64 arithmetic on lists of numbers."""

import inspect
import math

import pytest
import torch
from torch import Tensor

import patchlab as pl
from patchlab.errors import MetricError
from patchlab.metrics import METRICS, Answers, get_metric

CORRECT = [[1], [0, 4], [2, 3, 5]]
INCORRECT = [[2, 3], [1], [0, 6]]


@pytest.fixture(scope="module")
def logits() -> Tensor:
    return 3 * torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def answers() -> Answers:
    return Answers.of(CORRECT, INCORRECT)


def _logit_diff(row: list[float], correct: list[int], incorrect: list[int]) -> float:
    return sum(row[i] for i in correct) / len(correct) - sum(row[i] for i in incorrect) / len(incorrect)


def _logprob_diff(row: list[float], correct: list[int], incorrect: list[int]) -> float:
    total = sum(math.exp(x) for x in row)
    log_p = [math.log(math.exp(x) / total) for x in row]
    return math.log(sum(math.exp(log_p[i]) for i in correct)) - math.log(sum(math.exp(log_p[i]) for i in incorrect))


def _prob_diff(row: list[float], correct: list[int], incorrect: list[int]) -> float:
    total = sum(math.exp(x) for x in row)
    return sum(math.exp(row[i]) / total for i in correct) - sum(math.exp(row[i]) / total for i in incorrect)


def _max_diff(row: list[float], correct: list[int], incorrect: list[int]) -> float:
    return max(row[i] for i in correct) - max(row[i] for i in incorrect)


TWINS = {"logit_diff": _logit_diff, "logprob_diff": _logprob_diff, "max_diff": _max_diff, "prob_diff": _prob_diff}


@pytest.mark.parametrize("name", TWINS)
def test_formula_with_one_or_several_answers(name: str, logits: Tensor, answers: Answers) -> None:
    expected = [TWINS[name](row, good, bad) for row, good, bad in zip(logits.tolist(), CORRECT, INCORRECT, strict=True)]
    torch.testing.assert_close(METRICS[name](logits, answers), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_the_padding_of_answers_counts_for_nothing(logits: Tensor) -> None:
    # token 0 fills the rows with fewer answers; a huge logit there must not be seen
    loud = logits.clone()
    loud[0, 0] += 50
    for name in ("logit_diff", "logprob_diff", "max_diff"):
        alone = METRICS[name](loud[:1], Answers.of(CORRECT[:1], INCORRECT[:1]))
        torch.testing.assert_close(METRICS[name](loud, Answers.of(CORRECT, INCORRECT))[:1], alone, rtol=1e-12, atol=0)
        torch.testing.assert_close(alone, METRICS[name](logits, Answers.of(CORRECT, INCORRECT))[:1], rtol=1e-12, atol=0)


def test_neg_kl_is_summed_over_the_vocabulary(logits: Tensor, answers: Answers) -> None:
    clean = logits.roll(1, 0)
    expected = []
    for p_row, q_row in zip(clean.tolist(), logits.tolist(), strict=True):
        p_total, q_total = (sum(math.exp(x) for x in row) for row in (p_row, q_row))
        p, q = [math.exp(x) / p_total for x in p_row], [math.exp(x) / q_total for x in q_row]
        expected.append(-sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)))
    with_clean = Answers(answers.correct, answers.correct_mask, answers.incorrect, answers.incorrect_mask, clean)
    got = METRICS["neg_kl"](logits, with_clean)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert got.max() < 0


def test_neg_kl_is_finite_where_probabilities_underflow() -> None:
    # softmax().log() would give -inf, and -inf times zero NaN
    logits = torch.tensor([[0.0, -500.0, -1000.0]])
    clean = torch.tensor([[0.0, -1000.0, -500.0]])
    answers = Answers.of([[0]], [[1]])
    with_clean = Answers(answers.correct, answers.correct_mask, answers.incorrect, answers.incorrect_mask, clean)
    assert METRICS["neg_kl"](logits, with_clean).item() == pytest.approx(0.0, abs=1e-6)


def test_neg_kl_at_the_clean_run_is_zero_with_zero_gradient(logits: Tensor, answers: Answers) -> None:
    at = logits.clone().requires_grad_()
    with_clean = Answers(answers.correct, answers.correct_mask, answers.incorrect, answers.incorrect_mask, logits)
    values = METRICS["neg_kl"](at, with_clean)
    (gradient,) = torch.autograd.grad(values.sum(), at)
    assert METRICS["neg_kl"].vanishes_at_clean
    torch.testing.assert_close(values, torch.zeros_like(values), rtol=0, atol=1e-15)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


def test_neg_kl_without_the_clean_run(logits: Tensor, answers: Answers) -> None:
    with pytest.raises(MetricError, match="neg_kl compares with the clean run, whose logits are missing"):
        METRICS["neg_kl"](logits, answers)


def test_rows_select_and_repeat(logits: Tensor) -> None:
    answers = Answers.of(CORRECT, INCORRECT)
    answers = Answers(answers.correct, answers.correct_mask, answers.incorrect, answers.incorrect_mask, logits.flip(0))
    index = torch.tensor([2, 0, 2])
    for metric in METRICS.values():
        torch.testing.assert_close(metric(logits[index], answers.rows(index)), metric(logits, answers)[index], rtol=1e-12, atol=1e-15)
    assert answers.batch == 3
    assert answers.rows(index[:2]).batch == 2


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_named_metrics_keep_examples_apart(metric, logits: Tensor, answers: Answers) -> None:
    clean = Answers(answers.correct, answers.correct_mask, answers.incorrect, answers.incorrect_mask, logits.flip(0))
    metric.check_independent(logits, clean)


def _over_batch_mean(logits: Tensor, answers: Answers) -> Tensor:
    return logits[:, 0] - logits[:, 1].mean()


def test_a_metric_that_mixes_examples_is_refused(logits: Tensor, answers: Answers) -> None:
    with pytest.raises(MetricError, match=r"metric '_over_batch_mean' mixes examples: example 0 gives \S+ alone and \S+ in a batch of 3"):
        get_metric(_over_batch_mean).check_independent(logits, answers)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda logits, answers: logits.mean(), r"shape \[\]"),
        (lambda logits, answers: logits, r"shape \[3, 7\]"),
        (lambda logits, answers: logits[:2, 0], r"shape \[2\]"),
        (lambda logits, answers: 0.5, r"float"),
    ],
)
def test_a_metric_of_the_wrong_shape_is_refused(function, got: str, logits: Tensor, answers: Answers) -> None:
    with pytest.raises(MetricError, match=rf"metric 'mine' returned {got} for 3 examples; return one value per example, shape \[3\]"):
        pl.Metric("mine", function)(logits, answers)


def test_metrics_by_name_value_or_function() -> None:
    assert get_metric("logit_diff") is METRICS["logit_diff"]
    assert get_metric(METRICS["neg_kl"]) is METRICS["neg_kl"]
    custom = get_metric(_over_batch_mean)
    assert (custom.name, custom.function, custom.reads, custom.columns) == ("_over_batch_mean", _over_batch_mean, "answer", "vocabulary")


def test_unknown_metrics() -> None:
    with pytest.raises(
        MetricError, match=r"unknown metric 'logitdiff'; did you mean 'logit_diff'\? Valid: logit_diff, logprob_diff, max_diff, neg_kl, prob_diff"
    ):
        get_metric("logitdiff")
    with pytest.raises(MetricError, match=r"a metric is a name, a Metric or a function of \(logits, answers\); got int"):
        inspect.unwrap(get_metric)(3)


def test_wrong_shapes_raise_under_the_shape_checks(logits: Tensor, answers: Answers) -> None:
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError, match="logits"):
        METRICS["logit_diff"](logits.long(), answers)
    with pytest.raises(TypeCheckError, match="incorrect"):
        Answers(answers.correct, answers.correct_mask, answers.incorrect[:2], answers.incorrect_mask[:2])
    with pytest.raises(TypeCheckError, match="index"):
        answers.rows(torch.tensor([[0]]))
