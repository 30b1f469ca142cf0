"""HTML viewer of meshes as a single file without external resources."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import numpy as np

from inlaid.media.mesh_render import PALETTE
from inlaid.media.meshes import BOUND

if TYPE_CHECKING:
    import trimesh


def viewer_page(meshes: Mapping[str, trimesh.Trimesh], title: str) -> str:
    """Return the HTML page; vertex coordinates are quantized to 16 bits of the box."""
    parts = []
    for i, (name, one) in enumerate(meshes.items()):
        steps = (one.vertices / BOUND * 32767).round().clip(-32767, 32767).astype("<i2")
        parts.append(
            {
                "name": name,
                "color": PALETTE[i % len(PALETTE)],
                "points": base64.b64encode(steps.tobytes()).decode(),
                "faces": base64.b64encode(np.asarray(one.faces, "<u4").tobytes()).decode(),
            }
        )
    text = Template((Path(__file__).with_name("templates") / "viewer.html").read_text("utf-8"))
    data = json.dumps(parts).replace("</", "<\\/")
    return text.substitute(title=escape(title), parts=data)
