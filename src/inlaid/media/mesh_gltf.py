"""Reader of glTF files: checks the header, and reads what trimesh reads wrongly (names, colors, textures)."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from inlaid import limits
from inlaid.media.kinds import MediaError
from inlaid.media.mesh_looks import Look, Texture, texture_of, to_linear
from inlaid.reading import parse_json
from inlaid.text import decode_text

SUPPORTED = frozenset(
    [
        "EXT_texture_webp",
        "KHR_lights_punctual",
        "KHR_mesh_quantization",
        "KHR_texture_transform",
        *(
            f"KHR_materials_{name}"
            for name in (
                "anisotropy", "clearcoat", "dispersion", "emissive_strength", "ior", "iridescence",
                "pbrSpecularGlossiness", "sheen", "specular", "transmission", "unlit", "variants", "volume",
            )
        ),
    ]
)  # fmt: skip
"""glTF extensions that a file may require; they are supported or do not affect shapes and base colors."""

BINARY = "inlaid:binary"
"""Virtual file name of the binary chunk of a `.glb` file."""

WRAPS = {33071: "clamp", 33648: "mirror", 10497: "repeat"}
"""Texture wrap modes by glTF code."""

BYTES = {5120: 1, 5121: 1, 5122: 2, 5123: 2, 5125: 4, 5126: 4}
"""Bytes per number, by glTF component type."""

COLUMNS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT2": 4, "MAT3": 9, "MAT4": 16}
"""Numbers per element, by glTF accessor type."""

TRIANGLES = (4, 5)
"""glTF codes of the primitive modes triangles and triangle strip."""


class Gltf:
    """Header of a `.gltf` or `.glb` file. Its methods return the names, colors and textures of meshes.

    `original` is the header as stored. `header` is a modified copy that trimesh reads. In this copy, each
    name contains an index: the first node is `n0`, the first mesh is `m0`, and the first material is `0`.
    With these names, the results of trimesh are matched with `original`.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self.binary = b""
        text = content
        if content[:4] == b"glTF":
            size = int.from_bytes(content[12:16], "little")
            if len(content) < 20 + size:
                raise MediaError(path, "is truncated", "truncated")
            text = content[20 : 20 + size]
            length = int.from_bytes(content[20 + size : 24 + size], "little")
            self.binary = content[28 + size : 28 + size + length]
            if len(self.binary) < length:
                raise MediaError(path, "is truncated", "truncated")
        self.original: dict[str, Any] = parse_json(decode_text(text))
        if not isinstance(self.original, dict):
            raise ValueError("its JSON is not an object")
        self.notes = _checked(path, self.original)
        self.colors_are_srgb = "trimesh" in str(self._get("asset", "generator"))
        """True if colors are stored in sRGB: trimesh writes them so, although glTF requires linear light."""
        self.header = self._renamed()
        self._textures: dict[int | None, Texture | None] = {}

    def _get(self, *keys: str | int) -> Any:
        """Return a nested value of the original header, or None if a key is missing."""
        found: Any = self.original
        for key in keys:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                return None
        return found

    def _renamed(self) -> dict[str, Any]:
        """Return a copy of the header for trimesh, in which nodes, meshes and materials are named by index.

        Other changes in the copy work around limitations of trimesh.
        """
        header = json.loads(json.dumps(self.original))
        for i, buffer in enumerate(header.get("buffers", [])):
            if "uri" not in buffer and i == 0:
                buffer["uri"] = BINARY
        for letter, key in (("n", "nodes"), ("m", "meshes"), ("", "materials")):
            for i, each in enumerate(header.get(key, [])):
                each["name"] = f"{letter}{i}"
        for node in header.get("nodes", []):
            node.pop("camera", None)  # else trimesh loses the children of the node
        if not header.get("scenes"):
            children = {c for node in header.get("nodes", []) for c in node.get("children", [])}
            header["scenes"] = [
                {"nodes": [i for i in range(len(header.get("nodes", []))) if i not in children]}
            ]
        header.setdefault("materials", []).append({"name": "none"})
        for mesh in header.get("meshes", []):
            for primitive in mesh.get("primitives", []):
                attributes = primitive["attributes"]
                texture = self._get("materials", primitive.get("material", -1), *_BASE_TEXTURE) or {}
                coordinates = _transform(texture).get("texCoord", texture.get("texCoord", 0))
                if f"TEXCOORD_{coordinates}" in attributes:
                    attributes["TEXCOORD_0"] = attributes[f"TEXCOORD_{coordinates}"]
                if "material" not in primitive:  # else trimesh converts 16-bit colors to 8 bits wrongly
                    primitive["material"] = len(header["materials"]) - 1
        return header

    def stream(self) -> io.BytesIO:
        """Return `header` as JSON in a file object that trimesh can read."""
        return io.BytesIO(json.dumps(self.header).encode())

    def node_name(self, node: str) -> str:
        """Return the name of a node in the file, or the name of its mesh if the node has none.

        `node` is the name in trimesh: `n` and the index, possibly with a suffix, such as `n3` or `n3_xyz`.
        The result is empty if there is no name.
        """
        found = re.match(r"n(\d+)", node)
        if not found:
            return ""
        index = int(found[1])
        mesh = self._get("nodes", index, "mesh")
        own = self._get("nodes", index, "name") or (mesh is not None and self._get("meshes", mesh, "name"))
        return own if isinstance(own, str) else ""

    def material_name(self, index: int | None) -> str:
        """Return the name of a material, or an empty string if it has no name."""
        name = None if index is None else self._get("materials", index, "name")
        return name if isinstance(name, str) else ""

    def vertices(self, geometry: str, vertices: np.ndarray) -> np.ndarray:
        """Return the vertices of a trimesh geometry; normalized integers are scaled to [-1, 1]."""
        accessor = self._accessor(geometry, "POSITION")
        return vertices / _range(accessor) if accessor.get("normalized") else vertices

    def _accessor(self, geometry: str, attribute: str) -> dict[str, Any]:
        """Return the glTF accessor of a vertex attribute, or an empty dict if there is no such attribute.

        `geometry` is trimesh's name of a primitive. For mesh 2, `m2` is the first primitive, and `m2_1` is
        the second.
        """
        mesh, _, number = geometry[1:].partition("_")
        kept = [
            p
            for p in self.header["meshes"][int(mesh)]["primitives"]
            if p.get("mode", 4) in (0, 1, *TRIANGLES)
        ]
        index = kept[int(number or 0)]["attributes"].get(attribute)
        return {} if index is None else self.header["accessors"][index]

    def look(self, geometry: str, mesh: Any) -> tuple[Look | None, int | None]:
        """Return the colors of a trimesh mesh, and the index of its material or None.

        The colors are None if the mesh has neither a material nor vertex colors. Otherwise, they are base
        color factor x base color texture x vertex color, as glTF requires.
        """
        material, faces = mesh.visual.material, mesh.faces
        index = int(material.name) if str(material.name).isdigit() else None
        vertex = mesh.visual.vertex_attributes.get("color")
        if index is None and vertex is None:
            return None, None
        colors = np.ones((len(faces), 3, 4))
        factor = self._get("materials", index, *_BASE_FACTOR) if index is not None else None
        if factor is None and material.baseColorFactor is not None:
            factor = np.asarray(material.baseColorFactor) / 255  # of the specular-glossiness extension
        if factor is not None:
            colors *= self._linear(np.asarray(factor, np.float64))
        if vertex is not None:
            color = np.asarray(vertex, np.float64)
            if vertex.dtype.kind in "ui":
                color = color / np.iinfo(vertex.dtype).max
            if color.shape[1] == 3:
                color = np.concatenate([color, np.ones((len(color), 1))], -1)
            colors *= self._linear(color)[faces]
        look = Look.plain(colors)
        image = material.baseColorTexture
        if index is not None:
            mode = self._get("materials", index, "alphaMode")
            cutoff = self._get("materials", index, "alphaCutoff")
            limit = {"MASK": 0.5 if cutoff is None else float(cutoff), "BLEND": 0.05}.get(str(mode), 0.0)
            look.cutoff[:] = limit
            named = self._get("materials", index, *_BASE_TEXTURE)
            if named is not None and image is None:
                self.notes.append(f"the texture of material `{self.material_name(index)}` cannot be read")
        if image is not None and mesh.visual.uv is not None:
            look.uv[:] = self._uv(geometry, mesh.visual.uv, index)[faces]
            look.texture[:] = 0
            wraps = self._get("samplers", self._sampler(index)) or {}
            wrap = tuple(WRAPS.get(wraps.get(k, 10497), "repeat") for k in ("wrapS", "wrapT"))
            if index not in self._textures:
                name = self.material_name(index)
                self._textures[index] = texture_of(image, name, self.notes, (wrap[0], wrap[1]))
            texture = self._textures[index]
            if texture is None:
                look.texture[:] = -1
            look = Look(look.colors, look.uv, look.texture, look.cutoff, (texture,) if texture else ())
        return look, index

    def _linear(self, color: np.ndarray) -> np.ndarray:
        """Convert colors (..., 4) to linear light if the file stores sRGB."""
        if not self.colors_are_srgb:
            return color
        return np.concatenate([to_linear(color[..., :3]), color[..., 3:]], -1)

    def _sampler(self, material: int | None) -> int:
        texture = self._get("materials", -1 if material is None else material, *_BASE_TEXTURE, "index")
        found = self._get("textures", -1 if texture is None else texture, "sampler")
        return -1 if found is None else found

    def _uv(self, geometry: str, uv: np.ndarray, material: int | None) -> np.ndarray:
        """Convert trimesh's texture coordinates `uv`: move the origin to the top left of the image.

        If the material has a texture transform (KHR_texture_transform), it is applied.
        """
        accessor = self._accessor(geometry, "TEXCOORD_0")
        u, v = uv[:, 0], 1 - uv[:, 1]  # trimesh turns them upside down
        if accessor.get("normalized"):
            u, v = u / _range(accessor), v / _range(accessor)
        texture = self._get("materials", -1 if material is None else material, *_BASE_TEXTURE) or {}
        how = _transform(texture)
        (su, sv), (ou, ov), angle = (
            how.get("scale", (1, 1)),
            how.get("offset", (0, 0)),
            how.get("rotation", 0),
        )
        u, v, c, s = u * su, v * sv, math.cos(angle), math.sin(angle)
        return np.stack([c * u + s * v + ou, c * v - s * u + ov], -1)


