"""Reader and writer of adapter files.

`read` accepts the layouts of the common trainers; `export` writes diffusers, ComfyUI, kohya and merged
weights. In memory an adapter has one form: diffusers module names, alpha beside the factors, a DoRA magnitude
per row. The stock loaders ignore every tensor of most foreign layouts with only a warning, and drop alpha
without any.
`read` therefore uses every tensor or raises, and `export` reads back the file that it wrote.
DoRA follows peft (Liu et al. 2024, https://arxiv.org/abs/2402.09353): W' = m (W + s B A) / ||W + s B A|| per
row.
"""

from __future__ import annotations

import json
import math
import re
import struct
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid import files
from inlaid.alpha import joint, published
from inlaid.models import rgba_codec

if TYPE_CHECKING:
    from inlaid.families import Family

Layout = Literal["diffusers", "bare", "peft", "comfyui", "original", "kohya"]
Target = Literal["diffusers", "comfyui", "kohya", "merged"]
DoraRule = Literal["comfyui", "merged"]

WEIGHTS = "pytorch_lora_weights.safetensors"
"""File name that `load_lora_weights(folder)` looks for."""

KINDS = {"lora": "LoRA", "dora": "DoRA", "lokr": "LoKr", "loha": "LoHa"}
"""Display names of the adapter kinds."""

PEFT_WEIGHTS = "adapter_model.safetensors"
"""File name that peft and transformers look for."""

_METADATA = "lora_adapter_metadata"
_DORA_RULE = "inlaid_dora_scale"
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
_KEY = re.compile(
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
_CONFIG = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "lora_bias",
)


@dataclass(frozen=True)
class Adapter:
    """LoRA or DoRA in the internal form, independent of the file layout."""

    tensors: Mapping[str, Tensor]
    """`<module>.lora_A.weight` (r, in), `.lora_B.weight` (out, r) and, if trained, `.lora_B.bias` (out) and
    `.lora_magnitude_vector` (out). Modules have diffusers names; convolutions keep their kernel axes."""
    alpha: Mapping[str, float]
    """Alpha of each module; the update is scaled by alpha / rank."""
    layout: Layout
    """Layout of the source file."""
    alpha_from: str = "alpha argument"
    """Source of alpha."""
    notes: Sequence[str] = ()
    """Notes for the user about the import."""
    header: Mapping[str, str] = field(default_factory=dict)
    """Remaining metadata of the file."""
    vector: Tensor | None = None
    """Domain embedding of joint transparency, added to the alpha tokens, (d,)."""

    @property
    def joint(self) -> bool:
        """True if the adapter applies to the alpha tokens only (`alpha.joint`)."""
        return self.header.get("inlaid_alpha") == "joint"

    @property
    def modules(self) -> list[str]:
        """Names of the adapted layers."""
        return list(self.alpha)

    @property
    def rank(self) -> dict[str, int]:
        """Rank of each module."""
        return {m: self.tensors[f"{m}.lora_A.weight"].shape[0] for m in self.alpha}

    @property
    def dora(self) -> bool:
        """True if the adapter has magnitudes; then every module has one."""
        return f"{next(iter(self.alpha))}.lora_magnitude_vector" in self.tensors

    def scale(self, module: str) -> float:
        """Return the factor s of the update s B A."""
        return self.alpha[module] / self.tensors[f"{module}.lora_A.weight"].shape[0]

    def peft_config(self) -> dict[str, Any]:
        """Return the arguments of `peft.LoraConfig` that restore this adapter exactly."""
        rank, alpha = self.rank, {m: int(a) if float(a).is_integer() else a for m, a in self.alpha.items()}
        r, a = (Counter(values.values()).most_common(1)[0][0] for values in (rank, alpha))
        return {
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": a,
            "rank_pattern": {f"^{re.escape(m)}": v for m, v in rank.items() if v != r},
            "alpha_pattern": {f"^{re.escape(m)}": v for m, v in alpha.items() if v != a},
            "target_modules": sorted(rank),
            "use_dora": self.dora,
            "lora_bias": any(k.endswith(".lora_B.bias") for k in self.tensors),
        }


# --- reading ------------------------------------------------------------------------------------------------


