"""Functions that find and open adapter files, and read the stored LoRA alpha and configuration."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inlaid import limits
from inlaid.adapters import joint_published, published
from inlaid.adapters.adapter import METADATA_KEY, PEFT_WEIGHTS, WEIGHTS
from inlaid.adapters.layers import some_of
from inlaid.adapters.lora_config import HUGE, parse_config
from inlaid.files import TorchFileError, load_torch, read_metadata
from inlaid.networks.domain_embedding import EMBEDDING, read_domain_embedding
from inlaid.reading import FileError, read_text, reading, require_file

Expert = Literal["high", "low"]

PEFT_NAMES = (PEFT_WEIGHTS, "adapter_model.bin")
"""peft's names of adapter files. `adapter_config.json` applies only to files with these names."""

PLAIN_ALPHA = ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")
"""Header keys whose value is one LoRA alpha for all layers."""

_EXPERTS: Mapping[str, tuple[Expert, str]] = {
    "transformer_2.": ("low", "transformer."),
    "diffusion_model.transformer_1.": ("high", "diffusion_model."),
    "diffusion_model.transformer_2.": ("low", "diffusion_model."),
}
"""Prefixes of tensor names that state the expert of a two-expert network such as Wan2.2 A14B.

The values are the expert and the prefix that replaces the key.
"""


@dataclass(frozen=True)
class Source:
    """Content of an adapter file. For a file with two experts, it is the content for one expert."""

    path: Path
    tensors: Mapping[str, Tensor]
    header: Mapping[str, str]
    config: Mapping[str, Any]
    """Configuration of the adapter under peft's names; empty if none is stored."""
    config_from: str
    """Place of the configuration, for messages."""
    plain: tuple[float, str] | None = None
    """LoRA alpha of all layers from the header, and the place for messages."""
    vector: Tensor | None = None
    """Domain embedding (d,): trained vector that is added to the alpha channel's tokens; None if absent."""
    published: bool = False
    """True for a published TransPixeler adapter."""
    ask_alpha: str = ""
    """If not empty, the reason why the file requires the `alpha` argument."""
    expert: Expert | None = None
    notes: Sequence[str] = ()


def open_adapter(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any], Path]:
    """Return the tensors, the peft configuration and the file path of an adapter.

    Raises:
        ValueError: if the file is damaged or missing, or holds two adapters (one per expert of Wan2.2 A14B).
    """
    source = open_source(path)
    return source.tensors, source.config, source.path


def open_source(path: Path, alpha: float | None = None, expert: str | None = None) -> Source:
    """Open an adapter file or folder, and select the adapter of one expert.

    `expert` is `high` or `low`, for a network with two experts such as Wan2.2 A14B. It may be None if the
    file holds only one adapter.

    Raises:
        ValueError: if the file is damaged or missing, if it holds two adapters and `expert` is None, or if
            its only adapter is for the other expert.
    """
    found = open_experts(path, alpha)
    if len(found) > 1 and expert is None:
        counts = " and ".join(f"{e} ({len(s.tensors)} tensors)" for e, s in found.items())
        raise ValueError(
            f"{path}: contains adapters of two experts, {counts}: `inlaid import` writes one file per expert"
        )
    only = next(iter(found.values()))
    if len(found) == 1 and (only.expert in (None, expert) or expert is None):
        return only
    if expert in found:
        return found[expert]
    raise ValueError(
        f"{path}: an adapter of the {only.expert}-noise expert, not of the {expert}-noise expert"
    )


def open_experts(path: Path, alpha: float | None = None) -> dict[str | None, Source]:
    """Open an adapter file or folder, and split it by expert.

    Returns:
        Sources by expert; one entry with key None if the tensor names state no expert.

    Raises:
        ValueError: if the file is damaged or missing, or if only some of its tensor names state an expert.
    """
    path = locate(path)
    tensors, header, config = _contents(path)
    groups: dict[str | None, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in _EXPERTS if key.startswith(p)), None)
        expert, short = _EXPERTS[prefix] if prefix else (None, "")
        groups.setdefault(expert, {})[short + key.removeprefix(prefix or "")] = tensor
    if None in groups and "low" in groups and "high" not in groups:
        groups["high"] = groups.pop(None)  # the other half of a file with `transformer.` and `transformer_2.`
    if None in groups and len(groups) > 1:
        raise ValueError(
            f"{path}: {len(groups[None])} tensors name no expert, beside tensors of the experts "
            f"{' and '.join(sorted(e for e in groups if e))} ({some_of(groups[None])})"
        )
    order = [e for e in (None, "high", "low") if e in groups] or [None]
    return {e: _source(path, groups.get(e, {}), header, config, alpha, e) for e in order}  # type: ignore[arg-type]


