"""Tensors of an adapter file that are not low-rank factors: full differences, whole weights, whole biases.

A full difference is the change of a parameter, stored without factors. Step-distillation LoRAs contain full
differences of norms, biases and modulation tables. peft stores whole biases (`bias="all"`, `"lora_only"`) and
whole layers (`modules_to_save`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from inlaid.adapters.layers import some_of
from inlaid.adapters.names import Names
from inlaid.adapters.parse import Parsed, Whole


@dataclass
class FullWeights:
    """Changes of parameters relative to the base model, as whole tensors in float32."""

    biases: dict[str, Tensor] = field(default_factory=dict)
    """Bias differences of adapted layers, by layer."""
    layers: dict[str, Tensor] = field(default_factory=dict)
    """Weight differences of layers without factors, by layer."""
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """Differences of other parameters, by name; they can only be merged."""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def full_weights(parsed: Parsed, base: nn.Module | None, *, merging: bool, skip_missing: bool) -> FullWeights:
    """Return the changes to the base model that a parsed file stores as full tensors.

    Args:
        parsed: content of the file.
        base: network without adapters. Required if the file contains whole weights, and for merging.
        merging: accept changes that an adapter cannot represent, such as those of norms. They can only be
            merged. If False, they are reported as problems.
        skip_missing: leave out differences of parameters that the base model lacks, and add a note. If
            False, they are reported as problems.
    """
    out = FullWeights()
    own = {name: p.detach() for name, p in (base.named_parameters() if base is not None else ())}
    own = {name.replace(".base_layer.", "."): p for name, p in own.items()}
    _wholes(out, parsed, own if base is not None else None)
    if parsed.differences and not merging:
        keys = [d.key for d in parsed.differences]
        out.problems.append(
            f"{len(keys)} full weight differences, which an adapter cannot represent ({some_of(keys)}): "
            "merge them into a model with `inlaid export RUN --to merged --then FILE`"
        )
    elif parsed.differences:
        _differences(out, parsed, own, skip_missing)
    if out.parameters and not merging:
        out.problems.append(
            f"{len(out.parameters)} whole weights that differ from the base model and are not "
            f"those of linear layers ({some_of(out.parameters)}), which an adapter cannot represent: merge "
            "them into a model with `inlaid export RUN --to merged --then FILE`"
        )
    return out


def _differences(out: FullWeights, parsed: Parsed, own: Mapping[str, Tensor], skip_missing: bool) -> None:
    missing, wrong = [], []
    for each in parsed.differences:
        found = _places(parsed.names, each.module, each.flat, each.part, own)
        if not found:
            missing.append(each.key)
            continue
        for name, rows in found:
            value = rows(each.tensor).float()
            if value.numel() != own[name].numel():
                wrong.append(f"{each.key} {tuple(value.shape)} for {tuple(own[name].shape)}")
                continue
            if not value.isfinite().all():
                wrong.append(f"{each.key} with values that are not finite numbers")
                continue
            if name in out.parameters:
                wrong.append(f"{each.key}, which another tensor changes too")
                continue
            out.parameters[name] = value.reshape(own[name].shape)
    if missing and skip_missing:
        out.notes.append(
            f"left out {len(missing)} differences of parameters that the base model does not have "
            f"({some_of(missing)})"
        )
    elif missing:
        out.problems.append(
            f"{len(missing)} differences of parameters that the base model does not have ({some_of(missing)})"
        )
    if wrong:
        out.problems.append(
            f"{len(wrong)} full differences that do not fit the base model ({some_of(wrong)})"
        )


def _places(names: Names, module: str, flat: bool, part: str, own: Mapping[str, Tensor]):
    """Return the parameters that a tensor of differences in an adapter file changes.

    Args:
        names: names of the network's layers.
        module: module name in the file.
        flat: True if underscores replace the dots of `module`.
        part: suffix of the tensor: `diff` for a weight, `diff_b` for a bias, `diff_m` for a modulation table.
        own: parameters of the base model.

    Returns:
        Pairs of a parameter name and a function that selects the parameter's rows from the tensor.
    """
    leaf = {"diff": ".weight", "diff_b": ".bias", "diff_m": ""}[part]
    places = names.parameters(module + (".modulation" if part == "diff_m" else ""), flat)
    found = [(t.module + leaf, t.rows) for t in places if t.module + leaf in own]
    if not found and part == "diff":  # a parameter that is no weight, such as a modulation table
        found = [(t.module, t.rows) for t in places if t.module in own]
    return found


def _wholes(out: FullWeights, parsed: Parsed, own: Mapping[str, Tensor] | None) -> None:
    """Compare the whole weights and biases of a file with the base model, and add differences to `out`.

    `own` contains the tensors of the base model. If it is None, messages are added to `out` instead.
    """
    frozen = parsed.source.config.get("bias", "unknown") in ("none", None)
    copies = [w for w in parsed.wholes if w.copy and (frozen or w.name.endswith(".weight"))]
    rest = [w for w in parsed.wholes if w not in copies] if len(copies) < len(parsed.wholes) else []
    if own is None:
        saved = tuple(parsed.source.config.get("modules_to_save") or ())
        strange = [w.key for w in rest if not _known(parsed.names, w, saved)]
        if strange:
            out.problems.append(
                f"{len(strange)} tensors match no layer of {parsed.names.family} ({some_of(strange)})"
            )
        elif rest:
            out.problems.append(
                f"{len(rest)} whole weights or biases ({some_of(w.key for w in rest)}), which are part of "
                "the adapter if they differ from the base model: pass the base model "
                "(inlaid import --checkpoint)"
            )
        if copies:
            out.notes += [
                f"ignored {len(copies)} weights of the base model",
                "these weights were not compared with those of a base model, because none is passed",
            ]
        return
    equal, strange, changed, wrong = 0, [], [], []
    for each in parsed.wholes:
        module, _, leaf = each.name.rpartition(".")
        found = [(f"{t.module}.{leaf}", t) for t in parsed.names.parameters(module, False)]
        found += [(t.module, t) for t in parsed.names.parameters(each.name, False)]
        found = [(name, t) for name, t in found if name in own]
        if not found:
            strange.append(each.key)
            continue
        for name, target in found:
            given = target.rows(each.tensor)
            if given.shape != own[name].shape:
                wrong.append(f"{each.key} {tuple(given.shape)} for {tuple(own[name].shape)}")
            elif torch.equal(own[name].to(given.dtype), given) or torch.equal(
                own[name].float(), given.float()
            ):
                equal += 1
            elif each in copies:
                changed.append(each.key)
            elif not given.isfinite().all():
                wrong.append(f"{each.key} with values that are not finite numbers")
            else:
                _add(out, parsed, name, given.float() - own[name].float())
    for name in [n for n in out.parameters if n.endswith(".bias") and n[:-5] in out.layers]:
        out.biases[name[:-5]] = out.parameters.pop(name)
    if strange:
        out.problems.append(
            f"{len(strange)} tensors match no parameter of the base model ({some_of(strange)})"
        )
    if wrong:
        out.problems.append(f"{len(wrong)} whole weights that do not fit the base model ({some_of(wrong)})")
    if changed:
        out.problems.append(
            f"{len(changed)} weights of the base model differ from those of the one passed "
            f"({some_of(changed)}): trained on another base model"
        )
    if equal:
        out.notes.append(f"ignored {equal} weights and biases that equal those of the base model")


def _add(out: FullWeights, parsed: Parsed, name: str, delta: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    if leaf == "bias" and (module in parsed.modules):
        out.biases[module] = delta
    elif leaf == "weight" and delta.ndim > 1 and module not in parsed.modules:
        out.layers[module] = delta
    else:
        out.parameters[name] = delta


def _known(names: Names, whole: Whole, saved: tuple[str, ...]) -> bool:
    module, _, leaf = whole.name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return False
    return names.knows(module) or any(f".{module}".endswith(f".{name}") for name in saved)
