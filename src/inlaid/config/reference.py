"""The recipe reference page and the JSON schema, generated from the sections."""

from __future__ import annotations

import json
from typing import Any

from inlaid.config.sections import (
    Config,
    Data,
    Full,
    Joint,
    LowRank,
    Matte,
    Memory,
    Merged,
    Model,
    Objective,
    Opaque,
    Optim,
    RgbaVae,
    Runtime,
    Sample,
    Source,
    Train,
)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors."""
    return Config.model_json_schema()


def reference_page() -> str:
    """Return the reference page of all sections in Markdown (`docs/reference/config.md`)."""
    sections = {
        "(top level)": Config,
        "model": Model,
        "data": Data,
        "data.sources": Source,
        "data.matte": Matte,
        "objective": Objective,
    }
    sections |= {
        "tuner (lora, dora, lokr, loha)": LowRank,
        "tuner (full)": Full,
        "alpha (opaque)": Opaque,
        "alpha (joint)": Joint,
        "alpha (merged)": Merged,
        "rgba_vae": RgbaVae,
        "optim": Optim,
        "train": Train,
    }
    sections |= {"sample": Sample, "memory": Memory, "runtime": Runtime}
    out = [
        "# Recipe reference",
        "",
        "Generated from the schema by `make docs`; a test keeps it current.",
        "",
    ]
    for title, section in sections.items():
        out += [
            f"## {title}",
            "",
            (section.__doc__ or "").strip().splitlines()[0],
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for key, field in section.model_fields.items():
            if field.description is None:
                continue
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            out.append(
                f"| `{key}` | {default} | {field.description.replace('|', '/').replace(chr(10), ' ')} |"
            )
        out.append("")
    return "\n".join(out)
