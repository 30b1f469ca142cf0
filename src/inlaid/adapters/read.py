"""Reader of adapter files in the layouts of the common trainers.

All layouts are converted to an `adapter.Adapter`. diffusers ignores the files of most other trainers with
only a warning, and discards LoRA alpha without a warning. `read_adapter` uses every tensor of a file, or
raises an error.

DoRA is defined as in peft (Liu et al. 2024, https://arxiv.org/abs/2402.09353): each row of the weight is
W' = m (W + s B A) / ||W + s B A||.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from inlaid.adapters.adapter import METADATA_KEY, Adapter, Layout
from inlaid.adapters.dora_scale import DORA_RULE_KEY, DoraRule, from_dora_scale, fused_weight
from inlaid.adapters.factors import Factors, as_lora, factors_of, full_rank
from inlaid.adapters.full_weights import full_weights
from inlaid.adapters.layers import base_layer, check_fit, low_rank_product, row_norms, some_of
from inlaid.adapters.lora_config import HUGE, alpha_of, find_pattern, peft_type
from inlaid.adapters.names import Target
from inlaid.adapters.parse import Layer, Parsed, parse
from inlaid.adapters.source import PLAIN_ALPHA, open_source
from inlaid.reading import reading

if TYPE_CHECKING:
    from inlaid.families import Family

Base = nn.Module | Callable[[], nn.Module] | None
"""Network without adapters, or a function that loads it when it is needed."""


@dataclass(frozen=True)
class Lycoris:
    """LoKr or LoHa adapter in memory. Layers have diffusers names. Some layers may be LoRA."""

    layers: Mapping[str, Factors]
    layout: Layout
    alpha_from: str
    """Source of the LoRA alpha, as text."""
    notes: Sequence[str] = ()
    header: Mapping[str, str] = field(default_factory=dict)
    """Metadata of the file, without the configuration."""
    differences: Mapping[str, Tensor] = field(default_factory=dict)
    """Changes to parameters without low-rank factors, by name. They can only be merged."""


def read_adapter(
    path: str | Path,
    family: type[Family] | Family,
    *,
    alpha: float | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    base: Base = None,
    dora_scale: DoraRule | None = None,
    expert: str | None = None,
    merging: bool = False,
    skip_missing: bool = False,
) -> Adapter:
    """Read an adapter in any known layout as a LoRA or DoRA, using every tensor of the file.

    LoKr and LoHa are converted to a LoRA with the same update, which can be large. `read_any` keeps them.

    Args:
        path: adapter file, folder that contains one, or run folder.
        family: model family that defines the module names.
        alpha: LoRA alpha for files that store none. Default: the rank of each module; a note is added.
        shapes: weight shapes of the network's layers, from `layer_shapes`, to check that the adapter fits.
        base: network without adapters. Required for files with `dora_scale`, with magnitudes for only some
            layers, or with complete weights instead of factors. If `merging` is True, also required for files
            with full weight differences.
        dora_scale: meaning of a `dora_scale` (out, 1) in the file. With `comfyui`, it multiplies
            (W + s B A) / ||W||. With `merged` (LyCORIS), it multiplies (W + s B A) / ||W + s B A||. Not
            needed for files written by inlaid, which store it.
        expert: expert whose adapter is read (`high` or `low`), for files with adapters of both experts.
        merging: accept changes that an adapter cannot represent, such as full weight differences. They can
            only be merged into the base model.
        skip_missing: leave out layers that the network lacks, and add a note.

    Raises:
        ValueError: if the file is damaged, has an unknown layout, does not fit the network, or contains
            tensors that cannot be represented as a LoRA or DoRA.
    """
    options = (alpha, shapes, base, dora_scale, expert, merging, skip_missing)
    with reading(Path(path)):
        found = _read(Path(path), family, *options)
        return found if isinstance(found, Adapter) else lora_of(found, shapes)


def read_any(
    path: str | Path,
    family: type[Family] | Family,
    *,
    alpha: float | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    base: Base = None,
    dora_scale: DoraRule | None = None,
    expert: str | None = None,
    skip_missing: bool = False,
) -> Adapter | Lycoris:
    """Read an adapter in the same way as `read_adapter`, but do not convert LoKr and LoHa to LoRA."""
    with reading(Path(path)):
        return _read(Path(path), family, alpha, shapes, base, dora_scale, expert, False, skip_missing)


def _read(
    path: Path,
    family: type[Family] | Family,
    alpha: float | None,
    shapes: Mapping[str, tuple[int, ...]] | None,
    base: Base,
    dora_scale: DoraRule | None,
    expert: str | None,
    merging: bool,
    skip_missing: bool,
) -> Adapter | Lycoris:
    source = open_source(path, alpha, expert)
    parsed = parse(source, family, shapes or ())
    notes: list[str] = []
    if skip_missing and shapes is not None:
        notes += _skip(parsed, shapes)
    network = base if isinstance(base, nn.Module) else None
    if base is not None and network is None and _needs_base(parsed, merging):
        network = base()
    full = full_weights(parsed, network, merging=merging, skip_missing=skip_missing)
    problems = [*parsed.problems, *full.problems]
    strange = [m for m in parsed.modules if not any(re.fullmatch(t, m) for t in family.targets)]
    if source.published and strange:  # other files are checked against the checkpoint's shapes
        problems.append(
            f"adapter for {source.config_from}, with layers that this family does not have "
            f"({some_of(strange)})"
        )
    if problems:
        raise ValueError(f"{source.path}: " + "; ".join(problems))
    alphas, sources = alphas_of(parsed, alpha)
    notes = [*parsed.notes, *full.notes, *notes, *_alpha_notes(parsed, alphas, sources)]
    origin = sources.most_common(1)[0][0] if sources else "no factors"
    header = {
        k: v
        for k, v in source.header.items()
        if k not in (METADATA_KEY, DORA_RULE_KEY, "format", *PLAIN_ALPHA, "lycoris_config")
    }
    if parsed.kinds - {"lora"}:
        if full.biases or full.layers:
            changed = some_of([*full.biases, *full.layers])
            raise ValueError(
                f"{source.path}: LoKr or LoHa with whole biases or layers that differ from the base model "
                f"({changed}): one adapter cannot represent both"
            )
        about = Lycoris({}, parsed.layout, origin, notes, header, full.parameters)
        return _lycoris(parsed, alphas, shapes, about, family)
    _refuse_overflow(parsed, alphas)
    made = _Made(parsed, shapes or {}, network, dora_scale)
    for layer in parsed.layers.values():
        made.add(layer, alphas[layer.name])
    for module, delta in full.layers.items():
        a, b = full_rank(delta)
        made.put(module, {"A": a, "B": b}, float(a.shape[0]))
    made.finish(full.biases, family)
    if full.layers:
        notes.append(
            f"{len(full.layers)} whole layers ({some_of(full.layers)}) are an exact LoRA of full rank"
        )
    adapter = Adapter(
        made.tensors,
        made.alpha,
        parsed.layout,
        origin,
        (*notes, *made.notes),
        header,
        source.vector,
        full.parameters,
    )
    if shapes is not None:
        check_fit(adapter, shapes, source.path, family.widths)
    return adapter


def _needs_base(parsed: Parsed, merging: bool) -> bool:
    """Return whether reading the adapter requires the weights of the base model."""
    parts = [layer.parts.keys() for layer in parsed.layers.values()]
    marked = sum("magnitude" in p for p in parts)
    return (
        any("dora_scale" in p for p in parts)
        or 0 < marked < len(parts)
        or bool(parsed.wholes)
        or (merging and bool(parsed.differences))
    )


def _skip(parsed: Parsed, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Remove the adapter layers that the network does not have, and return a list with a note about them.

    If the network has none of the layers, nothing is removed. Without removed layers, the list is empty.
    """
    missing = {
        n: layer for n, layer in parsed.layers.items() if any(t.module not in shapes for t in layer.targets)
    }
    if not missing or len(missing) == len(parsed.layers):
        return []
    for name in missing:
        del parsed.layers[name]
    names = some_of(sorted(layer.label for layer in missing.values()), 12)
    return [f"left out {len(missing)} layers that the base model does not have ({names})"]


