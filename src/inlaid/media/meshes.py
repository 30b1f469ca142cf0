"""Surfaces, meshes and segmentations: reading, writing, normalization, mesh extraction and checks.

All objects of a scene share one coordinate frame, with coordinates in about [-1, 1] and y up.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from inlaid import limits
from inlaid.files import atomic
from inlaid.media.arrays import read_header, read_values
from inlaid.media.images import load_image
from inlaid.media.isosurface import BOUND, REACH
from inlaid.media.kinds import MediaError
from inlaid.media.pickled import UnsafePickleError, unpickle
from inlaid.reading import check_member, reading, require_file

if TYPE_CHECKING:
    import trimesh


LONGEST = 1.9
"""Length of the longest side of a normalized scene. It keeps the scene inside the cube from
-`BOUND` to `BOUND`."""

POINTS = 20_480
"""Number of points per surface that the published scene model was trained with."""

ESTIMATED = 8 * POINTS
"""Maximum number of points for which normals are estimated. Larger surfaces are thinned first, because the
estimation takes seconds."""

# --- surfaces -----------------------------------------------------------------------------------------------


class Note(str):
    """Message about a surface or a scene, with a problem code (a key of `data.problems.KINDS`)."""

    code: str

    def __new__(cls, code: str, message: str) -> Note:
        """Create a message with a problem code."""
        note = super().__new__(cls, message)
        note.code = code
        return note


@dataclass(frozen=True)
class Surface:
    """Surface points of one object with unit normals, and messages about problems with them.

    Normals should point outward; a message reports a surface whose normals point inward.
    """

    points: np.ndarray
    """Positions and normals, float32 (n, 6)."""
    notes: tuple[Note, ...] = ()


POINTS_KEY, NORMALS_KEY = "surface_points", "surface_normals"
"""Names of the arrays of a surface in an `.npz` file or a dict, as in the published 3D-FRONT data."""


def read_surface(path: Path) -> list[Surface]:
    """Read surface points of one or more objects from a file.

    An array (n, c) contains one object, and an array (k, n, c) contains k objects. If c is 6, each point has
    a position and a normal. If c is 3, each point has only a position, and normals are estimated. If c is 4,
    the last column is ignored and normals are estimated.

    An `.npz` file contains `surface_points` and optionally `surface_normals`, or only one array. A pickled
    dict, as in the published 3D-FRONT data, contains the same; it may be in an `.npy` file. A list or an
    object array contains one surface per object; the numbers of points may differ. Pickles are read by
    `unpickle`, which runs no code.

    Raises:
        MediaError: if the file is not a valid surface; the message contains path and cause.
    """
    with reading(path, MediaError):
        try:
            found = _point_arrays(path, _content(path))
        except UnsafePickleError as error:
            why = f"is a pickle that {error}: not loaded, it could run code; save its arrays with numpy.savez"
            raise MediaError(path, why, "pickle") from None
        if many := limits.POINTS.exceeded(sum(map(len, found)), f"has {sum(map(len, found)):,} points"):
            raise MediaError(path, many, "surface")
        if many := limits.OBJECTS.exceeded(len(found), f"contains {len(found)} surfaces"):
            raise MediaError(path, many, "several")
        return [_surface(path, np.asarray(one, np.float32)) for one in found]


def _content(path: Path) -> Any:
    """Return the array, dict or list in an `.npy` file, an `.npz` file or a pickle.

    Raises:
        MediaError: if the file is missing, too large, or none of these. Other errors pass unchanged.
    """
    size = require_file(path, MediaError).st_size
    if zipfile.is_zipfile(path):
        return _archive(path)
    if large := limits.ARRAY.exceeded(size, f"has {limits.as_size(size)}"):
        raise MediaError(path, large)
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if head[:6] == b"\x93NUMPY":
            return _values(file, size)
        if head[:1] == b"\x80" or re.match(rb"[(\[{}\]c]", head):  # protocols 2 to 5, or 0 and 1
            try:
                return unpickle(file.read())
            except UnsafePickleError:
                raise
            except ValueError:
                if head[:1] == b"\x80":
                    raise
    raise MediaError(path, "is neither .npy nor .npz")


def _archive(path: Path) -> Any:
    """Return the arrays of a surface in an `.npz` file, by name.

    If the file has only one array, and this is a pickled dict or list, the dict or list is returned.
    """
    with zipfile.ZipFile(path) as archive:
        members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        names = [n for n in (POINTS_KEY, NORMALS_KEY) if n in members]
        if POINTS_KEY not in names and len(members) != 1:
            raise MediaError(
                path, f"has no array {POINTS_KEY}; its arrays are: {', '.join([*members][:20]) or 'none'}"
            )
        out = {}
        for name in names if POINTS_KEY in names else members:
            check_member(path, members[name], MediaError)
            with archive.open(members[name]) as file:
                out[name] = _values(file, members[name].file_size)
    (name, value), *_ = out.items()
    return value if POINTS_KEY not in out and isinstance(value, (dict, list)) else out


def _values(file: IO[bytes], size: int) -> Any:
    """Read an open `.npy` file of `size` bytes; an object array is read as a pickle."""
    header = read_header(file)
    return unpickle(file.read()) if header.dtype.hasobject else read_values(file, header, size)


def _point_arrays(path: Path, content: Any) -> list[np.ndarray]:
    """Return an array (n, c) for each object in the content of a surface file.

    Raises:
        MediaError: if an array is missing, or has an invalid shape or type.
    """
    if isinstance(content, list) and content and isinstance(content[0], (dict, np.ndarray)):
        return [array for each in content for array in _point_arrays(path, each)]
    if isinstance(content, dict):
        if POINTS_KEY not in content:
            there = ", ".join(str(key)[:40] for key in [*content][:20]) or "none"
            raise MediaError(path, f"has no array {POINTS_KEY}; its arrays are: {there}")
        parts = [np.asarray(content[key]) for key in (POINTS_KEY, NORMALS_KEY) if key in content]
        shapes = [part.shape for part in parts]
        if len({shape[:-1] for shape in shapes}) > 1 or (len(shapes) == 2 and shapes[1][-1:] != (3,)):
            why = f"{NORMALS_KEY} {shapes[1]} does not match {POINTS_KEY} {shapes[0]}"
            raise MediaError(path, why, "surface")
        found = np.concatenate([part[..., :3] for part in parts], -1) if len(parts) == 2 else parts[0]
    else:
        found = np.asarray(content)
    if found.ndim not in (2, 3) or found.shape[-1] not in (3, 4, 6) or found.dtype.kind not in "fiu":
        why = f"is {found.dtype} {found.shape}; a surface must be (n, 6), positions and normals"
        raise MediaError(path, why, "surface")
    return [*found] if found.ndim == 3 else [found]


def _surface(path: Path, points: np.ndarray) -> Surface:
    if len(points) < 16:
        raise MediaError(path, f"has {len(points)} points; a surface needs about {POINTS}", "surface")
    if not np.isfinite(points).all():
        wrong = int((~np.isfinite(points)).any(-1).sum())
        raise MediaError(path, f"{wrong} points are not finite", "surface")
    reach = float(np.abs(points[:, :3]).max())
    if reach > 1.05:
        why = f"extends to {reach:.2f}, outside of the box of {BOUND}: scale the whole scene to fit"
        raise MediaError(path, why, "outside-box")
    if np.ptp(points[:, :3], axis=0).max() < 1e-6:
        raise MediaError(path, "all points have the same position", "surface")
    notes = []
    if points.shape[1] == 4:
        notes.append(Note("fourth-column", "the fourth column is ignored: a normal has three numbers"))
    if points.shape[1] < 6:
        why = "normals were estimated from neighboring points; store (n, 6) for exact normals"
        notes.append(Note("estimated", why))
        points = points[:: -(-len(points) // ESTIMATED)]
        points = np.concatenate([points[:, :3], estimate_normals(points[:, :3])], -1)
    length = np.linalg.norm(points[:, 3:], axis=-1, keepdims=True)
    if (length < 1e-6).any():
        raise MediaError(path, f"{int((length < 1e-6).sum())} normals are zero", "surface")
    points = np.concatenate([points[:, :3], points[:, 3:] / length], -1)
    if flipped(points):
        notes.append(Note("flipped", "most normals point inward; the model expects outward normals"))
    if len(points) < POINTS:
        why = f"{len(points)} points, fewer than {POINTS}: some are sampled more than once"
        notes.append(Note("sparse", why))
    return Surface(points.astype(np.float32), tuple(notes))


def flipped(points: np.ndarray) -> bool:
    """Return True if the normals of a surface point inward rather than outward.

    `points` (n, 6) contains coordinates, then normals. The test estimates the enclosed volume with the
    divergence theorem. Inward normals give a negative volume.
    """
    return float((points[:, :3] - points[:, :3].mean(0)).ravel() @ points[:, 3:].ravel()) < 0


def estimate_normals(points: np.ndarray, neighbors: int = 16) -> np.ndarray:
    """Estimate outward unit normals (n, 3) of points (n, 3).

    A normal is the direction of least variance among the nearest points. The normal of the topmost point gets
    an upward sign. The other signs follow from it along a minimum spanning tree. The tree connects neighbors
    with similar tangent planes (Hoppe et al. 1992).
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
    from scipy.spatial import KDTree

    near = np.asarray(KDTree(points).query(points, k=min(neighbors, len(points)))[1])
    local = points[near] - points[near].mean(1, keepdims=True)
    _, _, axes = np.linalg.svd(local, full_matrices=False)
    normals = axes[:, -1].astype(np.float32)
    rows, columns = np.repeat(np.arange(len(points)), near.shape[1] - 1), near[:, 1:].ravel()
    cost = 1.001 - np.abs((normals[rows] * normals[columns]).sum(-1))
    tree = minimum_spanning_tree(coo_matrix((cost, (rows, columns)), (len(points),) * 2))
    tree: Any = tree + tree.T
    left = np.ones(len(points), bool)
    while left.any():  # one root for each connected component
        root = int(np.flatnonzero(left)[points[left][:, 1].argmax()])
        normals[root] *= 1 if normals[root, 1] >= 0 else -1
        walk: Any = breadth_first_order(tree, root, directed=False)
        order, parents = walk
        for i in order[1:]:
            if normals[i] @ normals[parents[i]] < 0:
                normals[i] = -normals[i]
        left[order] = False
    return normals


