"""Conversion of published TransPixeler adapters to the usual tensor names.

With a TransPixeler adapter, a model generates the alpha channel as a second clip of tokens (see
`inlaid.alpha.joint`). The adapter applies to these tokens only. Its LoRA alpha is always 1, but the file does
not store it. If the file is loaded as an ordinary LoRA, the update applies to all tokens and is `rank` times
too strong. This module is based on the layout of the files, not on the authors' code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from inlaid.networks.domain_embedding import NAME, TOKENS

ALPHA = 1.0
"""LoRA alpha of all published TransPixeler adapters; their updates are scaled by 1 / rank."""

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")

_MOCHI = re.compile(r"block_(\d+)\.to_(q|k|v|out)_lora\.([01])\.weight")


@dataclass(frozen=True)
class Published:
    """Published TransPixeler adapter, with tensors renamed to names that `read_adapter` reads."""

    tensors: Mapping[str, Tensor]
    """Tensors by name in a layout that `read_adapter` reads, without the domain embedding."""
    vector: Tensor | None
    """Domain embedding (d,), a trained vector that is added to the alpha tokens; None if absent."""
    header: Mapping[str, str]
    """Header metadata with the same keys as in adapters that inlaid writes."""
    name: str
    """Base model and method for messages, such as `Wan (TransPixeler)`."""
    notes: Sequence[str]


def recognize(tensors: Mapping[str, Tensor]) -> Published | None:
    """Convert a published TransPixeler adapter; return None for other files.

    Raises:
        ValueError: if the file is such an adapter, but tensors are missing or unexpected, or ranks differ.
    """
    if "domain_emb" in tensors:
        rest = {k: v for k, v in tensors.items() if k != "domain_emb"}
        key = re.compile(r"transformer\.transformer_blocks\.(\d+)\.attn1\.(.+)\.lora_([AB])\.weight")
        _whole(rest, key, {"A", "B"}, _ATTENTION)
        return _made(rest, tensors["domain_emb"], "CogVideoX (TransPixeler)", "bias", "max")
    if "transformer.modality_embedding" in tensors:
        rest = {k: v for k, v in tensors.items() if k != "transformer.modality_embedding"}
        wrong = [k for k in rest if not k.startswith("diffusion_model.")]
        if wrong:
            raise ValueError(f"{len(wrong)} unexpected tensors ({_some(wrong)})")
        return _made(rest, tensors["transformer.modality_embedding"], "Wan (TransPixeler)", "block", "mean")
    if any(_MOCHI.fullmatch(k) for k in tensors):
        _whole(tensors, _MOCHI, {"0", "1"}, ("q", "k", "v", "out"))
        named = {_MOCHI.sub(_mochi, k): v for k, v in tensors.items()}
        return _made(named, None, "Mochi (TransPixeler)", "block", "max")
    return None


def _mochi(match: re.Match[str]) -> str:
    layer = {"out": "to_out.0"}.get(match[2], f"to_{match[2]}")
    return f"transformer.transformer_blocks.{match[1]}.attn1.{layer}.lora_{'AB'[int(match[3])]}.weight"


def _whole(
    tensors: Mapping[str, Tensor], key: re.Pattern[str], halves: set[str], layers: Sequence[str]
) -> None:
    """Check that a file contains both low-rank factors of every layer in every block, and no other tensors.

    The blocks are numbered from 0 to the highest block number in the file.

    Raises:
        ValueError: if tensors are missing or unexpected.
    """
    found = {k: key.fullmatch(k) for k in tensors}
    extra = [k for k, match in found.items() if not match or match[2] not in layers]
    if extra:
        raise ValueError(f"{len(extra)} unexpected tensors ({_some(extra)})")
    there = {(int(m[1]), m[2], m[3]) for m in found.values() if m}
    last = max((block for block, *_ in there), default=-1)
    wanted = {(i, layer, half) for i in range(last + 1) for layer in layers for half in halves}
    missing = sorted(f"{layer} of block {i}" for i, layer, _ in wanted - there)
    if missing or not wanted:
        raise ValueError(
            f"incomplete: {len(missing)} tensors are missing, such as those of {_some(missing) or 'all'}"
        )


def _made(rest: Mapping[str, Tensor], vector: Tensor | None, name: str, rule: str, mean: str) -> Published:
    ranks = Counter(v.shape[0] for k, v in rest.items() if re.search(r"lora_(A|down)", k) and v.ndim == 2)
    if len(ranks) > 1:
        counts = ", ".join(f"{r} ({n})" for r, n in ranks.most_common())
        raise ValueError(
            f"the layers have different ranks, {counts}, but published files have one rank: it may be two "
            "files in one"
        )
    if vector is not None and (vector.ndim == 0 or vector.numel() != vector.shape[-1]):
        raise ValueError(f"the domain embedding has shape {tuple(vector.shape)}, which is not a vector")
    values = {
        "alpha": "joint",
        "alpha_tokens": TOKENS,
        "text_to_alpha": rule,
        NAME: "no" if vector is None else "yes",
    }
    notes = [
        (
            "joint transparency: the adapter applies to the alpha tokens only. Use it in a recipe with "
            f"`alpha: {{kind: joint, text_to_alpha: {rule}, alpha_from: {mean}, domain_embedding: "
            f"{'false' if vector is None else 'true'}}}`; loaded as an ordinary LoRA it changes all tokens"
        ),
        f"scale: LoRA alpha is {ALPHA:g} in all published files, although no file stores it",
        "license: unknown; ask the publisher of the file",
    ]
    header = {f"inlaid_{k}": v for k, v in values.items()}
    return Published(rest, None if vector is None else vector.float().flatten(), header, name, notes)


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
