"""Reading of mesh files (.glb, .gltf, .obj, .ply, .stl): objects with names, colors and textures."""

from __future__ import annotations

import io
import re
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from inlaid import limits
from inlaid.media.images import checked_image
from inlaid.media.kinds import MediaError
from inlaid.media.mesh_gltf import BINARY, Gltf
from inlaid.media.mesh_looks import Look, Texture, texture_of, to_linear
from inlaid.media.mesh_obj import MATERIALS, Obj
from inlaid.paths import Root
from inlaid.reading import FileError, reading, require_file

if TYPE_CHECKING:
    import trimesh

FILES = (".glb", ".gltf", ".obj", ".ply", ".stl")
"""Suffixes of supported mesh files."""

OTHER_FILES = (".3ds", ".3mf", ".abc", ".blend", ".c4d", ".dae", ".fbx", ".max", ".off", ".step", ".stp",
               ".usd", ".usda", ".usdc", ".usdz", ".wrl", ".x3d")  # fmt: skip
"""Suffixes of unsupported mesh files, which are reported to the user."""

Grouping = Literal["parent", "node", "material"]
"""What forms one object of a mesh file; see `read_objects`."""

GROUPINGS: tuple[Grouping, ...] = ("parent", "node", "material")

CONTAINER = re.compile(
    r"(world|scene|root|root[ _]?node|sketchfab[ _]model|gltf[ _]?scene[ _]?root[ _]?node"
    r"|(scene |master |)collection|default|.*\.(fbx|obj|gltf|glb|dae|blend|max|3ds|usdz?|ply|stl)(\..*)?|)"
    r"[ _.-]*\d*",
    re.IGNORECASE,
)
"""Names of nodes that contain a scene, not an object; exporters add such nodes."""


@dataclass(frozen=True)
class MeshObject:
    """Object of a mesh file, in the coordinates of the file."""

    name: str
    """Name in the file; empty if it has none. Several objects may have the same name."""
    triangles: np.ndarray
    """Corners of the triangles, float64 (m, 3, 3)."""
    look: Look | None
    """Colors of the triangles; None if the file has none."""

    def moved(self, transform: np.ndarray) -> MeshObject:
        """Return a copy of the object with an affine transform (4, 4) applied.

        The transform must not mirror, because the order of the corners is kept.
        """
        corners = self.triangles @ transform[:3, :3].T + transform[:3, 3]
        return MeshObject(self.name, corners, self.look)


@dataclass(frozen=True)
class _Part:
    """Triangles of one node that have the same material."""

    path: tuple[str, ...]
    """Nodes from the top of the scene to the node of the part."""
    material: str
    triangles: np.ndarray
    look: Look | None


@dataclass
class _Content:
    """Content of a mesh file: its parts, the names of its nodes by ID, and notes for the user."""

    parts: list[_Part]
    names: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def name(self, node: str) -> str:
        return self.names.get(node, "")


def read_objects(path: Path, group: Grouping = "parent") -> tuple[list[MeshObject], list[str]]:
    """Read the objects of a mesh file, sorted by name, with all node transforms applied.

    Args:
        path: mesh file. Files that it references must be in its folder.
        group: what forms an object. `node`: each glTF node with a mesh. `parent`: each topmost glTF node,
            together with all nodes below it. Container nodes, such as `Scene` or `root`, are skipped.
            `material`: all triangles with the same material. In an .obj file, `node` selects groups (`g`) and
            `parent` selects objects (`o`). If only one of the two kinds exists, both values select it.

    Returns:
        The objects, and notes on parts that could not be read, such as missing textures.

    Raises:
        MediaError: if the file cannot be read or has no triangles; the message contains the path.
    """
    with reading(path, MediaError, "a mesh"):
        require_file(path, MediaError)
        content = _read(path)
        if not content.parts:
            raise MediaError(path, "has no triangles")
        notes, groups = list(dict.fromkeys(content.notes)), _grouped(content, group)
        if group == "parent" and len(groups) == 1 and len({p.path for p in content.parts}) > 1:
            (name, parts), *_ = groups.values()
            count = len({part.path for part in parts})
            notes.append(f"its {count} parts are one object, `{name}`; with --group node, each is an object")
        objects = [_object(name, parts) for name, parts in groups.values()]
    return sorted(objects, key=lambda one: one.name), notes


