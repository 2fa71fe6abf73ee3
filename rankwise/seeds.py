"""Random draws that depend on a seed and a purpose, never on the order in which they are made."""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for (seed, purpose...): equal inputs, equal draws, on every machine."""
    text = "\x1f".join([str(seed), *(str(p) for p in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return NumPy's PCG64 generator for (seed, purpose...)."""
    return np.random.Generator(np.random.PCG64(derive(seed, *purpose)))
