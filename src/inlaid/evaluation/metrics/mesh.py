"""Mesh metrics: chamfer distance, F-score, box IoU, alignment."""

from __future__ import annotations

import numpy as np


def chamfer(a: np.ndarray, b: np.ndarray) -> float:
    """Return the sum of the mean distances from each point set (n, 3) to the other."""
    from scipy.spatial import KDTree

    return float(KDTree(b).query(a)[0].mean() + KDTree(a).query(b)[0].mean())


def f_score(a: np.ndarray, b: np.ndarray, threshold: float) -> float:
    """Return the F-score of point sets (n, 3): the harmonic mean of precision and recall.

    Precision is the share of `a` within the distance `threshold` of `b`, recall the share of `b` near `a`.
    """
    from scipy.spatial import KDTree

    precision = float((KDTree(b).query(a)[0] <= threshold).mean())
    recall = float((KDTree(a).query(b)[0] <= threshold).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two axis-aligned boxes (2, 3): lowest and highest corner."""
    overlap = float(np.prod((np.minimum(a[1], b[1]) - np.maximum(a[0], b[0])).clip(0)))
    union = float(np.prod(a[1] - a[0]) + np.prod(b[1] - b[0])) - overlap
    return overlap / union if union else 0.0


def align(source: np.ndarray, target: np.ndarray, steps: int = 50) -> np.ndarray:
    """Return the rigid transform (4, 4) that aligns points `source` with `target`.

    Method: iterative closest point (Besl & McKay 1992).
    """
    from trimesh.registration import icp

    return icp(source, target, threshold=1e-12, max_iterations=steps, reflection=False, scale=False)[0]
