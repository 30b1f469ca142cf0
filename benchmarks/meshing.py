"""Compare ways to extract the mesh of an object from its field: quality, evaluations, time and memory.

    python benchmarks/meshing.py [--points 13000]

Each way extracts a ball whose true surface is known, of the radius 0.12 or 0.9 in the box of side 2.01:

- `whole box`: a grid of 256 cells over the whole box, refined near the surface. inlaid did this before.
- `dense, own box`: every point of a grid of 256 cells in the object's own box, after a dense pass over the
  whole box. The published program of MIDI-3D does this.
- `own box`: `inlaid.media.isosurface.extract`, with 256 cells (MIDI-3D) and 512 (TripoSG).

The chamfer distance is that of `inlaid evaluate`, between random points of the mesh and of the true ball; the
floor is the distance between two sets of random points of the true ball. The last column estimates the time
of the evaluations by a shape VAE of the published size on this machine, with random weights. Writes
`benchmarks/results/meshing.json` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from scipy.ndimage import binary_dilation, zoom
from skimage.measure import marching_cubes

from inlaid.evaluation.metrics.mesh import chamfer
from inlaid.media.isosurface import BOUND, MARGIN, extract
from inlaid.media.meshes import sample_surface
from inlaid.networks.triposg import Field, TripoSGVAE

RESULTS = Path(__file__).parent / "results"

Shape = Callable[[np.ndarray], np.ndarray]


def dense(field: Shape, cells: int) -> trimesh.Trimesh:
    """Extract with two dense grids of `cells`: of the whole box, then of the object's own box."""
    low, high = np.full(3, -BOUND), np.full(3, BOUND)
    for _ in range(2):
        index = np.indices((cells + 1,) * 3).reshape(3, -1).T
        places = low + index / cells * (high - low)
        values = np.concatenate([field(part) for part in np.array_split(places, 64)])
        box, low, high = (
            (low, high),
            *(
                end + pad
                for end, pad in zip(
                    (places[values < 0].min(0), places[values < 0].max(0)), (-MARGIN, MARGIN), strict=True
                )
            ),
        )
    found: Any = marching_cubes(values.reshape((cells + 1,) * 3), 0.0)
    return trimesh.Trimesh(box[0] + found[0] / cells * (box[1] - box[0]), found[1])


def whole_box(field: Shape, cells: int, coarse: int = 64) -> trimesh.Trimesh:
    """Extract from one grid of `cells` over the whole box, evaluated near the surface only."""

    def places(index: np.ndarray, n: int) -> np.ndarray:
        return (index / n * 2 - 1) * BOUND

    n = coarse
    values = field(places(np.indices((n + 1,) * 3).reshape(3, -1).T, n)).reshape((n + 1,) * 3)
    while n < cells:
        inside, near = values < 0, np.zeros(values.shape, bool)
        for axis in range(3):
            differ = np.diff(inside, axis=axis)
            np.moveaxis(near, axis, 0)[:-1] |= np.moveaxis(differ, axis, 0)
            np.moveaxis(near, axis, 0)[1:] |= np.moveaxis(differ, axis, 0)
        near = binary_dilation(near, np.ones((3, 3, 3)))
        fine = np.asarray(zoom(values, (2 * n + 1) / (n + 1), order=1, grid_mode=False))
        ask = np.zeros(fine.shape, bool)
        ask[::2, ::2, ::2] = near
        ask = binary_dilation(ask, np.ones((3, 3, 3)))
        fine[ask] = field(places(np.argwhere(ask), 2 * n))
        values, n = fine, 2 * n
    found: Any = marching_cubes(values, 0.0)
    return trimesh.Trimesh(places(found[0], n), found[1])


def own_box(field: Shape, cells: int) -> trimesh.Trimesh:
    """Extract as the product does."""
    found, _ = extract(field, resolution=cells)
    assert found is not None
    return found


def seconds_per_million(points: int = 4096) -> float:
    """Return the seconds in which a published-size decoder evaluates a million points on this machine."""
    vae = TripoSGVAE().eval().requires_grad_(False)
    field = Field(vae, torch.randn(2048, 64, generator=torch.Generator().manual_seed(0)))
    places = np.random.default_rng(0).uniform(-1, 1, (points, 3))
    field(places[:256])
    start = time.perf_counter()
    field(places)
    return (time.perf_counter() - start) * 1e6 / points


def main() -> None:
    """Measure every way on every ball, print the table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=13_000)
    args = parser.parse_args()
    rate = seconds_per_million()
    ways = [
        ("whole box", whole_box, 256),
        ("dense, own box", dense, 256),
        ("own box", own_box, 256),
        ("own box", own_box, 512),
    ]
    rows = []
    for radius in (0.12, 0.9):
        true, other = (ball_points(radius, args.points, seed) for seed in (0, 1))
        floor = chamfer(true, other)
        print(f"ball of radius {radius:g}: floor {floor:.4f}")
        for name, way, cells in ways:
            asked = [0]

            def field(points: np.ndarray, radius: float = radius, asked: list[int] = asked) -> np.ndarray:
                asked[0] += len(points)
                return (np.linalg.norm(points, axis=-1) - radius).astype(np.float32)

            start = time.process_time()
            mesh = way(field, cells)
            seconds, count = time.process_time() - start, asked[0]
            tracemalloc.start()
            way(field, cells)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            rows.append(
                {
                    "radius": radius,
                    "way": name,
                    "cells": cells,
                    "chamfer": round(chamfer(sample_surface(mesh, args.points)[:, :3], true), 5),
                    "floor": round(floor, 5),
                    "farthest_vertex": float(
                        f"{np.abs(np.linalg.norm(mesh.vertices, axis=-1) - radius).max():.2g}"
                    ),
                    "triangles": len(mesh.faces),
                    "watertight": bool(mesh.is_watertight),
                    "evaluations": count,
                    "cpu_seconds": round(seconds, 2),
                    "peak_mb": round(peak / 1e6),
                    "decoder_seconds": round(rate * count / 1e6),
                }
            )
            print("  " + ", ".join(f"{k} {v}" for k, v in rows[-1].items() if k not in ("radius", "floor")))
    about = {
        "points": args.points,
        "decoder_seconds_per_million": round(rate),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "meshing.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", "utf-8")


def ball_points(radius: float, count: int, seed: int) -> np.ndarray:
    """Return random points (count, 3) on a ball."""
    points = np.random.default_rng(seed).normal(size=(count, 3))
    return radius * points / np.linalg.norm(points, axis=-1, keepdims=True)


if __name__ == "__main__":
    main()
