"""A slow search: one state, one rotated chunk, one product at a time."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def rho(config, n, retrieved, i):
    """Eq. 6, in exact fractions."""
    if config.positions == "none":
        return 0.0
    if config.positions == "absolute":
        return float(i)
    before = sorted(b for b in retrieved if b <= i)
    start = before[-1] if before else 0
    end = min((b for b in retrieved if b > i), default=n)
    divisor = max(end - start - config.position_endpoint, 1)
    exact = len(before) * Fraction(config.position_step)
    exact += Fraction(config.position_span) * (i - start) / divisor
    return float(int(exact)) if config.truncate_positions else float(exact)


def rotated(vector, position, base):
    """Each half on its own, pairs (2m, 2m+1) by ρ · base^(-2m / (d/2))."""
    half = len(vector) // 2
    result = np.empty(len(vector))
    for start in (0, half):
        for m in range(half // 2):
            angle = position * base ** (-2 * m / half)
            x, y = vector[start + 2 * m], vector[start + 2 * m + 1]
            result[start + 2 * m] = x * np.cos(angle) - y * np.sin(angle)
            result[start + 2 * m + 1] = x * np.sin(angle) + y * np.cos(angle)
    return result


def slow_q(model, texts, query, retrieved):
    """Q and ρ of every chunk in one state; chunks are numbered as in ``texts``."""
    config = model.config
    order = sorted(retrieved) if config.state_order == "document" else retrieved
    state = model.encode_states([(query, [texts[b] for b in order])])[0].astype(float)
    actions = model.encode_actions(texts).astype(float)
    places = [rho(config, len(texts), retrieved, i) for i in range(len(texts))]
    rotations = [
        rotated(a, place, config.rotary_base) for a, place in zip(actions, places, strict=True)
    ]
    return np.array([state @ vector for vector in rotations]), places


def slow_search(model, texts, query, k, *, excluded=(), chunks_per_step=1):
    """Greedy search: (number, Q, ρ) of what is taken."""
    taken: list[tuple[int, float, float]] = []
    while len(taken) < k:
        retrieved = [number for number, _, _ in taken]
        free = [i for i in range(len(texts)) if i not in retrieved and i not in excluded]
        if not free:
            break
        q, places = slow_q(model, texts, query, retrieved)
        free.sort(key=lambda i: -q[i])
        taken += [(i, q[i], places[i]) for i in free[: min(chunks_per_step, k - len(taken))]]
    return taken
