"""Data loader for training."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from inlaid import families
from inlaid.data.batch import Batch, stable_hash
from inlaid.data.cache import Cache
from inlaid.data.clips import Window
from inlaid.data.sampler import BucketSampler
from inlaid.runs.launch import Context


@dataclass
class Loader:
    """Data loader with random access: it can read any micro-batch from the cache by its index."""

    family: families.Family
    store: Cache
    windows: Sequence[Window]
    media: Sequence[str]
    text: Sequence[str]
    empty: str
    sampler: BucketSampler
    dropout: float
    seed: int

    def batch(self, k: int) -> Batch:
        """Read micro-batch k from the cache, and apply caption dropout."""
        rows = self.sampler.batch(k)
        drop = torch.rand(
            len(rows), generator=torch.Generator().manual_seed(stable_hash(self.seed, "caption", k))
        )
        texts = [
            self.empty if d < self.dropout else self.text[r] for r, d in zip(rows, drop.tolist(), strict=True)
        ]
        clips = [self.store.read("media", self.media[r]) for r in rows]
        names = [self.windows[r].clip.name for r in rows]
        words = [self.store.read("text", n) for n in texts]
        batch = Batch.of(self.family, clips, words, names, self.seed, k)
        kept = [self.prior_preservation[self.windows[r].clip.source] for r in rows]
        return replace(batch, prior_preservation=torch.tensor(kept)) if any(kept) else batch

    def stream(self, start: int, steps: int, ctx: Context) -> Generator[tuple[int, Batch], None, None]:
        """Yield pairs (index, micro-batch) for this process, from step `start` to step `steps` - 1.

        A background thread reads the next micro-batch while the current one is in use.
        """
        total, (group, groups) = self.per_step, ctx.share
        indices = [k for s in range(start, steps) for k in range(s * total + group, (s + 1) * total, groups)]
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(self.batch, indices[0]) if indices else None
            for index, following in zip(indices, [*indices[1:], None], strict=True):
                assert waiting is not None
                batch = waiting.result()
                waiting = pool.submit(self.batch, following) if following is not None else None
                yield index, batch

    per_step: int = 1
    """Number of micro-batches per optimizer step, of all processes together."""
    prior_preservation: Sequence[float] = ()
    """Weight of the prior preservation loss for each data source; 0 disables the loss."""
