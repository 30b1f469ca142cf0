"""`inlaid inspect`: description of an adapter, RGBA VAE, cache file, checkpoint, run or model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from inlaid.adapters.adapter import KINDS, METADATA_KEY, PEFT_WEIGHTS
from inlaid.adapters.dora_scale import DORA_RULE_KEY
from inlaid.adapters.full_weights import full_weights
from inlaid.adapters.layers import some_of
from inlaid.adapters.lora_config import peft_type
from inlaid.adapters.names import split_block
from inlaid.adapters.parse import Parsed, parse
from inlaid.adapters.read import alphas_of, rank_of
from inlaid.adapters.source import Source, load_safetensors, open_experts
from inlaid.files import read_metadata
from inlaid.networks import rgba_vae_checkpoint
from inlaid.networks.domain_embedding import EMBEDDING
from inlaid.networks.rgba_vae_checkpoint import FILES, FOLDER
from inlaid.reading import parse_json, read_text, reading
from inlaid.text import printable


@dataclass(frozen=True)
class Inspection:
    """Description of the content of a file or folder."""

    path: Path
    kind: Literal[
        "adapter", "cached item", "tensors", "model", "pipeline", "checkpoint", "run", "folder", "RGBA VAE"
    ]
    facts: Mapping[str, str]
    """Properties of the content by name, in display order."""
    notes: Sequence[str] = ()
    parts: Sequence[Inspection] = ()
    """Descriptions of the files inside a folder."""


def inspect_path(path: str | Path) -> Inspection:
    """Describe an adapter in any layout, an RGBA VAE, a cache file, a checkpoint, a run or a model.

    No network is loaded.

    Raises:
        ValueError: if the path contains none of these, or a file is damaged.
    """
    with reading(Path(path)):
        return _inspect(Path(path))


def _inspect(path: Path) -> Inspection:
    if path.is_file():
        return _inspect_file(path)
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    if (path / "model_index.json").is_file():
        index = _json(path / "model_index.json")
        parts = {k: str(v[1]) for k, v in index.items() if isinstance(v, list) and len(v) == 2 and v[1]}
        rest = {k: str(v) for k, v in index.items() if not isinstance(v, list) and not k.startswith("_")}
        facts = {"class": str(index.get("_class_name")), **parts, **rest, "size": _bytes(path)}
        return Inspection(path, "pipeline", facts)
    if (path / "config.json").is_file():
        return (
            _inspect_rgba_vae(path) if "rgba_vae_id" in _json(path / "config.json") else _inspect_model(path)
        )
    adapter = tuple(inspect_path(path / n) for n in ("adapter", FOLDER) if (path / n).is_dir())
    if (path / "config.yaml").is_file():
        steps = sorted(int(p.name[5:]) for p in path.glob("checkpoints/step-*") if p.name[5:].isdigit())
        return Inspection(
            path, "run", {"checkpoints": some_of(steps, 12) or "none", "size": _bytes(path)}, (), adapter
        )
    if (path / "state.json").is_file():
        facts = {"step": str(_json(path / "state.json").get("step")), "size": _bytes(path)}
        trainer = [_inspect_file(p) for p in sorted(path.glob("*.safetensors"))]
        return Inspection(path, "checkpoint", facts, (), (*adapter, *trainer))
    files = [p for p in sorted(path.glob("*.safetensors")) if p.name != EMBEDDING]
    files = files or [p for kind in ("*.bin", "*.pt", "*.pth") for p in sorted(path.glob(kind))]
    found = [_inspect_file(p) for p in files]
    if not found:
        raise ValueError(f"{path}: no adapter, cached item, checkpoint, run or model in this folder")
    companions = tuple(_inspect_file(p) for p in sorted(path.glob(f"*/{PEFT_WEIGHTS}")))  # of `companions`
    if len(found) == 1:
        return replace(found[0], parts=companions)
    return Inspection(path, "folder", {"size": _bytes(path)}, (), (*found, *companions))


def describe(inspection: Inspection, indent: str = "") -> str:
    """Format an inspection as text for a terminal, with `indent` before each line."""
    width = max(map(len, inspection.facts), default=0)
    lines = [f"{indent}{inspection.path}: {inspection.kind}"]
    lines += [f"{indent}  {k:<{width}}  {v}" for k, v in inspection.facts.items()]
    lines += [f"{indent}  {note}" for note in inspection.notes]
    lines += [describe(part, indent + "  ") for part in inspection.parts]
    return printable("\n".join(lines))


def _inspect_file(path: Path) -> Inspection:
    if path.suffix == ".safetensors":
        with load_safetensors(path) as file:
            header = read_metadata(file)
            sizes = _sizes(file)
    else:
        header, sizes = {}, {}
        for source in open_experts(path).values():
            sizes |= _sizes_of(source)
    trainer = any(k.startswith("weights.") for k in sizes)
    if not trainer and any(mark in k for k in sizes for mark in _ADAPTER_MARKS):
        experts = open_experts(path)
        if len(experts) == 1:
            return _inspect_adapter(next(iter(experts.values())))
        facts = {"experts": " and ".join(map(str, experts)), "size": _bytes(path)}
        return Inspection(path, "adapter", facts, (), [_inspect_adapter(s) for s in experts.values()])
    facts = _summary(sizes) | {"size": _bytes(path)} | _texts(header)
    if "inlaid_cache" in header:
        return Inspection(path, "cached item", {k: f"{d} {list(s)}" for k, (s, d) in sizes.items()} | facts)
    return Inspection(path, "tensors", facts)


_ADAPTER_MARKS = ("lora_", "lora.", "dora_scale", "lokr_", "hada_", ".matrix_A.", "modality_embedding")
"""Parts of tensor names that occur only in adapters."""


def _sizes(file: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and dtype of each tensor in an open safetensors file, without reading tensor data."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U8": "uint8", "I64": "int64"}
    slices = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118
    return {
        k: (tuple(s.get_shape()), names.get(str(s.get_dtype()), str(s.get_dtype())))
        for k, s in slices.items()
    }


def _sizes_of(source: Source) -> dict[str, tuple[tuple[int, ...], str]]:
    return {k: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in source.tensors.items()}


def _inspect_adapter(file: Source) -> Inspection:
    from inlaid import families

    path = file.path
    known = {name: families.get(name) for name in families.names()}
    parsed = {name: parse(file, family) for name, family in known.items()}
    any_family = next(iter(known.values()))
    if path.name == PEFT_WEIGHTS and not any(p.layers for p in parsed.values()):
        layers = file.config.get("target_modules") or ()
        parsed = {f"none (adapter of {path.parent.name})": parse(file, any_family, layers)}
    most = max(len(p.layers) + len(p.differences) for p in parsed.values())
    names = [n for n, p in parsed.items() if len(p.layers) + len(p.differences) == most]
    about = _summary(_sizes_of(file)) | {"size": _bytes(path)} | _texts(file.header)
    best = parsed[names[0]]
    if not best.layers:
        first = next(iter(file.tensors), "none")
        notes = (f"matches no installed family ({', '.join(known)}); first tensor: {first}",)
        return Inspection(path, "adapter", about, notes)
    facts = {"family": " or ".join(names), "layout": best.layout, "modules": _modules(best.modules)}
    kinds = sorted(best.kinds)
    facts |= {"kind": some_of(KINDS[k] for k in kinds)} if kinds != ["lora"] else {}
    facts |= {"expert": f"{file.expert} noise"} if file.expert else {}
    if file.header.get("inlaid_alpha") == "joint":
        vector = "no" if file.vector is None else f"yes, {file.vector.numel()} values"
        facts |= {"transparency": f"joint, {file.config_from}" if file.published else "joint"}
        facts |= {"domain embedding": vector}
    problems = [*best.problems, *full_weights(best, None, merging=False, skip_missing=False).problems]
    notes = [*best.notes]
    if not problems:
        try:
            facts |= _alpha_facts(best)
        except ValueError as error:
            problems.append(str(error).removeprefix(f"{path}: "))
    notes += [f"cannot be imported: {p}" for p in problems]
    parts = {k for layer in best.layers.values() for k in layer.parts}
    relative = f"relative to {file.header.get(DORA_RULE_KEY, 'an unnamed norm')}; import needs the base model"
    dora = "yes, magnitudes as in peft" if "magnitude" in parts else f"yes, dora_scale {relative}"
    facts |= {"DoRA": dora if {"magnitude", "dora_scale"} & parts else "no"} if kinds == ["lora"] else {}
    return Inspection(path, "adapter", facts | about, tuple(notes))


def _alpha_facts(parsed: Parsed) -> dict[str, str]:
    """Describe the rank and LoRA alpha of an adapter's layers, and say where alpha was found."""
    alphas, sources = alphas_of(parsed, None)
    source = sources.most_common(1)[0][0]
    full = [layer.full and peft_type(parsed.source.config) != "LOKR" for layer in parsed.layers.values()]
    ranks = (
        "full factors" if f else rank_of(parsed, layer)
        for f, layer in zip(full, parsed.layers.values(), strict=True)
    )
    rank = _counted(ranks)
    values = _counted(f"{alphas[n]:g}" for n, layer in parsed.layers.items())
    if source == "rank":
        return {"rank": rank, "alpha": f"not stored; alpha = rank = {values} assumed"}
    if all(full):
        return {"rank": rank, "alpha": f"not used: {source}"}
    return {"rank": rank, "alpha": f"{values}, from {source}"}


