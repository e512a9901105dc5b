"""The report's numbers against independent computations."""

import math

import numpy as np
import pytest
import torch

from evaluation import measures


def one_hot(classes: list[int], scale: float = 20.0) -> torch.Tensor:
    """Logits of a model that is sure of the given classes, of three."""
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).double() * scale


def test_wilson_interval_against_known_values():
    assert measures.wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert measures.wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert measures.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe (1998), table I
    assert measures.wilson(10, 10)[1] == 1.0


def test_measure_against_a_case_worked_by_hand():
    # probabilities (1/2, 1/4, 1/4): right, right, wrong, and the fourth's (1/4, 1/4, 1/2): right
    half = math.log(2)
    logits = torch.tensor([[half, 0, 0], [half, 0, 0], [half, 0, 0], [0, 0, half]]).double()
    numbers = measures.measure(logits, torch.tensor([0, 0, 1, 2]))
    assert numbers["top1"] == 0.75 and "top5" not in numbers and numbers["images"] == 4
    assert numbers["per_class"] == [1.0, 0.0, 1.0]
    assert numbers["confusion"] == [[2, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert numbers["loss"] == pytest.approx((3 * math.log(2) + math.log(4)) / 4)
    assert numbers["ece"] == pytest.approx(0.25)  # one bin: accuracy 3/4, confidence 1/2
    assert numbers["top1_ci"] == list(measures.wilson(3, 4))
    assert measures.measure(logits, torch.tensor([0, 0, 0, 0]))["per_class"] == [0.75, None, None], "no image of two"


def test_confusion_agrees_with_top1_on_ties():
    logits = torch.randint(0, 3, (500, 10), generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(10).repeat(50)
    numbers = measures.measure(logits, labels)
    confusion = np.array(numbers["confusion"])
    expected = np.mean([(np.delete(row, y) < row[y]).all() for row, y in zip(logits.numpy(), labels, strict=True)])
    assert numbers["top1"] == pytest.approx(expected) and confusion.trace() == 500 * expected
    assert (confusion.sum(1) == 50).all()
    predicted = measures.predictions(logits, labels)
    assert (logits.gather(1, predicted[:, None])[:, 0] == logits.max(1).values).all()


def test_calibration_error_against_loops_over_bins_and_an_edge_is_in_the_bin_below():
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(400, 10, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 10, (400,), generator=generator)
    exponentials = np.exp(logits.numpy())
    confidence = (exponentials / exponentials.sum(1, keepdims=True)).max(1)
    right = logits.numpy().argmax(1) == labels.numpy()
    expected, filled = 0.0, 0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            filled += 1
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert measures.calibration_error(logits, labels) == pytest.approx(expected, abs=1e-12)
    count, mean_confidence, accuracy = measures.reliability(logits, labels)
    assert count.sum() == 400 and (count > 0).sum() == filled < 15
    assert (accuracy.isnan() == (count == 0)).all() and (mean_confidence.isnan() == (count == 0)).all()
    count, confidence, accuracy = measures.reliability(torch.zeros(2, 3), torch.tensor([0, 1]))  # 1/3 = 5/15
    assert count.tolist() == [0] * 4 + [2] + [0] * 10
    assert confidence[4] == pytest.approx(1 / 3) and accuracy[4] == 0
    sure, *_ = measures.reliability(one_hot([0], scale=1000), torch.tensor([0]))
    assert sure.tolist() == [0] * 14 + [1]


def test_fidelity_against_a_case_worked_by_hand():
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 0])  # teacher right, right, wrong, wrong; student right, wrong, wrong, wrong
    found = measures.fidelity(student, teacher, labels)
    assert found["agreement"] == 0.75 and found["contingency"] == [[1, 1], [0, 2]]
    p, q = np.exp(teacher.double().numpy()), np.exp(student.double().numpy())
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert found["kl_to_teacher"] == pytest.approx(np.mean((p * np.log(p / q)).sum(1)), abs=1e-9)


@pytest.mark.parametrize("omitted, scale", [([3], 1.0), ([3], 8.0), ([2, 3], 1.0), ([3, 2], 4.0)])
def test_the_bias_correction_against_a_search_by_bisection(omitted, scale):
    generator = torch.Generator().manual_seed(2)
    logits = scale * torch.randn(400, 4, generator=generator, dtype=torch.float64)
    logits -= scale * torch.tensor([0, 0, 3, 5])  # never favours the last two classes
    labels = torch.randint(0, 4, (400,), generator=generator)
    found = measures.bias_correction(logits, labels, omitted)
    expected, shares = np.zeros(4), np.bincount(labels, minlength=4) / 400

    def mean(i: int) -> float:
        exponentials = np.exp(logits.numpy() + expected)
        return (exponentials[:, i] / exponentials.sum(1)).mean()

    for _ in range(60):  # one class after the other, again and again
        for i in omitted:
            low, high = -20.0, 100.0
            for _ in range(50):
                expected[i] = (low + high) / 2
                low, high = (expected[i], high) if mean(i) < shares[i] else (low, expected[i])
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert [found[i] for i in range(4) if i not in omitted] == [0] * (4 - len(omitted))
    assert measures.bias_correction(logits[labels < 3], labels[labels < 3], [3]).tolist() == [0] * 4, "no image of it"


def test_accuracy_on_omitted_and_other_classes():
    logits, labels = one_hot([0, 1, 2, 2, 2]), torch.tensor([0, 0, 0, 2, 2])
    assert measures.measure_omitted(logits, labels, [2]) == {"top1_omitted": 1, "top1_others": pytest.approx(1 / 3)}
    assert measures.measure_omitted(logits, labels, [1]) == {"top1_others": pytest.approx(3 / 5)}


def test_softness_against_a_case_worked_by_hand():
    logits = torch.tensor([[math.log(4) * 5, 0.0], [0.0, 0.0]])  # at T = 5: 4/5 and 1/5; 1/2 and 1/2
    entropy = (-0.8 * math.log(0.8) - 0.2 * math.log(0.2) + math.log(2)) / 2
    assert measures.softness(logits.half(), 5.0) == pytest.approx({"confidence": 0.65, "entropy": entropy}, rel=1e-3)


def test_student_t_against_printed_tables():
    # Two-sided 95 % points by degrees of freedom.
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423, 120: 1.9799}
    for freedom, value in table.items():
        assert measures.t_quantile(freedom) == pytest.approx(value, abs=6e-5)
        assert measures.two_sided_p(value, freedom) == pytest.approx(0.05, abs=1e-5)
        assert measures.two_sided_p(-value, freedom) == measures.two_sided_p(value, freedom)
    assert measures.two_sided_p(0, 2) == 1
    assert measures.two_sided_p(1, 1) == pytest.approx(0.5)  # Cauchy: 1 - 2/pi atan(1)
    assert measures.two_sided_p(2, 2) == pytest.approx(1 - math.sqrt(2 / 3))  # 1 - t / sqrt(2 + t^2)
    for freedom, value in {2: 9.9248, 5: 4.0321, 10: 3.1693}.items():  # 99 % points
        assert measures.two_sided_p(value, freedom) == pytest.approx(0.01, abs=1e-5)


