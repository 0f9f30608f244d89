"""The paper's experiments, declared: ``python -m model.train --experiment NAME`` runs one."""

from dataclasses import dataclass, replace

from .config import Architecture, Config


@dataclass(frozen=True)
class Experiment:
    """A configuration, and what the paper and the best independent implementation report for it."""

    config: Config
    about: str
    paper: str = "-"
    """The paper's figure: test error unless said otherwise."""
    independent: str = "-"


MNIST = Config("mnist", epochs=50)
MULTIMNIST = Config(
    "mnist", Architecture(image_size=36), pairs=True, shift_pixels=4, epochs=100,
    lr_schedule="steps", lr_decay=0.96, lr_decay_steps=20_000, warmup_steps=500,
)  # fmt: skip
AFFNIST = Config(
    "affnist", Architecture(image_size=40), shift_pixels=0, stop_accuracy=0.9923, epochs=50,
    warmup_steps=500,
)  # fmt: skip
# The paper's section 7 mentions no decoder for the next three.
CIFAR10 = Config(
    "cifar10",
    Architecture(
        in_channels=3, image_size=24, capsule_types=64, same_padding=True, leaky=True,
        reconstruction=False,
    ),
    lam_recon=0.0, shift_pixels=0, flip=True, jitter=True, standardize=True, epochs=200,
    lr_schedule="steps", lr_decay=0.96, warmup_steps=500,
)  # fmt: skip
SMALLNORB = Config(
    "smallnorb",
    Architecture(in_channels=2, image_size=32, classes=5, reconstruction=False),
    lam_recon=0.0, shift_pixels=0, jitter=True, standardize=True, epochs=100, warmup_steps=500,
)  # fmt: skip
SVHN = Config(
    "svhn",
    Architecture(
        in_channels=3, image_size=32, conv_channels=64, capsule_types=16, capsule_dim=6,
        class_dim=8, reconstruction=False,
    ),
    lam_recon=0.0, shift_pixels=2, jitter=True, standardize=True, epochs=50,
)  # fmt: skip

EXPERIMENTS = {
    "digits": Experiment(
        Config("digits", epochs=6, batch_size=32, lr_schedule="linear"),
        "scikit-learn's 1,797 digits: no download, a few minutes on two cores",
    ),
    "mnist": Experiment(
        MNIST, "3 routing iterations, reconstruction", "0.25 +- 0.005 % (table 1)", "0.28 %"
    ),
    "mnist-1-epoch": Experiment(
        replace(MNIST, epochs=1, lr_schedule="linear", batch_size=64),
        "one epoch of MNIST: under 20 minutes on two CPU cores",
    ),
    "mnist-r1": Experiment(
        MNIST.replaced({"routings": 1}),
        "1 routing iteration, reconstruction",
        "0.29 +- 0.011 % (table 1)",
    ),
    "mnist-no-reconstruction": Experiment(
        MNIST.replaced({"lam_recon": 0.0}), "3 routing iterations", "0.35 +- 0.036 % (table 1)"
    ),
    "mnist-r1-no-reconstruction": Experiment(
        MNIST.replaced({"routings": 1, "lam_recon": 0.0}),
        "1 routing iteration",
        "0.34 +- 0.032 % (table 1)",
    ),
    "baseline-mnist": Experiment(
        replace(MNIST, architecture=Architecture("cnn", reconstruction=False), lam_recon=0.0),
        "CNN of 35,445,522 parameters",
        "0.39 % (table 1)",
    ),
    "multimnist": Experiment(MULTIMNIST, "two overlapping digits, 36 x 36", "5.2 % (table 1)"),
    "multimnist-r1": Experiment(
        MULTIMNIST.replaced({"routings": 1}), "... with 1 routing iteration", "7.5 % (table 1)"
    ),
    "baseline-multimnist": Experiment(
        replace(
            MULTIMNIST,
            architecture=Architecture("pooled-cnn", image_size=36, reconstruction=False),
            lam_recon=0.0,
        ),
        "CNN of 24,563,978 parameters",
        "8.1 % (table 1)",
    ),
    "affnist": Experiment(
        AFFNIST,
        "trained on MNIST placed at random on 40 x 40, tested on affine digits",
        "21 %, at 0.77 % on shifted MNIST (section 5.2)",
    ),
    "baseline-affnist": Experiment(
        replace(
            AFFNIST,
            architecture=Architecture(
                "pooled-cnn", image_size=40, hidden=328, dropout=0.5, reconstruction=False
            ),
            lam_recon=0.0,
            stop_accuracy=0.9922,
        ),
        "CNN with pooling of 11,719,458 parameters",
        "34 %, at 0.78 % on shifted MNIST (section 5.2)",
    ),
    "fashion-mnist": Experiment(replace(MNIST, dataset="fashion-mnist"), "pictures of clothes"),
    "cifar10": Experiment(
        CIFAR10, "24 x 24 patches, 64 capsule types, none of the above", "10.6 % with 7 models"
    ),
    "smallnorb": Experiment(SMALLNORB, "stereo pairs of toys, 32 x 32 crops of 48 x 48", "2.7 %"),
    "svhn": Experiment(SVHN, "house numbers, a smaller network", "4.3 %"),
    "folder": Experiment(
        Config("folder", epochs=30, lr_schedule="linear", batch_size=32),
        "your own pictures: --data-dir DIR with a folder for each class",
    ),
}
