"""The code of docs/pytorch.md, run from top to bottom as a reader would."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "pytorch.md"


@pytest.mark.slow
def test_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 5
    exec(compile("\n".join(blocks), PAGE.name, "exec"), {})
