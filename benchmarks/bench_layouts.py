"""klfast against itself on other layouts of the same rows, and one small call against np.vecdot."""

import pytest

from contrasts import CONTRASTS
from suite import THREADS

CASES = [
    pytest.param(contrast, side, n, id=f"{contrast.name}-{side}-{n}")
    for contrast in CONTRASTS
    for n in THREADS
    for side in contrast.sides
    if n == 1 or contrast.large
]


@pytest.mark.parametrize(("contrast", "side", "threads"), CASES)
def test_layout(contrast, side, threads, contrasted):
    contrasted(contrast, side, threads)
