"""The paper's experiments, declared: ``python -m model.train --experiment NAME`` runs one."""

from dataclasses import dataclass

from .config import Config


@dataclass(frozen=True)
class Experiment:
    """A configuration and what the paper reports for it."""

    config: Config
    about: str
    paper: str = "none"
    """The paper's figure."""


EXPERIMENTS = {
    "digits": Experiment(
        Config("digits", epochs=6, batch_size=32, lr_schedule="linear", shift_pixels=2),
        "scikit-learn's 1,797 digits: no download, a few minutes on two cores",
    ),
    "mnist": Experiment(
        Config("mnist"),
        "CapsNet, 3 routing iterations, reconstruction",
        "0.25 +- 0.005 % test error (table 1)",
    ),
    "fashion-mnist": Experiment(Config("fashion-mnist"), "CapsNet on pictures of clothes"),
}
