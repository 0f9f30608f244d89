"""Data sets by name: read from their publishers' own files, kept as uint8.

One module a file format; :func:`load_dataset` is the only door.
"""

from .registry import DATASETS, load_dataset
from .source import Source
from .splits import Dataset, Split, class_name

__all__ = ["DATASETS", "Dataset", "Source", "Split", "class_name", "load_dataset"]
