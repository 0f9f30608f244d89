"""What a loader is told: where files are, and what images are wanted."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """``image_size`` and ``channels`` matter only to pictures that come in any size and mode."""

    data_dir: Path
    download: bool = False
    image_size: int = 28
    channels: int = 1
