"""LiteLLM's proxy with the files of the example, in an environment and a process of its own.

The proxy pins releases that differ from those of the other tests, so it is not among their tools.
"""

import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import openai

from tests.support.recorded import ROOT

KEY: Final = "sk-of-the-proxy"
UPSTREAM_KEY: Final = "sk-of-the-models"
_CONFIG: Final = ROOT / "examples" / "litellm_proxy" / "config.yaml"
_FOLDER: Final = ROOT / "build" / "litellm_proxy"
_START_S: Final = 300.0  # it imports for ten seconds on a free processor
_END_S: Final = 120.0
_OFFLINE: Final = (
    *("MODEL_COST_MAP", "ANTHROPIC_BETA_HEADERS", "AUTOROUTER_PRESETS", "BLOG_POSTS"),
    "POLICY_TEMPLATES",
)
"""What it downloads otherwise."""


def _environment() -> dict[str, str]:
    ours = ("PYTHON", "PYTEST", "COV", "LITELLM", "LYNKR")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {f"LITELLM_LOCAL_{name}": "True" for name in _OFFLINE}


def installed() -> Path:
    """The proxy's program; the first call installs it, until this project requires something else.

    It takes two minutes. Another process that needs it waits for the first.
    """
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    stamp, venv = _FOLDER / "stamp", _FOLDER / "venv"
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with (_FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            pip = (venv / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
            for command in (
                (sys.executable, "-m", "venv", "--clear", venv),
                (*pip, "install", "litellm[proxy]", "--editable", f"{ROOT}[litellm]"),
                (*pip, "check"),
            ):
                subprocess.run(command, check=True, env=_environment())
            stamp.write_text(wanted)
    return venv / "bin" / "litellm"


class Proxy:
    """A proxy that runs.

    Args:
        process: Its first process.
        url: Where it answers.
        log: The file of what it prints.
        store_url: The database of its rows.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], url: str, log: Path, store_url: str
    ) -> None:
        self._process = process
        self.url = url
        self.log = log
        self.store_url = store_url

    def client(self, key: str = KEY) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/health/readiness", timeout=30):  # noqa: S310
                    return
            except OSError:
                assert self._process.poll() is None, self.log.read_text()[-3000:]
                assert time.monotonic() < deadline, self.log.read_text()[-3000:]
                time.sleep(0.2)

    def end(self) -> int:
        """End it as an operator does; return how it ended."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(_END_S)


@contextmanager
def running(models_url: str, folder: Path, *options: str, **settings: str) -> Iterator[Proxy]:
    """Run a proxy on a free port of the loopback address.

    Args:
        models_url: Where its models answer.
        folder: An empty one for its database and its log.
        options: More options of its command line.
        settings: More variables of its environment.
    """
    program = installed()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    store_url = f"sqlite:///{folder}/telemetry.db"
    environment = _environment() | {
        "LITELLM_MASTER_KEY": KEY,
        "LYNKR_STORE_URL": store_url,
        **{f"{which}_URL": f"{models_url}/v1" for which in ("MODELS", "SPARE")},
        **{f"{which}_KEY": UPSTREAM_KEY for which in ("MODELS", "SPARE")},
        **settings,
    }
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [program, "--config", _CONFIG, "--host", "127.0.0.1", "--port", port, *options],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    proxy = Proxy(process, f"http://127.0.0.1:{port}", log, store_url)
    try:
        proxy.wait_until_ready()
        yield proxy
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with its workers, also after a failed test
        process.wait()