def _object(name: str, parts: Sequence[_Part]) -> MeshObject:
    """Join the parts of an object. If only some parts have colors, the others become gray."""
    triangles = np.concatenate([part.triangles for part in parts])
    if all(part.look is None for part in parts):
        return MeshObject(name, triangles, None)
    return MeshObject(name, triangles, Look.joined([p.look or gray(len(p.triangles)) for p in parts]))


def gray(count: int) -> Look:
    """Return a uniform light gray `Look` for `count` triangles without colors."""
    return Look.plain(np.tile(np.array([0.5, 0.5, 0.5, 1.0]), (count, 3, 1)))


def _grouped(content: _Content, group: Grouping) -> dict[str, tuple[str, list[_Part]]]:
    """Group the parts of a mesh file into objects.

    Returns:
        Name and parts of each object. The dict keys are names of materials if `group` is "material", else IDs
        of nodes.
    """
    out: dict[str, tuple[str, list[_Part]]] = {}
    meshes = {part.path[-1] for part in content.parts}
    for part in content.parts:
        if group == "material":
            key, name = part.material, part.material
        else:
            key = part.path[-1]
            if group == "parent":  # the topmost node that is not only a container
                key = next(n for n in part.path if n in meshes or not CONTAINER.fullmatch(content.name(n)))
            name = content.name(key)
        out.setdefault(key, (name, []))[1].append(part)
    return out


# --- reading ------------------------------------------------------------------------------------------------


def _read(path: Path) -> _Content:
    """Read the parts of a mesh file with trimesh."""
    import trimesh

    suffix, resolver = path.suffix.lower(), _resolver(path)
    if large := limits.ARRAY.exceeded(path.stat().st_size, f"has {limits.as_size(path.stat().st_size)}"):
        raise MediaError(path, large)
    options: dict[str, Any] = {"process": False, "resolver": resolver}
    gltf = obj = None
    stream: io.BytesIO
    if suffix in (".glb", ".gltf"):
        gltf = Gltf(path, path.read_bytes())
        resolver.extra[BINARY] = gltf.binary
        stream, suffix = gltf.stream(), ".gltf"
    elif suffix == ".obj":
        obj = Obj(path.read_bytes())
        resolver.extra[MATERIALS] = obj.materials(resolver.get)
        stream = obj.stream()
        options |= {"split_objects": True}
    else:
        stream = io.BytesIO(path.read_bytes())
    scene: Any = trimesh.load_scene(stream, file_type=suffix[1:], **options)
    parents, names = scene.graph.transforms.parents, {}
    content, total, textures = _Content([], names), 0, {}
    for node in scene.graph.nodes_geometry:
        transform, geometry = scene.graph[node]
        mesh = scene.geometry[geometry]
        if not isinstance(mesh, trimesh.Trimesh) or not len(mesh.faces):
            continue
        total += len(mesh.faces)
        if large := limits.TRIANGLES.exceeded(total, f"has more than {total:,} triangles"):
            raise MediaError(path, large)
        vertices, look, material = np.asarray(mesh.vertices, np.float64), None, ""
        if gltf:
            vertices = gltf.vertices(geometry, vertices)
            look, index = gltf.look(geometry, mesh)
            material = gltf.material_name(index)
            chain = [node]
            while chain[0] in parents and parents[chain[0]] not in chain:
                chain.insert(0, parents[chain[0]])
            chain = list(dict.fromkeys(n.split("_")[0] for n in chain[1:])) or [node]
            names.update({n: gltf.node_name(n) for n in chain})
        else:
            look, material = _look(mesh, content.notes, textures)
            chain = ["file"]
            if obj:
                chain = obj.path_of(geometry)
                names.update(obj.names)
            elif len(scene.geometry) > 1:  # an .stl file with several solids
                chain, names[node] = [node], str(geometry)
        with np.errstate(invalid="ignore"):  # values that are not finite are reported later
            triangles = vertices[mesh.faces] @ transform[:3, :3].T + transform[:3, 3]
        if np.linalg.det(transform[:3, :3]) < 0:
            triangles = triangles[:, ::-1]
            look = look.turned(np.ones(len(triangles), bool)) if look else None
        content.parts.append(_Part(tuple(chain), material, triangles, look))
    names.setdefault("file", path.stem)
    content.notes += [*(gltf.notes if gltf else []), *resolver.notes]
    return content