def read(
    path: str | Path,
    family: type[Family] | Family,
    *,
    alpha: float | None = None,
    shapes: Mapping[str, tuple[int, int]] | None = None,
    base: nn.Module | None = None,
    dora_scale: DoraRule | None = None,
) -> Adapter:
    """Read an adapter in any known layout, using every tensor of the file.

    Args:
        path: adapter file, folder that contains one, or run folder.
        family: model family that defines the module names.
        alpha: value for files that store no alpha. Default: the rank of each module, with a note.
        shapes: (out, in) of the network's layers, from `shapes`; the adapter must fit them.
        base: network without adapters; required for files with `dora_scale`, which is relative to its
            weights.
        dora_scale: what a `dora_scale` of shape (out, 1) multiplies: (W + s B A) / ||W|| (`comfyui`), or
            (W + s B A) / ||W + s B A|| (`merged`, as in LyCORIS). Files written by inlaid record it.

    Raises:
        ValueError: if the file is damaged, has an unknown layout, does not fit the network, or contains
            tensors that cannot be represented as a LoRA or DoRA.
    """
    file = _open(_locate(Path(path)), alpha)
    parsed = _parse(file, family, shapes or {})
    problems = _problems(parsed, family)
    strange = [m for m in parsed.parts if not any(re.fullmatch(t, m) for t in family.targets)]
    if file.notes and strange:  # other files are checked against the checkpoint's shapes
        problems.append(
            f"adapter for {file.config_from}, with layers that this family does not have ({_some(strange)})"
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
    tensors, full = _normalised(parsed, alphas, base, dora_scale)
    if full:
        notes.append(
            f"{full} layers have a dora_scale per input column, which peft's DoRA does not support: "
            "converted to an exact LoRA of full rank, which is as large as the network; better export merged"
        )
    header = {k: v for k, v in file.header.items() if k not in (_METADATA, _DORA_RULE, "format")}
    adapter = Adapter(tensors, alphas, parsed.layout, source, tuple(notes), header, file.vector)
    if shapes is not None:
        _fit(adapter, shapes, file.path, family.widths)
    return adapter


def shapes(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    """Return (out, in) of all linear and convolution layers by name, with kernels flattened into `in`.

    Also works on a network on the meta device.
    """
    return {
        name.removesuffix(".base_layer"): (m.weight.shape[0], math.prod(m.weight.shape[1:]))
        for name, m in denoiser.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and ".lora_" not in name
    }


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
    """Return the tensors, peft configuration and file path of an adapter of any kind, unchanged.

    Raises:
        ValueError: if the file is damaged or missing.
    """
    file = _open(_locate(path))
    return file.tensors, file.config, file.path


def _locate(path: Path) -> Path:
    """Return the weights file of a folder, or `path` itself if it is a file."""
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
            else f"{len(found)} candidate files ({_some(p.name for p in found)}); pass one of these files"
        )
        raise ValueError(f"{path}: {what}")
    return found[0]


def _open(path: Path, alpha: float | None = None) -> _File:
    """Return the tensors and header of a file, and the LoRA configuration in the header or beside the file.

    In published files of joint transparency, tensor names and alpha are corrected, unless `alpha` is given.
    """
    header: dict[str, str] = {}
    if path.suffix == ".safetensors" or _head(path)[0][8:] == b"{":
        with _safetensors(path) as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    else:
        tensors = _unpickle(path)
    raw, origin = header.get(_METADATA), f"the file's header ({_METADATA})"
    beside = path.with_name("adapter_config.json")
    if raw is None and beside.is_file() and path.name == PEFT_WEIGHTS:
        raw, origin = beside.read_text("utf-8"), beside.name
    try:
        config = json.loads(raw) if raw else {}
        config = {k.removeprefix("transformer."): v for k, v in config.items()}
        for value in [config.get("lora_alpha", 1), *(config.get("alpha_pattern") or {}).values()]:
            float(value)
    except (ValueError, AttributeError, TypeError):
        raise ValueError(f"{path}: {origin} is not a LoRA configuration in JSON") from None
    try:
        found = published.recognise(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: adapter of joint transparency that cannot be used: {error}") from None
    if found is None:
        return _File(path, tensors, header, config, origin, joint.embedding(path.parent, header))
    config = {} if alpha is not None else {"lora_alpha": published.ALPHA}
    header = {**header, **found.header}
    return _File(path, found.tensors, header, config, found.name, found.vector, found.notes)


def _head(path: Path) -> tuple[bytes, int]:
    """Return the first nine bytes and the size of a file."""
    try:
        with path.open("rb") as stream:
            head, size = stream.read(9), path.stat().st_size
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not size:
        raise ValueError(f"{path}: the file is empty")
    return head, size


@contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file.

    Raises:
        ValueError: if it is another kind of file, truncated or damaged.
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
    try:
        opened = safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or damaged ({error}): copy it again") from None
    with opened as file:
        yield file


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a torch file with `weights_only=True`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        called = re.search(r"GLOBAL (\S+)", str(error))
        what = (
            f"a pickle that calls {called[1]}: not loaded"
            if called
            else "neither a safetensors nor a torch file"
        )
        raise ValueError(f"{path}: {what}") from None
    for key in ("state_dict", "module", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: not a mapping of names to tensors")
    return state


@dataclass(frozen=True)
class _Parsed:
    file: _File
    layout: Layout
    parts: dict[str, dict[str, Tensor]]
    """By module: A and B, plus alpha, magnitude, dora_scale, bias and diff_b if the file has them."""
    problems: list[str]
    notes: list[str]


def _parse(file: _File, family: type[Family] | Family, layers: Iterable[str]) -> _Parsed:
    """Group the tensors of a file by module, under diffusers names."""
    find = _finder(family, layers)
    parts: dict[str, dict[str, Tensor]] = {}
    prefixes: dict[str, str] = {}
    adapters: set[str] = set()
    spellings: set[str] = set()
    unknown, differences, problems, dropped = [], [], [], Counter()
    for key, tensor in file.tensors.items():
        prefix = next(p for p in _PREFIXES if key.startswith(p))
        match = _KEY.fullmatch(key.removeprefix(prefix))
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
            f"({_some(differences)})"
        )
    if unknown:
        problems.append(_unknown(unknown, family, bool(parts)))
    layout = _PREFIXES[next(iter(prefixes), "")]
    layout = "original" if layout == "bare" and "original" in spellings else layout
    notes = [*file.notes, *(f"ignored {n} {what}" for what, n in dropped.items())]
    return _Parsed(file, layout, parts, problems, notes)


def _finder(family: type[Family] | Family, layers: Iterable[str]):
    """Return a function that maps a module name of a file to its diffusers name and its naming scheme."""
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
            stem, leaf = _split(name)
            found = dotted.get(leaf)
            if found is None and (name in layers or any(re.fullmatch(t, name) for t in family.targets)):
                found = (leaf, "diffusers")
        return (stem + found[0], found[1]) if found else None

    return find


def _split(module: str) -> tuple[str, str]:
    """Split `blocks.0.attn1.to_q` into (`blocks.0.`, `attn1.to_q`); outside the blocks return (``, name)."""
    match = _BLOCK.fullmatch(module)
    assert match
    return match[1] or "", match[2]


def _unknown(keys: Sequence[str], family: type[Family] | Family, some_known: bool) -> str:
    name = (family if isinstance(family, type) else type(family)).__name__
    if any(k in key for key in keys for k in ("lokr_", "hada_")):
        return f"a LyCORIS adapter, not a LoRA ({_some(keys)}): merge it with LyCORIS"
    if any(key.startswith("transformer_2.") for key in keys):
        return f"contains a second expert ({_some(keys)}): write one file per expert"
    if not some_known:
        return f"no tensor matches a layer of {name} ({_some(keys)}): another architecture, or not an adapter"
    return f"{len(keys)} tensors match no layer of {name} ({_some(keys)})"


def _some(names: Iterable[object], most: int = 4) -> str:
    names = [str(n) for n in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _problems(parsed: _Parsed, family: type[Family] | Family) -> list[str]:
    """Return the problems that make a parsed file unusable."""
    out = list(parsed.problems)
    if not parsed.parts and not out:
        out.append(_unknown([*parsed.file.tensors] or ["no tensors at all"], family, False))
    half = {m: p for m, p in parsed.parts.items() if not {"A", "B"} <= p.keys()}
    if half:
        have = _some(f"{m} has {_some(p)}" for m, p in half.items())
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
        out.append(f"{len(wild)} layers with values that are not finite numbers ({_some(wild)})")
    magnitudes = [m for m, p in parsed.parts.items() if {"magnitude", "dora_scale"} & p.keys()]
    bare = [m for m in parsed.parts if m not in magnitudes]
    config = parsed.file.config
    if magnitudes and any({"bias", "diff_b"} & p.keys() for p in parsed.parts.values()):
        out.append("DoRA with trained biases, which peft does not support: merge it with its own trainer")
    if magnitudes and bare:
        out.append(f"DoRA with {len(bare)} layers without a magnitude ({_some(bare)})")
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
    if a.ndim < 2 or b.ndim != a.ndim or a.shape[0] != b.shape[1] or a.shape[0] == 0:
        return [f"{module}: factors of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be multiplied"]
    for name in ("magnitude", "bias", "diff_b"):
        if name in parts and parts[name].numel() != b.shape[0]:
            out.append(f"{module}: {name} has {parts[name].numel()} values for {b.shape[0]} outputs")
    if "alpha" in parts and (parts["alpha"].numel() != 1 or not parts["alpha"].any()):
        out.append(f"{module}: alpha is {parts['alpha'].tolist()}")
    return out


def _alphas(parsed: _Parsed, alpha: float | None) -> tuple[dict[str, float], Counter[str]]:
    """Return alpha of every module, and how many modules have it from which source.

    The file takes precedence over the `alpha` argument.
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
        stored = _some(sorted({f"{a:g}" for a in out.values()}))
        raise ValueError(
            f"{parsed.file.path}: --alpha is {alpha:g}, but the file stores alpha {stored}: omit --alpha"
        )
    return out, sources


def _normalised(
    parsed: _Parsed, alphas: dict[str, float], base: nn.Module | None, dora_scale: DoraRule | None
) -> tuple[dict[str, Tensor], int]:
    """Return the tensors in the form of `Adapter`, and the number of layers converted to full rank.

    Sets alpha of the converted layers in `alphas`.
    """
    path, rule = parsed.file.path, parsed.file.header.get(_DORA_RULE, dora_scale)
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
        return _layer(base, module).weight.detach().float()
    except AttributeError:
        raise ValueError(f"{path}: the base model has no layer {module}") from None


def _from_dora_scale(
    parts: Mapping[str, Tensor], scale: float, weight: Tensor, rule: str | None, path: Path
) -> tuple[dict[str, Tensor], bool]:
    """Replace dora_scale by a magnitude, or, if it is per input column, by factors of full rank.

    Returns:
        The new parts, and True if dora_scale is per input column.
    """
    given = parts["dora_scale"].float()
    rest = {k: v for k, v in parts.items() if k != "dora_scale"}
    merged = weight + _product(parts["A"], parts["B"], scale).reshape(weight.shape)
    if given.ndim > 1 and given.shape[0] == 1 and given.shape[1] == merged.shape[1]:
        columns = torch.linalg.vector_norm(merged.transpose(0, 1).flatten(1), dim=1)
        shape = (1, -1, *[1] * (merged.ndim - 2))
        a, b = _full_rank(merged * (given.reshape(shape) / columns.clamp_min(1e-8).reshape(shape)) - weight)
        return {**rest, "A": a, "B": b}, True
    if given.numel() != weight.shape[0]:
        raise ValueError(
            f"{path}: dora_scale of shape {tuple(given.shape)} for a layer of shape {tuple(weight.shape)}"
        )
    if rule not in ("comfyui", "merged"):
        raise ValueError(
            f"{path}: the norm that dora_scale refers to is ambiguous: pass --dora-scale comfyui (||W||, as "
            "ComfyUI applies it) or merged (||W + BA||, as LyCORIS trains it)"
        )
    given = given.reshape(-1)
    return {**rest, "magnitude": given if rule == "merged" else given * _rows(merged) / _rows(weight)}, False


def _full_rank(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return exact factors A and B of a weight difference; one of the two is the identity."""
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


def _fit(
    adapter: Adapter,
    layers: Mapping[str, tuple[int, int]],
    where: object = "adapter",
    widths: Mapping[int, str] = MappingProxyType({}),
) -> None:
    missing = [m for m in adapter.modules if m not in layers]
    wrong: dict[tuple, str] = {}
    for module in adapter.modules:
        a, b = adapter.tensors[f"{module}.lora_A.weight"], adapter.tensors[f"{module}.lora_B.weight"]
        own = (b.shape[0], math.prod(a.shape[1:]))
        if module in layers and own != layers[module]:
            wrong.setdefault((own, layers[module]), module)
    problems = []
    if wrong:
        (own, theirs), module = next(iter(wrong.items()))
        of, other = (f" ({widths[w]})" if w in widths else "" for w in (own[1], theirs[1]))
        problems.append(
            f"trained on a network of another size: {module} is {own[0]} x {own[1]}{of} in the adapter and "
            f"{theirs[0]} x {theirs[1]}{other} in the network"
        )
    if missing:
        count = f"{len(missing)} of the adapter's {len(adapter.modules)} layers"
        problems.append(f"the network lacks {count} ({_some(missing)})")
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))


# --- applying and merging -----------------------------------------------------------------------------------


def effective_delta(adapter: Adapter, module: str, base_weight: Tensor) -> Tensor:
    """Return the change of a layer's weight, float32: s B A, or for DoRA W' - W."""
    if not adapter.dora:
        return _delta(adapter, module).to(base_weight.device).reshape(base_weight.shape)
    return _merged(adapter, module, base_weight) - base_weight.float()


@torch.no_grad()
def merge(denoiser: nn.Module, adapter: Adapter) -> None:
    """Merge an adapter into a network in place, in float32, and cast each weight back to its own dtype.

    Raises:
        ValueError: if the network has an adapter attached, is quantized, or does not fit.
    """
    if adapter.joint:
        raise ValueError(joint.MERGE)
    if any(".lora_" in n for n, _ in denoiser.named_parameters()):
        raise ValueError("the network has an adapter attached: merge into a network without adapters")
    _fit(adapter, shapes(denoiser))
    layers = {module: _layer(denoiser, module) for module in adapter.modules}
    biases = {m: adapter.tensors.get(f"{m}.lora_B.bias") for m in layers}
    for module, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise ValueError(f"{module} is quantized: merge into a bfloat16 or float32 network")
        if biases[module] is not None and layer.bias is None:
            raise ValueError(f"{module} has no bias in the network, but the adapter has one")
    for module, layer in layers.items():
        layer.weight.copy_(_merged(adapter, module, layer.weight))
        added = biases[module]
        if added is not None:
            layer.bias.copy_(layer.bias.float() + adapter.scale(module) * added.to(layer.bias.device).float())


def companions(denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the transformers models inside a denoiser by name; their adapters are stored in subfolders."""
    from transformers import PreTrainedModel

    return {name: child for name, child in denoiser.named_children() if isinstance(child, PreTrainedModel)}


def attach(network: nn.Module, adapter: Adapter, name: str = "inlaid") -> None:
    """Load an adapter into a diffusers or transformers network, and check that every tensor was loaded.

    Raises:
        ValueError: if the adapter does not fit the network.
    """
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    _fit(adapter, shapes(network))
    load: Any = getattr(network, "load_lora_adapter", None)
    if load:
        load(dict(adapter.tensors), prefix=None, adapter_name=name, metadata=adapter.peft_config())
    else:
        inject_adapter_in_model(LoraConfig(**adapter.peft_config()), network, name)
        set_peft_model_state_dict(network, dict(adapter.tensors), name)
        network.eval().requires_grad_(False)
    arrived = get_peft_model_state_dict(network, adapter_name=name)
    assert arrived.keys() == adapter.tensors.keys(), "the stock loader ignored tensors"
    for key, tensor in adapter.tensors.items():
        assert torch.equal(arrived[key].cpu(), tensor.to(arrived[key].dtype).cpu()), f"{key} was not loaded"


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the update s B A in float32, (out, in) with kernels flattened."""
    return scale * (b.float().flatten(1) @ a.float().flatten(1))


def _delta(adapter: Adapter, module: str) -> Tensor:
    a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
    return _product(a, b, adapter.scale(module))


def _rows(weight: Tensor) -> Tensor:
    """Return the norm of each output row."""
    return torch.linalg.vector_norm(weight.flatten(1), dim=1).clamp_min(1e-8)


def _merged(adapter: Adapter, module: str, base_weight: Tensor) -> Tensor:
    weight = base_weight.detach().float()
    weight = weight + _delta(adapter, module).to(weight.device).reshape(weight.shape)
    magnitude = adapter.tensors.get(f"{module}.lora_magnitude_vector")
    if magnitude is None:
        return weight
    ratio = magnitude.to(weight.device).float().reshape(-1) / _rows(weight)
    return weight * ratio.reshape(-1, *[1] * (weight.ndim - 1))


def _layer(denoiser: nn.Module, module: str) -> Any:
    layer = denoiser.get_submodule(module)
    return getattr(layer, "base_layer", layer)


# --- writing ------------------------------------------------------------------------------------------------


def write_diffusers(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    peft_config: Mapping[str, Any],
    metadata: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write an adapter that `load_lora_weights(folder)` restores completely: alpha, ranks, DoRA.

    Only settings that change the function go into the header, because other releases of peft reject unknown
    settings.

    Args:
        folder: created if missing.
        tensors: state dict from `get_peft_model_state_dict`.
        peft_config: `LoraConfig.to_dict()`.
        metadata: additional header entries.

    Returns:
        Path of the file, written atomically.

    Raises:
        ValueError: if there are no tensors, or tensors that diffusers cannot load.
    """
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if not match or match["part"] not in ("lora_A", "lora_B", "lora_magnitude_vector"):
            raise ValueError(f"`{key}` is no LoRA tensor: diffusers would reject the whole file")
        suffix = "" if match["part"] == "lora_magnitude_vector" else f".{match['leaf'] or 'weight'}"
        named[f"transformer.{match['module']}.{match['part']}{suffix}"] = tensor
    if not named:
        raise ValueError(f"{folder}: the adapter has no tensors; nothing was written")
    modules = {k.removeprefix("transformer.").split(".lora_")[0] for k in named}
    config = {k: peft_config[k] for k in _CONFIG if k in peft_config} | {"target_modules": sorted(modules)}
    assert bool(config.get("use_dora")) == any(k.endswith("_vector") for k in named), (
        "DoRA without magnitudes"
    )
    path = Path(folder) / WEIGHTS
    write_tensors(path, dict(sorted(named.items())), {**metadata, **adapter_header(config)})
    return path


def write_peft(
    folder: Path, tensors: Mapping[str, Tensor], peft_config: Mapping[str, Any], metadata: Mapping[str, str]
) -> Path:
    """Write an adapter that `peft.PeftModel.from_pretrained(network, folder)` restores.

    `load_adapter` of transformers (5.23) also loads a LoRA, but ignores the magnitudes of a DoRA.

    Args:
        folder: created if missing.
        tensors: state dict from `get_peft_model_state_dict`.
        peft_config: `LoraConfig.to_dict()`; only settings that change the function are used.
        metadata: header entries of the weights file.
    """
    from peft import LoraConfig

    modules = sorted({k.split(".lora_")[0] for k in tensors})
    path = folder / PEFT_WEIGHTS
    named = {f"base_model.model.{k}": t for k, t in sorted(tensors.items())}
    write_tensors(path, named, metadata)
    config = {k: peft_config[k] for k in ("r", "lora_alpha", "use_dora")}
    LoraConfig(**config, target_modules=modules, inference_mode=True).save_pretrained(str(folder))
    return path


def adapter_header(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the header entry in which diffusers expects peft's configuration."""
    packed = json.dumps({f"transformer.{k}": v for k, v in config.items()}, indent=2, sort_keys=True)
    return {_METADATA: packed}


def export(
    adapter: Adapter,
    to: Target,
    out: str | Path,
    *,
    family: type[Family] | Family,
    base: nn.Module | None = None,
) -> Path:
    """Write an adapter for another program, and read it back to verify that it is equivalent.

    Args:
        adapter: adapter from `read`.
        to: `diffusers`: a folder. `comfyui`: a file with original names under `diffusion_model.`. `kohya`: a
            file with the names of kohya and musubi, and zeros for untrained layers. `merged`: the whole
            network as a diffusers folder.
        out: file for `comfyui` and `kohya`, folder for the others.
        family: model family that defines the module names.
        base: network without adapters. Required for `merged`, which merges into it in place, for `comfyui`
            with DoRA, and for the sizes of untrained layers in `kohya`.

    Returns:
        The file, or the folder for `merged`.

    Raises:
        ValueError: if the target layout cannot represent the adapter, or `out` exists.
    """
    out = Path(out)
    if adapter.joint and to != "diffusers":
        raise ValueError(
            f"--to: {to} applies an adapter to all tokens. {joint.MERGE[0].upper()}{joint.MERGE[1:]}"
        )
    if to in ("comfyui", "kohya") and not family.original_names:
        name = (family if isinstance(family, type) else type(family)).__name__
        raise ValueError(f"--to: no {to} layout is known for {name}; use `diffusers` or `merged`")
    if to == "merged":
        if base is None:
            raise ValueError("merging requires the base model: pass base")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ValueError(f"{out}: already exists: choose a new folder")
        merge(base, adapter)
        return write_network(out, base)
    if to == "diffusers":
        if adapter.vector is not None:
            write_tensors(out / joint.EMBEDDING, {joint.NAME: adapter.vector}, adapter.header)
        path = write_diffusers(out, adapter.tensors, adapter.peft_config(), adapter.header)
    else:
        path = out if out.suffix == ".safetensors" else out / f"{to}.safetensors"
        tensors = _comfyui(adapter, family, base) if to == "comfyui" else _kohya(adapter, family, base)
        rule = {_DORA_RULE: "comfyui"} if adapter.dora else {}
        write_tensors(path, tensors, {**adapter.header, **rule})
    try:
        _verify(adapter, read(path, family, base=base), base)
    except BaseException:
        path.unlink()
        raise
    return path


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file atomically.

    Raises:
        ValueError: if it cannot be written.
    """
    own = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    try:
        with files.atomic(path) as temporary:
            save_file(own, temporary, metadata={**header, "format": "pt"})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be written ({error})") from None


def _comfyui(adapter: Adapter, family: type[Family] | Family, base: nn.Module | None) -> dict[str, Tensor]:
    """Return the tensors for ComfyUI: original names and one alpha per layer.

    ComfyUI multiplies W + s B A by dora_scale / ||W||, while DoRA is defined with ||W + s B A||. dora_scale
    is therefore m ||W|| / ||W + s B A||, which makes the two equal. Stock converters support no alpha outside
    the blocks; there it is folded into B.
    """
    if adapter.dora and base is None:
        raise ValueError(
            "DoRA for ComfyUI is relative to the weights of the base model: pass base, or export as merged"
        )
    originals = {ours: original for original, ours in family.original_names}
    out: dict[str, Tensor] = {}
    for module in adapter.modules:
        stem, leaf = _split(module)
        name, scale = f"diffusion_model.{stem}{originals.get(leaf, leaf)}", adapter.scale(module)
        a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
        fold = not stem and scale != 1
        out[f"{name}.lora_A.weight"], out[f"{name}.lora_B.weight"] = a, b.float() * scale if fold else b
        if stem:
            out[f"{name}.alpha"] = torch.tensor(float(adapter.alpha[module]))
        if f"{module}.lora_B.bias" in adapter.tensors:
            out[f"{name}.diff_b"] = adapter.tensors[f"{module}.lora_B.bias"].float() * scale
        if adapter.dora and base is not None:
            weight = _layer(base, module).weight.detach().float()
            magnitude = (
                adapter.tensors[f"{module}.lora_magnitude_vector"].to(weight.device).float().reshape(-1)
            )
            merged = weight + _delta(adapter, module).to(weight.device).reshape(weight.shape)
            out[f"{name}.dora_scale"] = (magnitude * _rows(weight) / _rows(merged)).unsqueeze(1)
    return out


def _kohya(adapter: Adapter, family: type[Family] | Family, base: nn.Module | None) -> dict[str, Tensor]:
    """Return the tensors for kohya: all default targets up to the last trained block.

    Stock converters fail if a default target is missing, so untrained targets are zero.
    """
    if adapter.dora:
        raise ValueError("no other program reads DoRA in the kohya layout: export as merged or comfyui")
    if any(k.endswith(".bias") for k in adapter.tensors):
        raise ValueError("the kohya layout has no biases: export as comfyui")
    stem = next((s for s, _ in map(_split, adapter.modules) if s), "")
    originals = {
        ours: original
        for original, ours in family.original_names
        if any(re.fullmatch(t, stem + ours) for t in family.targets)
    }
    blocks = stem.rstrip("0123456789.")
    last = max((int(s.split(".")[-2]) for s, _ in map(_split, adapter.modules) if s), default=0)
    wanted = [f"{blocks}.{i}.{leaf}" for i in range(last + 1) for leaf in originals]
    outside = [m for m in adapter.modules if m not in wanted]
    if outside:
        raise ValueError(f"the kohya layout cannot represent {_some(outside)}: export as comfyui")
    rank = Counter(adapter.rank.values()).most_common(1)[0][0]
    like = {_split(m)[1]: _size(adapter, m) for m in adapter.modules}
    layers = shapes(base) if base is not None else {}
    out: dict[str, Tensor] = {}
    for module in wanted:
        stem, leaf = _split(module)
        name = f"lora_unet_{stem}{originals[leaf]}".replace(".", "_")
        if module in adapter.alpha:
            a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
        else:
            size = layers.get(module) or like.get(leaf)
            if size is None:
                raise ValueError(
                    f"the kohya layout needs zeros for {module}, but its size is unknown: pass the base model"
                )
            a, b = torch.zeros(rank, size[1]), torch.zeros(size[0], rank)
        out[f"{name}.lora_down.weight"], out[f"{name}.lora_up.weight"] = a, b
        out[f"{name}.alpha"] = torch.tensor(float(adapter.alpha.get(module, rank)))
    return out


def _size(adapter: Adapter, module: str) -> tuple[int, int]:
    """Return (out, in) of the layer that a module of the adapter applies to."""
    a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
    return b.shape[0], math.prod(a.shape[1:])


def write_network(out: Path, base: nn.Module) -> Path:
    """Write a whole network as a diffusers folder with shards of at most 5 GB, and verify the written files.

    Raises:
        ValueError: if it cannot be written.
    """
    try:
        with files.atomic(out) as folder:
            base.save_pretrained(folder, max_shard_size="5GB")  # type: ignore[operator]
            left = base.state_dict()
            for shard in folder.glob("*.safetensors"):
                with _safetensors(shard) as file:
                    for key in file.keys():  # noqa: SIM118
                        assert torch.equal(file.get_tensor(key), left.pop(key).cpu()), (
                            f"{key} differs on disk"
                        )
            assert not left, f"not written: {_some(left)}"
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out}: cannot be written ({error})") from None
    return out


def _verify(wanted: Adapter, got: Adapter, base: nn.Module | None) -> None:
    """Assert that two adapters have the same effect on every layer; extra layers must be zero."""
    assert (wanted.vector is None) == (got.vector is None), "the domain embedding was lost in export"
    assert wanted.vector is None or torch.equal(wanted.vector, got.vector), "the domain embedding differs"  # type: ignore[arg-type]
    for module in got.modules:
        if module not in wanted.alpha:
            assert not got.tensors[f"{module}.lora_B.weight"].any(), f"{module} is not part of the adapter"
    for module in wanted.modules:
        names = [f"{module}.lora_{x}" for x in ("A.weight", "B.weight", "B.bias", "magnitude_vector")]
        old, new = ([x.tensors.get(n) for n in names] for x in (wanted, got))
        assert [t is None for t in old] == [t is None for t in new], f"{module} lost a part in export"
        pairs = [(a, b) for a, b in zip(old, new, strict=True) if a is not None and b is not None]
        if all(torch.equal(a, b) for a, b in pairs) and wanted.scale(module) == got.scale(module):
            continue  # equal factors: no need to compute the products
        assert base is not None or not wanted.dora, f"magnitudes of {module} differ after export"
        weight = torch.zeros(_size(wanted, module)) if base is None else _layer(base, module).weight
        one, two = effective_delta(wanted, module, weight), effective_delta(got, module, weight)
        limit = 1e-5 * max(one.abs().max().item(), weight.abs().max().item())
        assert (one - two).abs().max().item() <= limit, f"{module} differs after export"
        if old[2] is not None and new[2] is not None:
            before, after = old[2].float() * wanted.scale(module), new[2].float() * got.scale(module)
            assert torch.allclose(before, after), f"bias of {module} differs after export"


def _use(config: recipe.Config, source: str) -> list[str]:
    """Return code that loads the trained weights into a diffusers pipeline."""
    component = "transformer_2" if config.model.expert == "low" else "transformer"
    kind = config.tuner.kind
    if not isinstance(config.tuner, recipe.LowRank):
        return [
            "from diffusers import AutoModel, DiffusionPipeline\n",
            f'{component} = AutoModel.from_pretrained("path/to/this/folder")',
            f'pipe = DiffusionPipeline.from_pretrained("{source}", {component}={component})',
        ]
    expert = ", load_into_transformer_2=True" if component == "transformer_2" else ""
    load = {
        "lokr": f'pipe.{component}.load_lora_adapter("path/to/this/folder", prefix="transformer")',
        "loha": f'inlaid.lycoris.load(pipe.{component}, Path("path/to/this/folder"))',
    }
    return [
        *(["from pathlib import Path\n", "import inlaid.lycoris"] if kind == "loha" else []),
        "from diffusers import DiffusionPipeline\n",
        f'pipe = DiffusionPipeline.from_pretrained("{source}")',
        load.get(kind, f'pipe.load_lora_weights("path/to/this/folder"{expert})'),
    ]


def _use_of_scenes(config: recipe.Config, source: str) -> list[str]:
    """Return code that loads the trained weights into the network of MIDI and TripoSG."""
    start, kind = "from inlaid.models.triposg import TripoSGTransformer\n", config.tuner.kind
    if not isinstance(config.tuner, recipe.LowRank):
        return [start, 'network = TripoSGTransformer.from_pretrained("path/to/this/folder")']
    load = {
        "lokr": 'network.load_lora_adapter("path/to/this/folder", prefix="transformer")',
        "loha": 'lycoris.load(network, Path("path/to/this/folder"))',
    }
    return [
        *(["from pathlib import Path\n", "from inlaid import lycoris"] if kind == "loha" else []),
        start,
        f'network = TripoSGTransformer.from_pretrained("{source}", subfolder="transformer")',
        load.get(kind, 'network.load_lora_adapter("path/to/this/folder")'),
    ]


def model_card(
    config: recipe.Config,
    *,
    step: int,
    prompts: Sequence[str] = (),
    task: str = "text-to-video",
    objective: str = "",
    warnings: Sequence[str] = (),
) -> str:
    """Return the model card of trained weights: front matter for the Hub, loading code, training settings.

    Args:
        config: recipe of the run. For a local checkpoint only the folder name is included.
        step: number of training steps.
        prompts: example prompts.
        task: pipeline tag of the Hub.
        objective: description of the objective; default: the recipe's preset.
        warnings: paragraphs with limitations.
    """
    import yaml

    tuner, data, optim = config.tuner, config.data, config.optim
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.model.checkpoint) is not None
    name = (
        config.model.checkpoint if on_hub else re.split(r"[/\\]", config.model.checkpoint.rstrip("/\\"))[-1]
    )
    source = name if on_hub else f"path/to/{name.split(':')[-1]}"
    scenes = task == "image-to-3d"  # diffusers has no such network; inlaid provides it
    code = (_use_of_scenes if scenes else _use)(config, source)
    low_rank = isinstance(tuner, recipe.LowRank)
    how = {"rank": tuner.rank, "alpha": tuner.alpha or tuner.rank} if low_rank else {}
    title = KINDS.get(tuner.kind, "Fine-tuned weights")
    front: dict[str, Any] = {"base_model": name} if on_hub else {}
    front |= {
        "library_name": "inlaid" if scenes else "diffusers",
        "tags": ["inlaid", config.model.family, task, tuner.kind],
    }
    front |= {"instance_prompt": data.trigger} if data.trigger else {}
    size = f"{data.size[0]} x {data.size[1]}, {', '.join(map(str, data.frames))} frames"
    settings = {
        "base": name + (f", {config.model.expert}-noise expert" if config.model.expert else ""),
        "steps": step,
        **how,
        "targets": ", ".join(getattr(tuner, "targets", [])) or "default of the family",
        **({} if scenes else {"size": size}),
        "optimizer": f"{optim.name}, learning rate {optim.lr:g}, {optim.schedule}",
        "batch": f"{config.train.batch}, {config.train.accumulate} gradient accumulation steps",
        "objective": objective or config.objective.preset,
        **config.model.options,
        "seed": config.seed,
    }
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {title} for {name}\n",
        *([f"Use `{data.trigger}` in the prompt.\n"] if data.trigger else []),
        *[f"{paragraph}\n" for paragraph in warnings],
        *["```python", *code, "```\n"],
        *(["Example prompts:\n", *[f"- {' '.join(p.split())}" for p in prompts], ""] if prompts else []),
        "| setting | value |\n|---|---|",
        *[f"| {k} | {str(v).replace('|', chr(92) + '|')} |" for k, v in settings.items()],
    ]
    return "\n".join(lines) + "\n"


# --- inspection ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """Contents of a file or folder."""

    path: Path
    kind: Literal[
        "adapter", "cached item", "tensors", "model", "pipeline", "checkpoint", "run", "folder", "codec"
    ]
    facts: Mapping[str, str]
    """Properties by name, in display order."""
    notes: Sequence[str] = ()
    parts: Sequence[Inspection] = ()
    """Inspections of the files in a folder."""


def inspect(path: str | Path) -> Inspection:
    """Inspect an adapter in any layout, a cached item, a checkpoint, a run or a model.

    Loads no network.

    Raises:
        ValueError: if nothing is found, or a file is damaged.
    """
    path = Path(path)
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
        return _inspect_codec(path) if "codec_id" in _json(path / "config.json") else _inspect_model(path)
    adapter = tuple(inspect(path / n) for n in ("adapter", "codec") if (path / n).is_dir())
    if (path / "config.yaml").is_file():
        steps = sorted(int(p.name[5:]) for p in path.glob("checkpoints/step-*") if p.name[5:].isdigit())
        return Inspection(
            path, "run", {"checkpoints": _some(steps, 12) or "none", "size": _bytes(path)}, (), adapter
        )
    if (path / "state.json").is_file():
        facts = {"step": str(_json(path / "state.json").get("step")), "size": _bytes(path)}
        trainer = [_inspect_file(p) for p in sorted(path.glob("*.safetensors"))]
        return Inspection(path, "checkpoint", facts, (), (*adapter, *trainer))
    found = [_inspect_file(p) for p in sorted(path.glob("*.safetensors")) if p.name != joint.EMBEDDING]
    if not found:
        raise ValueError(f"{path}: no adapter, cached item, checkpoint, run or model in this folder")
    beside = tuple(_inspect_file(p) for p in sorted(path.glob(f"*/{PEFT_WEIGHTS}")))  # of `companions`
    if len(found) == 1:
        return replace(found[0], parts=beside)
    return Inspection(path, "folder", {"size": _bytes(path)}, (), (*found, *beside))


def describe(inspection: Inspection, indent: str = "") -> str:
    """Format an inspection as text for a terminal."""
    width = max(map(len, inspection.facts), default=0)
    lines = [f"{indent}{inspection.path}: {inspection.kind}"]
    lines += [f"{indent}  {k:<{width}}  {v}" for k, v in inspection.facts.items()]
    lines += [f"{indent}  {note}" for note in inspection.notes]
    lines += [describe(part, indent + "  ") for part in inspection.parts]
    return "\n".join(lines)


def _inspect_file(path: Path) -> Inspection:
    if path.suffix == ".safetensors":
        with _safetensors(path) as file:
            header = file.metadata() or {}
            sizes = _sizes(file)
    else:
        state = _open(path).tensors
        header, sizes = (
            {},
            {k: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in state.items()},
        )
    trainer = any(k.startswith("weights.") for k in sizes)
    if not trainer and any(mark in k for k in sizes for mark in ("lora_", "dora_scale", "lokr_", "hada_")):
        return _inspect_adapter(path)
    facts = _summary(sizes) | {"size": _bytes(path)} | _texts(header)
    if "inlaid_cache" in header:
        return Inspection(path, "cached item", {k: f"{d} {list(s)}" for k, (s, d) in sizes.items()} | facts)
    return Inspection(path, "tensors", facts)


def _sizes(file: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of each tensor of an open safetensors file, without reading any data."""
    names = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U8": "uint8", "I64": "int64"}
    slices = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118
    return {
        k: (tuple(s.get_shape()), names.get(str(s.get_dtype()), str(s.get_dtype())))
        for k, s in slices.items()
    }


def _inspect_adapter(path: Path) -> Inspection:
    from inlaid import families

    file = _open(path)
    if str(file.config.get("peft_type", "")).lower() in ("lokr", "loha"):
        return _inspect_lycoris(file)
    known = {name: families.get(name) for name in families.names()}
    parsed = {name: _parse(file, family, ()) for name, family in known.items()}
    any_family = next(iter(known.values()))
    if path.name == PEFT_WEIGHTS and not any(p.parts for p in parsed.values()):
        layers = file.config.get("target_modules") or ()
        parsed = {f"none (adapter of {path.parent.name})": _parse(file, any_family, layers)}
    most = max(len(p.parts) for p in parsed.values())
    names = [n for n, p in parsed.items() if len(p.parts) == most]
    sizes = {k: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in file.tensors.items()}
    if not most:
        notes = (f"matches no installed family ({', '.join(known)}); first tensor: {next(iter(sizes))}",)
        return Inspection(
            path, "adapter", _summary(sizes) | {"size": _bytes(path)} | _texts(file.header), notes
        )
    best = parsed[names[0]]
    problems = _problems(best, known.get(names[0], any_family))
    facts = {"family": " or ".join(names), "layout": best.layout, "modules": _modules(best.parts)}
    if file.header.get("inlaid_alpha") == "joint":
        vector = "no" if file.vector is None else f"yes, {file.vector.numel()} values"
        facts |= {"transparency": f"joint, {file.config_from}" * bool(file.notes) or "joint"}
        facts |= {"domain embedding": vector}
    notes = [*best.notes, *(f"cannot be imported: {p}" for p in problems)]
    if not problems:
        alphas, sources = _alphas(best, None)
        source = sources.most_common(1)[0][0]
        facts["rank"] = _counted(p["A"].shape[0] for p in best.parts.values())
        values = _counted(f"{a:g}" for a in alphas.values())
        facts["alpha"] = (
            f"{values}, from {source}" if source != "rank" else f"not stored; alpha = rank = {values} assumed"
        )
    kinds = {k for p in best.parts.values() for k in p}
    relative = f"relative to {file.header.get(_DORA_RULE, 'an unnamed norm')}; import needs the base model"
    dora = "yes, magnitudes as in peft" if "magnitude" in kinds else f"yes, dora_scale {relative}"
    facts["DoRA"] = dora if {"magnitude", "dora_scale"} & kinds else "no"
    facts |= _summary(sizes) | {"size": _bytes(path)} | _texts(file.header)
    return Inspection(path, "adapter", facts, tuple(notes))


def _inspect_lycoris(file: _File) -> Inspection:
    modules = {k.removeprefix("transformer.").rsplit(".", 1)[0]: None for k in file.tensors}
    facts = {"kind": KINDS[file.config["peft_type"].lower()], "layout": "peft", "modules": _modules(modules)}
    facts |= {"rank": str(file.config.get("r")), "alpha": str(file.config.get("alpha"))}
    sizes = {k: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in file.tensors.items()}
    facts |= _summary(sizes) | {"size": _bytes(file.path)} | _texts(file.header)
    return Inspection(file.path, "adapter", facts)


def _inspect_model(folder: Path) -> Inspection:
    config = _json(folder / "config.json")
    sizes: dict[str, tuple[tuple[int, ...], str]] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with _safetensors(shard) as file:
            sizes |= _sizes(file)
    kind = str(config.get("_class_name") or ", ".join(config.get("architectures") or ["unknown"]))
    facts = {"class": kind} | _summary(sizes) | {"size": _bytes(folder)}
    settings = {
        k: str(v) for k, v in config.items() if isinstance(v, int | float | str) and not k.startswith("_")
    }
    return Inspection(folder, "model", facts | settings)


def _inspect_codec(folder: Path) -> Inspection:
    said = rgba_codec.read_config(folder)
    facts = {k: str(v) for k, v in said.items() if k not in ("colors", "format")}
    parts = []
    for part in said.get("parts", rgba_codec.FILES):
        with _safetensors(folder / f"{rgba_codec.FILES[part]}.safetensors") as file:
            parts.append(
                Inspection(
                    folder / f"{rgba_codec.FILES[part]}.safetensors", "tensors", _summary(_sizes(file))
                )
            )
    return Inspection(folder, "codec", facts | {"size": _bytes(folder)}, (), tuple(parts))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def _summary(sizes: Mapping[str, tuple[Sequence[int], str]]) -> dict[str, str]:
    values = sum(math.prod(s) for s, _ in sizes.values())
    return {"tensors": f"{len(sizes)}, {values:,} values", "types": _counted(d for _, d in sizes.values())}


def _modules(parts: Mapping[str, object]) -> str:
    blocks = sorted({int(s.split(".")[-2]) for s, _ in map(_split, parts) if s})
    whole = blocks == list(range(len(blocks)))
    span = f" in {len(blocks)} blocks" + ("" if whole else f" ({_some(blocks, 8)})") if blocks else ""
    return f"{len(parts)}{span}: {_some(sorted({leaf for _, leaf in map(_split, parts)}), 12)}"


def _counted(values: Iterable[object]) -> str:
    counts = Counter(str(v) for v in values)
    return ", ".join(v if len(counts) == 1 else f"{v} ({n})" for v, n in counts.most_common(6))


def _texts(header: Mapping[str, str]) -> dict[str, str]:
    texts = {k: " ".join(v.split()) for k, v in header.items() if k not in (_METADATA, "format", _DORA_RULE)}
    return {k: v if len(v) <= 100 else f"{v[:97]}..." for k, v in texts.items()}


def _bytes(path: Path) -> str:
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    size = float(sum(p.stat().st_size for p in files))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