# --- LoRA alpha ---------------------------------------------------------------------------------------------


def alphas_of(parsed: Parsed, alpha: float | None) -> tuple[dict[str, float], Counter[str]]:
    """Return the LoRA alpha of each module, and a count of modules by the origin of their alpha.

    LyCORIS does not scale LoKr layers with two full factors. Their alpha and rank are therefore 1.

    Raises:
        ValueError: if the argument `alpha` contradicts the file, or is None although this file requires it.
    """
    source, out, sources = parsed.source, {}, Counter[str]()
    for name, layer in parsed.layers.items():
        rank = rank_of(parsed, layer)
        stored = alpha_of(source.config, name, rank)
        if layer.full and peft_type(source.config) != "LOKR":
            out[name], origin = 1.0, "LyCORIS's rule for two full factors (scale 1)"
        elif "alpha" in layer.parts:
            out[name], origin = float(layer.parts["alpha"].item()), "the file (.alpha of each layer)"
        elif stored is not None:
            out[name], origin = stored, source.config_from
        elif source.plain is not None:
            out[name], origin = source.plain
        elif source.ask_alpha and alpha is None:
            raise ValueError(f"{source.path}: {source.ask_alpha}")
        else:
            out[name], origin = (float(rank), "rank") if alpha is None else (float(alpha), "alpha argument")
        sources[origin] += 1
    fixed = {n for n, layer in parsed.layers.items() if layer.full}
    if alpha is not None and "alpha argument" not in sources and fixed != out.keys():
        others = {a for n, a in out.items() if n not in fixed and a != alpha}
        if others:
            raise ValueError(
                f"{source.path}: --alpha is {alpha:g}, but the file stores alpha "
                f"{some_of(sorted(f'{a:g}' for a in others))}: omit --alpha"
            )
    return out, sources