def sample_surface(mesh: trimesh.Trimesh, count: int = POINTS, seed: int = 0) -> np.ndarray:
    """Sample points on a mesh, each with the normal of its face: float32 (count, 6)."""
    import trimesh

    drawn: Any = trimesh.sample.sample_surface(mesh, count, seed=seed)
    points, faces = drawn[:2]
    return np.concatenate([points, mesh.face_normals[faces]], -1).astype(np.float32)


def normalizing(bounds: np.ndarray) -> np.ndarray:
    """Return the transform (4, 4) that centers a scene and scales its longest side to `LONGEST`.

    Args:
        bounds: minimum and maximum corner of the scene's bounding box, (2, 3).
    """
    size = float((bounds[1] - bounds[0]).max())
    assert size > 0, "a scene has a size"
    out = np.eye(4)
    out[:3] *= LONGEST / size
    out[:3, 3] = -bounds.mean(0) * LONGEST / size
    return out


# --- extracted meshes --------------------------------------------------------------------------------------


def decimated(mesh: trimesh.Trimesh, triangles: int) -> trimesh.Trimesh:
    """Decimate a mesh to at most `triangles` triangles, with the quadric error metric.

    Raises:
        ValueError: if the package fast-simplification is not installed.
    """
    try:
        return mesh.simplify_quadric_decimation(face_count=triangles)
    except ModuleNotFoundError:
        raise ValueError("sample.triangles: needs fast-simplification: pip install 'inlaid[mesh]'") from None


