"""Reader of adapter files in the layouts of the common trainers.

Every layout is converted to an `adapter.Adapter`. The loaders of diffusers ignore most layouts of other
trainers with only a warning, and discard LoRA alpha without a warning. `read_adapter` instead raises an error
if it cannot use a tensor. It ignores only base weights and weight differences of zero, with a message.

DoRA is defined as in peft (Liu et al. 2024, https://arxiv.org/abs/2402.09353): each row of the merged weight
is W' = m (W + s B A) / ||W + s B A||, where m is the trained magnitude of the row.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from inlaid import limits
from inlaid.adapters.adapter import METADATA_KEY, PEFT_WEIGHTS, WEIGHTS, Adapter, Layout
from inlaid.adapters.joint_published import ALPHA, recognize
from inlaid.adapters.layers import base_layer, check_fit, low_rank_product, row_norms, some_of
from inlaid.adapters.lora_config import HUGE, parse_config
from inlaid.files import TorchFileError, load_torch, read_metadata
from inlaid.networks.domain_embedding import EMBEDDING, read_domain_embedding
from inlaid.reading import FileError, read_text, reading, require_file

if TYPE_CHECKING:
    from inlaid.families import Family


DoraRule = Literal["comfyui", "merged"]

DORA_RULE_KEY = "inlaid_dora_scale"

_PREFIXES: Mapping[str, Layout] = {
    "base_model.model.": "peft",
    "model.diffusion_model.": "comfyui",
    "diffusion_model.": "comfyui",
    "transformer.": "diffusers",
    "unet.": "diffusers",
    "pipe.dit.": "original",
    "lora_unet_": "kohya",
    "": "bare",
}

_FACTORS = "lora_A|lora_B|lora_down|lora_up|lora_magnitude_vector|dora_scale|alpha|diff_b|diff_m|diff"

TENSOR_KEY = re.compile(
    rf"(?P<module>.+?)\.(?P<part>{_FACTORS})(?:\.(?P<name>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)

_PARTS = {
    "lora_A": "A",
    "lora_down": "A",
    "lora_B": "B",
    "lora_up": "B",
    "lora_magnitude_vector": "magnitude",
}

_BLOCK = re.compile(r"(\w*blocks\.\d+\.)?(.+)")


def read_adapter(
    path: str | Path,
    family: type[Family] | Family,
    *,
    alpha: float | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    base: nn.Module | None = None,
    dora_scale: DoraRule | None = None,
) -> Adapter:
    """Read an adapter in any known layout; raise an error if a tensor of the file cannot be used.

    Args:
        path: adapter file, folder with an adapter file, or run folder.
        family: model family that defines the module names.
        alpha: LoRA alpha for files that store none. Default: the rank of each module, with a message.
        shapes: shapes (out, in) of the network's layers, from `layer_shapes`, to check that the adapter fits.
        base: network without adapters. Required for files with `dora_scale`, which is relative to the
            weights of the base model.
        dora_scale: definition of the file's `dora_scale` (out, 1). The merged weight is
            dora_scale * (W + s B A) / ||W|| for `comfyui`, and dora_scale * (W + s B A) / ||W + s B A|| for
            `merged`, as in LyCORIS. Not needed for files written by inlaid, which store this setting.

    Raises:
        ValueError: if the file is damaged, has an unknown layout, does not fit the network, or contains
            tensors that cannot be represented as a LoRA or DoRA.
    """
    with reading(Path(path)):
        file = _open(_locate(Path(path)), alpha)
        return _adapter(file, family, alpha, shapes, base, dora_scale)


def _adapter(
    file: _File,
    family: type[Family] | Family,
    alpha: float | None,
    shapes: Mapping[str, tuple[int, int]] | None,
    base: nn.Module | None,
    dora_scale: DoraRule | None,
) -> Adapter:
    """Convert an open file to an `Adapter`; the arguments are the same as in `read_adapter`."""
    parsed = _parse(file, family, shapes or {})
    problems = _problems(parsed, family)
    strange = [m for m in parsed.parts if not any(re.fullmatch(t, m) for t in family.targets)]
    if file.notes and strange:  # other files are checked against the checkpoint's shapes
        problems.append(
            f"adapter for {file.config_from}, with layers that this family does not have ({some_of(strange)})"
        )
    if problems:
        raise ValueError(f"{file.path}: " + "; ".join(problems))
    alphas, sources = _alphas(parsed, alpha)
    source = sources.most_common(1)[0][0]
    notes = list(parsed.notes)
    if source == "rank":
        notes.append(
            "warning: the file stores no alpha; alpha = rank is assumed (scale 1). The other common "
            "convention is alpha = 1 (scale 1 / rank): pass --alpha 1 if the effect is far too strong"
        )
    elif sources["rank"]:
        notes.append(f"{sources['rank']} layers store no alpha: alpha = rank is used, as in other programs")
    _refuse_overflow(parsed, alphas)
    tensors, full = _normalized(parsed, alphas, base, dora_scale)
    if full:
        notes.append(
            f"{full} layers have a dora_scale per input column, which peft's DoRA does not support: "
            "converted to an exact LoRA of full rank, which is as large as the network; better export merged"
        )
    header = {k: v for k, v in file.header.items() if k not in (METADATA_KEY, DORA_RULE_KEY, "format")}
    adapter = Adapter(tensors, alphas, parsed.layout, source, tuple(notes), header, file.vector)
    if shapes is not None:
        check_fit(adapter, shapes, file.path, family.widths)
    return adapter


@dataclass(frozen=True)
class _File:
    path: Path
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]
    config: Mapping[str, Any]
    config_from: str
    vector: Tensor | None = None
    notes: Sequence[str] = ()


def open_adapter(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any], Path]:
    """Return the tensors, the peft configuration and the file path of an adapter, without any conversion.

    Raises:
        ValueError: if the file is damaged or missing.
    """
    file = _open(_locate(path))
    return file.tensors, file.config, file.path


def _locate(path: Path) -> Path:
    """Return the path of the weights file in a folder, or `path` itself if it is a file."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    for name in (WEIGHTS, PEFT_WEIGHTS, f"adapter/{WEIGHTS}"):
        if (path / name).is_file():
            return path / name
    found = [p for kind in ("*.safetensors", "*.bin", "*.pt", "*.pth") for p in sorted(path.glob(kind))]
    if len(found) != 1:
        what = (
            "no adapter file"
            if not found
            else f"{len(found)} candidate files ({some_of(p.name for p in found)}); pass one of these files"
        )
        raise ValueError(f"{path}: {what}")
    return found[0]