def rank_of(parsed: Parsed, layer: Layer) -> int:
    """Return the rank by which the LoRA alpha of a layer is divided.

    A LoKr whose two factors are full matrices has no rank. For such a layer, the result is the rank in peft's
    configuration, or 1 if the file was not written by peft.

    Raises:
        ValueError: if peft's configuration has no rank for the layer.
    """
    if layer.rank is not None:
        return layer.rank
    config = parsed.source.config
    if peft_type(config) != "LOKR":
        return 1
    patterns = config.get("rank_pattern") or {}
    key = find_pattern(patterns, layer.name)
    rank = config.get("r") if key is None else patterns[key]
    if rank is None:
        raise ValueError(
            f"{parsed.source.path}: {parsed.source.config_from} states no rank, by which peft divides alpha"
        )
    return rank


def _alpha_notes(parsed: Parsed, alphas: Mapping[str, float], sources: Counter[str]) -> list[str]:
    notes = []
    if sources and sources.most_common(1)[0][0] == "rank":
        notes.append(
            "warning: the file stores no alpha; alpha = rank is assumed (scale 1). The other common "
            "convention is alpha = 1 (scale 1 / rank): pass --alpha 1 if the effect is far too strong"
        )
    elif sources["rank"]:
        notes.append(f"{sources['rank']} layers store no alpha: alpha = rank is used, as in other programs")
    plain = parsed.source.plain
    if plain and plain[1] not in sources:
        used = sorted({f"{a:g}" for a in alphas.values()})
        if used != [f"{plain[0]:g}"]:
            notes.append(
                f"alpha is {plain[0]:g} in {plain[1]}, but {some_of(used)} in "
                f"{' and '.join(sorted(sources))}, which is used"
            )
    return notes


def _refuse_overflow(parsed: Parsed, alphas: Mapping[str, float]) -> None:
    """Check that no layer's update overflows in float32.

    Raises:
        ValueError: if a layer's update could overflow.
    """
    wild = []
    for layer in parsed.layers.values():
        sizes = [t.float().abs().max().item() for n, t in layer.parts.items() if n in "AB" or "_w" in n]
        if not math.prod(max(1.0, s) for s in sizes) * max(1.0, abs(alphas[layer.name])) < HUGE:
            wild.append(layer.label)
    if wild:
        raise ValueError(
            f"{parsed.source.path}: {len(wild)} layers with values or alpha so large that the update "
            f"overflows ({some_of(wild)})"
        )


# --- layers -------------------------------------------------------------------------------------------------


