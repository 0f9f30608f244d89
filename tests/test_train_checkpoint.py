"""Checkpoint files: whole or not at all, refused when torn or foreign."""

import json
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint, load, restore_model, save
from model.errors import UserError
from model.outputs import remove_unfinished, write_atomically

from .tiny import CONFIG, tiny_capsnet

safetensors = pytest.importorskip("safetensors.torch")


def example() -> Checkpoint:
    torch.manual_seed(0)
    tensors = checkpoints.model_tensors(tiny_capsnet())
    return Checkpoint(CONFIG, ("a", "b"), tensors, {"step": 7}, {"train": [3, 5]})


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / checkpoints.CHECKPOINT
    saved = example()
    save(path, saved)
    for source in (path, tmp_path):
        found = load(source)
        assert found.config == saved.config
        assert found.classes == saved.classes
        assert found.counters == saved.counters
        assert found.data == saved.data
        assert found.tensors.keys() == saved.tensors.keys()
        for name, tensor in saved.tensors.items():
            assert torch.equal(found.tensors[name], tensor)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    # Weights are plain safetensors that any other program reads.
    assert "model.digits.weight" in safetensors.load_file(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="not a checkpoint of this program"):
        load(path)
    path.write_bytes(b"PK\x03\x04 some other format, long enough to be read")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load(path)
    metadata = {"format": checkpoints.FORMAT, "config": '{"unknown": 1}'}
    safetensors.save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(UserError, match="its metadata can't be read"):
        load(path)
    with pytest.raises(UserError, match="nowhere is not there"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("part", "value", "expected"),
    [
        ("config", {"epochs": "3"}, "epochs must be of type int, got '3'"),
        ("config", {"epochs": True}, "epochs must be of type int, got True"),
        ("config", {"epochs": -1}, "--epochs must be at least 0, got -1"),
        ("config", {"lr": None}, "lr must be of type float, got None"),
        ("config", {"dataset": ["mnist"]}, r"dataset must be of type str, got \['mnist'\]"),
        ("config", {"stop_accuracy": "high"}, r"stop_accuracy must be of type float \| None, got"),
        ("config", {"architecture": 3}, "argument after"),
        ("architecture", {"network": "mlp"}, "network must be one of capsnet, cnn, pooled-cnn, go"),
        ("architecture", {"classes": 0}, "classes must be at least 1, got 0"),
        ("architecture", {"routings": 2.5}, "routings must be of type int, got 2.5"),
        ("classes", "ab", "classes must be a list of names, got 'ab'"),
        ("counters", [1], r"counters must be an object, got \[1\]"),
        ("data", 7, "data must be an object, got 7"),
    ],
)
def test_bad_metadata_is_refused(part: str, value: Any, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    config = CONFIG.to_dict()
    metadata = {"config": config, "classes": ["a"], "counters": {}}
    if part == "architecture":
        config["architecture"] |= value
    elif part == "config":
        config |= value
    else:
        metadata[part] = value
    texts = {name: json.dumps(v) for name, v in metadata.items()} | {"format": checkpoints.FORMAT}
    safetensors.save_file({"weight": torch.zeros(3)}, path, texts)
    with pytest.raises(UserError, match=f"its metadata can't be read: .*{expected}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_metadata_of_an_older_version(tmp_path: Path) -> None:
    """Without what identifies the data, and options that came later; a part it needs is named."""
    path = tmp_path / "x.safetensors"
    config = CONFIG.to_dict()
    del config["warmup_steps"]
    texts = {"format": checkpoints.FORMAT, "config": json.dumps(config), "classes": "[]"}
    safetensors.save_file({"weight": torch.zeros(3)}, path, texts | {"counters": "{}"})
    assert load(path).config == CONFIG
    assert load(path).data == {}
    texts["data"] = "null"
    safetensors.save_file({"weight": torch.zeros(3)}, path, texts | {"counters": "{}"})
    assert load(path).data == {}
    safetensors.save_file({"weight": torch.zeros(3)}, path, texts)
    with pytest.raises(UserError, match="can't be read: 'counters' is missing"):
        load(path)


def test_names_of_classes_are_text(tmp_path: Path) -> None:
    """An older version saved those of folders as the file system gave them."""
    saved = example()
    saved.classes = ("caf\udce9", "b")
    save(tmp_path / "x.safetensors", saved)
    assert load(tmp_path / "x.safetensors").classes == (r"caf\xe9", "b")
    saved.classes = ("\ud800",)  # of no file system
    save(tmp_path / "x.safetensors", saved)
    with pytest.raises(UserError, match=r"its metadata can't be read: .* surrogates not allowed"):
        load(tmp_path / "x.safetensors")


def test_other_architecture_names_the_first_tensor(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"here: weights of another architecture: primary\.convolution\.weight is \[",
    ) as caught:
        restore_model(tiny_capsnet(capsule_types=3), example(), Path("here"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"decoder\.0\.weight is \[.*\] there, nothing here"):
        restore_model(tiny_capsnet(reconstruction=False), example(), Path("here"))


def test_a_new_file_takes_the_old_ones_place_in_one_go(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"before")
    with path.open("rb") as reader:
        write_atomically(path, b"after it")
        assert reader.read() == b"before"
    assert path.read_bytes() == b"after it"


def test_what_a_killed_write_left_is_removed(tmp_path: Path) -> None:
    """Only that: not what has a similar name, a directory or a link."""
    path = tmp_path / "x"
    write_atomically(path, b"before")
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from model.outputs import write_atomically\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), b'after it')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = (p for p in tmp_path.iterdir() if p != path)
    assert left.read_bytes() == b"after it"
    others = [
        tmp_path / name for name in ("y.unfinished", "x.12345678.part", ".12345678.unfinished")
    ]
    for other in others:
        other.touch()
    directory, link = tmp_path / "d.12345678.unfinished", tmp_path / "l.12345678.unfinished"
    directory.mkdir()
    link.symlink_to(path)
    remove_unfinished(tmp_path)
    assert set(tmp_path.iterdir()) == {path, *others, directory, link}
    assert path.read_bytes() == b"before"


def test_a_full_disk_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomically(path, b"before")
    # A limit on the size of files stands in for a full disk: the write stops in its middle.
    script = (
        "import resource, sys; from pathlib import Path\n"
        "from model.outputs import write_atomically; from model.errors import run_command\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))\n"
        "try: run_command(lambda: write_atomically(Path(sys.argv[1]), bytes(100_000)))\n"
        "finally: resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))\n"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path}: can't be written: ")
    assert len(done.stderr.splitlines()) == 1
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