def _open(path: Path, alpha: float | None = None) -> _File:
    """Load the tensors, header and LoRA configuration of an adapter file.

    The configuration is read from the header or from `adapter_config.json`. Published TransPixeler adapters
    are converted to the usual tensor names; their LoRA alpha is 1 unless `alpha` is passed.
    """
    header: dict[str, str] = {}
    if path.suffix == ".safetensors" or _head(path)[0][8:] == b"{":
        with load_safetensors(path) as file:
            header = read_metadata(file)
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    else:
        with reading(path):
            tensors = _unpickle(path)
    raw, origin = header.get(METADATA_KEY), f"the file's header ({METADATA_KEY})"
    config_file = path.with_name("adapter_config.json")
    if raw is None and config_file.is_file() and path.name == PEFT_WEIGHTS:
        raw, origin = read_text(config_file), config_file.name
    config = parse_config(path, raw or "{}", origin)
    try:
        found = recognize(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: adapter of joint transparency that cannot be used: {error}") from None
    if found is None:
        with reading(path.parent / EMBEDDING):
            vector = read_domain_embedding(path.parent, header)
        return _File(path, tensors, header, config, origin, vector)
    config = {} if alpha is not None else {"lora_alpha": ALPHA}
    header = {**header, **found.header}
    return _File(path, found.tensors, header, config, found.name, found.vector, found.notes)


def _head(path: Path) -> tuple[bytes, int]:
    """Return the first nine bytes of a file, and its size in bytes.

    Raises:
        ValueError: if the file is empty or cannot be read.
    """
    try:
        with path.open("rb") as stream:
            head, size = stream.read(9), path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    require_file(path)
    if not size:
        raise ValueError(f"{path}: the file is empty")
    return head, size


@contextmanager
def load_safetensors(path: Path) -> Iterator[Any]:
    """Context manager that opens a safetensors file.

    Raises:
        ValueError: if the file has another format, is truncated or is damaged.
    """
    head, size = _head(path)
    announced = struct.unpack("<Q", head[:8])[0] if len(head) > 8 else 0
    if head[8:] != b"{":
        if head[:2] == b"PK" or head[:1] == b"\x80":
            raise ValueError(
                f"{path}: a pickle with the extension of a safetensors file: not loaded, it could run code"
            )
        raise ValueError(f"{path}: not a safetensors file")
    if announced + 8 > size:
        raise ValueError(
            f"{path}: truncated: the header alone needs {announced + 8} bytes, the file has {size}: "
            "copy it again"
        )
    if large := limits.TEXT.exceeded(announced, f"its header has {limits.as_size(announced)}"):
        raise FileError(path, large)
    with reading(path):
        try:
            opened = safe_open(path, "pt")
        except SafetensorError as error:
            raise FileError(path, f"truncated or damaged ({error}): copy it again") from None
        with opened as file:
            yield file


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a file that `torch.save` wrote."""
    try:
        state = load_torch(path)
    except TorchFileError as error:
        if error.code == "pickle" or "a tensor has" in error.cause or "INLAID_" in error.cause:
            raise
        raise ValueError(f"{path}: neither a safetensors nor a torch file") from None
    for key in ("state_dict", "module", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    named = isinstance(state, dict) and all(isinstance(k, str) for k in state)
    if not named or not all(isinstance(v, Tensor) and v.layout == torch.strided for v in state.values()):
        raise ValueError(f"{path}: not a mapping of names to tensors")
    return state


@dataclass(frozen=True)
class _Parsed:
    file: _File
    layout: Layout
    parts: dict[str, dict[str, Tensor]]
    """Tensors by module name and part. The parts are A, B and, if present, alpha, magnitude, dora_scale, bias
    and diff_b."""
    problems: list[str]
    notes: list[str]


def _parse(file: _File, family: type[Family] | Family, layers: Iterable[str]) -> _Parsed:
    """Group the tensors of a file by module, and translate the module names to diffusers names."""
    find = _finder(family, layers)
    parts: dict[str, dict[str, Tensor]] = {}
    prefixes: dict[str, str] = {}
    adapters: set[str] = set()
    spellings: set[str] = set()
    unknown, differences, problems, dropped = [], [], [], Counter()
    for key, tensor in file.tensors.items():
        prefix = next(p for p in _PREFIXES if key.startswith(p))
        match = TENSOR_KEY.fullmatch(key.removeprefix(prefix))
        if ".base_layer." in key:
            dropped["weights of the base model"] += 1
            continue
        if match and match["part"].startswith("diff") and not tensor.any():
            dropped["weight differences that are all zero"] += 1
            continue
        found = find(match["module"], prefix == "lora_unet_") if match else None
        if match and match["part"].startswith("diff") and (match["part"] != "diff_b" or not found):
            differences.append(key)
            continue
        if not match or not found or (match["leaf"] == "bias" and match["part"] not in ("lora_B", "lora_up")):
            unknown.append(key)
            continue
        prefixes.setdefault(prefix, key)
        spellings.add(found[1])
        adapters.add(match["name"] or "")
        part = "bias" if match["leaf"] == "bias" else _PARTS.get(match["part"], match["part"])
        if part in parts.setdefault(found[0], {}):
            problems.append(f"`{key}` is present twice, under two names")
        parts[found[0]][part] = tensor
    if len(prefixes) > 1:
        problems.append(
            f"mixes layouts ({' and '.join(f'`{k}`' for k in prefixes.values())}): "
            "split it into one file per layout"
        )
    if len(adapters - {""}) > 1:
        problems.append(
            f"contains several adapters ({', '.join(sorted(adapters))}): split it into one file per adapter"
        )
    if differences:
        problems.append(
            f"{len(differences)} full weight differences, which an adapter cannot represent "
            f"({some_of(differences)})"
        )
    if unknown:
        problems.append(_unknown(unknown, family, bool(parts)))
    layout = _PREFIXES[next(iter(prefixes), "")]
    layout = "original" if layout == "bare" and "original" in spellings else layout
    notes = [*file.notes, *(f"ignored {n} {what}" for what, n in dropped.items())]
    return _Parsed(file, layout, parts, problems, notes)


def _finder(family: type[Family] | Family, layers: Iterable[str]):
    """Return a function that translates a module name in a file to a diffusers name.

    The returned function takes the name and a flag, which is true if the name has underscores instead of
    dots (kohya). It returns the diffusers name and the naming scheme of the file, `diffusers` or `original`.
    For an unknown module, it returns None.
    """
    layers = set(layers)
    dotted = {ours: (ours, "diffusers") for _, ours in family.original_names}
    dotted = {**{original: (ours, "original") for original, ours in family.original_names}, **dotted}
    flat = {name.replace(".", "_"): found for name, found in dotted.items()}
    flat_layers = {name.replace(".", "_"): name for name in layers}

    def find(name: str, is_flat: bool) -> tuple[str, str] | None:
        if is_flat:
            if name in flat_layers:
                return flat_layers[name], "diffusers"
            match = re.fullmatch(r"(\w*?blocks)_(\d+)_(.+)", name)
            stem, leaf = (f"{match[1]}.{match[2]}.", match[3]) if match else ("", name)
            found = flat.get(leaf)
        else:
            stem, leaf = split_block(name)
            found = dotted.get(leaf)
            if found is None and (name in layers or any(re.fullmatch(t, name) for t in family.targets)):
                found = (leaf, "diffusers")
        return (stem + found[0], found[1]) if found else None

    return find


def split_block(module: str) -> tuple[str, str]:
    """Split a module name such as `blocks.0.attn1.to_q` into `blocks.0.` and `attn1.to_q`.

    The first part is empty for modules outside the blocks.
    """
    match = _BLOCK.fullmatch(module)
    assert match
    return match[1] or "", match[2]


def _unknown(keys: Sequence[str], family: type[Family] | Family, some_known: bool) -> str:
    name = (family if isinstance(family, type) else type(family)).__name__
    if any(k in key for key in keys for k in ("lokr_", "hada_")):
        return f"a LyCORIS adapter, not a LoRA ({some_of(keys)}): merge it with LyCORIS"
    if any(key.startswith("transformer_2.") for key in keys):
        return f"contains a second expert ({some_of(keys)}): write one file per expert"
    if not some_known:
        return (
            f"no tensor matches a layer of {name} ({some_of(keys)}): another architecture, or not an adapter"
        )
    return f"{len(keys)} tensors match no layer of {name} ({some_of(keys)})"


def _problems(parsed: _Parsed, family: type[Family] | Family) -> list[str]:
    """Return messages about problems that make a parsed file unusable; empty if there are none."""
    out = list(parsed.problems)
    if not parsed.parts and not out:
        out.append(_unknown([*parsed.file.tensors] or ["no tensors at all"], family, False))
    half = {m: p for m, p in parsed.parts.items() if not {"A", "B"} <= p.keys()}
    if half:
        have = some_of(f"{m} has {some_of(p)}" for m, p in half.items())
        out.append(f"{len(half)} layers lack a factor, A or B ({have})")
    for module, parts in parsed.parts.items():
        if module not in half:
            out += _misshapen(module, parts)
    wild = [
        module
        for module, parts in parsed.parts.items()
        if not all(
            (n == "alpha" or t.is_floating_point()) and t.float().isfinite().all() for n, t in parts.items()
        )
    ]
    if wild:
        out.append(f"{len(wild)} layers with values that are not finite numbers ({some_of(wild)})")
    magnitudes = [m for m, p in parsed.parts.items() if {"magnitude", "dora_scale"} & p.keys()]
    bare = [m for m in parsed.parts if m not in magnitudes]
    config = parsed.file.config
    if magnitudes and any({"bias", "diff_b"} & p.keys() for p in parsed.parts.values()):
        out.append("DoRA with trained biases, which peft does not support: merge it with its own trainer")
    if magnitudes and bare:
        out.append(f"DoRA with {len(bare)} layers without a magnitude ({some_of(bare)})")
    if config.get("use_dora") and not magnitudes:
        out.append("the configuration has use_dora, but the file has no magnitudes")
    if str(config.get("peft_type", "LORA")).rsplit(".")[-1] != "LORA":
        out.append(f"the configuration has peft_type {config['peft_type']}, not LORA")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith(("pissa", "olora", "corda", "lora_ga", "loftq", "mica")):
        out.append(
            f"trained with init_lora_weights={init}, which changes the base model: convert it with peft first"
        )
    return out


def _misshapen(module: str, parts: Mapping[str, Tensor]) -> list[str]:
    a, b, out = parts["A"], parts["B"], []
    if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != b.shape[1] or not a.numel() or not b.numel():
        return [f"{module}: factors of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied"]
    for name in ("magnitude", "bias", "diff_b"):
        if name in parts and parts[name].numel() != b.shape[0]:
            out.append(f"{module}: {name} has {parts[name].numel()} values for {b.shape[0]} outputs")
    if "alpha" in parts and (parts["alpha"].numel() != 1 or not parts["alpha"].any()):
        some = parts["alpha"].flatten()[:4].tolist()
        out.append(f"{module}: alpha is {some[0] if parts['alpha'].numel() == 1 else some}")
    return out


def _alphas(parsed: _Parsed, alpha: float | None) -> tuple[dict[str, float], Counter[str]]:
    """Return the LoRA alpha of each module, and a count of the modules for each source of alpha.

    Raises:
        ValueError: if the `alpha` argument contradicts the file.
    """
    config, out, sources = parsed.file.config, {}, Counter[str]()
    patterns = config.get("alpha_pattern") or {}
    for module, parts in parsed.parts.items():
        rank = parts["A"].shape[0]
        if "alpha" in parts:
            out[module], source = float(parts["alpha"].item()), "the file (.alpha of each layer)"
        elif "lora_alpha" in config:
            key = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", module)), None)
            value = float(config["lora_alpha"] if key is None else patterns[key])
            out[module], source = (
                value * (math.sqrt(rank) if config.get("use_rslora") else 1),
                parsed.file.config_from,
            )
        else:
            out[module], source = (float(rank), "rank") if alpha is None else (float(alpha), "alpha argument")
        sources[source] += 1
    if alpha is not None and "alpha argument" not in sources and any(a != alpha for a in out.values()):
        stored = some_of(sorted({f"{a:g}" for a in out.values()}))
        raise ValueError(
            f"{parsed.file.path}: --alpha is {alpha:g}, but the file stores alpha {stored}: omit --alpha"
        )
    return out, sources


def _refuse_overflow(parsed: _Parsed, alphas: Mapping[str, float]) -> None:
    """Check that no layer's update, alpha / rank * B A, can overflow float32.

    Raises:
        ValueError: if the update of a layer could overflow.
    """
    wild = []
    for module, parts in parsed.parts.items():
        a, b = (parts[x].abs().max().double().item() for x in "AB")
        if not max(1.0, a) * max(1.0, b) * max(1.0, abs(alphas[module])) < HUGE:
            wild.append(module)
    if wild:
        raise ValueError(
            f"{parsed.file.path}: {len(wild)} layers with values or alpha so large that the update overflows "
            f"({some_of(wild)})"
        )


def _normalized(
    parsed: _Parsed, alphas: dict[str, float], base: nn.Module | None, dora_scale: DoraRule | None
) -> tuple[dict[str, Tensor], int]:
    """Return the tensors named as in `Adapter.tensors`, and the number of layers converted to full rank.

    The LoRA alpha of a converted layer is its new rank; `alphas` is changed in place.
    """
    path, rule = parsed.file.path, parsed.file.header.get(DORA_RULE_KEY, dora_scale)
    tensors: dict[str, Tensor] = {}
    full = 0
    for module, parts in parsed.parts.items():
        scale = alphas[module] / parts["A"].shape[0]
        if "dora_scale" in parts:
            weight = _base_weight(base, module, path)
            parts, by_input = _from_dora_scale(parts, scale, weight, rule, path)
            if by_input:
                full, alphas[module] = full + 1, parts["A"].shape[0]
        if "diff_b" in parts:
            parts = {**parts, "bias": parts["diff_b"].float() / scale}
        tensors |= _named(module, parts)
    if 0 < full < len(parsed.parts):
        raise ValueError(
            f"{path}: dora_scale is per input column in some layers and per output row in others: "
            "merge it with its own trainer"
        )
    return tensors, full


def _base_weight(base: nn.Module | None, module: str, path: Path) -> Tensor:
    if base is None:
        raise ValueError(
            f"{path}: dora_scale is relative to the weights of the base model: pass the base model "
            "(inlaid import --checkpoint)"
        )
    try:
        return base_layer(base, module).weight.detach().float()
    except AttributeError:
        raise ValueError(f"{path}: the base model has no layer {module}") from None


def _from_dora_scale(
    parts: Mapping[str, Tensor], scale: float, weight: Tensor, rule: str | None, path: Path
) -> tuple[dict[str, Tensor], bool]:
    """Replace the `dora_scale` of a module by tensors that peft supports.

    A scale per output row becomes a magnitude. A scale per input column becomes factors of full rank.

    Returns:
        The new tensors of the module, and True if dora_scale is per input column.
    """
    dora_scale = parts["dora_scale"].float()
    rest = {k: v for k, v in parts.items() if k != "dora_scale"}
    merged = weight + low_rank_product(parts["A"], parts["B"], scale).reshape(weight.shape)
    if dora_scale.ndim > 1 and dora_scale.shape[0] == 1 and dora_scale.shape[1] == merged.shape[1]:
        columns = torch.linalg.vector_norm(merged.transpose(0, 1).flatten(1), dim=1)
        shape = (1, -1, *[1] * (merged.ndim - 2))
        a, b = _full_rank(
            merged * (dora_scale.reshape(shape) / columns.clamp_min(1e-8).reshape(shape)) - weight
        )
        return {**rest, "A": a, "B": b}, True
    if dora_scale.numel() != weight.shape[0]:
        raise ValueError(
            f"{path}: dora_scale of shape {tuple(dora_scale.shape)} for a layer of shape "
            f"{tuple(weight.shape)}"
        )
    if rule not in ("comfyui", "merged"):
        raise ValueError(
            f"{path}: the norm that dora_scale refers to is ambiguous: pass --dora-scale comfyui (||W||, as "
            "ComfyUI applies it) or merged (||W + BA||, as LyCORIS trains it)"
        )
    dora_scale = dora_scale.reshape(-1)
    return {
        **rest,
        "magnitude": (dora_scale if rule == "merged" else dora_scale * row_norms(merged) / row_norms(weight)),
    }, False


def _full_rank(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors A and B whose product B A is exactly `delta`; one factor is the identity matrix."""
    flat = delta.flatten(1)
    n_out, n_in = flat.shape
    a, b = (torch.eye(n_in), flat) if n_in <= n_out else (flat, torch.eye(n_out))
    return a.reshape(-1, *delta.shape[1:]), b.reshape(n_out, -1, *[1] * (delta.ndim - 2))


def _named(module: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {f"{module}.lora_A.weight": parts["A"], f"{module}.lora_B.weight": parts["B"]}
    if "bias" in parts:
        out[f"{module}.lora_B.bias"] = parts["bias"].reshape(-1)
    if "magnitude" in parts:
        # peft stores the magnitudes of a convolution as (1, out, 1, ...).
        shape = (-1,) if parts["A"].ndim == 2 else (1, -1, *[1] * (parts["A"].ndim - 2))
        out[f"{module}.lora_magnitude_vector"] = parts["magnitude"].reshape(shape)
    return out
