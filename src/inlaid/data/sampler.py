"""Batch order in training: shuffled batches of windows with equal shape, reproducible from the seed."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from inlaid import config
from inlaid.data.clips import Window

# --- order --------------------------------------------------------------------------------------------------


def _permutation(n: int, *key: Hashable) -> list[int]:
    """Return a permutation of range(n) that is determined by `key`.

    It is the same on all machines and with all NumPy versions.
    """
    entropy = np.frombuffer(hashlib.sha256(repr(key).encode()).digest(), np.uint32)
    return np.random.RandomState(entropy).permutation(n).tolist()


class BucketSampler:
    """Batch sampler. A batch lists the indices of windows (training examples) that have equal shape.

    Batch k depends only on the arguments and k. Windows with the same data source and shape form a group. One
    epoch takes max(1, round(n * repeats * weight)) windows from a group of n windows. These windows come from
    an endless sequence of random permutations of the group. Therefore, the use counts of two windows of a
    group never differ by more than one.
    """

    def __init__(
        self,
        entries: Sequence[tuple[int, Hashable]],
        repeats: Mapping[int, float] | Sequence[float],
        batch: int,
        seed: int,
    ) -> None:
        """Group the training windows by data source and shape.

        Args:
            entries: for each window, the index of its data source and its shape.
            repeats: how often a window is used in one epoch, by index of its data source.
            batch: windows per batch; the last batch of a shape may be smaller.
            seed: seed of the shuffling.

        Raises:
            ValueError: if there are no windows.
        """
        if not entries:
            raise ValueError("no windows to train on")
        self.size, self.seed = batch, seed
        self._groups: dict[tuple[int, Hashable], list[int]] = defaultdict(list)
        for i, entry in enumerate(entries):
            self._groups[entry].append(i)
        self._uses = {g: max(1, math.floor(len(v) * repeats[g[0]] + 0.5)) for g, v in self._groups.items()}
        counts: dict[Hashable, int] = defaultdict(int)
        for (_, shape), uses in self._uses.items():
            counts[shape] += uses
        self._length = sum(math.ceil(n / batch) for n in counts.values())
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self._length

    def batch(self, k: int) -> list[int]:
        """Return the indices of the training windows of batch k, for any k >= 0."""
        epoch, at = divmod(k, self._length)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._batches(epoch))
        return self._epoch[1][at]

    def _batches(self, epoch: int) -> list[list[int]]:
        shapes: dict[Hashable, list[int]] = defaultdict(list)
        for group, members in self._groups.items():
            n, uses = len(members), self._uses[group]
            first, last = epoch * uses, (epoch + 1) * uses
            for turn in range(first // n, (last - 1) // n + 1):
                order = _permutation(n, self.seed, "windows", group, turn)
                picked = order[max(first - turn * n, 0) : last - turn * n]
                shapes[group[1]] += [members[i] for i in picked]
        batches = []
        for shape, indices in shapes.items():
            order = _permutation(len(indices), self.seed, "shape", shape, epoch)
            mixed = [indices[i] for i in order]
            batches += [mixed[i : i + self.size] for i in range(0, len(mixed), self.size)]
        return [batches[i] for i in _permutation(len(batches), self.seed, "batches", epoch)]


def make_sampler(
    windows: Sequence[Window], sources: Sequence[config.Source], batch: int, seed: int
) -> BucketSampler:
    """Return the batch sampler for the training windows of a dataset."""
    shares = [s.repeats * s.weight for s in sources]
    # The repr of the shape seeds the order: pass a plain tuple, because the repr of an `Extent` differs.
    return BucketSampler([(w.clip.source, tuple(w.extent)) for w in windows], shares, batch, seed)
