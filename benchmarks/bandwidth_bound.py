"""Runs one pass of Adamax in C on all CPU cores, and a copy, to measure the memory bound.

The system's C compiler compiles both loops when the benchmark runs.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = """
#include <math.h>
#include <stddef.h>
void adamax(float *restrict p, float *restrict m, float *restrict v, const float *restrict g,
            size_t n, float b1, float b2, float eps, float rate) {
    for (size_t i = 0; i < n; i++) {
        float size = fabsf(g[i]) + eps, old = b2 * v[i];
        m[i] = b1 * m[i] + (1 - b1) * g[i];
        v[i] = size > old ? size : old;
        p[i] -= rate * m[i] / v[i];
    }
}
void copy(float *restrict to, const float *restrict from, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = from[i];
}
"""
FLAGS = ["-O3", "-march=native", "-ffinite-math-only", "-fno-trapping-math"]
STREAMS = 7  # read p, m, v, g; write p, m, v


class MemoryBound:
    """Runs both loops on its own arrays; raises RuntimeError if they cannot be compiled."""

    def __init__(self, size: int):
        compiler = shutil.which("cc")
        if compiler is None:
            raise RuntimeError("no C compiler was found")
        with tempfile.TemporaryDirectory() as folder:
            library, source = Path(folder) / "bound.so", Path(folder) / "bound.c"
            source.write_text(SOURCE)
            command = [compiler, *FLAGS, "-shared", "-fPIC", "-o", str(library), str(source), "-lm"]
            made = subprocess.run(command, capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(f"the C compiler failed: {made.stderr.strip()[:200]}")
            self._code = ctypes.CDLL(str(library))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self._pool = ThreadPoolExecutor(cores)
        edges = np.linspace(0, size, (cores or 1) + 1).astype(int).tolist()
        self._parts = list(itertools.pairwise(edges))
        self._arrays = [np.full(size, value, np.float32) for value in (1.0, 0.0, 0.0, 0.01)]

    def adamax(self) -> None:
        """Runs one step on all cores."""
        scalars = [ctypes.c_float(x) for x in (0.9, 0.999, 1e-8, 1e-3)]
        self._on_all_cores(self._code.adamax, self._arrays, scalars)

    def copy(self) -> None:
        """Copies one array to another."""
        self._on_all_cores(self._code.copy, [self._arrays[1], self._arrays[3]], [])

    def _on_all_cores(self, code: Any, arrays: list[np.ndarray], scalars: list[Any]) -> None:
        def run(part: tuple[int, int]) -> None:  # ctypes releases the GIL during a call
            start, end = part
            starts = (ctypes.c_void_p(array[start:].ctypes.data) for array in arrays)
            code(*starts, ctypes.c_size_t(end - start), *scalars)

        list(self._pool.map(run, self._parts))
