"""The capsule network: its size, the meaning of its channels, its routing, its decoder."""

from typing import Literal

import pytest
import torch

from capsule_kernels import squash
from model.capsnet import CapsNet, PrimaryCapsules
from model.config import Architecture
from model.experiments import EXPERIMENTS
from model.networks import build

from .tiny import tiny_capsnet


def parameters(architecture: Architecture) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(architecture).parameters())


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("mnist", 8_215_568),
        ("mnist-r1", 8_215_568),
        ("mnist-no-reconstruction", 6_804_224),
        ("digits", 8_215_568),
        ("fashion-mnist", 8_215_568),
        ("baseline-mnist", 35_445_522),
        ("multimnist", 11_361_808),
        ("baseline-multimnist", 24_563_978),
        ("affnist", 13_475_648),
        ("baseline-affnist", 11_719_458),
        ("cifar10", 22_476_288),
        ("smallnorb", 6_661_120),
        ("svhn", 1_004_896),
    ],
)
def test_parameter_counts(experiment: str, expected: int) -> None:
    assert parameters(EXPERIMENTS[experiment].config.architecture) == expected


@pytest.mark.parametrize("network", ["cnn", "pooled-cnn"])
@torch.no_grad()
def test_baselines_drop_units_in_training_only(network: Literal["cnn", "pooled-cnn"]) -> None:
    torch.manual_seed(0)
    model = build(Architecture(network, image_size=8, hidden=16, dropout=0.5, reconstruction=False))
    images = torch.rand(2, 1, 8, 8)
    first, again = (model(images).scores for _ in range(2))
    assert not torch.equal(first, again)
    model.eval()
    first, again = (model(images).scores for _ in range(2))
    assert torch.equal(first, again)


def test_bias_adds_one_vector_a_class() -> None:
    assert parameters(Architecture(bias=True)) == 8_215_568 + 10 * 16


@pytest.mark.parametrize(
    ("experiment", "capsules"),
    [
        ("mnist", 1152),
        ("multimnist", 3200),
        ("affnist", 4608),
        ("smallnorb", 2048),
        ("cifar10", 9216),
        ("svhn", 1024),
    ],
)
def test_capsule_counts_of_the_paper(experiment: str, capsules: int) -> None:
    a = EXPERIMENTS[experiment].config.architecture
    with torch.device("meta"):
        network = CapsNet(a)
        images = torch.zeros(2, a.in_channels, a.image_size, a.image_size)
        assert network.primary_capsules(images).shape == (2, capsules, a.capsule_dim)
        assert network.digits.in_capsules == capsules


def test_primary_capsules_take_their_components_across_channels() -> None:
    torch.manual_seed(0)
    layer = PrimaryCapsules(3, types=4, dim=5)
    features = torch.randn(2, 3, 13, 15)
    channels = layer.convolution(features)  # [2, 20, 3, 4]
    u = layer(features)
    assert u.shape == (2, 4 * 3 * 4, 5)
    for kind in range(4):
        for y in range(3):
            for x in range(4):
                capsule = channels[:, kind * 5 : (kind + 1) * 5, y, x]
                torch.testing.assert_close(u[:, (kind * 3 + y) * 4 + x], squash(capsule))


def test_reference_backend_trains_the_same_network() -> None:
    torch.manual_seed(0)
    network = tiny_capsnet()
    oracle = CapsNet(network.architecture, backend="reference")
    oracle.load_state_dict(network.state_dict())
    assert oracle.digits.backend == "reference"
    images, labels = torch.rand(3, 1, 28, 28), torch.tensor([[1], [2], [9]])
    outputs = []
    for model in (network, oracle):
        scores, reconstructions = model(images, labels)
        (scores.square().sum() + reconstructions.sum()).backward()
        outputs.append((scores, reconstructions))
    torch.testing.assert_close(outputs[0], outputs[1])
    for (name, p), q in zip(network.named_parameters(), oracle.parameters(), strict=True):
        assert p.grad is not None
        assert p.grad.abs().sum() > 0, name
        torch.testing.assert_close(p.grad, q.grad)


def test_decoder_sees_only_the_labelled_capsule() -> None:
    torch.manual_seed(0)
    network = tiny_capsnet()
    capsules = torch.randn(2, 10, 6)
    labels = torch.tensor([[3, 5], [0, 9]])
    both = network.reconstruct(capsules, labels)
    assert both.shape == (2, 2, 1, 28, 28)
    assert (both >= 0).all()
    assert (both <= 1).all()
    others = capsules.clone()
    others[0, [0, 1, 2, 4, 5, 6, 7, 8, 9]] = 7.0
    torch.testing.assert_close(network.reconstruct(others, labels)[0, 0], both[0, 0])
    assert not torch.allclose(network.reconstruct(others, labels)[0, 1], both[0, 1])


def test_no_decoder_without_reconstruction() -> None:
    network = tiny_capsnet(reconstruction=False)
    output = network(torch.rand(2, 1, 28, 28), torch.zeros(2, 1, dtype=torch.long))
    assert output.reconstructions is None
    with pytest.raises(ValueError, match="no decoder"):
        network.reconstruct(torch.randn(2, 10, 6), torch.zeros(2, 1, dtype=torch.long))


def test_black_images_have_finite_gradients() -> None:
    network = tiny_capsnet()
    with torch.no_grad():
        for layer in (network.conv1, network.primary.convolution):
            assert layer.bias is not None
            layer.bias.zero_()
    network(torch.zeros(2, 1, 28, 28)).scores.sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
