"""CIFAR-10, SVHN, smallNORB and affNIST: small files in exactly the publishers' formats."""

import gzip
import io
import lzma
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint, check_data
from model.data import (
    Dataset,
    Source,
    Split,
    affnist,
    cifar10,
    files,
    load_dataset,
    smallnorb,
    svhn,
)
from model.data.idx import FILES as MNIST_FILES
from model.errors import UserError
from model.experiments import EXPERIMENTS

from .test_data_idx import idx

savemat = pytest.importorskip("scipy.io").savemat
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def numbers(*shape: int, seed: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint8)


def refused(path: Path, dataset: str, source: Path, expected: str) -> None:
    """Loading fails in one line that names ``path`` and says ``expected``."""
    with pytest.raises(UserError) as caught:
        load_dataset(dataset, Source(source))
    message = str(caught.value)
    assert str(path) in message
    assert expected in message
    assert "\n" not in message


# CIFAR-10


def cifar_batch(seed: int, records: int = 7) -> np.ndarray:
    batch = numbers(records, cifar10.RECORD, seed=seed)
    batch[:, 0] %= 10
    return batch


@pytest.fixture
def cifar_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar10"
    folder.mkdir()
    for n, name in enumerate((*cifar10.TRAIN, cifar10.TEST)):
        (folder / name).write_bytes(cifar_batch(n).tobytes())
    return tmp_path


def test_cifar_batches(cifar_dir: Path) -> None:
    dataset = load_dataset("cifar10", Source(cifar_dir))
    assert dataset.train.images.shape == (35, 3, 32, 32)
    assert dataset.test_name == "test"
    third = cifar_batch(2)[4]
    assert dataset.train.labels[2 * 7 + 4] == third[0]
    # Red first, row by row.
    assert dataset.train.images[2 * 7 + 4, 1, 20, 9] == third[1 + 1024 + 20 * 32 + 9]
    assert dataset.test.images.flatten(1).tolist() == cifar_batch(5)[:, 1:].tolist()


def test_cifar_without_test_batch_holds_out_the_fifth_and_says_so(cifar_dir: Path) -> None:
    folder = cifar_dir / "cifar10"
    (folder / cifar10.TEST).unlink()
    packed = folder / (cifar10.TRAIN[0] + ".xz")
    packed.write_bytes(lzma.compress((folder / cifar10.TRAIN[0]).read_bytes()))
    (folder / cifar10.TRAIN[0]).unlink()
    dataset = load_dataset("cifar10", Source(cifar_dir))
    assert len(dataset.train) == 28
    assert dataset.test.images.flatten(1).tolist() == cifar_batch(4)[:, 1:].tolist()
    assert "data_batch_5" in dataset.test_name


def test_a_network_is_not_tested_on_a_held_out_batch_it_was_trained_on(cifar_dir: Path) -> None:
    """Its run had a test batch, which is gone; files of older versions don't tell."""
    config = EXPERIMENTS["cifar10"].config

    def check(trained: Dataset | None, dataset: Dataset) -> None:
        data = {} if trained is None else trained.fingerprint()
        check_data(Checkpoint(config, cifar10.CLASSES, {}, data=data), dataset, Path("run"))

    whole = load_dataset("cifar10", Source(cifar_dir))
    (cifar_dir / "cifar10" / cifar10.TEST).unlink()
    held_out = load_dataset("cifar10", Source(cifar_dir))
    with pytest.raises(UserError, match=r"^run: may be trained on the held-out .* \[28, .* \[35,"):
        check(whole, held_out)
    for trained, dataset in ((held_out, held_out), (held_out, whole), (None, held_out)):
        check(trained, dataset)


@pytest.fixture
def cifar_archive(tmp_path: Path) -> Path:
    path = tmp_path / cifar10.ARCHIVE
    with tarfile.open(path, "w:gz") as archive:
        for n, name in enumerate((*cifar10.TRAIN, cifar10.TEST)):
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            content = cifar_batch(n).tobytes()
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_cifar_archive(cifar_archive: Path) -> None:
    dataset = load_dataset("cifar10", Source(cifar_archive.parent))
    assert dataset.test.images.flatten(1).tolist() == cifar_batch(5)[:, 1:].tolist()