def preview_meshes(
    meshes: Mapping[str, trimesh.Trimesh], triangles: int = 300_000
) -> dict[str, trimesh.Trimesh]:
    """Decimate meshes to at most about `triangles` triangles in total, for pictures and web pages.

    The meshes are returned unchanged if they have at most `triangles` triangles in total, or if the package
    fast-simplification is not installed.
    """
    total = sum(len(mesh.faces) for mesh in meshes.values())
    if total <= triangles or find_spec("fast_simplification") is None:
        return dict(meshes)
    targets = {name: max(100, len(mesh.faces) * triangles // total) for name, mesh in meshes.items()}
    return {n: decimated(m, targets[n]) if len(m.faces) > targets[n] else m for n, m in meshes.items()}


def mesh_problems(mesh: trimesh.Trimesh, *, most: int = 8_000_000) -> list[str]:
    """Return the defects of a mesh, such as `is not watertight`; empty for a valid mesh.

    Args:
        mesh: the mesh.
        most: maximum number of triangles.
    """
    found = []
    if not np.isfinite(mesh.vertices).all():
        found.append("has vertices that are not finite")
        return found
    if not mesh.is_watertight:
        found.append("is not watertight")
    if np.abs(mesh.vertices).max() > REACH - 1e-6:
        found.append(f"is cut off at the box of {REACH:g}")
    if len(mesh.faces) > most:
        found.append(f"has {len(mesh.faces):,} triangles, more than {most:,}: set sample.triangles")
    return found


def require_mesh_packages() -> None:
    """Check that the optional packages for 3D scenes are installed.

    Raises:
        ValueError: if packages are missing; the message contains the command that installs them.
    """
    missing = [name for name in ("trimesh", "skimage", "fpsample") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"scenes need packages that are not installed ({', '.join(missing)}): pip install 'inlaid[mesh]'"
        )


def write_scene(path: Path, meshes: Mapping[str, trimesh.Trimesh], empty: Sequence[str] = ()) -> Path:
    """Write a `.glb` file atomically. Each object becomes one node, which has the name of the object.

    Objects named in `empty` get a node without a mesh.
    """
    import trimesh

    root = "world"
    while root in (*meshes, *empty):  # an object of this name would contain all others
        root += "_"
    scene = trimesh.Scene(base_frame=root)
    for name, mesh in meshes.items():
        scene.add_geometry(mesh, node_name=name, geom_name=name)
    for name in empty:
        scene.graph.update(frame_to=name, frame_from=scene.graph.base_frame)
    with atomic(path) as part:
        part.write_bytes(scene.export(file_type="glb"))  # type: ignore[arg-type]
    return path


# --- segmentations ------------------------------------------------------------------------------------------


def read_ids(path: Path) -> np.ndarray:
    """Read the object IDs of a segmentation image: int (h, w), where 0 is background.

    In a palette image, the IDs are palette indices. In a gray image, they are pixel values. In an RGB image,
    each color except black is one object. RGB is not converted to gray, because that could merge objects.

    Raises:
        MediaError: if the file cannot be read or is another kind of image; the message contains the path.
    """
    with load_image(path) as image:
        image.load()
        if image.mode in ("P", "L", "I;16", "I", "1"):
            return np.asarray(image).astype(np.int64)
        if image.mode not in ("RGB", "RGBA", "LA"):
            raise MediaError(path, f"is {image.mode}; save it as a palette, gray or RGB image")
        pixels = np.asarray(image.convert("RGBA")).astype(np.int64)
    code = (pixels[..., 0] << 16) + (pixels[..., 1] << 8) + pixels[..., 2]
    code[pixels[..., 3] == 0] = 0
    return np.unique(np.concatenate([[0], code.ravel()]), return_inverse=True)[1][1:].reshape(code.shape)
