"""Meshes of fields whose surface is known: exact, closed, at the resolution of the object, and affordable."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

trimesh = pytest.importorskip("trimesh")
measure = pytest.importorskip("skimage.measure")

from inlaid.evaluation.metrics.mesh import chamfer
from inlaid.media import isosurface
from inlaid.media.isosurface import BOUND, MARGIN, REACH, extract
from inlaid.media.meshes import mesh_problems, sample_surface

Shape = Callable[[np.ndarray], np.ndarray]


def ball(center: tuple[float, float, float] = (0.0, 0.0, 0.0), radius: float = 0.5) -> Shape:
    return lambda points: np.linalg.norm(points - np.array(center), axis=-1) - radius


def box(half: tuple[float, float, float], center: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Shape:
    def field(points: np.ndarray) -> np.ndarray:
        beyond = np.abs(points - np.array(center)) - np.array(half)
        return np.linalg.norm(beyond.clip(0), axis=-1) + beyond.max(-1).clip(max=0)

    return field


def rod(radius: float, x: float, z: float) -> Shape:
    return lambda p: np.maximum(np.hypot(p[:, 0] - x, p[:, 2] - z) - radius, np.abs(p[:, 1]) - 0.5)


def union(*shapes: Shape) -> Shape:
    return lambda points: np.min([shape(points) for shape in shapes], axis=0)


def counted(field: Shape) -> tuple[Shape, list[int]]:
    asked: list[int] = []

    def seen(points: np.ndarray) -> np.ndarray:
        asked.append(len(points))
        return field(points)

    return seen, asked


def dense(field: Shape, low: np.ndarray, high: np.ndarray, cells: int) -> trimesh.Trimesh:
    """The mesh of a dense grid, which the published pipelines evaluate."""
    index = np.indices((cells + 1,) * 3).reshape(3, -1).T
    values = field(low + index / cells * (high - low)).reshape((cells + 1,) * 3)
    vertices, faces = measure.marching_cubes(values, 0.0)[:2]
    return trimesh.Trimesh(low + vertices / cells * (high - low), faces)


@pytest.mark.parametrize("radius", [0.06, 0.2, 0.7])
def test_it_is_the_mesh_of_a_dense_grid_in_the_own_box(radius: float) -> None:
    center = np.array([0.2, -0.1, 0.3])
    field, asked = counted(ball(tuple(center), radius))
    found, note = extract(field, resolution=64)
    assert sum(asked[1:]) < 0.4 * 65**3, "after the coarse grid, a fraction of the fine one"
    assert found is not None and note == "" and mesh_problems(found) == []
    cell = (2 * radius + 2 * MARGIN) / 64
    off = np.linalg.norm(found.vertices - center, axis=-1) - radius
    assert np.abs(off).max() < 0.25 * cell**2 / radius, "dividing by the number of points would show here"
    assert found.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.01)
    assert ((found.triangles_center - center) * found.face_normals).sum(-1).min() > 0.9 * radius, "outward"
    whole = dense(field, center - radius - MARGIN, center + radius + MARGIN, 64)
    assert len(found.faces) == pytest.approx(len(whole.faces), rel=0.1)


def test_vertices_are_those_of_marching_cubes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of faces that could be connected in two ways, and where the field is exactly zero."""
    values = np.random.default_rng(0).normal(size=(9, 9, 9))
    values[2, 3, 4] = 0.0
    from scipy.interpolate import RegularGridInterpolator

    line = np.linspace(-1, 1, 9)
    field = RegularGridInterpolator((line,) * 3, values, bounds_error=False, fill_value=3.0)
    samples = isosurface._Samples(field, np.full(3, -1.0), np.full(3, 1.0), 8)
    cells = samples.follow(np.indices((8, 8, 8)).reshape(3, -1).T)
    ours = trimesh.Trimesh(*isosurface._triangles(samples, cells), process=False)
    theirs = dense(field, np.full(3, -1.0), np.full(3, 1.0), 8)
    assert len(ours.faces) == pytest.approx(len(theirs.faces), abs=8)
    assert chamfer(ours.vertices, theirs.vertices) < 1e-3
    inner = trimesh.grouping.group_rows(ours.edges_sorted, require_count=1)
    side = np.abs(ours.vertices[ours.edges_sorted[inner]]).max(-1)
    assert np.allclose(side, 1.0), "open only at the sides of the grid"


@pytest.mark.slow
def test_a_small_object_at_the_default_setting() -> None:
    """Must be as good as the sampling of 13,000 points can show, which is a chamfer distance of 0.0037."""
    found, _ = extract(ball(radius=0.12))
    assert found is not None
    true = np.random.default_rng(0).normal(size=(13_000, 3))
    true *= 0.12 / np.linalg.norm(true, axis=-1, keepdims=True)
    assert chamfer(sample_surface(found, 13_000)[:, :3], true) <= 0.0038
    own = dense(ball(radius=0.12), np.full(3, -0.17), np.full(3, 0.17), 256)
    assert len(own.faces) / 2 < len(found.faces) < 2 * len(own.faces)


