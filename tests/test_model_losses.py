"""Losses and the count of correct answers, against values worked out by hand."""

import pytest
import torch

from model.config import Architecture, Config
from model.losses import (
    Output,
    correct,
    lengths,
    margin_loss,
    multi_hot,
    reconstruction_loss,
    total_loss,
)
from model.views import Batch


def test_margin_loss_by_hand() -> None:
    scores = torch.tensor([[0.95, 0.3, 0.05], [0.4, 0.1, 0.6]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    # Sample 1: 0 + 0.5 * 0.2^2 + 0; sample 2: 0.5^2 + 0 + 0.5 * 0.5^2.
    paper = (0.02 + 0.375) / 2
    assert margin_loss(scores, targets).item() == pytest.approx(paper)
    assert margin_loss(scores, targets, "authors").item() == pytest.approx(paper / 3 / 2)


def test_margin_loss_counts_every_class_that_is_present() -> None:
    scores = torch.tensor([[0.9, 0.9, 0.1]])
    assert margin_loss(scores, multi_hot(torch.tensor([[0, 1]]), 3)).item() == 0
    assert margin_loss(scores, multi_hot(torch.tensor([[0, 0]]), 3)).item() == pytest.approx(0.32)


def test_lengths_of_a_zero_capsule_have_no_gradient() -> None:
    capsules = torch.zeros(1, 2, 4, requires_grad=True)
    lengths(capsules).sum().backward()
    assert capsules.grad is not None
    assert (capsules.grad == 0).all()


def test_reconstruction_loss_sums_pixels_and_averages_samples() -> None:
    drawn, original = torch.zeros(2, 1, 1, 2, 2), torch.zeros(2, 1, 1, 2, 2)
    original[0] = 0.5
    assert reconstruction_loss(drawn, original).item() == pytest.approx(4 * 0.25 / 2)


def test_total_loss_weighs_the_reconstruction() -> None:
    config = Config(lam_recon=0.1)
    batch = Batch(torch.zeros(1, 1, 2, 2), torch.tensor([[0]]), torch.ones(1, 1, 1, 2, 2))
    scores = torch.tensor([[0.9, 0.1]])
    assert total_loss(Output(scores), batch, config).item() == 0
    drawn = Output(scores, torch.zeros(1, 1, 1, 2, 2))
    assert total_loss(drawn, batch, config).item() == pytest.approx(0.1 * 4)


def test_cnns_are_trained_by_cross_entropy() -> None:
    batch = Batch(torch.zeros(1, 1, 2, 2), torch.tensor([[1]]), torch.zeros(1, 1, 1, 2, 2))
    config = Config(architecture=Architecture(network="cnn"))
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    expected = -logits.log_softmax(-1)[0, 1]
    torch.testing.assert_close(total_loss(Output(logits), batch, config), expected)


def test_cnns_of_pairs_are_trained_by_a_sigmoid_for_each_class() -> None:
    config = Config(architecture=Architecture(network="pooled-cnn"), pairs=True)
    images = torch.zeros(2, 1, 2, 2)
    batch = Batch(images, torch.tensor([[2, 1], [0, 1]]), images.unsqueeze(1))
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]])
    p = logits.sigmoid().log(), (-logits).sigmoid().log()  # of being there, of not being there
    first = p[1][0, 0] + p[0][0, 1] + p[0][0, 2]
    second = p[0][1, 0] + p[0][1, 1] + p[1][1, 2]
    loss = total_loss(Output(logits), batch, config)
    torch.testing.assert_close(loss, -(first + second) / 2)
    certain = torch.tensor([[-90.0, 90.0, 90.0], [90.0, 90.0, -90.0]])
    assert total_loss(Output(certain), batch, config).item() == pytest.approx(0, abs=1e-6)


def test_correct_wants_exactly_the_labels() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.1, 0.9, 0.5]])
    assert correct(scores, torch.tensor([[1], [2], [0]])).tolist() == [True, False, False]
    pairs = torch.tensor([[2, 1], [1, 2], [0, 1]])
    assert correct(scores, pairs).tolist() == [True, True, False]


@pytest.mark.parametrize("form", ["paper", "authors"])
def test_the_form_of_the_margin_loss_is_the_configured_one(form: str) -> None:
    scores, labels = torch.tensor([[0.4, 0.6]]), torch.tensor([[0]])
    batch = Batch(scores, labels, scores)
    found = total_loss(Output(scores), batch, Config(margin=form))
    assert found == margin_loss(scores, multi_hot(labels, 2), form)
    assert len({margin_loss(scores, multi_hot(labels, 2), f) for f in ("paper", "authors")}) == 2