def test_paired_gain_against_a_case_worked_by_hand():
    gain = measures.paired_gain([1.0, 3.0, 2.0])
    assert gain["mean"] == pytest.approx(2) and gain["sd"] == pytest.approx(1) and gain["pairs"] == 3
    assert gain["ci"] == pytest.approx([2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)], abs=1e-5)
    assert gain["p"] == pytest.approx(1 - math.sqrt(12 / 14))  # t = 2 sqrt(3) with 2 degrees of freedom
    assert measures.paired_gain([0.7]) == {"pairs": 1, "mean": 0.7}
    assert measures.paired_gain([0.1, 0.1, 0.1]) == {"pairs": 3, "mean": pytest.approx(0.1)}, "equal by chance"


def test_holm_against_examples_worked_by_hand():
    for ps, significant in (
        ([0.05], [True]),
        # Holm (1979): the smallest against 0.05 / 4, the next against 0.05 / 3, ...; the first failure ends it.
        ([0.01, 0.04, 0.03, 0.005], [True, False, False, True]),  # 0.005 and 0.01 pass, 0.03 > 0.025
        ([0.03, 0.01, 0.02], [True, True, True]),  # 0.01 <= 0.0167, 0.02 <= 0.025, 0.03 <= 0.05
        ([0.02, 0.04, 0.02], [False, False, False]),  # 0.02 > 0.0167: nor what would pass alone
        ([0.0125, 0.9, 0.0166, 0.9], [True, False, True, False]),
    ):
        assert measures.holm(ps) == significant, ps
