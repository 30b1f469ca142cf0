"""Micro-batches of cached tensors, and random seeds that are the same in every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlaid.families import Family


@dataclass(frozen=True)
class Batch:
    """Micro-batch: latents (n, ...), conditioning tensors, and names of the clips."""

    latents: Tensor
    cond: Mapping[str, Tensor]
    names: Sequence[str] = ()
    prior_preservation: Tensor | None = None
    """Weight of each sample's prior preservation loss, (n,). A sample with weight 0 is trained normally."""

    @classmethod
    def of(
        cls,
        family: Family,
        clips: Sequence[Mapping[str, Tensor]],
        text: Sequence[Mapping[str, Tensor]],
        names: Sequence[str],
        *seed: Any,
    ) -> Batch:
        """Return a micro-batch of cached clips and cached text embeddings.

        Random choices, such as sampling from the VAE posterior, depend only on `seed` and the clip's index in
        the batch.
        """
        drawn = [
            family.sample_item(clip, torch.Generator().manual_seed(stable_hash(*seed, "clip", i)))
            for i, clip in enumerate(clips)
        ]
        stacked = {k: torch.stack([d[k] for d in drawn]) for k in drawn[0]}
        return cls(stacked.pop("latents"), {**family.collate(text), **stacked}, names)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device. Copies to CUDA are asynchronous, from pinned memory."""
        pin = (lambda t: t.pin_memory()) if device.type == "cuda" else (lambda t: t)
        move = lambda t: pin(t).to(device, non_blocking=True)  # noqa: E731
        prior_preservation = None if self.prior_preservation is None else move(self.prior_preservation)
        return Batch(
            move(self.latents), {k: move(v) for k, v in self.cond.items()}, self.names, prior_preservation
        )


def stable_hash(*parts: Any) -> int:
    """Return a 63-bit hash of `parts` for use as a random seed; it is the same in every process."""
    import hashlib

    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1
