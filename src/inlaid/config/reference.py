"""Reference page of all recipe keys, generated from the section classes."""

from __future__ import annotations

import json

from inlaid.config import sections as s


def reference_page() -> str:
    """Return the reference page of all sections (`docs/reference/config.md`) as Markdown."""
    sections = {
        "(top level)": s.Config,
        "model": s.Model,
        "data": s.Data,
        "data.sources": s.Source,
        "data.matte": s.Matte,
        "objective": s.Objective,
    }
    sections |= {
        "tuner (lora, dora, lokr, loha)": s.LowRank,
        "tuner (full)": s.Full,
        "alpha (opaque)": s.Opaque,
        "alpha (joint)": s.Joint,
        "alpha (merged)": s.Merged,
        "rgba_vae": s.RgbaVae,
        "optim": s.Optim,
        "train": s.Train,
    }
    sections |= {"sample": s.Sample, "memory": s.Memory, "runtime": s.Runtime}
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
