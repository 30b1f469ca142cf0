"""Extraction of meshes from implicit fields, at a resolution relative to the size of each object.

A field is a function of points. It is negative inside an object, and its zero level set is the surface of the
object. The published pipelines of MIDI-3D and TripoSG evaluate a field on dense grids of 257 or 512 points
per side: first in a box of fixed size, then in the bounding box of the object. `extract` finds the same
surface with about one percent of the evaluations, because it evaluates the fine grid only at the cells that
the surface crosses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import trimesh

BOUND = 1.005
"""Half the side length of the box in which a field is searched for its object."""

MARGIN = 0.05
"""Distance between an object and the sides of its own box, as published. The own box may extend beyond the
search box by this distance."""

REACH = BOUND + MARGIN
"""Greatest absolute value of a coordinate of an extracted mesh."""

Field = Callable[[np.ndarray], np.ndarray]
"""Function from points (n, 3) to values (n,), negative inside the object."""

MOST_CELLS = 8_000_000
"""Maximum number of surface cells, estimated for a finer grid before refinement. Only noise exceeds it."""

MOST_HIDDEN = 4096
"""Maximum number of coarse cells that are searched for thin parts. It limits the time for noisy fields."""

_CORNERS = np.array(list(itertools.product((0, 1), repeat=3)))
"""Offsets (8, 3) of the corners of a cell from its lowest corner."""


def extract(field: Field, *, resolution: int = 256, coarse: int = 64) -> tuple[trimesh.Trimesh | None, str]:
    """Extract the zero level set of a field as a mesh.

    The search box is a cube around the origin. A coarse grid in this box locates the object and its bounding
    box. The bounding box is enlarged by a margin and divided into `resolution` cells per side. Marching cubes
    runs only in the cells that the surface crosses. These cells are found by following the surface from
    cell to cell, first on coarse grids, then on finer ones.

    A part of the object may be thinner than a coarse cell. Such parts are found by linear extrapolation of
    the field. If the field is negative at more than four corners of the search box, its sign is assumed to be
    wrong and is inverted.

    Args:
        field: the field to extract, negative inside.
        resolution: cells per side of the object's box, a power of two, at least 8.
        coarse: cells per side of the search box.

    Returns:
        The mesh and a note. The mesh is None if the field has no zero level set. The note reports an inverted
        sign, values that are not finite, or a reduced resolution. Otherwise it is empty.
    """
    import trimesh

    assert resolution >= 8 and resolution & (resolution - 1) == 0, resolution
    notes = []
    raw = _Samples(field, np.full(3, -BOUND), np.full(3, BOUND), coarse).dense()
    sign = 1.0
    if (raw[::coarse, ::coarse, ::coarse] < 0).sum() > 4:
        sign = -1.0
        notes.append("the field was positive inside, so its sign was inverted")
    if invalid := int((~np.isfinite(raw)).sum()):
        notes.append(f"{invalid:,} of {raw.size:,} values of the field are not finite, taken as outside")

    def outward(points: np.ndarray) -> np.ndarray:
        found = sign * field(points)
        return np.where(np.isfinite(found), found, 1.0)

    values = np.where(np.isfinite(raw), sign * raw, 1.0).astype(np.float32)
    thin = _thin_parts(outward, values)
    near = _mixed(values)
    for points in thin.values():
        near[tuple(((points + BOUND) / (2 * BOUND) * coarse).astype(int).clip(0, coarse - 1).T)] = True
    if not near.any():
        return None, "; ".join(notes)
    found = _crossed(outward, _own_box(values, thin["inside"]), _widened(near), thin, resolution)
    if found is None:
        return None, "; ".join(notes)
    samples, cells = found
    if samples.cells < resolution:
        why = "its surface is as complex as that of noise"
        notes.append(f"{why}, so it was extracted with {samples.cells} cells per side, not {resolution}")
    return trimesh.Trimesh(*_triangles(samples, cells), process=False), "; ".join(notes)


class _Samples:
    """Values of a field at points of a regular grid. `corners` evaluates each point only once.

    The indices of points and cells are integers (n, 3). A cell has the index of its lowest corner.
    """

    def __init__(self, field: Field, low: np.ndarray, high: np.ndarray, cells: int) -> None:
        self.field, self.low, self.high, self.cells = field, low, high, cells
        self.keys, self.values = np.empty(0, np.int64), np.empty(0, np.float32)

    def dense(self) -> np.ndarray:
        """Return the values at all points of the grid, shape (cells + 1,) * 3."""
        shape = (self.cells + 1,) * 3
        return self.field(self.places(np.indices(shape).reshape(3, -1).T)).reshape(shape)

    def places(self, index: np.ndarray) -> np.ndarray:
        """Convert grid indices (n, 3) to coordinates; indices may be fractional.

        Index 0 is the lower side of the box, and index `cells` is the upper side.
        """
        return self.low + index / self.cells * (self.high - self.low)

    def corners(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Evaluate the field at the eight corners of each cell, and store new values.

        Args:
            cells: indices of the cells, (n, 3).

        Returns:
            The index of each corner in the attribute `values`, (n, 8), and the value of each corner, (n, 8).
        """
        keys = self._key(cells[:, None] + _CORNERS).ravel()
        new = _without(_sorted_unique(keys), self.keys)
        if len(new):
            at = np.searchsorted(self.keys, new)
            values = self.field(self.places(self.points(new))).astype(np.float32)
            self.keys, self.values = np.insert(self.keys, at, new), np.insert(self.values, at, values)
        where = np.searchsorted(self.keys, keys).reshape(-1, 8)
        return where, self.values[where]

    def points(self, keys: np.ndarray) -> np.ndarray:
        """Convert the integer keys (n,) of points to their grid indices (n, 3)."""
        side = self.cells + 1
        return np.stack([keys // side**2, keys // side % side, keys % side], -1)

    def follow(self, cells: np.ndarray) -> np.ndarray:
        """Follow the surface from cell to cell, and return the cells (m, 3) that it crosses.

        The search starts at `cells`. It continues across each cell face that the surface crosses.
        """
        cells = self.points(_sorted_unique(self._key(cells)))
        found, seen = [np.empty((0, 3), np.int64)], np.empty(0, np.int64)
        while len(cells):
            new = self._key(cells)
            seen = np.insert(seen, np.searchsorted(seen, new), new)
            inside = (self.corners(cells)[1] < 0).reshape(-1, 2, 2, 2)
            mixed = inside.any((1, 2, 3)) & ~inside.all((1, 2, 3))
            found.append(cells[mixed])
            beyond = []
            for axis, side in itertools.product(range(3), (0, 1)):
                face = np.take(inside, side, axis + 1)
                step = np.zeros(3, np.int64)
                step[axis] = 2 * side - 1
                beyond.append(cells[face.any((1, 2)) & ~face.all((1, 2))] + step)
            each = np.concatenate(beyond)
            each = each[((each >= 0) & (each < self.cells)).all(1)]
            cells = self.points(_without(_sorted_unique(self._key(each)), seen))
        return np.concatenate(found)

    def finer(self) -> _Samples:
        """Return samples on a grid of twice the resolution; known values are kept."""
        out = _Samples(self.field, self.low, self.high, 2 * self.cells)
        out.keys, out.values = out._key(2 * self.points(self.keys)), self.values
        return out

    def _key(self, points: np.ndarray) -> np.ndarray:
        """Convert the indices of points (..., 3) to keys, which are unique integers."""
        side = self.cells + 1
        return (points[..., 0] * side + points[..., 1]) * side + points[..., 2]


def _sorted_unique(keys: np.ndarray) -> np.ndarray:
    """Return the unique numbers, sorted; all numbers must be 0 or greater.

    For millions of numbers, `numpy.unique` would take more than ten times as long.
    """
    keys = np.sort(keys)
    return keys[np.diff(keys, prepend=-1) > 0]


def _without(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Return the numbers in `keys` that are not in the sorted array `known`."""
    if not len(known):
        return keys
    at = np.searchsorted(known, keys).clip(max=len(known) - 1)
    return keys[known[at] != keys]


def _mixed(values: np.ndarray) -> np.ndarray:
    """Return bool (n, n, n), True for grid cells whose corners differ in sign.

    Args:
        values: values at the grid points, (n + 1,) * 3.
    """
    n = values.shape[0] - 1
    inside = sum(
        (values[a : n + a, b : n + b, c : n + c] < 0).astype(np.int8)
        for a, b, c in itertools.product((0, 1), repeat=3)
    )
    return np.logical_and(inside > 0, inside < 8)


def _widened(cells: np.ndarray) -> np.ndarray:
    """Dilate a mask of cells by one cell in each direction, including diagonals."""
    out = cells.copy()
    for axis in range(3):
        low, high = ([slice(None)] * 3 for _ in range(2))
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        before = out.copy()
        out[tuple(low)] |= before[tuple(high)]
        out[tuple(high)] |= before[tuple(low)]
    return out


def _thin_parts(field: Field, values: np.ndarray) -> dict[str, np.ndarray]:
    """Find thin parts and thin gaps of an object that contain no point of the coarse grid.

    Values decrease toward a thin part from both sides. They are extrapolated linearly from both sides. Where
    the two lines meet near or below zero, the values are computed on a grid of four times the resolution. For
    gaps, the signs are reversed.

    Returns:
        Points (n, 3) in thin parts (`inside`) and in thin gaps (`outside`).
    """
    n = values.shape[0] - 1
    found = {}
    for name, sign in (("inside", 1.0), ("outside", -1.0)):
        v = sign * values
        around, depths = [np.empty((0, 3), np.int64)], [np.empty(0)]
        for axis in range(3):
            a, p, q, b = (np.moveaxis(v, axis, 0)[i : n - 2 + i] for i in range(4))
            fall, rise = a - p, b - q
            with np.errstate(divide="ignore", invalid="ignore"):
                lowest = p - fall * (p - q + rise) / (fall + rise)
            valley = (p >= 0) & (q >= 0) & (fall > 0) & (rise > 0) & (lowest < 0.25 * np.minimum(fall, rise))
            edges = np.argwhere(valley)
            edges = np.insert(edges[:, 1:], axis, edges[:, 0] + 1, axis=1)
            around.append((edges[:, None] - _CORNERS[_CORNERS[:, axis] == 0]).reshape(-1, 3))
            depths.append(lowest[valley].repeat(4))
        deepest = np.argsort(np.concatenate(depths), kind="stable")
        cells = np.concatenate(around)[deepest]
        cells = cells[((cells >= 0) & (cells < n)).all(1)]
        first = np.unique((cells[:, 0] * n + cells[:, 1]) * n + cells[:, 2], return_index=True)[1]
        cells = cells[np.sort(first)[:MOST_HIDDEN]]
        found[name] = np.empty((0, 3))
        if len(cells):
            fine = _Samples(field, np.full(3, -BOUND), np.full(3, BOUND), 4 * n)
            parts = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
            fine.corners((4 * cells[:, None] + parts).reshape(-1, 3))
            points = fine.points(fine.keys[sign * fine.values < 0])
            # Points next to a part that the coarse grid shows are not hidden.
            corner = (points // 4).clip(0, n - 1)
            alone = (v[tuple((corner[:, None] + _CORNERS).reshape(-1, 3).T)] >= 0).reshape(-1, 8).all(1)
            found[name] = fine.places(points[alone])
    return found


def _own_box(values: np.ndarray, thin: np.ndarray) -> np.ndarray:
    """Return the bounding box of the object in a field, enlarged by `MARGIN` on each side.

    Args:
        values: field on the coarse grid, (n + 1, n + 1, n + 1); negative inside the object.
        thin: points (m, 3) in parts of the object that are too thin for the coarse grid.

    Returns:
        Lowest and highest corner, (2, 3).
    """
    n = values.shape[0] - 1
    places = _Samples(lambda p: p[:, 0], np.full(3, -BOUND), np.full(3, BOUND), n).places
    ends = [thin]
    for axis in range(3):
        v = np.moveaxis(values, axis, 0)
        before, after = v[:-1], v[1:]
        cut = np.argwhere((before < 0) != (after < 0))
        a, b = before[tuple(cut.T)], after[tuple(cut.T)]
        crossing = cut.astype(np.float64)
        crossing[:, 0] += a / (a - b)
        ends.append(places(np.insert(crossing[:, 1:], axis, crossing[:, 0], axis=1)))
    ends.append(places(np.argwhere(values < 0)))
    points = np.concatenate(ends)
    box = np.stack([points.min(0) - MARGIN, points.max(0) + MARGIN])
    return box.clip(-REACH, REACH)


def _crossed(
    field: Field, box: np.ndarray, near: np.ndarray, thin: dict[str, np.ndarray], resolution: int
) -> tuple[_Samples, np.ndarray] | None:
    """Find the grid cells that the surface of an object crosses, in a box around the object.

    If the surface reaches a side of the box, the box is enlarged on this side.

    Args:
        field: function of points, negative inside the object.
        box: lowest and highest corner of the box, (2, 3).
        near: bool (n, n, n), coarse cells of the search box that may contain the surface.
        thin: two arrays of points (k, 3): `inside` lie in thin parts of the object, `outside` in thin gaps.
        resolution: cells per side of the box, reduced if there are too many surface cells.

    Returns:
        The samples of the finest grid and the cells (m, 3), or None if there are no cells.
    """
    n, known = near.shape[0], np.concatenate(list(thin.values()))
    start = 8
    while start < resolution and np.ptp(box, axis=0).max() / start > 2 * BOUND / n:
        start *= 2
    samples = _Samples(field, box[0], box[1], start)
    cells = np.indices((start,) * 3).reshape(3, -1).T
    middle = ((samples.places(cells + 0.5) + BOUND) / (2 * BOUND) * n).astype(int).clip(0, n - 1)
    cells = cells[near[tuple(middle.T)]]
    while True:
        index = (known - samples.low) / (samples.high - samples.low) * samples.cells
        seeds = (np.floor(index)[:, None] - 1 + _CORNERS).reshape(-1, 3).astype(int)
        seeds = seeds[((seeds >= 0) & (seeds < samples.cells)).all(1)]
        cells = samples.follow(np.concatenate([cells, seeds]))
        if len(cells):
            touched = np.stack([(cells == 0).any(0), (cells == samples.cells - 1).any(0)])
            touched &= np.abs(box) < REACH
            if touched.any():
                step = np.where(touched, MARGIN + 0.25 * np.ptp(box, axis=0), 0.0)
                larger = (box + step * [[-1.0], [1.0]]).clip(-REACH, REACH)
                return _crossed(field, larger, near, thin, resolution)
        if samples.cells == resolution or 4 * len(cells) > MOST_CELLS:
            return (samples, cells) if len(cells) else None
        samples = samples.finer()
        cells = (2 * cells[:, None] + _CORNERS).reshape(-1, 3)


def _triangles(samples: _Samples, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the vertices (v, 3) and faces (f, 3) of the surface in the crossed cells (m, 3).

    Marching cubes runs on an array in which each crossed cell is a separate block of 2 x 2 x 2 points, so
    that its time and memory depend on the surface, not on the volume. Vertices on the same edge of the grid
    are then merged.
    """
    from skimage.measure import marching_cubes

    where, corners = samples.corners(cells)
    # A vertex very close to a corner could be rounded onto it, in one cell but not in the next.
    largest = np.zeros(len(samples.values), np.float32)
    np.maximum.at(largest, where.ravel(), np.abs(corners).max(1).repeat(8))
    values = np.where(samples.values < 0, -1.0, 1.0) * np.maximum(np.abs(samples.values), 1e-3 * largest)
    side = int(np.ceil(len(cells) ** (1 / 3)))
    block = np.stack(np.unravel_index(np.arange(len(cells)), (side,) * 3), -1)
    soup, used = np.ones((side, 2) * 3, np.float32), np.zeros((side, 2) * 3, bool)
    for corner, (a, b, c) in enumerate(_CORNERS):
        place = (block[:, 0], a, block[:, 1], b, block[:, 2], c)
        soup[place] = values[where[:, corner]]
        used[place] = a & b & c
    found: Any = marching_cubes(
        soup.reshape((2 * side,) * 3), 0.0, method="lewiner", mask=used.reshape((2 * side,) * 3)
    )
    vertices, faces = found[0].astype(np.float64), found[1]
    owner = (vertices / 2).astype(int)
    vertices += cells[np.ravel_multi_index(tuple(owner.T), (side,) * 3)] - 2 * owner
    # Twice the index, odd along the edge that a vertex divides: equal for the same edge in different cells.
    whole = np.floor(vertices).astype(np.int64)
    edge = 2 * whole + (vertices != whole)
    length = 2 * samples.cells + 1
    keys = (edge[:, 0] * length + edge[:, 1]) * length + edge[:, 2]
    _, first, merged = np.unique(keys, return_index=True, return_inverse=True)
    return samples.places(vertices[first]), merged.reshape(-1)[faces]
