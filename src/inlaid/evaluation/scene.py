"""Metrics of generated scenes against the true surfaces, per object and overall.

`POINTS` points per object are sampled uniformly from meshes and surfaces with fixed seeds, so the same meshes
give the same numbers. Lengths are in units of the scene's coordinate frame, whose longest side is about 2.
Metrics "in place" assume that model and data share a coordinate frame; "aligned" metrics first remove a rigid
motion (iterative closest points) of the whole scene or of each object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from inlaid.evaluation.metrics import mesh
from inlaid.evaluation.metrics.metric import Metric
from inlaid.media import mesh_render, meshes
from inlaid.media.meshes import BOUND
from inlaid.media.scene import GeneratedScene

if TYPE_CHECKING:
    from PIL import Image


TRUTH = True
"""Each scene has a ground truth, its surfaces, so validation scenes are generated."""

POINTS = 2048
"""Points sampled per object."""

NEAR = 0.1
"""Threshold of the F-score, as in the published evaluation."""

GOOD = 0.8
"""Smallest F-score of a scene that counts as correct."""

NOWHERE = 2 * BOUND * 3**0.5
"""Distance assigned to an object that was not generated: the diagonal of the bounding box."""

METRICS: Mapping[str, Metric] = {
    "f_score": Metric(
        "F-score", "F", f"within {NEAR:g}", 3, "higher",
        f"Share of the true surface within {NEAR:g} of the generated one, and the reverse, in place.",
    ),
    "f_aligned": Metric(
        "F-score, aligned", "F al.", f"within {NEAR:g}", 3, "higher",
        "F-score after rigid alignment of the whole scene to the ground truth.",
    ),
    "chamfer": Metric(
        "Chamfer distance", "", "length", 3, "lower",
        "Mean distance from each point to the other scene, summed over both directions, in place.",
    ),
    "chamfer_aligned": Metric(
        "Chamfer distance, aligned", "", "length", 3, "lower", "Chamfer distance after alignment."
    ),
    "object_f": Metric(
        "F-score of objects", "", f"within {NEAR:g}", 3, "higher",
        "Mean over objects, each aligned separately: correctness of shapes, regardless of position.",
    ),
    "iou": Metric(
        "volume overlap", "IoU", "share", 3, "higher",
        "Intersection over union of the volumes of each object in place, averaged over objects.",
    ),
    "box_iou": Metric(
        "box overlap", "", "share", 3, "higher",
        "Intersection over union of the bounding boxes, averaged over objects.",
    ),
    "off": Metric(
        "center offset", "off", "length", 3, "lower",
        "Distance between the centers of the generated and the true box, averaged over objects.",
    ),
}  # fmt: skip
"""Metrics returned by `gauge`, in display order."""

_EMPTY = {"f_score": 0.0, "chamfer": NOWHERE, "object_f": 0.0, "iou": 0.0, "box_iou": 0.0, "off": NOWHERE / 2}


def gauge(made: GeneratedScene, prompt: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return all of `METRICS` of a scene, and the metrics of each object.

    Args:
        made: generated scene.
        prompt: prompt whose `images` is the source scene.
    """
    truth = {f"object_{one.number}": one.surface for one in prompt.images.read().objects}
    whole = {n: _points(s, i) for i, (n, s) in enumerate(sorted(truth.items()))}
    drawn = {
        n: meshes.sample_surface(made.meshes[n], POINTS, seed=i) if n in made.meshes else None
        for i, n in enumerate(sorted(truth))
    }
    parts = {n: _object(drawn[n], whole[n]) for n in whole}
    means = {k: float(np.mean([p[k] for p in parts.values()])) for k in ("object_f", "iou", "box_iou", "off")}
    there = [d[:, :3] for d in drawn.values() if d is not None]
    if not there:
        nothing = {"f_score": 0.0, "f_aligned": 0.0, "chamfer": NOWHERE, "chamfer_aligned": NOWHERE}
        return {**nothing, **means}, parts
    a, b = np.concatenate(there), np.concatenate([w[:, :3] for w in whole.values()])
    moved = _moved(a, b)
    scene = {
        "f_score": mesh.f_score(a, b, NEAR),
        "f_aligned": mesh.f_score(moved, b, NEAR),
        "chamfer": mesh.chamfer(a, b),
        "chamfer_aligned": mesh.chamfer(moved, b),
    }
    return {**scene, **means}, parts


def right(metrics: Mapping[str, float]) -> bool:
    """Return True if a scene counts as correct, see `GOOD`."""
    return metrics["f_score"] >= GOOD


def keep(made: GeneratedScene) -> np.ndarray:
    """Return the points (n, 3) on which the difference of two generated scenes is measured."""
    found = [meshes.sample_surface(m, POINTS, seed=i)[:, :3] for i, m in enumerate(made.meshes.values())]
    return np.concatenate(found) if found else np.full((1, 3), NOWHERE)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of both surfaces that is not close to the other surface, in [0, 1]."""
    return 0.0 if np.array_equal(a, b) else 1 - mesh.f_score(a, b, NEAR / 5)


def picture(made: GeneratedScene) -> Image.Image:
    """Render turntable views in a row."""
    from PIL import Image

    views = mesh_render.turntable(list(made.meshes.values()), 5, 192)
    return Image.fromarray(np.concatenate(list(views), 1))


def _points(surface: np.ndarray, seed: int) -> np.ndarray:
    """Sample `POINTS` points of a surface (n, 6)."""
    rng = np.random.default_rng(seed)
    return surface[rng.choice(len(surface), POINTS, replace=len(surface) < POINTS)]


def _moved(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    turn = mesh.align(a, b)
    return a @ turn[:3, :3].T + turn[:3, 3]


def _object(made: np.ndarray | None, true: np.ndarray) -> dict[str, float]:
    """Return the metrics of one object, given generated and true surfaces (n, 6)."""
    if made is None:
        return dict(_EMPTY)
    a, b = made[:, :3], true[:, :3]
    boxes = [np.stack([p.min(0), p.max(0)]) for p in (a, b)]
    return {
        "f_score": mesh.f_score(a, b, NEAR),
        "chamfer": mesh.chamfer(a, b),
        "object_f": mesh.f_score(_moved(a, b), b, NEAR),
        "iou": _overlap(made, true, boxes),
        "box_iou": mesh.box_iou(*boxes),
        "off": float(np.linalg.norm(boxes[0].mean(0) - boxes[1].mean(0))),
    }


def _overlap(a: np.ndarray, b: np.ndarray, boxes: list[np.ndarray], count: int = 8000) -> float:
    """Return the intersection over union of two volumes.

    A point is inside a volume if the normal of the nearest surface point faces away from it.
    """
    from scipy.spatial import KDTree

    low, high = np.minimum(boxes[0][0], boxes[1][0]), np.maximum(boxes[0][1], boxes[1][1])
    places = np.random.default_rng(0).uniform(low, high, (count, 3))
    inside = []
    for surface in (a, b):
        near = surface[KDTree(surface[:, :3]).query(places)[1]]
        inside.append(((places - near[:, :3]) * near[:, 3:]).sum(-1) < 0)
    union = (inside[0] | inside[1]).sum()
    return float((inside[0] & inside[1]).sum() / union) if union else 0.0
