"""What scripts name is there: nobody runs the long ones with every change."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_install_matrix_runs_tests_that_exist() -> None:
    script = (ROOT / "scripts" / "install-matrix.sh").read_text()
    (names,) = re.findall(r'^TESTS="(.*?)"', script, re.MULTILINE | re.DOTALL)
    assert len(names.split()) > 20
    assert all((ROOT / "tests" / f"test_{name}.py").exists() for name in names.split())