@pytest.mark.parametrize("z", [0.0, 0.004, 0.0101, 0.0157, 0.022])
def test_sheets_thinner_than_a_coarse_cell_are_found(z: float) -> None:
    half = (0.2, 0.15, 0.004)
    found, _ = extract(box(half, (0.01, 0.2, z)), resolution=32)
    assert found is not None and found.is_watertight and found.body_count == 1
    assert (np.abs(found.extents - 2 * np.array(half)) < (2 * np.array(half) + 2 * MARGIN) / 32).all()


@pytest.mark.parametrize(("x", "z"), [(0.0, 0.0), (0.0157, 0.0157), (0.0157, 0.002)])
def test_rods_thinner_than_a_coarse_cell_are_found(x: float, z: float) -> None:
    found, _ = extract(rod(0.008, x, z), resolution=32)
    assert found is not None and found.is_watertight and found.body_count == 1
    assert np.allclose(found.extents, (0.016, 1.0, 0.016), atol=1.1 / 32)
    assert np.allclose(found.extents[[0, 2]], 0.016, atol=0.116 / 32)


def test_separate_and_attached_thin_parts_of_an_object_are_found() -> None:
    parts = [
        ball((-0.4, 0.0, 0.0), 0.1),
        box((0.1, 0.1, 0.005), (0.3, 0.3, 0.0157)),
        box((0.6, 0.005, 0.005), (0.2, 0.0, 0.0157)),
    ]
    found, _ = extract(union(*parts), resolution=128)
    assert found is not None and found.is_watertight and found.body_count == 2
    assert found.bounds[1, 0] == pytest.approx(0.8, abs=0.003), "the box grew to hold the end of the rod"
    assert found.bounds[1, 1] == pytest.approx(0.4, abs=0.003)


def test_a_thin_gap_stays_open() -> None:
    block, gap = box((0.3, 0.08, 0.3)), box((0.4, 0.004, 0.4), (0, 0.0157, 0))
    found, _ = extract(lambda p: np.maximum(block(p), -gap(p)), resolution=64)
    assert found is not None and found.is_watertight and found.body_count == 2


def test_a_field_that_is_positive_inside_is_inverted() -> None:
    found, note = extract(lambda p: -ball()(p), resolution=32)
    assert found is not None and "sign was inverted" in note and found.volume > 0.5
    normals = (found.triangles_center * found.face_normals).sum(-1)
    assert normals.min() > 0.4, "outward"


def test_nothing_is_found_in_nothing() -> None:
    assert extract(lambda p: np.ones(len(p)), resolution=32) == (None, "")
    assert extract(ball((3, 3, 3), 0.5), resolution=32) == (None, "")


def test_an_object_at_the_side_is_closed_and_one_beyond_it_is_reported() -> None:
    inside, _ = extract(ball((0.8, 0, 0), 0.24), resolution=32)
    assert inside is not None and mesh_problems(inside) == [] and inside.bounds[1, 0] > BOUND
    beyond, _ = extract(ball((0.8, 0, 0), 0.4), resolution=32)
    assert beyond is not None and np.abs(beyond.vertices).max() == pytest.approx(REACH)
    assert mesh_problems(beyond) == ["is not watertight", "is cut off at the box of 1.055"]


def test_noise_is_bounded_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isosurface, "MOST_CELLS", 50_000)
    monkeypatch.setattr(isosurface, "MOST_HIDDEN", 64)

    def noise(points: np.ndarray) -> np.ndarray:
        return np.sin(1e4 * points @ np.array([1.0, 2.3, 3.1]))

    field, asked = counted(noise)
    found, note = extract(field, resolution=256, coarse=16)
    assert found is not None and len(found.faces) < 4 * 50_000
    assert "as complex as that of noise, so it was extracted with 32 cells per side, not 256" in note
    assert sum(asked) < 200_000


def test_values_that_are_not_finite_are_outside_and_reported() -> None:
    def field(points: np.ndarray) -> np.ndarray:
        values = ball()(points)
        values[(points[:, 0] > 0.3) & (points[:, 1] > 0)] = np.nan
        return values

    found, note = extract(field, resolution=32)
    assert found is not None and mesh_problems(found) == [] and found.bounds[1, 0] < 0.52
    assert "of 274,625 values of the field are not finite, taken as outside" in note
    empty, note = extract(lambda p: np.full(len(p), np.inf), resolution=32)
    assert empty is None and "274,625 of 274,625 values" in note


def test_values_far_from_the_surface_do_not_matter() -> None:
    """Fields of networks are steep at the surface and constant elsewhere."""
    plain, _ = extract(ball((0, 0.2, 0), 0.3), resolution=64)
    steep, _ = extract(lambda p: np.tanh(40 * ball((0, 0.2, 0), 0.3)(p)), resolution=64)
    assert plain is not None and steep is not None and steep.is_watertight
    assert steep.volume == pytest.approx(plain.volume, rel=0.002)
