"""Targets of `inlaid export`: how other programs load the files, and what they cannot load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from inlaid.adapters.adapter import KINDS
from inlaid.networks.half_tokens import NOT_MERGEABLE

if TYPE_CHECKING:
    from inlaid.families import Family

ALL = ("lora", "dora", "lokr", "loha")

_FOLDER = '`pipe.transformer = AutoModel.from_pretrained("{path}")`'

_LAYERS = (
    '`pipe.transformer.load_lora_adapter("{path}", prefix="transformer", '
    'weight_name="pytorch_lora_weights.safetensors")`'
)


@dataclass(frozen=True)
class Program:
    """Target of `inlaid export`: a program or a file layout, and what it can represent."""

    name: str
    """Names of the programs that load this layout."""
    kinds: Sequence[str]
    """Adapter kinds that the target represents exactly."""
    adapter: str
    """How to load an adapter: Markdown text with the placeholder `{path}`."""
    whole: str = ""
    """How to load a whole model (full fine-tuning or merged adapter): Markdown text with `{path}`."""
    folder: bool = False
    """True if the export is a folder, False if it is one file."""
    whole_folder: bool = False
    """True if a whole model is a folder in diffusers layout, False if it is one file with original names."""
    lacks: str = ""
    """What the program cannot load, as text."""
    without: Mapping[str, str] = field(default_factory=dict)
    """Reasons why the target cannot represent other adapter kinds, by kind."""
    special: Mapping[str, str] = field(default_factory=dict)
    """Texts that replace `adapter`, by adapter kind or modality."""


PROGRAMS: Mapping[str, Program] = {
    "diffusers": Program(
        "diffusers, SimpleTuner, finetrainers, kijai's CogVideoXWrapper",
        ALL,
        '`pipe.load_lora_weights("{path}")`',
        _FOLDER,
        folder=True,
        whole_folder=True,
        lacks="LoHa loads with `inlaid.adapters.lycoris.load` only",
        special={
            "lokr": _LAYERS,
            "loha": '`inlaid.adapters.lycoris.load(pipe.transformer, Path("{path}"))`',
            "scene": _LAYERS,
        },
    ),
    "merged": Program(
        "diffusers and programs without adapters",
        ALL,
        "",
        _FOLDER,
        folder=True,
        whole_folder=True,
        lacks="joint alpha",
    ),
    "comfyui": Program(
        "ComfyUI, kijai's WanVideoWrapper, LightX2V, ai-toolkit",
        ALL,
        "copy `{path}` to `ComfyUI/models/loras`; node LoraLoaderModelOnly",
        "copy `{path}` to `ComfyUI/models/diffusion_models`; node Load Diffusion Model",
        lacks="joint alpha; adapters of image encoders; whole CogVideoX-5B-I2V",
    ),
    "musubi": Program(
        "musubi-tuner and other programs with kohya's names",
        ("lora", "lokr", "loha"),
        "`--lora_weight {path}` (A14B, high noise: `--lora_weight_high_noise`)",
        "`--dit {path}`",
        lacks="as adapters: DoRA, trained biases, convolutions (`patch_embedding`)",
        without={"dora": "it ignores the magnitudes"},
    ),
    "diffsynth": Program(
        "DiffSynth-Studio",
        ("lora",),
        '`pipe.load_lora(pipe.dit, "{path}")`',
        '`ModelConfig(path="{path}")`',
        lacks="as adapters: DoRA, LoKr, LoHa, trained biases, convolutions (`patch_embedding`)",
        without=dict.fromkeys(("dora", "lokr", "loha"), "it ignores them"),
    ),
    "wan-alpha": Program(
        "Wan-Alpha's inference script",
        ("lora", "dora"),
        "`--lora_path {path} --lora_ratio 1.0`",
        lacks="LoKr, LoHa, trained biases, convolutions, whole models; Wan 2.1 T2V only",
        without=dict.fromkeys(("lokr", "loha"), "it reads DoRA only"),
    ),
    "transpixeler": Program(
        "TransPixeler's inference script",
        ("lora",),
        "`--lora_path {path}`",
        lacks="everything but joint-alpha LoRA of rank 128 or less on the four attention layers",
        without=dict.fromkeys(("dora", "lokr", "loha"), "it reads LoRA only"),
    ),
    "genmo": Program(
        "genmo's Mochi, kijai's MochiWrapper (whole models)",
        ("lora",),
        "`--lora_path {path}`",
        "`{path}` in place of `dit.safetensors`",
        lacks="as adapters: DoRA, LoKr, LoHa, layers outside attention, trained biases",
        without=dict.fromkeys(("dora", "lokr", "loha"), "it reads LoRA only"),
    ),
    "midi-3d": Program(
        "MIDI-3D, TripoSG",
        ("lora", "dora"),
        "`pipe.init_custom_adapter(transformer_lora_config=...)` with the printed settings, then "
        '`pipe.load_custom_adapter("{path}", "lora_weights.safetensors")`',
        "replace the folder `transformer` of the checkpoint by `{path}`",
        folder=True,
        whole_folder=True,
        lacks="LoKr and LoHa as adapters",
        without=dict.fromkeys(("lokr", "loha"), "its loader reads LoRA and DoRA only"),
    ),
}
"""Targets of `inlaid export` by name, in display order."""

ALIASES: Mapping[str, str] = {"kohya": "musubi"}
"""Targets by alternative name."""


def targets(family: type[Family] | Family) -> list[str]:
    """Return the names of the `inlaid export` targets that a family supports."""
    return [t for t in PROGRAMS if t in ("diffusers", "merged") or t in family.programs]


def canonical(to: str) -> str:
    """Return the main name of an export target; `to` is this name or an alias.

    Raises:
        ValueError: if there is no such target.
    """
    target = ALIASES.get(to, to)
    if target not in PROGRAMS:
        names = ", ".join([*PROGRAMS, *ALIASES])
        raise ValueError(f"--to: `{to}` is not one of {names}")
    return target


def refusal(
    to: str, family: type[Family] | Family, kind: str, *, whole: bool = False, joint: bool = False
) -> str | None:
    """Return the reason why an export target cannot represent trained weights, or None if it can.

    Args:
        to: name of the target.
        family: model family.
        kind: kind of tuner: `lora`, `dora`, `lokr`, `loha` or `full`.
        whole: True to export the whole model, with the adapter merged into it.
        joint: True for an adapter that was trained with joint alpha.
    """
    target = canonical(to)
    program, whole = PROGRAMS[target], whole or kind == "full" or target == "merged"
    name = (family if isinstance(family, type) else getattr(family, "single", family).__class__).__name__
    if joint and (whole or target not in ("diffusers", "transpixeler")):
        return f"{to} applies an adapter to all tokens. {NOT_MERGEABLE[0].upper()}{NOT_MERGEABLE[1:]}"
    if target not in targets(family):
        others = ", ".join(f"`{t}`" for t in targets(family))
        return f"no {to} layout is known for {name}; use {others}"
    if target == "transpixeler" and not joint:
        return (
            f"{to} takes adapters of joint alpha only; this adapter applies to all tokens: "
            "use another target, or train with alpha.kind=joint"
        )
    if whole and not program.whole:
        return f"{to} takes adapters only, not a whole model; use `merged`"
    if not whole and kind not in program.kinds:
        why = program.without[kind]
        instead = "add --merge to export the whole model" if program.whole else "use `merged`"
        return f"{to} cannot represent {KINDS[kind]} ({why}): {instead}"
    return None if isinstance(family, type) else family.export_problem(target, whole)


def loading(to: str, path: Path, family: type[Family] | Family, kind: str, *, whole: bool) -> str:
    """Return one line of text that tells how to load an exported file or folder in the program `to`."""
    program = PROGRAMS[canonical(to)]
    text = program.special.get(kind) or program.special.get(family.modality) or program.adapter
    text = (program.whole if whole else text).format(path=path)
    return f"{program.name.split(',')[0]}: {text}".replace("`", "")


def table() -> list[dict[str, str]]:
    """Return one dictionary of texts per export target.

    The key `target` gives the name of the target, and `program` the programs that load the export. `adapter`
    and `whole` explain in Markdown how to load an adapter and a whole model. An empty text means that the
    program cannot load it. `lacks` states what else the program cannot load.
    """
    rows = []
    for target, program in PROGRAMS.items():
        file = f"export/{target}" if program.folder else f"NAME-{target}.safetensors"
        model = f"export/{target}" if program.whole_folder else f"NAME-{target}-model.safetensors"
        texts = {"target": target, "program": program.name, "lacks": program.lacks}
        texts |= {"adapter": program.adapter.format(path=file), "whole": program.whole.format(path=model)}
        rows.append(texts)
    return rows


def markdown() -> str:
    """Return a Markdown table of the programs that `inlaid export` supports, for the documentation."""
    lines = [
        "| `--to` | program | adapter | whole model (`--merge`, or full fine-tuning) | cannot take |",
        "|---|---|---|---|---|",
    ]
    for row in table():
        cells = f"`{row['target']}`", row["program"], row["adapter"], row["whole"], row["lacks"]
        lines.append(f"| {' | '.join(cell or '-' for cell in cells)} |")
    return "\n".join(lines)
