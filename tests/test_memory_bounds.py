"""No vector tail reads beyond the end of an array, nor before its beginning."""

import subprocess
import sys

import klfast
import pytest

import fresh
import guarded
from registry import ENTRIES

SAME_KERNEL = ("-sparse", "-counts", "-totals", "-masked")  # other values, the same reads
KERNELS = [entry for entry in ENTRIES if not entry.id.endswith(SAME_KERNEL)]


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
@pytest.mark.parametrize("entry", KERNELS, ids=lambda e: e.id)
@pytest.mark.parametrize("isa", klfast.config.describe()["isa_available"])
def test_no_access_out_of_bounds(entry, isa):
    done = subprocess.run(
        [sys.executable, guarded.__file__, entry.id, isa],
        env=fresh.environment(KLFAST_ISA=isa),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    last = done.stdout.splitlines()[-1:]
    assert done.returncode == 0, f"exit {done.returncode} at {last}\n{done.stderr}"