class _Made:
    """Builder that collects the tensors and the LoRA alpha of each diffusers layer of an adapter."""

    def __init__(
        self,
        parsed: Parsed,
        shapes: Mapping[str, tuple[int, ...]],
        base: nn.Module | None,
        rule: DoraRule | None,
    ) -> None:
        self.path, self.shapes, self.base = parsed.source.path, shapes, base
        self.rule = parsed.source.header.get(DORA_RULE_KEY, rule)
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.alpha: dict[str, float] = {}
        self.tensors: dict[str, Tensor] = {}
        self.notes: list[str] = []
        self.full = 0

    def add(self, layer: Layer, alpha: float) -> None:
        """Add one module of the file. If the module fuses several diffusers layers, each layer is added."""
        a, b = _without_ones(layer.parts["A"]), _without_ones(layer.parts["B"])
        parts, scale = {**layer.parts, "A": a, "B": b}, alpha / a.shape[0]
        if "dora_scale" in parts:
            weight = fused_weight(self.base, layer, self.path)
            parts, by_input = from_dora_scale(parts, scale, weight, self.rule, self.path)
            if by_input:
                self.full, alpha = self.full + 1, float(parts["A"].shape[0])
                scale = 1.0
        if "diff_b" in parts:
            parts = {**parts, "bias": parts["diff_b"].float() / scale}
        for target in layer.targets:
            own = {n: _rows(parts[n], n, target) for n in ("B", "bias", "magnitude") if n in parts}
            a, b = parts["A"], own["B"]
            if len(layer.targets) > 1:
                a, b = _without_zeros(a, b)
            a, b = _as_weight(a, b, self.shapes.get(target.module))
            self.put(
                target.module,
                {**own, "A": a, "B": b},
                alpha if a.shape[0] == parts["A"].shape[0] else scale * a.shape[0],
            )

    def put(self, module: str, parts: dict[str, Tensor], alpha: float) -> None:
        """Set the tensors and LoRA alpha of a layer."""
        self.parts[module], self.alpha[module] = parts, alpha

    def finish(self, biases: Mapping[str, Tensor], family: type[Family] | Family) -> None:
        """Add the changes of biases and missing DoRA magnitudes, and collect all tensors by peft's names.

        Raises:
            ValueError: if one peft adapter cannot contain all layers, or if the base model is needed but was
                not given.
        """
        marked = [m for m, p in self.parts.items() if "magnitude" in p]
        if self.full and marked:
            raise ValueError(
                f"{self.path}: dora_scale is per input column in some layers and per output row in others: "
                "merge it with its own trainer"
            )
        if self.full:
            self.notes.append(
                f"{self.full} layers have a dora_scale per input column, which peft's DoRA does not support: "
                "converted to an exact LoRA of full rank, which is as large as the network; better export "
                "merged"
            )
        if marked and biases:
            raise ValueError(f"{self.path}: DoRA with trained biases, which peft does not support")
        for module, delta in biases.items():
            scale = self.alpha[module] / self.parts[module]["A"].shape[0]
            self.parts[module]["bias"] = delta / scale + self.parts[module].get("bias", torch.zeros(()))
        if marked:
            self._magnitudes([m for m in self.parts if m not in marked])
        flat = [
            m
            for m, p in self.parts.items()
            if m not in self.shapes
            and p["A"].ndim == 2
            and any(re.fullmatch(c, m) for c in family.convolutions)
        ]
        if flat:
            raise ValueError(
                f"{self.path}: the factors of {some_of(flat)} do not state the size of the kernel: pass the "
                "base model (inlaid import --checkpoint)"
            )
        biased = any("bias" in p for p in self.parts.values())
        for module, parts in self.parts.items():
            if biased and "bias" not in parts:  # peft has biases in all layers or in none
                parts["bias"] = torch.zeros(parts["B"].shape[0])
            self.tensors |= _named(module, parts)

    def _magnitudes(self, bare: Sequence[str]) -> None:
        """Set each missing DoRA magnitude to the row norms of the merged weight.

        With these magnitudes, the layer computes the same output as plain LoRA.
        """
        if bare and self.base is None:
            raise ValueError(
                f"{self.path}: DoRA with {len(bare)} layers without a magnitude ({some_of(bare)}): pass "
                "the base model (inlaid import --checkpoint), from which the magnitudes are computed"
            )
        for module in bare:
            parts = self.parts[module]
            try:
                weight = base_layer(self.base, module).weight.detach().float()  # type: ignore[arg-type]
            except AttributeError:
                raise ValueError(f"{self.path}: the base model has no layer {module}") from None
            scale = self.alpha[module] / parts["A"].shape[0]
            update = low_rank_product(parts["A"], parts["B"], scale)
            if update.numel() != weight.numel():
                raise ValueError(f"{self.path}: {module} does not fit the base model")
            parts["magnitude"] = row_norms(weight + update.reshape(weight.shape))
        if bare:
            self.notes.append(
                f"{len(bare)} layers have no magnitude: given that of their merged weight, which is exact"
            )


