"""A folder of pictures for each class: which are held out, and what can't be a data set."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.data import Source, load_dataset
from model.data.folder import FORMS, HELD_OUT, divided, lot
from model.errors import UserError


def save(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20), value, np.uint8)).save(path)


def fill(folder: Path, count: int, value: int = 0) -> None:
    for n in range(count):
        save(folder / f"{n}.png", value + n)


def test_a_folder_for_each_class(tmp_path: Path) -> None:
    fill(tmp_path / "owls", 20, 100)
    fill(tmp_path / "cats", 3, 200)
    (tmp_path / "owls" / "notes.txt").write_text("not a picture")
    # What macOS puts beside files, and archives made there hold.
    for name in ("owls/._1.png", "__MACOSX/owls/._1.png", ".Trash/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("not a picture")
    dataset = load_dataset("folder", Source(tmp_path, image_size=24))
    assert dataset.classes == ("cats", "owls")
    assert dataset.train.images.shape[1:] == (1, 24, 24)
    assert len(dataset.train) + len(dataset.test) == 23
    parts = dataset.train, dataset.test
    assert all(part.images.shape == (len(part), 1, 24, 24) for part in parts)
    assert all(set(part.labels.tolist()) == {0, 1} for part in parts)
    values = torch.cat([part.images.amax((1, 2, 3)) for part in parts]).sort().values
    assert values.tolist() == [*range(100, 120), *range(200, 203)]  # each of them once
    for part in parts:
        assert torch.equal(part.labels == 0, part.images.amax((1, 2, 3)) >= 200)
    owls = dataset.test.images.amax((1, 2, 3))[dataset.test.labels == 1].tolist()
    # As in every version to come: another choice would test earlier runs on what they trained on.
    assert owls == [100, 114, 118, 106, 107, 108]
    assert "held-out" in dataset.test_name


def test_a_class_whose_name_is_no_utf8(tmp_path: Path) -> None:
    """Bytes of a name come as surrogates, which neither matplotlib nor a terminal takes."""
    for name in (b"caf\xe9", "caf\u00e9".encode()):
        fill(tmp_path / os.fsdecode(name), 2)
    assert load_dataset("folder", Source(tmp_path)).classes == ("caf\u00e9", r"caf\xe9")


def test_pictures_that_come_or_go_move_no_other() -> None:
    paths = [Path(f"picture {n}.png") for n in range(1000)]
    train, test = divided(paths)
    assert sorted(train + test) == sorted(paths)
    assert len(test) / len(paths) == pytest.approx(HELD_OUT, abs=0.04)
    for some in (paths[1:], paths[::3], [Path("aardvark.png"), *paths]):
        train_of_some, test_of_some = divided(some)
        assert set(train_of_some) & set(paths) <= set(train)
        assert set(test_of_some) & set(paths) <= set(test)


def test_every_class_has_a_picture_of_each_kind() -> None:
    paths = [Path(f"{n}.png") for n in range(200)]
    low = [p for p in paths if lot(p) < HELD_OUT]
    high = [p for p in paths if lot(p) >= HELD_OUT]
    assert divided(high)[1] == [min(high, key=lot)]
    assert divided(low)[0] == [max(low, key=lot)]
    assert all(len(part) == 1 for part in divided(low[:2]))


def test_folders_train_and_test(tmp_path: Path) -> None:
    for part, count in (("train", 4), ("test", 1)):
        for value, name in enumerate("ab"):
            fill(tmp_path / part / name, count, 10 * value)
    dataset = load_dataset("folder", Source(tmp_path, channels=3))
    assert dataset.train.images.shape == (8, 3, 28, 28)
    assert dataset.test.labels.tolist() == [0, 1]
    fill(tmp_path / "test" / "c", 1)
    with pytest.raises(UserError, match="same classes, only one has c"):
        load_dataset("folder", Source(tmp_path))


def test_classes_called_train_and_test(tmp_path: Path) -> None:
    for name in ("train", "test", "tram"):
        fill(tmp_path / name, 2)
    dataset = load_dataset("folder", Source(tmp_path))
    assert dataset.classes == ("test", "train", "tram")
    assert "held-out" in dataset.test_name


def test_pictures_to_test_must_be_there_if_those_to_train_on_are(tmp_path: Path) -> None:
    fill(tmp_path / "train" / "a", 2)
    with pytest.raises(UserError, match=f"test is not there; {re.escape(FORMS)}$"):
        load_dataset("folder", Source(tmp_path))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not there; --data-dir must hold"):
        load_dataset("folder", Source(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="must have at least 2 classes, got 0"):
        load_dataset("folder", Source(tmp_path))
    fill(tmp_path / "a", 3)
    with pytest.raises(UserError, match="must have at least 2 classes, got 1"):
        load_dataset("folder", Source(tmp_path))
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="b: no pictures in it"):
        load_dataset("folder", Source(tmp_path))
    save(tmp_path / "b" / "0.png", 9)
    with pytest.raises(UserError, match="b: must have at least 2 pictures, one to train on and on"):
        load_dataset("folder", Source(tmp_path))


def test_an_unknown_data_set() -> None:
    with pytest.raises(UserError, match=r"dataset must be one of digits, .*, got 'emnist'"):
        load_dataset("emnist", Source(Path()))