def _look(
    mesh: trimesh.Trimesh, notes: list[str], textures: dict[int, Texture | None]
) -> tuple[Look | None, str]:
    """Return the colors of the triangles of an .obj, .ply or .stl mesh, and the name of its material.

    The colors are None if the file has no usable colors. `textures` is a cache of converted textures by
    `id(image)`.
    """
    visual, faces = mesh.visual, mesh.faces
    if visual.kind == "texture":
        material: Any = visual.material
        image, name = getattr(material, "image", None), str(getattr(material, "name", None) or "")
        if image is not None and visual.uv is not None and len(visual.uv) == len(mesh.vertices):
            if id(image) not in textures:
                textures[id(image)] = texture_of(image, name, notes)
            texture = textures[id(image)]
            if texture is None:
                return None, name
            look = Look.plain(np.ones((len(faces), 3, 4)))
            look.uv[:] = np.stack([visual.uv[:, 0], 1 - visual.uv[:, 1]], -1)[faces]
            look.texture[:] = 0
            return Look(look.colors, look.uv, look.texture, look.cutoff, (texture,)), name
        if "kd" in getattr(material, "kwargs", {}):
            color = np.append(to_linear(np.asarray(material.kwargs["kd"], float).clip(0, 1)[:3]), 1.0)
            return Look.plain(np.tile(color, (len(faces), 3, 1))), name
        return None, name
    if visual.kind not in ("face", "vertex"):
        return None, ""
    stored = visual.face_colors[:, None] if visual.kind == "face" else visual.vertex_colors[faces]
    colors = np.broadcast_to(stored[..., :4] / 255, (len(faces), 3, 4)).copy()
    colors[..., :3] = to_linear(colors[..., :3])
    return Look.plain(colors), ""


def _resolver(path: Path) -> Any:
    """Return a trimesh resolver that reads only files in the folder of the mesh.

    Its `extra` maps file names to contents. These contents are used instead of files on disk. Its `notes` are
    messages about files that could not be read.
    """
    import trimesh

    root = Root(path.parent)

    class Resolver(trimesh.resolvers.FilePathResolver):
        extra: dict[str, bytes] = {}  # noqa: RUF012
        notes: list[str] = []  # noqa: RUF012

        def get(self, name: str) -> bytes:
            """Return the content of a file that the mesh refers to."""
            if name in self.extra:
                return self.extra[name]
            try:
                file = _beside(root, name.strip())
                size = require_file(file, MediaError).st_size
                if large := limits.ARRAY.exceeded(size, f"has {limits.as_size(size)}"):
                    raise MediaError(file, large)
                content = file.read_bytes()
                if file.suffix.lower() in _IMAGES:
                    with reading(file, MediaError, "an image"):
                        checked_image(io.BytesIO(content), file).close()
                return content
            except FileError as error:
                self.notes.append(f"`{name.strip()[:200]}` {error.cause}")
                raise

    resolver = Resolver(str(path))
    resolver.extra, resolver.notes = {}, []
    return resolver


_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tga", ".tif", ".tiff", ".gif")


def _beside(root: Root, name: str) -> Path:
    """Find a file that a mesh refers to.

    Names in glTF files may be percent-encoded. Names in .mtl files may follow options such as `-s 1 1 1`.
    Names may be paths from another computer; the file is then searched by its file name in the folder of the
    mesh.
    """
    if not name.strip():
        raise MediaError(root.folder, "is an empty file name", "missing")
    first: FileError | None = None
    for other in (name, urllib.parse.unquote(name), name.split()[-1], re.split(r"[/\\]", name)[-1]):
        try:
            found = root.named(other)
            if found.is_file():
                return found
        except FileError as error:
            first = first or error
    if first:
        raise first
    raise MediaError(root.folder / name, "does not exist", "missing")