def _rows(tensor: Tensor, name: str, target: Target) -> Tensor:
    return target.rows(tensor if name == "B" else tensor.reshape(-1))


def _without_ones(tensor: Tensor) -> Tensor:
    """Remove all axes of a factor after its second axis, if each of these has size 1."""
    return tensor.flatten(1) if all(n == 1 for n in tensor.shape[2:]) else tensor


def _without_zeros(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Reduce the rank of an update B A: remove the columns of B that are zero, and the same rows of A.

    One column remains if all are zero. Such columns occur in a fused layer, such as query-key-value, if each
    of its parts was trained with a separate LoRA.
    """
    used = b.flatten(2).abs().amax((0, 2)) > 0 if b.ndim > 2 else b.abs().amax(0) > 0
    used[0] |= not used.any()
    return (a, b) if used.all() else (a[used], b[:, used])


def _as_weight(a: Tensor, b: Tensor, shape: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Add kernel axes to the factors of a convolution; return other factors unchanged."""
    if shape is not None and len(shape) > 2 and a[0].numel() == math.prod(shape[1:]):
        a = a.reshape(-1, *shape[1:])
    if b.ndim == 2 and a.ndim > 2:
        b = b.reshape(*b.shape, *[1] * (a.ndim - 2))
    return a, b


def _named(module: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {f"{module}.lora_A.weight": parts["A"], f"{module}.lora_B.weight": parts["B"]}
    if "bias" in parts:
        out[f"{module}.lora_B.bias"] = parts["bias"].reshape(-1)
    if "magnitude" in parts:
        # peft stores the magnitudes of a convolution as (1, out, 1, ...).
        shape = (-1,) if parts["A"].ndim == 2 else (1, -1, *[1] * (parts["A"].ndim - 2))
        out[f"{module}.lora_magnitude_vector"] = parts["magnitude"].reshape(shape)
    return out


# --- LoKr and LoHa ------------------------------------------------------------------------------------------


def _lycoris(
    parsed: Parsed,
    alphas: Mapping[str, float],
    shapes: Mapping[str, tuple[int, ...]] | None,
    about: Lycoris,
    family: type[Family] | Family,
) -> Lycoris:
    """Return the adapter in a parsed file that has LoKr or LoHa layers."""
    _refuse_overflow(parsed, alphas)
    layers: dict[str, Factors] = {}
    for layer in parsed.layers.values():
        scale = alphas[layer.name] / rank_of(parsed, layer)
        if layer.kind == "lora" and layer.parts.keys() - {"A", "B", "alpha"}:
            raise ValueError(
                f"{parsed.source.path}: {layer.label}: LoRA with {', '.join(sorted(layer.parts))} beside "
                "LyCORIS layers: one adapter cannot represent both"
            )
        own = factors_of(layer, scale)
        if len({f.shape for f in own.values()}) > 1:
            raise ValueError(
                f"{parsed.source.path}: the outputs of {layer.label} cannot be split "
                f"among the layers it fuses"
            )
        layers |= own
    if shapes is not None:
        flat = {m: (s[0], math.prod(s[1:])) for m, s in shapes.items()}
        check_fit({m: f.shape for m, f in layers.items()}, flat, parsed.source.path, family.widths)
    return replace(about, layers=layers)


def lora_of(found: Lycoris, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Adapter:
    """Convert a LoKr or LoHa adapter to a LoRA with the same weight update.

    Raises:
        ValueError: if the LoRA exceeds the memory limit `limits.ARRAY`.
    """
    tensors, alphas, ranks = {}, {}, []
    for module, (a, b, alpha) in as_lora(found.layers).items():
        a, b = _as_weight(_without_ones(a), _without_ones(b), (shapes or {}).get(module))
        tensors |= _named(module, {"A": a, "B": b})
        alphas[module] = alpha
        ranks.append(a.shape[0])
    note = f"LoKr and LoHa layers are converted to an exact LoRA of ranks up to {max(ranks)}"
    notes = (*found.notes, note)
    return Adapter(
        tensors, alphas, found.layout, found.alpha_from, notes, found.header, differences=found.differences
    )
