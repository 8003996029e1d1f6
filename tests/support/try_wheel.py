"""Install a wheel in an empty environment and use it there, outside the checkout."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

CHECK = """
import lynkr_store
from lynkr_store import RoutingEvent, Store
from lynkr_store.migrate import scripts
assert scripts.directory().name == "_migrations", scripts.directory()
with Store("sqlite:///by-code.db") as store:
    store.record(RoutingEvent(provider="p"))
    assert store.flush(10)
    assert store.get_stats().total_requests == 1
"""


def main(wheel: Path) -> None:
    """Raise unless the wheel works by itself."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        environment["LYNKR_STORE_URL"] = f"sqlite:///{folder}/by-command.db"

        def run(*command: object) -> None:
            subprocess.run([str(part) for part in command], check=True, cwd=folder, env=environment)

        run(sys.executable, "-m", "venv", folder / "venv")
        programs = folder / "venv" / "bin"
        run(programs / "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
        run(programs / "lynkr-store", "upgrade")
        run(programs / "lynkr-store", "check")
        run(programs / "python", "-c", CHECK)
        run(programs / "python", "-m", "lynkr_store", "health")
    print(f"{wheel.name} works by itself")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
