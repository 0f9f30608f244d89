"""CIFAR-10 in its publisher's binary format.

A batch file holds records of 3,073 bytes: the label, then 32 x 32 red, green and blue values. The
publisher's archive contains five training batches and one to test, of 10,000 records each.
"""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from .files import Remote, Source, find, obtain, read_bytes
from .splits import Dataset, Split

CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
RECORD = 1 + 3 * 32 * 32
TRAIN = tuple(f"data_batch_{n}.bin" for n in range(1, 6))
TEST = "test_batch.bin"
ARCHIVE = "cifar-10-binary.tar.gz"
HELD_OUT = "held-out data_batch_5 (no test batch)"
REMOTE = Remote(
    f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}", "md5:c32a1d4ab5d03f1284b67883e8d87530"
)


def parse(content: bytes, name: str) -> Split:
    """The images [N, 3, 32, 32] and labels of a batch; ``name`` begins the messages."""
    if not content or len(content) % RECORD:
        raise UserError(
            f"{name}: truncated or not a CIFAR-10 batch: must be records of {RECORD} bytes, "
            f"got {len(content)} bytes"
        )
    records = torch.from_numpy(np.frombuffer(content, np.uint8).reshape(-1, RECORD).copy())
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return Split(images, records[:, 0].long()).check(name, len(CLASSES))


def join(splits: list[Split]) -> Split:
    return Split(torch.cat([s.images for s in splits]), torch.cat([s.labels for s in splits]))


def load(source: Source) -> Dataset:
    """50,000 images [3, 32, 32] to train on and 10,000 to test.

    If any of the six files is missing, the archive takes their place, fetched where that is asked
    for. Without it, where only the publisher's test batch is missing, the fifth training batch is
    held out and the data set says so.
    """
    *found, test = (find(source, "cifar10", name) for name in (*TRAIN, TEST))
    archived = source.download or find(source, "cifar10", ARCHIVE) is not None
    if not any(found) or (archived and None in (*found, test)):
        return load_archive(obtain(source, "cifar10", ARCHIVE, REMOTE))
    # The message about a file that is missing says that --download fetches it: in the archive.
    paths = [obtain(source, "cifar10", name, REMOTE) for name in TRAIN]
    batches = [parse(read_bytes(path), str(path)) for path in paths]
    if test is not None:
        return Dataset(join(batches), parse(read_bytes(test), str(test)), CLASSES)
    return Dataset(join(batches[:-1]), batches[-1], CLASSES, test_name=HELD_OUT)


def load_archive(path: Path) -> Dataset:
    """The six batches inside the publisher's archive."""
    content = io.BytesIO(read_bytes(path))
    splits = {}
    try:
        with tarfile.open(fileobj=content, mode="r:") as archive:
            for name in (*TRAIN, TEST):
                member = archive.extractfile(f"cifar-10-batches-bin/{name}")
                if member is None:
                    raise KeyError(f"{name} is no file")
                splits[name] = parse(member.read(), f"{path}: {name}")
    except (tarfile.TarError, KeyError) as error:
        raise UserError(f"{path}: not the whole archive of CIFAR-10 ({error})") from None
    return Dataset(join([splits[name] for name in TRAIN]), splits[TEST], CLASSES)
