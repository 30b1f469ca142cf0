"""Metrics that compare generated scenes with the true surfaces, per object and for the whole scene.

This module implements `evaluate.ModalityMetrics` for scenes.

For each object, `POINTS` points are sampled uniformly from the generated mesh and from the true surface. The
seeds are fixed, so the same meshes give the same numbers. Lengths are in units of the scene's coordinate
frame. In these units, the longest side of a scene is about 2. Metrics "in place" assume that model and data
use the same coordinate frame. "Aligned" metrics are computed after rigid alignment (iterative closest point).
Either the whole scene or each object is aligned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from inlaid.evaluation.metrics import mesh
from inlaid.evaluation.metrics.metric import Metric
from inlaid.media import mesh_render, meshes
from inlaid.media.isosurface import BOUND
from inlaid.media.scene import GeneratedScene

if TYPE_CHECKING:
    from PIL import Image


HAS_GROUND_TRUTH = True
"""True because a scene's surfaces are its only correct output. Validation scenes are therefore the default
prompts."""

POINTS = 2048
"""Number of surface points sampled per object."""

NEAR = 0.1
"""Distance threshold of the F-score; the published evaluation of MIDI uses the same value."""

MATCH_F_SCORE = 0.8
"""Minimum F-score at which a scene counts as correct."""

MISSING_DISTANCE = 2 * BOUND * 3**0.5
"""Distance that is assigned to an object that was not generated: the diagonal of the scene's bounding box."""

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
"""Descriptions of the metrics that `measure` returns, in display order."""

_MISSING_OBJECT = {
    **dict.fromkeys(("f_score", "object_f", "iou", "box_iou"), 0.0),
    "chamfer": MISSING_DISTANCE,
    "off": MISSING_DISTANCE / 2,
}
"""Metric values of an object that was not generated."""


def measure(output: GeneratedScene, prompt: Any) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return all `METRICS` of a generated scene, and the metrics of each object by object name.

    Args:
        output: generated scene.
        prompt: evaluated prompt. Its attribute `images` is the validation example with the true scene.
    """
    truth = {one.label: one.surface for one in prompt.images.read().objects}
    targets = {n: _points(s, i) for i, (n, s) in enumerate(sorted(truth.items()))}
    sampled = {
        n: meshes.sample_surface(output.meshes[n], POINTS, seed=i) if n in output.meshes else None
        for i, n in enumerate(sorted(truth))
    }
    parts = {n: _object_metrics(sampled[n], targets[n]) for n in targets}
    means = {k: float(np.mean([p[k] for p in parts.values()])) for k in ("object_f", "iou", "box_iou", "off")}
    found = [d[:, :3] for d in sampled.values() if d is not None]
    if not found:
        scene = {"f_score": 0.0, "f_aligned": 0.0}
        scene |= {"chamfer": MISSING_DISTANCE, "chamfer_aligned": MISSING_DISTANCE}
        return {**scene, **means}, parts
    a, b = np.concatenate(found), np.concatenate([w[:, :3] for w in targets.values()])
    aligned = _aligned(a, b)
    scene = {
        "f_score": mesh.f_score(a, b, NEAR),
        "f_aligned": mesh.f_score(aligned, b, NEAR),
        "chamfer": mesh.chamfer(a, b),
        "chamfer_aligned": mesh.chamfer(aligned, b),
    }
    return {**scene, **means}, parts


def matches_prompt(metrics: Mapping[str, float]) -> bool:
    """Return True if the F-score of a scene is at least `MATCH_F_SCORE`."""
    return metrics["f_score"] >= MATCH_F_SCORE


def comparable(output: GeneratedScene) -> np.ndarray:
    """Return surface points (n, 3) of a generated scene, which `distance` compares."""
    found = [meshes.sample_surface(m, POINTS, seed=i)[:, :3] for i, m in enumerate(output.meshes.values())]
    return np.concatenate(found) if found else np.full((1, 3), MISSING_DISTANCE)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the difference of two point clouds: 1 - F-score, in [0, 1].

    The distance threshold of the F-score is a fifth of `NEAR`.
    """
    return 0.0 if np.array_equal(a, b) else 1 - mesh.f_score(a, b, NEAR / 5)


def preview(output: GeneratedScene) -> Image.Image:
    """Render a scene from several directions, side by side in one image."""
    from PIL import Image

    views = mesh_render.turntable(list(meshes.preview_meshes(output.meshes).values()), 5, 192)
    return Image.fromarray(np.concatenate(list(views), 1))


def _points(surface: np.ndarray, seed: int) -> np.ndarray:
    """Select `POINTS` random rows of a surface (n, 6). Each row is the position and normal of a point."""
    rng = np.random.default_rng(seed)
    return surface[rng.choice(len(surface), POINTS, replace=len(surface) < POINTS)]


def _aligned(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    transform = mesh.align(a, b)
    return a @ transform[:3, :3].T + transform[:3, 3]


def _object_metrics(output: np.ndarray | None, true: np.ndarray) -> dict[str, float]:
    """Return the metrics of one object.

    Args:
        output: generated surface (n, 6); None if the object was not generated.
        true: true surface (n, 6).
    """
    if output is None:
        return dict(_MISSING_OBJECT)
    a, b = output[:, :3], true[:, :3]
    boxes = [np.stack([p.min(0), p.max(0)]) for p in (a, b)]
    return {
        "f_score": mesh.f_score(a, b, NEAR),
        "chamfer": mesh.chamfer(a, b),
        "object_f": mesh.f_score(_aligned(a, b), b, NEAR),
        "iou": _overlap(output, true, boxes),
        "box_iou": mesh.box_iou(*boxes),
        "off": float(np.linalg.norm(boxes[0].mean(0) - boxes[1].mean(0))),
    }


def _overlap(a: np.ndarray, b: np.ndarray, boxes: list[np.ndarray], count: int = 8000) -> float:
    """Return the intersection over union of two volumes, estimated with `count` random points.

    `a` and `b` (n, 6) are points on the surfaces of the volumes: positions and normals. A random point is
    inside a volume if the normal of the nearest surface point faces away from it. `boxes` are the bounding
    boxes of both surfaces, (2, 3) each. The random points lie in the box around both.
    """
    from scipy.spatial import KDTree

    low, high = np.minimum(boxes[0][0], boxes[1][0]), np.maximum(boxes[0][1], boxes[1][1])
    positions = np.random.default_rng(0).uniform(low, high, (count, 3))
    inside = []
    for surface in (a, b):
        near = surface[KDTree(surface[:, :3]).query(positions)[1]]
        inside.append(((positions - near[:, :3]) * near[:, 3:]).sum(-1) < 0)
    union = (inside[0] | inside[1]).sum()
    return float((inside[0] & inside[1]).sum() / union) if union else 0.0