def locate(path: Path) -> Path:
    """Return the weights file in a folder, or `path` itself if it is a file.

    Raises:
        ValueError: if `path` does not exist, or if the folder has no weights file or several candidates.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    for name in (WEIGHTS, *PEFT_NAMES, f"adapter/{WEIGHTS}"):
        if (path / name).is_file():
            return path / name
    kinds = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    found = [p for kind in kinds for p in sorted(path.glob(kind)) if p.is_file()]
    if len(found) != 1:
        what = (
            "no adapter file"
            if not found
            else f"{len(found)} candidate files ({some_of(p.name for p in found)}); pass one of these files"
        )
        raise ValueError(f"{path}: {what}")
    return found[0]


def _contents(path: Path) -> tuple[dict[str, Tensor], dict[str, str], Mapping[str, Any] | None]:
    """Read an adapter file.

    Returns:
        The tensors, the header (empty for a torch file), and the settings that a trainer stored in a torch
        file (None if there are none).
    """
    if path.suffix == ".safetensors" or _head(path)[0][8:] == b"{":
        with load_safetensors(path) as file:
            return {k: file.get_tensor(k) for k in file.keys()}, read_metadata(file), None  # noqa: SIM118
    with reading(path):
        tensors, config = _unpickle(path)
    return tensors, {}, config


def _source(
    path: Path,
    tensors: dict[str, Tensor],
    header: dict[str, str],
    stored: Mapping[str, Any] | None,
    alpha: float | None,
    expert: Expert | None,
) -> Source:
    """Return the tensors and configuration of an adapter file.

    Files of the original Mochi and CogVideoX trainers, and published TransPixeler adapters, are converted to
    common LoRA tensor names.
    """
    tensors = {k: t.bfloat16() if _is_float8(t) else t for k, t in tensors.items()}
    component = "transformer_2" if expert == "low" else "transformer"
    raw, origin = header.get(METADATA_KEY), f"the file's header ({METADATA_KEY})"
    beside, notes = path.with_name("adapter_config.json"), []
    if raw is None and beside.is_file():
        if path.name in PEFT_NAMES:
            raw, origin = read_text(beside), beside.name
        else:
            notes.append(
                f"{beside.name} beside the file is not used: it belongs to {' or '.join(PEFT_NAMES)}, as "
                "which this file has to be saved if the configuration is its own"
            )
    config = parse_config(path, raw or "{}", origin, component)
    plain, more = _plain_alpha(path, header, alpha)
    source = Source(path, tensors, header, config, origin, plain, expert=expert, notes=(*notes, *more))
    try:
        joint = joint_published.recognize(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: adapter of joint transparency that cannot be used: {error}") from None
    if joint is not None:
        return replace(
            source,
            tensors=joint.tensors,
            header={**header, **joint.header},
            config={} if alpha is not None else {"lora_alpha": joint_published.ALPHA},
            config_from=joint.name,
            vector=joint.vector,
            published=True,
            notes=(*source.notes, *joint.notes),
        )
    other = published.recognize(path, tensors, stored if stored is not None else header)
    if other is not None:
        return replace(
            source,
            tensors=other.tensors,
            header={k: v for k, v in header.items() if k != published.GENMO_KEY},
            config=other.config or config,
            config_from=other.name if other.config else origin,
            ask_alpha=other.ask_alpha,
            notes=(*source.notes, *other.notes),
        )
    with reading(path.parent / EMBEDDING):
        return replace(source, vector=read_domain_embedding(path.parent, header))


def _is_float8(tensor: Tensor) -> bool:
    """Return whether a tensor has a float8 dtype."""
    return tensor.is_floating_point() and tensor.element_size() == 1


def _plain_alpha(
    path: Path, header: Mapping[str, str], alpha: float | None
) -> tuple[tuple[float, str] | None, list[str]]:
    """Return the LoRA alpha in the header of an adapter file, and notes about unusable entries.

    The first result is a pair: the LoRA alpha, and a text that says where it was found. It is None if the
    header contains no usable LoRA alpha, or if entries differ and `alpha` is passed.

    Raises:
        ValueError: if two entries differ and no `alpha` is passed.
    """
    values: dict[str, float] = {}
    notes = []
    for key in PLAIN_ALPHA:
        if key not in header:
            continue
        try:
            number = float(header[key])
        except ValueError:
            number = math.nan
        if 0 < number < HUGE:
            values[key] = number
        else:
            notes.append(f"`{key}: {header[key][:40]}` in the header is not a number above 0: not used")
    if len(set(values.values())) > 1:
        if alpha is None:
            both = " and ".join(f"{k} {v:g}" for k, v in values.items())
            raise ValueError(f"{path}: the header has {both}: pass the right one as --alpha")
        return None, notes
    key = next(iter(values), None)
    return (values[key], f"the file's header ({key})") if key else None, notes


def _head(path: Path) -> tuple[bytes, int]:
    """Return the first nine bytes and the size of a file."""
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


def _unpickle(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any] | None]:
    """Load the tensors of a file that `torch.save` wrote.

    Returns:
        The tensors by name, and the trainer settings that the file contains. The settings are None if there
        are none.

    Raises:
        ValueError: if the file is not a torch file, or does not map names to tensors.
    """
    try:
        state = load_torch(path)
    except TorchFileError as error:
        if error.code == "pickle" or "a tensor has" in error.cause or "INLAID_" in error.cause:
            raise
        raise ValueError(f"{path}: neither a safetensors nor a torch file") from None
    config = None
    for key in ("state_dict", "module", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            found = state.get(published.GENMO_KEY)
            config = {published.GENMO_KEY: json.dumps(found, default=str)} if found is not None else config
            state = state[key]
    named = isinstance(state, dict) and all(isinstance(k, str) for k in state)
    if not named or not all(isinstance(v, Tensor) and v.layout == torch.strided for v in state.values()):
        raise ValueError(f"{path}: not a mapping of names to tensors")
    return state, config
