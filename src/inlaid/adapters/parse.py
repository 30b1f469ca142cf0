"""Parsing of adapter files: group the tensors by layer, and find problems that prevent an import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from inlaid.adapters.adapter import Layout
from inlaid.adapters.layers import some_of
from inlaid.adapters.lora_config import find_pattern, peft_type
from inlaid.adapters.names import AmbiguousError, Found, Names, Target, layout_of, parse_key
from inlaid.adapters.source import Source

if TYPE_CHECKING:
    from inlaid.families import Family

DIFFERENCES = ("diff", "diff_b", "diff_m")
"""Parts of tensor names for changes without factors: to a weight, a bias and a modulation table."""

Kind = Literal["lora", "lokr", "loha"]

_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq", "mica")
"""Prefixes of `init_lora_weights` values with which peft also changes the base model."""

_OTHER_LAYERS = ("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora")
"""peft settings that make the update of a layer differ from s B A."""


@dataclass
class Layer:
    """Tensors of one adapted module in an adapter file."""

    name: str
    """Name of the module in the file, without prefix."""
    targets: tuple[Target, ...]
    """Layers in diffusers; several if the module fuses them."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Tensors by part, such as `A`, `B`, `alpha` or `lokr_w1`."""

    @property
    def label(self) -> str:
        """Name for messages: the name in diffusers, or for fused layers the name in the file."""
        return self.targets[0].module if len(self.targets) == 1 else self.name

    @property
    def kind(self) -> Kind:
        """Adapter kind of this layer."""
        kinds: tuple[tuple[str, Kind], ...] = (("lokr_", "lokr"), ("hada_", "loha"))
        found: list[Kind] = [kind for mark, kind in kinds if any(p.startswith(mark) for p in self.parts)]
        return found[0] if found else "lora"

    @property
    def full(self) -> bool:
        """True for a LoKr whose two factors are full matrices. Such a LoKr has no rank."""
        return self.kind == "lokr" and not any(p.endswith(("_a", "_b")) for p in self.parts)

    @property
    def rank(self) -> int | None:
        """Rank of the factors; None for LoKr with two full factors."""
        if self.kind == "lora":
            return self.parts["A"].shape[0]
        for name in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in self.parts:
                return self.parts[name].shape[0]
        return None


@dataclass(frozen=True)
class Difference:
    """Change of a parameter, stored as a full tensor instead of low-rank factors."""

    key: str
    module: str
    """Name of the module in the file, without prefix."""
    flat: bool
    part: Literal["diff", "diff_b", "diff_m"]
    tensor: Tensor


@dataclass(frozen=True)
class Whole:
    """Weight or bias that the file stores as a whole, not as a change."""

    key: str
    name: str
    """Name of the parameter in the file, without prefix and without parts that peft inserts."""
    copy: bool
    """True for a weight or bias of the original layer that an adapter layer wraps. Training does not change
    it, unless peft's `bias` is set."""
    tensor: Tensor


@dataclass(frozen=True)
class Parsed:
    """Content of an adapter file, grouped by layer."""

    source: Source
    names: Names
    layout: Layout
    layers: dict[str, Layer]
    """Adapted modules by their name in the file."""
    differences: list[Difference]
    wholes: list[Whole]
    problems: list[str]
    notes: list[str]

    @property
    def modules(self) -> list[str]:
        """Diffusers names of the adapted layers."""
        return [t.module for layer in self.layers.values() for t in layer.targets]

    @property
    def kinds(self) -> set[Kind]:
        """Adapter kinds of the layers."""
        return {layer.kind for layer in self.layers.values()}


def parse(source: Source, family: type[Family] | Family, layers: Iterable[str] = ()) -> Parsed:
    """Group the tensors of a file by layer.

    Args:
        source: opened file.
        family: model family, which knows the names of the layers.
        layers: names of a network's layers; without these, only layers that the family declares are known.
    """
    names = Names(family, layers)
    found: dict[str, Layer] = {}
    prefixes: dict[str, str] = {}
    adapters: set[str] = set()
    spellings: set[str] = set()
    zeros, unknown, problems = 0, [], []
    differences: list[Difference] = []
    wholes: list[Whole] = []
    for name, tensor in source.tensors.items():
        key = parse_key(name)
        if key.module is not None and key.part in DIFFERENCES and tensor.numel() and not tensor.any():
            zeros += 1
            continue
        if key.module is None or ".base_layer." in f".{key.module}.":
            wholes.append(_whole(name, key.rest, tensor))
            continue
        try:
            place: Found | None = names.find(key.module, key.flat)
        except AmbiguousError as error:
            problems.append(str(error))
            continue
        if key.part in DIFFERENCES:
            differences.append(Difference(name, key.module, key.flat, key.part, tensor))  # type: ignore[arg-type]
            continue
        if place is None:
            unknown.append(name)
            continue
        prefixes.setdefault(key.prefix, name)
        spellings.add(place.spelling)
        adapters.add(key.adapter)
        layer = found.setdefault(key.module, Layer(key.module, place.targets))
        if key.part in layer.parts:
            problems.append(f"`{name}` is present twice, under two names")
        layer.parts[key.part] = tensor
    differences = _beside_factors(found, differences)
    if not found:
        unknown += [w.key for w in wholes]
        wholes = []
    if len(prefixes) > 1:
        two = " and ".join(f"`{k}`" for k in prefixes.values())
        problems.append(f"mixes layouts ({two}): split it into one file per layout")
    if len(adapters - {""}) > 1:
        problems.append(
            f"contains several adapters ({', '.join(sorted(adapters))}): split it into one file per adapter"
        )
    places = Counter(t.module for layer in found.values() for t in layer.targets)
    problems += [f"{m} is present twice, under two names" for m, n in places.items() if n > 1]
    if unknown or not (found or differences or problems):
        problems.append(_unknown(unknown or ["no tensors at all"], names, bool(found)))
    layout = layout_of(next(iter(prefixes), ""))
    layout = "original" if layout == "bare" and "original" in spellings else layout
    notes = [*source.notes]
    notes += [f"ignored {zeros} weight differences that are all zero"] if zeros else []
    parsed = Parsed(source, names, layout, found, differences, wholes, problems, notes)
    problems += _problems(parsed)
    notes += _unused_patterns(parsed)
    return parsed


