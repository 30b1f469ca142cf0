"""How near made scenes are to the true surfaces: distances, volumes and places, of each object and in all.

Points are drawn evenly from meshes and surfaces, `POINTS` of each object, with fixed seeds: the same meshes
give the same numbers. Lengths are in units of the scene's frame, whose longest side is about 2. What is
measured in place needs the model's frame to be the data's; what is measured aligned forgives a rigid motion
(iterative closest points), of the whole scene or of each object.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from inlaid import mesh, scenes
from inlaid.evaluate.video import Metric

if TYPE_CHECKING:
    from PIL import Image

TRUTH = True
"""Scenes are measured against their own surfaces, so those that were held out are made."""

POINTS = 2048
"""Points of each object."""

NEAR = 0.1
"""Threshold of the F-score, as in the published evaluation."""

GOOD = 0.8
"""A scene whose F-score is at least this counts as right."""

NOWHERE = 2 * mesh.BOUND * 3**0.5
"""Distance that counts for an object of which nothing was made: the diagonal of the box."""

METRICS: Mapping[str, Metric] = {
    "f_score": Metric(
        "F-score", "F", f"within {NEAR:g}", 3, "higher",
        f"How much of the true scene is within {NEAR:g} of the made one, and the other way, in place.",
    ),
    "f_aligned": Metric(
        "F-score, aligned", "F al.", f"within {NEAR:g}", 3, "higher",
        "The same after a rigid motion of the whole scene onto the truth.",
    ),
    "chamfer": Metric(
        "Chamfer distance", "", "length", 3, "lower",
        "Mean distance from each point to the other scene, both ways added, in place.",
    ),
    "chamfer_aligned": Metric(
        "Chamfer distance, aligned", "", "length", 3, "lower", "The same after alignment."
    ),
    "object_f": Metric(
        "F-score of objects", "", f"within {NEAR:g}", 3, "higher",
        "Mean over objects, each aligned by itself: are the shapes right, wherever they stand?",
    ),
    "iou": Metric(
        "volume overlap", "IoU", "share", 3, "higher",
        "Intersection over union of the volumes of each object in place, the mean over objects.",
    ),
    "box_iou": Metric(
        "box overlap", "", "share", 3, "higher", "The same of their boxes."
    ),
    "off": Metric(
        "off centre", "off", "length", 3, "lower",
        "Distance between the middles of the made and the true box of each object, the mean over objects.",
    ),
}  # fmt: skip
"""What `gauge` gives, in the order in which it is shown."""

_EMPTY = {"f_score": 0.0, "chamfer": NOWHERE, "object_f": 0.0, "iou": 0.0, "box_iou": 0.0, "off": NOWHERE / 2}


def gauge(made: scenes.Made, prompt: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """All of `METRICS` of a scene, and of each of its objects those that make sense for one.

    Args:
        made: what was drawn.
        prompt: its `images` are the scene that it was drawn from.
    """
    truth = {f"object_{one.number}": one.surface for one in prompt.images.read().objects}
    whole = {n: _points(s, i) for i, (n, s) in enumerate(sorted(truth.items()))}
    drawn = {
        n: mesh.sample_surface(made.meshes[n], POINTS, seed=i) if n in made.meshes else None
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
    """Whether a scene counts as made as it was shown."""
    return metrics["f_score"] >= GOOD


def keep(made: scenes.Made) -> np.ndarray:
    """What the difference of two made scenes is measured on: points (n, 3)."""
    found = [mesh.sample_surface(m, POINTS, seed=i)[:, :3] for i, m in enumerate(made.meshes.values())]
    return np.concatenate(found) if found else np.full((1, 3), NOWHERE)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Share of two surfaces that is not near the other one, in [0, 1]."""
    return 0.0 if np.array_equal(a, b) else 1 - mesh.f_score(a, b, NEAR / 5)


def picture(made: scenes.Made) -> Image.Image:
    """A turntable in a row."""
    from PIL import Image

    views = mesh.turntable(list(made.meshes.values()), 5, 192)
    return Image.fromarray(np.concatenate(list(views), 1))


def _points(surface: np.ndarray, seed: int) -> np.ndarray:
    """So many of a surface's points (n, 6)."""
    rng = np.random.default_rng(seed)
    return surface[rng.choice(len(surface), POINTS, replace=len(surface) < POINTS)]


def _moved(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    turn = mesh.align(a, b)
    return a @ turn[:3, :3].T + turn[:3, 3]


def _object(made: np.ndarray | None, true: np.ndarray) -> dict[str, float]:
    """Of one object (n, 6), made and true."""
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
    """Intersection over union of two volumes: a point is inside where the nearest normal points away."""
    from scipy.spatial import KDTree

    low, high = np.minimum(boxes[0][0], boxes[1][0]), np.maximum(boxes[0][1], boxes[1][1])
    places = np.random.default_rng(0).uniform(low, high, (count, 3))
    inside = []
    for surface in (a, b):
        near = surface[KDTree(surface[:, :3]).query(places)[1]]
        inside.append(((places - near[:, :3]) * near[:, 3:]).sum(-1) < 0)
    union = (inside[0] | inside[1]).sum()
    return float((inside[0] & inside[1]).sum() / union) if union else 0.0
