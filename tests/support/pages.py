"""The examples of a documentation page, run from top to bottom in one directory."""

import contextlib
import io
import os
import re
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lynkr_store.cli import commands
from tests.support.recorded import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
SERVERS = ("uvicorn", "gunicorn")
_WAIT_S = 30.0


class Block(NamedTuple):
    """A fenced block: its language, the file that its title names, its text and its line."""

    language: str
    title: str | None
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    found = re.finditer(r"(?ms)^```(\w*)(?: title=\"([^\"]+)\")?\n(.*?)^```$", text)
    return [
        Block(match[1], match[2], match[3], text.count("\n", 0, match.start()) + 1)
        for match in found
    ]


class Runner:
    """Runs blocks in the current directory.

    Args:
        patch: Sets the environment for the blocks that follow.
        server_url: The real database, for the one that pages name.
        models_url: A server of models, for the one that pages name.
    """

    def __init__(self, patch: pytest.MonkeyPatch, server_url: str, models_url: str) -> None:
        self._patch = patch
        self._server_url = server_url
        self._models_url = models_url

    def run(self, block: Block) -> None:
        """Run it, and compare what it prints with what the page says."""
        text = re.sub(
            r"postgresql(?:\+psycopg)?://[^@\s\"']*@db\.example/gateway(\?)?", self._url, block.text
        )
        text = text.replace("https://models.example", self._models_url)
        match block.language:
            case "python":
                self._python(text, block)
            case "console":
                self._console(text)
            case _:
                pytest.fail(f"line {block.line}: no way to run {block.language or 'this'}")

    def _url(self, match: re.Match[str]) -> str:
        more = "&" if "?" in self._server_url else "?"
        return self._server_url + (more if match[1] else "")

    def _python(self, text: str, block: Block) -> None:
        path = Path(block.title or f"example_{block.line}.py")
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
        if path.name.startswith(("env.py", "test_")):
            return  # a command of the page runs it
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(path), run_name="__main__")
        said = iter(out.getvalue().splitlines())
        for expected in re.findall(r"(?m)^ *print\(.*\)  # (.*)$", text):
            # a comment may go on after what is printed
            assert any(expected == line or expected.startswith(f"{line}:") for line in said), (
                f"line {block.line}: {expected!r} is not in {out.getvalue()!r}"
            )
        assert out.getvalue() or block.title, f"line {block.line}: this shows nothing"

    def _console(self, text: str) -> None:
        lines = text.splitlines()
        starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
        assert starts[:1] == [0], "a console's block begins with a command"
        for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
            command, *expected = lines[start:end]
            said = self._command(command.removeprefix("$ ").partition("  #")[0].strip())
            assert not expected or said.splitlines() == expected, command

    def _command(self, command: str) -> str:
        words = shlex.split(command)
        if words[0] == "export":
            self._patch.setenv(*words[1].split("=", 1))
            return ""
        if words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\[([\w,]+)\]", command):
                assert set(extra.split(",")) <= set(EXTRAS), command
            return ""
        if words[0] in SERVERS:
            return self._server(words)
        if words[0] == "lynkr-store" and ">" not in words:
            return _in_process(words)
        return _shell(command)

    def _server(self, words: list[str]) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UVICORN_PORT", str(port))
            patch.setenv("GUNICORN_CMD_ARGS", f"--bind 127.0.0.1:{port} --no-control-socket")
            server = subprocess.Popen([sys.executable, "-m", *words], env=_environment())
        try:
            at = f"http://127.0.0.1:{port}"
            _eventually(lambda: _get(f"{at}/health"))
            for number in range(3):
                _get(f"{at}/chat?question={number}", method="POST")
            answers = [_get(f"{at}{path}") for path in ("/stats", "/requests?provider=ollama")]
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                ended = server.wait(_WAIT_S)
            finally:
                server.kill()
        assert ended in (0, -signal.SIGTERM), ended
        return "\n".join(answers)


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONWARNINGS": "error"}


def _shell(command: str) -> str:
    done = subprocess.run(
        ["bash", "-c", command],  # noqa: S607 - the system's
        check=False,
        capture_output=True,
        text=True,
        env=_environment(),
        timeout=_WAIT_S * 4,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def _in_process(words: list[str]) -> str:
    """What the command prints; it spares the second in which a new process imports the library."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr("warnings.showwarning", lambda *_, **__: None)
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            commands.main()
    assert not ended.value.code, f"{words}: {out.getvalue()}{err.getvalue()}"
    return out.getvalue()


def _get(url: str, method: str = "GET") -> str:
    request = urllib.request.Request(url, method=method)  # noqa: S310 - its own server
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        said: bytes = answer.read()
    return said.decode()


def _eventually(ask: Callable[[], object]) -> None:
    deadline = time.monotonic() + _WAIT_S
    while True:
        try:
            ask()
        except OSError:
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.1)
        else:
            return


def examples() -> Iterator[tuple[Path, list[Block]]]:
    """Each page that has examples."""
    for page in PAGES:
        if found := [block for block in blocks(page.read_text()) if block.language]:
            yield page, found
