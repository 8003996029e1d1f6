"""The wheel carries the revisions and works outside the checkout."""

import subprocess
import sys
import zipfile

import pytest

from tests.support import try_wheel
from tests.support.recorded import ROOT


@pytest.mark.slow
def test_the_wheel_upgrades_an_empty_database_outside_the_checkout(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "build", "--quiet", "--outdir", tmp_path, ROOT], check=True
    )
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for part in ("py.typed", "_migrations/env.py", "_migrations/versions/0005_own_columns.py"):
        assert f"lynkr_store/{part}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith(("tests", "examples", "migrations"))]
    try_wheel.main(wheel)
