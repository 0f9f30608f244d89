"""What a step sees and does: order, shares, seeds, learning rates."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from model.checkpoint import Checkpoint, model_tensors
from model.config import Config
from model.data import Dataset, Split
from model.distributed import ALONE, World
from model.errors import UserError
from model.evaluation import scores_of
from model.experiments import EXPERIMENTS
from model.fit import Fit
from model.interrupt import Interruption
from model.losses import Output
from model.metrics import MetricsLog
from model.networks import build
from model.trainer import Trainer, derived_seed
from model.views import Batch

from .tiny import ARCHITECTURE, tiny_capsnet


def alike(count: int = 22) -> Dataset:
    """Images that are all the same, so that only their place can differ."""
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    images[:, :, 10:18, 12:16] = 255
    split = Split(images, torch.arange(count) % 10)
    return Dataset(split, split, tuple("0123456789"))


def trainer(world: World = ALONE, **changes: object) -> Trainer:
    config = Config("x", ARCHITECTURE, **{"epochs": 3, "batch_size": 8, **changes})  # type: ignore[arg-type]
    return Trainer(config, tiny_capsnet(), alike(), Path(), world)


def fit_of(made: Trainer, max_minutes: float | None = None, checkpoint_minutes: float = 5.0) -> Fit:
    console = Console()
    interruption = Interruption(console)
    return Fit(made, MetricsLog(None), console, interruption, max_minutes, checkpoint_minutes)


def batches(made: Trainer, steps: int) -> list[Batch]:
    """What the next steps are given."""
    seen: list[Batch] = []
    made.update = seen.append
    for _ in range(steps):
        made.step()
    return seen


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own() -> None:
    made = trainer()
    assert (made.steps_per_epoch, made.total_steps) == (2, 6)
    orders = [torch.cat([made.batch_index(2 * epoch + n) for n in (0, 1)]) for epoch in range(3)]
    for order in orders:
        assert len(order.unique()) == 16  # the last 6 of 22 make no whole batch
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(trainer().batch_index(3), made.batch_index(3))
    assert not torch.equal(trainer(seed=1).batch_index(3), made.batch_index(3))


def test_processes_share_a_batch() -> None:
    whole = trainer().batch_index(1)
    shares = [trainer(World(rank, 2)).batch_index(1) for rank in range(2)]
    assert sorted(torch.cat(shares).tolist()) == sorted(whole.tolist())
    assert not set(shares[0].tolist()) & set(shares[1].tolist())


def test_every_step_and_process_shifts_its_images_anew() -> None:
    first, second = batches(trainer(), 2)
    assert not torch.equal(first.images, second.images)
    (again, _), (other, _) = batches(trainer(), 2), batches(trainer(seed=1), 2)
    assert torch.equal(again.images, first.images)
    assert not torch.equal(other.images, first.images)
    pair = [batches(trainer(World(rank, 2)), 1)[0] for rank in range(2)]
    assert not torch.equal(pair[0].images, pair[1].images)


def test_seeds_of_different_keys_differ() -> None:
    seeds = {derived_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert max(seeds) > 2**60


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"lr": 1.0, "lr_decay": 0.5}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        ({"lr": 1.0, "lr_schedule": "linear"}, [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        (
            {"lr": 1.0, "lr_schedule": "steps", "lr_decay": 0.25, "lr_decay_steps": 2},
            [1, 0.5, 0.25, 0.125, 0.0625, 0.03125],
        ),
        ({"lr": 1.0, "lr_decay": 0.5, "warmup_steps": 4}, [0.25, 0.5, 0.375, 0.5, 0.25, 0.25]),
    ],
)
def test_learning_rates(changes: dict[str, object], expected: list[float]) -> None:
    made, used = trainer(**changes), []
    made.update = lambda batch: used.append(float(made.lr))
    for _ in expected:
        made.step()
    assert used == pytest.approx(expected)


@pytest.mark.parametrize("name", ["multimnist", "affnist"])
def test_the_first_steps_leave_capsules_something_to_learn(name: str) -> None:
    """Their lengths stay off 1, where squash lets no gradient through."""
    config = replace(EXPERIMENTS[name].config, batch_size=8)
    torch.manual_seed(0)
    strokes = 255 * (torch.rand(40, 1, 28, 28) < 0.15)
    split = Split(strokes.to(torch.uint8), torch.arange(40) % 10)
    dataset = Dataset(split, split, tuple("0123456789"))
    made = Trainer(config, build(config.architecture), dataset, Path())
    for _ in range(2):
        made.step()
    with torch.no_grad():
        lengths = made.model(made.test_batch(8).images).scores
    assert lengths.mean() < 0.5


def test_a_loss_that_diverged_in_another_process_ends_them_all(tmp_path: Path) -> None:
    class BesideOneThatDiverged(World):
        def total(self, values: torch.Tensor) -> torch.Tensor:
            return values + torch.nan

    made = trainer(BesideOneThatDiverged())
    made.directory = tmp_path
    with pytest.raises(UserError, match=r"^the loss \(nan\) or the weights are not finite after"):
        fit_of(made).save()
    assert not list(tmp_path.iterdir())


def test_an_accuracy_that_another_process_reached_ends_them_all(tmp_path: Path) -> None:
    class BesideOneThatReachedIt(World):
        def largest(self, value: int) -> int:
            return True if value is False else value  # between steps it is a number

    made = trainer(BesideOneThatReachedIt(), stop_accuracy=1.0)
    made.directory = tmp_path
    assert fit_of(made).run() == "accuracy reached"
    assert (made.progress.epoch, made.total_steps) == (1, 6)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_that_cannot_be_written_ends_both_processes(
    rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class OfTwo(World):
        def total(self, values: torch.Tensor) -> torch.Tensor:
            return values

        def largest(self, value: int) -> int:
            return max(value, 2)  # what the main one says that has failed

        def meet(self) -> None:
            pass

    made = trainer(OfTwo(rank, 2))
    made.directory = tmp_path / "nowhere"
    with pytest.raises(SystemExit, match="2"):
        fit_of(made).save()
    path = made.directory / "checkpoint.safetensors"
    told = f"error: {path}: can't be written: No such file or directory\n"
    assert capsys.readouterr().err == (told if rank == 0 else "")


def test_a_data_set_smaller_than_a_batch() -> None:
    made = trainer(batch_size=100)
    assert (made.batch_size, made.steps_per_epoch) == (22, 1)
    made.step()
    assert made.running_means()[0] > 0
    assert made.sums[2] == 22


def test_at_least_an_image_for_each_process() -> None:
    def of_four(images: int) -> Trainer:
        config = Config("x", ARCHITECTURE)
        return Trainer(config, tiny_capsnet(), alike(images), Path(), World(0, 4))

    assert (of_four(4).batch_size, of_four(4).steps_per_epoch) == (4, 1)
    with pytest.raises(UserError, match=r"^torchrun must start at most 3 processes, .*, got 4$"):
        of_four(3)


@pytest.mark.parametrize(
    ("counters", "expected"),
    [
        ({"step": "4"}, "its counters can't be read: step must be of type int, got '4'"),
        ({"seconds": None}, "its counters can't be read: seconds must be of type float, got None"),
        ({"steps": 4}, "its counters can't be read: .*'steps'"),
        ({"step": 3, "epoch": 0}, "here: step 3 must be in or at the end of epoch 1 of 2 steps"),
        ({"step": 3, "epoch": 2}, "here: step 3 must be in or at the end of epoch 3 of 2 steps"),
        ({"step": 0, "epoch": -1}, "here: step 0 must be in or at the end of epoch 0 of 2 steps"),
    ],
)
def test_counters_no_run_can_have(counters: dict[str, object], expected: str) -> None:
    made = trainer()
    tensors = model_tensors(made.model) | {"progress.sums": torch.zeros(3)}
    with pytest.raises(UserError, match=expected):
        made.restore(Checkpoint(made.config, ("a",), tensors, counters), Path("here"))
    for step, epoch in ((0, 0), (2, 0), (2, 1), (3, 1)):  # at 2 the test is done, or is not
        made.restore(
            Checkpoint(made.config, ("a",), tensors, {"step": step, "epoch": epoch}), Path()
        )


def test_a_step_trains_and_its_randomness_follows_from_its_number() -> None:
    """Dropout is on in steps and off in tests."""
    made, seen = trainer(), []
    made.model.eval()
    made.update = lambda batch: seen.append((made.model.training, float(torch.rand(()))))
    made.step()
    made.progress.step = 0
    torch.rand(7)
    made.step()
    assert seen[0] == seen[1]
    assert seen[0][0]
    made.test(made.dataset.test)
    assert not made.model.training


def test_compilation_is_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network: ("compiled", network))
    made = trainer(compile=True)
    assert made.forward == ("compiled", made.model)


def test_an_epoch_sums_its_own_steps(tmp_path: Path) -> None:
    made = trainer()
    made.directory = tmp_path
    fit_of(made).run()
    assert made.sums.tolist() == [0, 0, 0]


def test_limits_are_minutes_and_earlier_seconds_count() -> None:
    made = trainer()
    made.progress.seconds = 1000.0
    fit = fit_of(made, 2.0, 3.0)
    assert fit.deadline - fit.start == pytest.approx(120)
    assert fit.checkpoint_seconds == 180
    assert 1000 <= fit.seconds() < 1100


def test_a_second_signal_ends_at_once_and_afterwards_all_is_as_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interruption(Console()) as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.number == signal.SIGINT
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_mixed_precision_holds_for_tests() -> None:
    on = []

    def network(images: torch.Tensor) -> Output:
        on.append(torch.is_autocast_enabled("cpu"))
        return Output(torch.zeros(len(images), 10))

    for amp in (True, False):
        scores_of(network, trainer(amp=amp).config, alike().test)
    assert on == [True, False]