def _inspect_model(folder: Path) -> Inspection:
    config = _json(folder / "config.json")
    sizes: dict[str, tuple[tuple[int, ...], str]] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with load_safetensors(shard) as file:
            sizes |= _sizes(file)
    kind = str(config.get("_class_name") or ", ".join(config.get("architectures") or ["unknown"]))
    facts = {"class": kind} | _summary(sizes) | {"size": _bytes(folder)}
    settings = {
        k: str(v) for k, v in config.items() if isinstance(v, int | float | str) and not k.startswith("_")
    }
    return Inspection(folder, "model", facts | settings)


def _inspect_rgba_vae(folder: Path) -> Inspection:
    values = rgba_vae_checkpoint.read_config(folder)
    facts = {k: str(v) for k, v in values.items() if k not in ("colors", "format")}
    parts = []
    for part in values.get("parts", FILES):
        with load_safetensors(folder / f"{FILES[part]}.safetensors") as file:
            parts.append(Inspection(folder / f"{FILES[part]}.safetensors", "tensors", _summary(_sizes(file))))
    return Inspection(folder, "RGBA VAE", facts | {"size": _bytes(folder)}, (), tuple(parts))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_text(path))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def _summary(sizes: Mapping[str, tuple[Sequence[int], str]]) -> dict[str, str]:
    values = sum(math.prod(s) for s, _ in sizes.values())
    return {"tensors": f"{len(sizes)}, {values:,} values", "types": _counted(d for _, d in sizes.values())}


def _modules(parts: Sequence[str]) -> str:
    blocks = sorted({int(s.split(".")[-2]) for s, _ in map(split_block, parts) if s})
    whole = blocks == list(range(len(blocks)))
    span = f" in {len(blocks)} blocks" + ("" if whole else f" ({some_of(blocks, 8)})") if blocks else ""
    return f"{len(parts)}{span}: {some_of(sorted({leaf for _, leaf in map(split_block, parts)}), 12)}"


def _counted(values: Iterable[object]) -> str:
    counts = Counter(str(v) for v in values)
    return ", ".join(v if len(counts) == 1 else f"{v} ({n})" for v, n in counts.most_common(6))


def _texts(header: Mapping[str, str]) -> dict[str, str]:
    texts = {
        k: " ".join(v.split()) for k, v in header.items() if k not in (METADATA_KEY, "format", DORA_RULE_KEY)
    }
    return {k: v if len(v) <= 100 else f"{v[:97]}..." for k, v in texts.items()}


def _bytes(path: Path) -> str:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and not p.is_symlink()]
    size = float(sum(p.stat().st_size for p in files))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