def _whole(key: str, rest: str, tensor: Tensor) -> Whole:
    name, copy = rest, False
    for part in (".base_layer.", ".original_module."):
        if part in name:
            name, copy = name.replace(part, "."), True
    before, mark, after = name.partition(".modules_to_save.")
    if mark:
        name = f"{before}.{after.rsplit('.', 1)[-1]}"
    return Whole(key, name, copy, tensor)


def _beside_factors(layers: Mapping[str, Layer], differences: Sequence[Difference]) -> list[Difference]:
    """Add the bias differences of layers with LoRA factors to these layers; return the other differences."""
    rest = []
    for each in differences:
        layer = layers.get(each.module)
        if layer and each.part == "diff_b" and layer.kind == "lora":
            layer.parts["diff_b"] = each.tensor
        else:
            rest.append(each)
    return rest


def _unknown(keys: Sequence[str], names: Names, some_known: bool) -> str:
    if not some_known:
        return (
            f"no tensor matches a layer of {names.family} ({some_of(keys)}): another architecture, or not an "
            "adapter"
        )
    return f"{len(keys)} tensors match no layer of {names.family} ({some_of(keys)})"


def _unused_patterns(parsed: Parsed) -> list[str]:
    """Return notes about patterns in the configuration that match no layer."""
    notes = []
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = parsed.source.config.get(name) or {}
        used = {find_pattern(patterns, module) for module in parsed.layers}
        unused = [p for p in patterns if p not in used]
        if unused and parsed.layers:
            notes.append(
                f"{len(unused)} patterns of {name} apply to no layer of the file ({some_of(unused)})"
            )
    return notes


# --- problems -----------------------------------------------------------------------------------------------


def _problems(parsed: Parsed) -> list[str]:
    """Return messages about problems that make a parsed file unusable."""
    out: list[str] = []
    half: dict[str, str] = {}
    for layer in parsed.layers.values():
        missing = _incomplete(layer)
        if missing:
            half[layer.label] = missing
        else:
            out += _misshapen(layer)
    if half:
        what = some_of(f"{m} has {parts}" for m, parts in half.items())
        lycoris = " of a LyCORIS adapter" if parsed.kinds - {"lora"} else ", A or B"
        out.append(f"{len(half)} layers lack a factor{lycoris} ({what})")
    wild = [layer.label for layer in parsed.layers.values() if not _finite(layer)]
    if wild:
        out.append(f"{len(wild)} layers with values that are not finite numbers ({some_of(wild)})")
    return out + _contradictions(parsed)


def _incomplete(layer: Layer) -> str:
    """Return text that lists a layer's tensors if a factor is missing, else an empty string."""
    have = layer.parts.keys()
    wanted: dict[str, tuple[set[str], ...]] = {
        "lora": ({"A"}, {"B"}),
        "loha": tuple({f"hada_w{i}_{x}"} for i in (1, 2) for x in "ab"),
        "lokr": (),
    }
    complete = all(names <= have for names in wanted[layer.kind])
    if layer.kind == "lokr":
        pairs = [{f"lokr_w{i}", f"lokr_w{i}_a", f"lokr_w{i}_b"} for i in (1, 2)]
        complete = all(have & names in ({min(names)}, names - {min(names)}) for names in pairs)
    return "" if complete else some_of(sorted(have), 9)


def _finite(layer: Layer) -> bool:
    """Return True if all tensors are real floating-point tensors with finite values.

    Alpha may also be an integer. It is not checked for LoKr with two full factors, which does not use it.
    """
    unused = {"alpha"} if layer.full else set()
    return all(
        (n == "alpha" or t.is_floating_point()) and t.float().isfinite().all()
        for n, t in layer.parts.items()
        if n not in unused and not t.is_complex()
    ) and not any(t.is_complex() for t in layer.parts.values())


