"""glTF files written by hand, with features that trimesh does not write."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"f4": 5126, "u1": 5121, "u2": 5123, "u4": 5125, "i2": 5122}
SHAPES = {1: "SCALAR", 2: "VEC2", 3: "VEC3", 4: "VEC4"}

SQUARE = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], "f4")
FACES = np.array([0, 1, 2, 0, 2, 3], "u2")
CORNERS = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], "f4")
"""Texture coordinates of the corners of `SQUARE`."""


class Builder:
    """Collects arrays in one buffer."""

    def __init__(self) -> None:
        self.data = b""
        self.header: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": "by hand"},
            "accessors": [],
            "bufferViews": [],
            "meshes": [],
            "nodes": [],
            "scenes": [{"nodes": [0]}],
        }

    def view(self, raw: bytes) -> int:
        self.data += b"\0" * (-len(self.data) % 4)
        view = {"buffer": 0, "byteOffset": len(self.data), "byteLength": len(raw)}
        self.header["bufferViews"].append(view)
        self.data += raw
        return len(self.header["bufferViews"]) - 1

    def array(self, values: np.ndarray, **more: Any) -> int:
        columns = 1 if values.ndim == 1 else values.shape[1]
        kind = {"componentType": TYPES[values.dtype.str[1:]], "type": SHAPES[columns], "count": len(values)}
        self.header["accessors"].append({"bufferView": self.view(values.tobytes()), **kind, **more})
        return len(self.header["accessors"]) - 1

    def primitive(self, points: np.ndarray = SQUARE, material: int | None = None, **attributes: Any) -> dict:
        """A square, with attributes such as COLOR_0 as arrays or as accessors."""
        found = {k: self.array(v) if isinstance(v, np.ndarray) else v for k, v in attributes.items()}
        out: dict[str, Any] = {"attributes": {"POSITION": self.array(points), **found}}
        out["indices"] = self.array(FACES)
        return out if material is None else {**out, "material": material}

    def mesh(self, *primitives: dict, name: str | None = None) -> int:
        self.header["meshes"].append({"primitives": list(primitives)} | ({"name": name} if name else {}))
        return len(self.header["meshes"]) - 1

    def node(self, name: str | None = None, **values: Any) -> int:
        self.header["nodes"].append(values | ({"name": name} if name is not None else {}))
        return len(self.header["nodes"]) - 1

    def write(self, path: Path, uri: str | None = None) -> Path:
        """Write a `.glb`, or a `.gltf` with an embedded buffer or with the buffer `uri`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer: dict[str, Any] = {"byteLength": len(self.data)}
        if path.suffix == ".gltf":
            buffer["uri"] = (
                uri or "data:application/octet-stream;base64," + base64.b64encode(self.data).decode()
            )
            path.write_text(json.dumps({**self.header, "buffers": [buffer]}), "utf-8")
            return path
        text = json.dumps({**self.header, "buffers": [buffer]}).encode()
        text += b" " * (-len(text) % 4)
        data = self.data + b"\0" * (-len(self.data) % 4)
        chunks = (
            struct.pack("<I4s", len(text), b"JSON") + text + struct.pack("<I4s", len(data), b"BIN\0") + data
        )
        path.write_bytes(struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks)
        return path
