"""Downloads, from a server on this machine: there whole and checked, or not there at all."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.data import Source
from model.data.files import Remote, obtain
from model.errors import UserError

pytest.importorskip("pooch", reason="downloading needs pooch")
pytest.importorskip("tqdm", reason="downloading needs tqdm")

CONTENT = bytes(range(256)) * 40
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()


@pytest.fixture
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("published")
    (folder / "file.bin").write_bytes(CONTENT)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/file.bin"
        server.shutdown()


def test_a_missing_file_is_fetched_once_asked_for(url: str, tmp_path: Path) -> None:
    remote = Remote(url, MD5)
    with pytest.raises(UserError, match=r"file\.bin is not there .*; --download fetches it"):
        obtain(Source(tmp_path), "set", "file.bin", remote)
    path = obtain(Source(tmp_path, download=True), "set", "file.bin", remote)
    assert path == tmp_path / "set" / "file.bin"
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("wrong", ["checksum", "address", "server"])
def test_what_can_go_wrong_leaves_nothing(wrong: str, url: str, tmp_path: Path) -> None:
    remote = {
        "checksum": Remote(url, "md5:" + "0" * 32),
        "address": Remote(url + ".nowhere", MD5),
        "server": Remote("http://127.0.0.1:9/file.bin", MD5),
    }[wrong]
    with pytest.raises(UserError, match=r"file\.bin: downloading http://127.* failed: ") as caught:
        obtain(Source(tmp_path, download=True), "set", "file.bin", remote)
    assert "\n" not in str(caught.value)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
