"""Run a module of the tests as a program of its own, which says what it has to say in JSON."""

import json
import subprocess
import sys
from typing import Any

from tests.support.recorded import ROOT


def command(module: str, name: str, options: dict[str, Any]) -> list[str]:
    return [sys.executable, "-W", "error", "-m", module, name, json.dumps(options)]


def run(module: str, name: str, options: dict[str, Any], timeout_s: float) -> list[dict[str, Any]]:
    """What a program said until its end, which must be a good one."""
    done = subprocess.run(
        command(module, name, options),
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]
