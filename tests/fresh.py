"""Run Python code in a fresh interpreter: for the environment, forks, signals and crashes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

THREAD_VARIABLES = ("KLFAST_NUM_THREADS", "OMP_NUM_THREADS", "KLFAST_ISA")


def environment(**variables):
    """Give the environment without what steers klfast, and with `variables`."""
    kept = {name: value for name, value in os.environ.items() if name not in THREAD_VARIABLES}
    paths = [str(Path(__file__).parent), kept.get("PYTHONPATH", "")]
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | variables


# A job in the background of a script inherits an ignored SIGINT, and Python keeps it ignored.
CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"


def command(code, *arguments):
    """Give the command that runs `code`; warnings are errors, the source folder is not imported."""
    code = CTRL_C + textwrap.dedent(code)
    return [sys.executable, "-P", "-W", "error", "-c", code, *map(str, arguments)]


def attempt(code, *arguments, timeout=120, **variables):
    """Run `code` and give the finished process, whatever became of it."""
    return subprocess.run(
        command(code, *arguments),
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run(code, *arguments, timeout=120, **variables):
    """Run `code`, which must succeed, and give what it printed."""
    done = attempt(code, *arguments, timeout=timeout, **variables)
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout
