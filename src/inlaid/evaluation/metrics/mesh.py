"""Mesh metrics: chamfer distance, F-score, IoU of bounding boxes, and rigid alignment."""

from __future__ import annotations

import numpy as np


def chamfer(a: np.ndarray, b: np.ndarray) -> float:
    """Return the chamfer distance of two point sets (n, 3).

    It is the mean distance from a point of one set to the other set, summed over both directions.
    """
    from scipy.spatial import KDTree

    return float(KDTree(b).query(a)[0].mean() + KDTree(a).query(b)[0].mean())


def f_score(a: np.ndarray, b: np.ndarray, threshold: float) -> float:
    """Return the F-score of two point sets (n, 3): the harmonic mean of precision and recall.

    Precision is the share of points in `a` that are within the distance `threshold` of `b`. Recall is the
    share of points in `b` that are within this distance of `a`.
    """
    from scipy.spatial import KDTree

    precision = float((KDTree(b).query(a)[0] <= threshold).mean())
    recall = float((KDTree(a).query(b)[0] <= threshold).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two axis-aligned boxes.

    A box (2, 3) consists of its lowest and its highest corner.
    """
    overlap = float(np.prod((np.minimum(a[1], b[1]) - np.maximum(a[0], b[0])).clip(0)))
    union = float(np.prod(a[1] - a[0]) + np.prod(b[1] - b[0])) - overlap
    return overlap / union if union else 0.0


def align(source: np.ndarray, target: np.ndarray, steps: int = 50) -> np.ndarray:
    """Return the rigid transform (4, 4) that aligns the points `source` with the points `target`.

    The method is iterative closest point (Besl & McKay 1992).
    """
    from trimesh.registration import icp

    return icp(source, target, threshold=1e-12, max_iterations=steps, reflection=False, scale=False)[0]
