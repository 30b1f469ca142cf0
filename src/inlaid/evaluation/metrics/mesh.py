"""Mesh metrics: chamfer distance, F-score, IoU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import trimesh


# --- comparing ----------------------------------------------------------------------------------------------


def chamfer(a: np.ndarray, b: np.ndarray) -> float:
    """Return the sum of the mean distances from each point set (n, 3) to the other."""
    from scipy.spatial import KDTree

    return float(KDTree(b).query(a)[0].mean() + KDTree(a).query(b)[0].mean())


def f_score(a: np.ndarray, b: np.ndarray, threshold: float) -> float:
    """Return the harmonic mean of both shares of points within `threshold` of the other set."""
    from scipy.spatial import KDTree

    precision = float((KDTree(b).query(a)[0] <= threshold).mean())
    recall = float((KDTree(a).query(b)[0] <= threshold).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two axis-aligned boxes, as bounds (2, 3)."""
    overlap = float(np.prod((np.minimum(a[1], b[1]) - np.maximum(a[0], b[0])).clip(0)))
    union = float(np.prod(a[1] - a[0]) + np.prod(b[1] - b[0])) - overlap
    return overlap / union if union else 0.0


def volume_iou(a: trimesh.Trimesh, b: trimesh.Trimesh, *, points: int = 20_000, seed: int = 0) -> float:
    """Return the intersection over union of two watertight volumes, by random points of their common box."""
    low = np.minimum(a.bounds[0], b.bounds[0])
    high = np.maximum(a.bounds[1], b.bounds[1])
    places = np.random.default_rng(seed).uniform(low, high, (points, 3))
    inside = [m.contains(places) for m in (a, b)]
    union = (inside[0] | inside[1]).sum()
    return float((inside[0] & inside[1]).sum() / union) if union else 0.0


def align(source: np.ndarray, target: np.ndarray, steps: int = 50) -> np.ndarray:
    """Return the rigid transform (4, 4) that aligns points: iterative closest point (Besl & McKay 1992)."""
    from scipy.spatial import KDTree

    tree, moved, total = KDTree(target), source.copy(), np.eye(4)
    for _ in range(steps):
        nearest = target[tree.query(moved)[1]]
        middle = moved.mean(0), nearest.mean(0)
        u, _, v = np.linalg.svd((moved - middle[0]).T @ (nearest - middle[1]))
        turn = (u @ np.diag([1, 1, np.sign(np.linalg.det(u @ v))]) @ v).T
        step = np.eye(4)
        step[:3, :3], step[:3, 3] = turn, middle[1] - turn @ middle[0]
        moved, total = moved @ turn.T + step[:3, 3], step @ total
        if np.abs(step - np.eye(4)).max() < 1e-6:
            break
    return total