@pytest.mark.parametrize("missing", [cifar10.TRAIN[0], cifar10.TRAIN[3], cifar10.TEST])
@pytest.mark.parametrize("download", [False, True])
def test_the_archive_is_taken_if_a_cifar_batch_is_missing(
    missing: str,
    download: bool,
    cifar_dir: Path,
    cifar_archive: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Wherever it lies, or fetched; without a gap in the batches nothing is."""
    folder = cifar_dir / "cifar10"
    if download:
        published = cifar_archive.rename(cifar_dir / "published")
        monkeypatch.setattr(files, "fetch", lambda remote, path: published.rename(path))
    source = Source(cifar_dir, download)
    (folder / missing).unlink()
    dataset = load_dataset("cifar10", source)
    assert (len(dataset.train), dataset.test_name) == (35, "test")
    assert (folder / cifar10.ARCHIVE).exists() == download
    (folder / missing).write_bytes(cifar_batch(9).tobytes())
    dataset = load_dataset("cifar10", source)
    images = torch.cat([dataset.train.images, dataset.test.images]).flatten(1).tolist()
    assert cifar_batch(9)[0, 1:].tolist() in images


def test_bad_cifar_archives(cifar_archive: Path) -> None:
    path, folder = cifar_archive, cifar_archive.parent
    whole = path.read_bytes()
    unpacked = gzip.decompress(whole)
    # Level 0: a changed byte of a pixel unpacks like any other, only the checksum tells.
    stored = bytearray(gzip.compress(unpacked, 0))
    stored[2000] ^= 1
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    for content in (whole[:-50_000], whole[:-4], bytes(stored), bytes(damaged)):
        path.write_bytes(content)
        refused(path, "cifar10", folder, "not a whole gz file, truncated or damaged")
    directory = tarfile.TarInfo(f"cifar-10-batches-bin/{cifar10.TRAIN[0]}")
    directory.type = tarfile.DIRTYPE
    for content in (
        b"no archive", unpacked[:-50_000], bytes(10_240), directory.tobuf() + bytes(10_240)
    ):  # fmt: skip
        path.write_bytes(gzip.compress(content))
        refused(path, "cifar10", folder, "not the whole archive of CIFAR-10 (")


def test_bad_cifar_files(cifar_dir: Path) -> None:
    path = cifar_dir / "cifar10" / cifar10.TRAIN[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(path, "cifar10", cifar_dir, "must be records of 3073 bytes, got 21510 bytes")
    path.write_bytes(b"\x0b" + whole[1:])
    refused(path, "cifar10", cifar_dir, "labels must be 0 to 9")
    path.unlink()
    refused(path, "cifar10", cifar_dir, "is not there (nor ")
    refused(path, "cifar10", cifar_dir, "; --download fetches it")


def test_the_publishers_own_cifar_batch() -> None:
    path = SHARED / "cifar10" / "data_batch_1.bin.xz"
    if not path.exists():
        pytest.skip("CIFAR-10's batches are not here")
    split = cifar10.parse(lzma.decompress(path.read_bytes()), "data_batch_1.bin")
    assert split.images.shape == (10_000, 3, 32, 32)
    # It begins with a frog, two trucks and a deer.
    assert split.labels[:4].tolist() == [6, 9, 9, 4]
    assert split.labels.bincount().sort().values[[0, -1]].tolist() == [937, 1032]


# SVHN


def write_svhn(folder: Path, count: int = 6) -> tuple[np.ndarray, np.ndarray]:
    X = numbers(32, 32, 3, count)
    y = np.array([[10], [1], [2], [9], [10], [5]], np.uint8)[:count]
    for name in svhn.FILES.values():
        savemat(folder / name, {"X": X, "y": y}, do_compression=True)
    return X, y


def test_svhn_files(tmp_path: Path) -> None:
    X, _ = write_svhn(tmp_path)
    dataset = load_dataset("svhn", Source(tmp_path))
    assert dataset.train.images.shape == (6, 3, 32, 32)
    assert dataset.train.labels.tolist() == [0, 1, 2, 9, 0, 5]
    assert dataset.test.images[4, 1, 20, 9] == X[20, 9, 1, 4]


def test_bad_svhn_files(tmp_path: Path) -> None:
    write_svhn(tmp_path)
    path = tmp_path / svhn.FILES["train"]
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"not MATLAB " * 30):
        path.write_bytes(content)
        refused(path, "svhn", tmp_path, "not a whole MATLAB file")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    path.write_bytes(damaged)
    refused(path, "svhn", tmp_path, "not a whole MATLAB file")
    savemat(path, {"Z": numbers(3, 3)})
    refused(path, "svhn", tmp_path, "must have variables X and y, got Z")
    savemat(path, {"X": numbers(3, 3), "y": numbers(3, 1)})
    refused(path, "svhn", tmp_path, "X must be uint8 [32, 32, 3, N], got uint8 [3, 3]")
    savemat(path, {"X": numbers(32, 32, 3, 2), "y": np.array([[1], [11]])})
    refused(path, "svhn", tmp_path, "labels must be 0 to 9, got 1 to 11")


# smallNORB


def norb(array: np.ndarray) -> bytes:
    magic = 0x1E3D4C55 if array.dtype == np.uint8 else 0x1E3D4C54
    shape = [*array.shape, *[1] * (3 - array.ndim)]
    header = np.array([magic, array.ndim, *shape], "<i4").tobytes()
    return header + array.astype("<i4" if magic == 0x1E3D4C54 else "u1").tobytes()


@pytest.fixture
def norb_dir(tmp_path: Path) -> Path:
    for seed, (images, labels) in enumerate(smallnorb.FILES.values()):
        pairs = numbers(5, 2, 96, 96, seed=seed)
        (tmp_path / images).write_bytes(gzip.compress(norb(pairs)))
        (tmp_path / labels).write_bytes(gzip.compress(norb(np.arange(5, dtype=np.int32))))
    return tmp_path


def test_norb_files(norb_dir: Path) -> None:
    dataset = load_dataset("smallnorb", Source(norb_dir))
    assert dataset.train.images.shape == (5, 2, 48, 48)
    assert dataset.test.labels.tolist() == [0, 1, 2, 3, 4]
    pairs = numbers(5, 2, 96, 96, seed=1).astype(float)
    means = pairs.reshape(5, 2, 48, 2, 48, 2).mean((3, 5))
    assert np.abs(dataset.test.images.numpy() - means).max() <= 0.5


def test_bad_norb_files(norb_dir: Path) -> None:
    path = norb_dir / smallnorb.FILES["train"][0]
    whole = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(whole[:-3]))
    refused(path, "smallnorb", norb_dir, "announces 92160 bytes, got 92157")
    path.write_bytes(gzip.compress(b"\x00" * 100))
    refused(path, "smallnorb", norb_dir, "must begin with 0x1e3d4c55 or 0x1e3d4c54, got 0x0")
    path.write_bytes(gzip.compress(norb(numbers(5, 96, 96))))
    refused(path, "smallnorb", norb_dir, "must be bytes [N, 2, 96, 96], got uint8 [5, 96, 96]")
    minus_5, minus_2 = 2**32 - 5, 2**32 - 2
    for dimensions, *sizes, expected in (
        (5, 5, 2, 96, 96, 1, "must announce at most 4 dimensions, got 5 in a file of 92188 bytes"),
        (minus_5, 5, 2, 96, 96, "must announce at most 4 dimensions, got 4294967291"),
        (4, minus_5, minus_2, 96, 96, "[4294967291, 4294967294, 96, 96] announces"),
    ):
        header = np.array([0x1E3D4C55, dimensions, *sizes], "<u4").tobytes()
        path.write_bytes(gzip.compress(header + whole[24:]))
        refused(path, "smallnorb", norb_dir, f"truncated or damaged: {expected}")
    path.write_bytes(gzip.compress(whole[:21]))
    refused(path, "smallnorb", norb_dir, "at most 4 dimensions, got 4 in a file of 21 bytes")
    path.write_bytes(b"x")
    refused(path, "smallnorb", norb_dir, "not a whole gz file")


def test_real_norb_pairs(tmp_path: Path) -> None:
    samples = SHARED / "smallnorb" / "smallnorb_12samples.npz"
    if not samples.exists():
        pytest.skip("the smallNORB samples are not here")
    real = np.load(samples)
    for part, (images, labels) in smallnorb.FILES.items():
        (tmp_path / images).write_bytes(gzip.compress(norb(real[f"{part}_images"])))
        (tmp_path / labels).write_bytes(gzip.compress(norb(real[f"{part}_labels"])))
    dataset = load_dataset("smallnorb", Source(tmp_path))
    for part in ("train", "test"):
        split = getattr(dataset, part)
        assert split.labels.tolist() == real[f"{part}_labels"].tolist()
        # Two cameras see the same toy: the halves of a pair are more alike than any two toys.
        flat = split.images.double().flatten(2)
        own = (flat[:, 0] - flat[:, 1]).norm(dim=-1)
        other = torch.cdist(flat[:, 0], flat[:, 0])
        assert own.median() < other[other > 0].median()


# affNIST


def write_mnist(folder: Path) -> None:
    for images, labels in MNIST_FILES.values():
        (folder / images).write_bytes(gzip.compress(idx(numbers(10, 28, 28))))
        (folder / labels).write_bytes(gzip.compress(idx(np.arange(10))))


def test_affnist_file(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    images = numbers(1600, 4)
    data = {"image": images, "label_int": np.array([[3, 1, 4, 1]], np.uint8)}
    savemat(tmp_path / "test.mat", {"affNISTdata": data})
    dataset = load_dataset("affnist", Source(tmp_path))
    assert len(dataset.train) == len(dataset.test) == 10
    (further,) = dataset.further_tests.items()
    name, split = further
    assert name == affnist.OFFICIAL
    assert split.images.shape == (4, 1, 40, 40)
    assert split.labels.tolist() == [3, 1, 4, 1]
    assert split.images[2, 0, 7, 30] == images[7 * 40 + 30, 2]


def test_bad_affnist_files(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "test.mat"
    savemat(path, {"other": numbers(2, 2)})
    refused(path, "affnist", tmp_path, "must have a structure affNISTdata")
    data = {"image": numbers(784, 4), "label_int": numbers(1, 4, high=10)}
    savemat(path, {"affNISTdata": data})
    refused(path, "affnist", tmp_path, "image must be uint8 [1600, N], got uint8 [784, 4]")
    path.write_bytes(b"torn")
    refused(path, "affnist", tmp_path, "not a whole MATLAB file")


def test_own_affine_digits_never_carry_the_official_name(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (name,) = load_dataset("affnist", Source(tmp_path)).further_tests
    assert name == affnist.OWN != affnist.OFFICIAL
    assert "own" in name


def box_digits(count: int) -> Split:
    """A bright 20 x 20 box in the middle, as MNIST's digits are."""
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    images[..., 4:24, 4:24] = 255
    return Split(images, torch.zeros(count, dtype=torch.long))


def test_affine_digits_follow_the_recipe() -> None:
    digits = affnist.affine_digits(box_digits(600))
    assert digits.images.shape == (600, 1, 40, 40)
    area = digits.images.double().sum((1, 2, 3)) / 255
    # Nothing is cut off: the area is 400 times both scales, 0.64 to 1.44, to a little resampling.
    assert area.min() > 400 * 0.63
    assert area.max() < 400 * 1.45
    assert area.min() < 400 * 0.75 < 400 * 1.25 < area.max()
    ink = digits.images[:, 0] > 127
    rows, columns = ink.any(2), ink.any(1)
    # They reach every edge of the canvas, and lie anywhere on it.
    for profile in (rows, columns):
        assert profile[:, :3].any()
        assert profile[:, -3:].any()
    # Rotation by up to 20 degrees and shear: the box's own height spreads.
    height = rows.sum(1)
    assert height.min() <= 19
    assert height.max() >= 28
    assert torch.equal(affnist.affine_digits(box_digits(600)).images, digits.images)
