"""Where a data set's files are: found, or downloaded with their checksums, and unpacked."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".xz": lzma.decompress,
    ".bz2": bz2.decompress,
}


@dataclass(frozen=True)
class Remote:
    """Where a file is published, and the checksum it must have ("md5:..." or "sha256:...")."""

    url: str
    checksum: str


@dataclass(frozen=True)
class Source:
    """What a loader is told: where files are, and what images are wanted.

    ``image_size`` and ``channels`` matter only to pictures that come in any size and mode.
    """

    data_dir: Path
    download: bool = False
    image_size: int = 28
    channels: int = 1


def find(source: Source, dataset: str, name: str) -> Path | None:
    """``name``, or a packed or unpacked form of it, in ``data_dir/dataset`` or ``data_dir``."""
    bare = Path(name).stem if Path(name).suffix in UNPACK else name
    for folder in (source.data_dir / dataset, source.data_dir):
        for candidate in (name, bare, *(bare + suffix for suffix in UNPACK)):
            if (folder / candidate).is_file():
                return folder / candidate
    return None


def obtain(source: Source, dataset: str, name: str, remote: Remote | None = None) -> Path:
    """The path of a file that is there, or was downloaded if asked for; UserError otherwise."""
    found = find(source, dataset, name)
    if found is not None:
        return found
    if source.download and remote is not None:
        return fetch(remote, source.data_dir / dataset / name)
    hint = "; --download fetches it" if remote is not None else ""
    raise UserError(
        f"{source.data_dir / dataset / name} is not there (nor {source.data_dir / name}); "
        f"--data-dir names the folder of the data{hint}"
    )


def fetch(remote: Remote, path: Path) -> Path:
    """Download to ``path`` with a progress bar; it appears there only with the right checksum."""
    try:
        import pooch

        downloader = pooch.HTTPDownloader(progressbar=True)
    except (ImportError, ValueError):  # it wants tqdm for the bar
        raise UserError("--download needs two packages: pip install pooch tqdm") from None
    try:
        pooch.retrieve(remote.url, remote.checksum, path.name, path.parent, downloader=downloader)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: downloading {remote.url} failed: {reason}") from None
    return path


def read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked if it is a .gz, .xz or .bz2; UserError if it is damaged."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    unpack = UNPACK.get(path.suffix)
    if unpack is None:
        return content
    try:
        return unpack(content)
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"{path}: not a whole {path.suffix[1:]} file, truncated or damaged ({error})"
        ) from None


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB file (version 5); UserError if it is none or damaged."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise UserError(f"{path}: reading .mat files needs scipy: pip install scipy") from None
    content = read_bytes(path)
    try:
        return loadmat(io.BytesIO(content))
    except Exception as error:  # scipy raises many kinds for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a whole MATLAB file, damaged ({reason})") from None
