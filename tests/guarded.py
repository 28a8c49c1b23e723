"""Arrays that end right before a protected page, or begin right after one (run in a subprocess)."""

from __future__ import annotations

import ctypes
import mmap
import sys

import klfast
import numpy as np

from registry import IDS

PAGE = mmap.PAGESIZE
COLUMNS = [(3, 40), (129, 40), (145, 7), (160, 17), (181, 130), (300, 33)]  # length, number


class Region:
    """Some pages of memory between two that nobody may touch."""

    def __init__(self, pages):
        self.size = pages * PAGE
        self.memory = mmap.mmap(-1, self.size + 2 * PAGE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + PAGE
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for address in (self.start - PAGE, self.start + self.size):
            if protect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 0):
                raise OSError(ctypes.get_errno(), "mprotect")

    def place(self, a, step, at_end):
        """Copy `a` to where its last element ends, or its first begins, at the protected page.

        `step` is the distance of neighbours along the last axis in elements; negative to go back.
        """
        strides = [a.itemsize * abs(step)]
        for n in a.shape[:0:-1]:
            strides.insert(0, strides[0] * n)
        extent = sum((n - 1) * s for n, s in zip(a.shape, strides, strict=True)) + a.itemsize
        assert extent <= self.size, (a.shape, step)
        start = self.start + (self.size - extent if at_end else 0)
        raw = (ctypes.c_char * extent).from_address(start)
        view = np.ndarray(a.shape, a.dtype, raw, 0, strides)
        view = view[..., ::-1] if step < 0 else view
        view[...] = a
        return view


def forms(entry, dtype, batch, size):
    """Give the arguments of one entry, and for factors the covariances, too."""
    arrays = {
        name: (np.clip(a, 0.01, 1000) if name in "pq" else a).astype(dtype)
        for name, a in entry.inputs("float32", batch, size).items()
    }
    yield arrays
    if entry.core == 2:
        yield {
            name.replace("scale_tril", "cov"): a
            if name.startswith("loc")
            else (a.astype(float) @ a.astype(float).swapaxes(-1, -2)).astype(dtype)
            for name, a in arrays.items()
        }


def call_at_the_edge(entry, arrays, regions, **options):
    """Call one entry with all its arrays at the edge, for every stride and side."""
    want = entry(arrays, **options)
    for step in (1, -2):
        for at_end in (True, False):
            print(*arrays, want.dtype, *map(np.shape, arrays.values()), step, at_end, flush=True)
            placed = {
                name: region.place(a, step, at_end)
                for region, (name, a) in zip(regions, arrays.items(), strict=False)
            }
            np.testing.assert_allclose(entry(placed, **options), want, rtol=3e-5, atol=1e-30)


def run(entry_id, sizes, dtypes):
    """Call one entry for every size and dtype, rows and columns."""
    entry = IDS[entry_id]
    regions = [Region(256 if entry.core == 2 else 512) for _ in range(4)]
    for dtype in dtypes:
        for size in sizes:
            for batch in [(), (9,)]:
                for arrays in forms(entry, dtype, batch, size):
                    call_at_the_edge(entry, arrays, regions)
        for size, width in COLUMNS if entry.core == 1 else []:
            arrays = next(forms(entry, dtype, (width,), size))
            columns = {name: a.T if a.ndim == 2 else a for name, a in arrays.items()}
            call_at_the_edge(entry, columns, regions, axis=0)


if __name__ == "__main__":
    import ml_dtypes

    entry_id, isa = sys.argv[1:]
    assert klfast.config.describe()["isa"] == isa
    size_limit = 70 if IDS[entry_id].core == 2 else 1000
    dtypes = [np.float64, np.float32]
    if IDS[entry_id].core == 1:
        dtypes += [np.float16, ml_dtypes.bfloat16]
    run(
        entry_id,
        [size for size in [*range(1, 71), 127, 255, 257, 1000] if size <= size_limit],
        dtypes,
    )