_BASE_TEXTURE = ("pbrMetallicRoughness", "baseColorTexture")
_BASE_FACTOR = ("pbrMetallicRoughness", "baseColorFactor")


def _transform(texture: Any) -> dict[str, Any]:
    extensions = texture.get("extensions", {}) if isinstance(texture, dict) else {}
    return extensions.get("KHR_texture_transform", {})


def _range(accessor: dict[str, Any]) -> float:
    """Return the integer that represents 1.0 in a normalized accessor."""
    return {5120: 127.0, 5121: 255.0, 5122: 32767.0, 5123: 65535.0}[accessor["componentType"]]


def _checked(path: Path, header: dict[str, Any]) -> list[str]:
    """Check a header for unsupported features and excessive sizes; return notes on parts that are left out.

    Raises:
        MediaError: if the file requires an unsupported extension, has sparse accessors, or declares too much
            data.
    """
    unknown = sorted(set(map(str, header.get("extensionsRequired", []))) - SUPPORTED)
    if unknown:
        names = ", ".join(unknown[:5])
        raise MediaError(path, f"requires the glTF extension {names}: export it without compression")
    accessors = header.get("accessors", [])
    if any("sparse" in a for a in accessors):
        raise MediaError(path, "has sparse accessors, which are not supported: export it without them")
    size = sum(a["count"] * BYTES[a["componentType"]] * COLUMNS[a["type"]] for a in accessors)
    if large := limits.ARRAY.exceeded(size, f"claims {limits.as_size(size)}"):
        raise MediaError(path, large)
    notes, primitives = [], [p for m in header.get("meshes", []) for p in m["primitives"]]
    fans = sum(p.get("mode", 4) == 6 for p in primitives)
    lines = sum(p.get("mode", 4) < 4 for p in primitives)
    notes += [f"{fans} triangle fans are not supported and are left out"] * (fans > 0)
    notes += [f"{lines} parts consist of points or lines and are left out"] * (lines > 0)
    scenes = len(header.get("scenes", []))
    notes += [f"contains {scenes} scenes, only the default one is imported"] * (scenes > 1)
    if header.get("skins"):
        notes.append("has a skeleton: the mesh is imported without its pose")
    if "EXT_mesh_gpu_instancing" in header.get("extensionsUsed", []):
        notes.append("EXT_mesh_gpu_instancing is not supported: only one copy of each mesh is imported")
    return notes