def _misshapen(layer: Layer) -> list[str]:
    """Return messages about the invalid factor shapes and the unsupported parts of a layer.

    The layer must have all factors of its kind.
    """
    parts, label, out = layer.parts, layer.label, []
    pairs = {
        "lora": [("A", "B")],
        "loha": [("hada_w1_b", "hada_w1_a"), ("hada_w2_b", "hada_w2_a")],
        "lokr": [(f"lokr_w{i}_b", f"lokr_w{i}_a") for i in (1, 2) if f"lokr_w{i}_a" in parts],
    }[layer.kind]
    for right, left in pairs:
        a, b = parts[right], parts[left]
        if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
            out.append(
                f"{label}: factors of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied"
            )
    strange = sorted(n for n in parts if n.endswith(("_t1", "_t2")))
    if strange:
        out.append(f"{label}: {', '.join(strange)}: Tucker decomposition is not supported: merge it instead")
    if layer.kind != "lora":
        flat = [
            n for n in parts if n.startswith(("lokr_", "hada_")) and (t := parts[n]).ndim >= 2 and _flat(t)
        ]
        bad = [n for n in parts if n.startswith(("lokr_", "hada_")) and n not in flat and n not in strange]
        out += [f"{label}: {n} has shape {tuple(parts[n].shape)}, not two axes" for n in sorted(bad)]
        own = "hada_" if layer.kind == "loha" else "lokr_"
        mixed = sorted(p for p in parts if not p.startswith(own) and p != "alpha")
        if mixed:
            why = "which peft does not support: merge it with its own trainer"
            why = f"weight decomposition of LyCORIS adapters, {why}" if mixed == ["dora_scale"] else why
            out.append(f"{label}: {layer.kind} with {', '.join(mixed)}: {why}")
        if "hada_w1_a" in parts and not out:
            first, second = ((parts[f"hada_w{i}_a"].shape[0], parts[f"hada_w{i}_b"].shape[1]) for i in (1, 2))
            if first != second:
                out.append(f"{label}: products of shapes {first} and {second} cannot be multiplied")
    elif not out:
        for two in (("bias", "diff_b"), ("magnitude", "dora_scale")):
            if {*two} <= parts.keys():
                out.append(f"{label}: both {two[0]} and {two[1]}, which state the same thing")
        for name in ("magnitude", "bias", "diff_b"):
            if name in parts and parts[name].numel() != parts["B"].shape[0]:
                out.append(
                    f"{label}: {name} has {parts[name].numel()} values for {parts['B'].shape[0]} outputs"
                )
        wide = sum(1 for t in layer.targets if parts["B"].shape[0] % max(1, t.parts * (1 + t.swapped)))
        if wide:
            out.append(f"{label}: {parts['B'].shape[0]} outputs cannot be split among the layers it fuses")
    empty = sorted(n for n, t in parts.items() if not t.numel())
    if empty:
        out.append(f"{label}: {', '.join(empty)} without values")
    elif "alpha" in parts and not layer.full and (parts["alpha"].numel() != 1 or not parts["alpha"].any()):
        some = parts["alpha"].flatten()[:4].tolist()
        out.append(f"{label}: alpha is {some[0] if parts['alpha'].numel() == 1 else some}")
    return out


def _flat(tensor: Tensor) -> bool:
    """Return whether all axes after the second have size 1."""
    return all(n == 1 for n in tensor.shape[2:])


def _contradictions(parsed: Parsed) -> list[str]:
    """Return a message for each contradiction and each unsupported feature in an adapter file.

    A contradiction is a difference between the tensors and the stored configuration.
    """
    out, config = [], parsed.source.config
    parts = {layer.label: layer.parts for layer in parsed.layers.values()}
    magnitudes = [m for m, p in parts.items() if {"magnitude", "dora_scale"} & p.keys()]
    if magnitudes and any({"bias", "diff_b"} & p.keys() for p in parts.values()):
        out.append("DoRA with trained biases, which peft does not support: merge it with its own trainer")
    if config.get("use_dora") and not magnitudes and "lora" in parsed.kinds:
        out.append("the configuration has use_dora, but the file has no magnitudes")
    kind, kinds = peft_type(config), {k.upper() for k in parsed.kinds}
    if kind not in ("LORA", "LOKR", "LOHA"):
        out.append(f"the configuration has peft_type {config['peft_type']}, not LORA, LOKR or LOHA")
    elif "peft_type" in config and kinds and kinds != {kind}:
        out.append(
            f"the configuration has peft_type {config['peft_type']}, the tensors are of {some_of(kinds)}"
        )
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(_CHANGED_BASE):
        out.append(
            f"trained with init_lora_weights={init}, which changes the base model: convert it with peft first"
        )
    used = [name for name in _OTHER_LAYERS if config.get(name)]
    if used:
        out.append(f"trained with {', '.join(used)}, which peft computes differently from a LoRA")
    full = [d for d in parsed.differences if d.part == "diff" and d.module in parsed.layers]
    if full:
        out.append(
            f"{len(full)} layers with both factors and a full weight difference "
            f"({some_of(d.key for d in full)}): programs disagree about their meaning"
        )
    return out
