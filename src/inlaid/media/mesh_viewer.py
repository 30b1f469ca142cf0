"""HTML viewer for meshes: a single file without external resources."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np

from inlaid.media.isosurface import REACH
from inlaid.media.mesh_render import PALETTE

if TYPE_CHECKING:
    import trimesh

TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
)


def viewer_page(meshes: Mapping[str, trimesh.Trimesh], title: str) -> str:
    """Return an HTML page that displays named meshes; vertex coordinates are stored as 16-bit integers."""
    parts = []
    for i, (name, mesh) in enumerate(meshes.items()):
        quantized = (mesh.vertices / REACH * 32767).round().clip(-32767, 32767).astype("<i2")
        parts.append(
            {
                "name": name,
                "color": PALETTE[i % len(PALETTE)],
                "points": base64.b64encode(quantized.tobytes()).decode(),
                "faces": base64.b64encode(np.asarray(mesh.faces, "<u4").tobytes()).decode(),
            }
        )
    return TEMPLATES.get_template("viewer.html").render(title=title, parts=parts)
