"""The report's numbers against independent computations."""

import math

import numpy as np
import pytest
import torch

from datasets import DATASETS
from evaluation import measures, report

SPEC = DATASETS["cifar10"]


def one_hot(classes, scale: float = 20.0, of: int = 3) -> torch.Tensor:
    """Logits of a model that is sure of the given classes."""
    return torch.nn.functional.one_hot(torch.tensor(classes), of).double() * scale


def test_wilson_against_hand_worked_values():
    assert measures.wilson(5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    assert measures.wilson(0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    assert measures.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe (1998), table I
    assert measures.wilson(10, 10)[1] == 1.0
    for correct, count in ((3, 17), (900, 1000), (1, 1)):  # by its definition: the roots of the score test
        for bound in measures.wilson(correct, count):
            if 0 < bound < 1:
                score = abs(correct / count - bound) / math.sqrt(bound * (1 - bound) / count)
                assert score == pytest.approx(1.959964, abs=1e-5)


def test_numbers_of_a_hand_worked_case():
    # probabilities (1/2, 1/4, 1/4): right, right, wrong, and the fourth's (1/4, 1/4, 1/2): right
    half = math.log(2)
    logits = torch.tensor([[half, 0, 0], [half, 0, 0], [half, 0, 0], [0, 0, half]]).double()
    labels = torch.tensor([0, 0, 1, 2])
    numbers = measures.measure(logits, labels)
    assert numbers["top1"] == 0.75 and "top5" not in numbers and numbers["images"] == 4
    assert numbers["per_class"] == [1.0, 0.0, 1.0]
    assert numbers["confusion"] == [[2, 0, 0], [1, 0, 0], [0, 0, 1]]
    assert numbers["loss"] == pytest.approx((3 * math.log(2) + math.log(4)) / 4)
    assert numbers["ece"] == pytest.approx(0.25)  # one bin: accuracy 3/4, confidence 1/2
    assert numbers["top1_ci"] == list(measures.wilson(3, 4))


def test_perfect_constant_and_adversarial_predictors():
    labels = torch.arange(10).repeat(4)
    perfect = measures.measure(one_hot(labels.tolist(), of=10), labels)
    assert perfect["top1"] == perfect["top5"] == 1 and perfect["per_class"] == [1.0] * 10
    assert perfect["ece"] < 1e-6 and perfect["loss"] < 1e-6
    constant = measures.measure(torch.zeros(40, 10), labels)  # all ties: nothing is right by luck
    assert constant["top1"] == constant["top5"] == 0 and sum(constant["per_class"]) == 0
    assert constant["loss"] == pytest.approx(math.log(10)) and constant["ece"] == pytest.approx(0.1)
    adversarial = measures.measure(one_hot(((labels + 1) % 10).tolist(), of=10), labels)
    assert adversarial["top1"] == 0 and adversarial["ece"] == pytest.approx(1, abs=1e-6)
    assert adversarial["loss"] == pytest.approx(20, abs=1e-6)


def test_confusion_agrees_with_top1_on_ties():
    logits = torch.randint(0, 3, (500, 10), generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(10).repeat(50)
    numbers = measures.measure(logits, labels)
    confusion = np.array(numbers["confusion"])
    expected = np.mean([(np.delete(row, y) < row[y]).all() for row, y in zip(logits.numpy(), labels, strict=True)])
    assert numbers["top1"] == pytest.approx(expected) and confusion.trace() == 500 * expected
    assert (confusion.sum(1) == 50).all()
    best = logits.max(1).values
    predicted = measures.predictions(logits, labels)
    assert (logits.gather(1, predicted[:, None])[:, 0] == best).all()


def test_a_class_without_images_has_no_accuracy():
    numbers = measures.measure(one_hot([0, 2]), torch.tensor([0, 0]))
    assert numbers["per_class"] == [0.5, None, None]
    assert "automobile no image" in report.accuracy_text(numbers, SPEC.classes[:3])


def test_calibration_error_against_loops_over_bins():
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


def test_a_confidence_on_an_edge_is_of_the_bin_below():
    count, confidence, accuracy = measures.reliability(torch.zeros(2, 3), torch.tensor([0, 1]))  # 1/3 = 5/15
    assert count.tolist() == [0] * 4 + [2] + [0] * 10
    assert confidence[4] == pytest.approx(1 / 3) and accuracy[4] == 0
    sure, *_ = measures.reliability(one_hot([0], scale=1000), torch.tensor([0]))
    assert sure.tolist() == [0] * 14 + [1]


def test_fidelity_against_hand_worked_values():
    student = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 3.0]])
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 0])  # teacher right, right, wrong, wrong; student right, wrong, wrong, wrong
    found = measures.fidelity(student, teacher, labels)
    assert found["agreement"] == 0.75 and found["contingency"] == [[1, 1], [0, 2]]
    p, q = np.exp(teacher.double().numpy()), np.exp(student.double().numpy())
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    assert found["kl_to_teacher"] == pytest.approx(np.mean((p * np.log(p / q)).sum(1)), abs=1e-9)
    itself = measures.fidelity(teacher, teacher, labels)
    assert itself["agreement"] == 1 and itself["kl_to_teacher"] == pytest.approx(0, abs=1e-12)
    right_alone = measures.fidelity(one_hot([0, 1]), one_hot([1, 1]), torch.tensor([0, 1]))
    assert right_alone["contingency"] == [[1, 0], [1, 0]]


def test_t_quantile_against_printed_tables():
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622, 10: 2.2281, 30: 2.0423, 120: 1.9799}
    for freedom, value in table.items():
        assert measures.t_quantile(freedom) == pytest.approx(value, abs=6e-5)


def test_paired_gain_against_hand_worked_values():
    gain = measures.paired_gain([71.0, 74.0, 72.0], [70.0, 71.0, 70.0])  # +1, +3, +2
    assert gain["mean"] == pytest.approx(2) and gain["sd"] == pytest.approx(1) and gain["pairs"] == 3
    assert gain["ci"] == pytest.approx([2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)], abs=1e-5)
    assert gain["within_seed_noise"]
    assert not measures.paired_gain([71.0, 72.0, 71.5], [70.0, 70.9, 70.5])["within_seed_noise"]
    assert not measures.paired_gain([70.0, 70.9, 70.5], [71.0, 72.0, 71.5])["within_seed_noise"]  # surely harmful
