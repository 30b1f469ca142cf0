"""The order of batches: a function of the index, even, weighted, one shape at a time."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

import pytest

from inlaid.data.sampler import BucketSampler

ENTRIES = [(0, "wide")] * 13 + [(0, "tall")] * 4 + [(1, "wide")] * 7 + [(2, "short")] * 1
SHARES = [1.0, 2.0, 1.0]


def make(entries=ENTRIES, shares=SHARES, batch: int = 4, seed: int = 0) -> BucketSampler:
    return BucketSampler(entries, shares, batch, seed)


def epoch(sampler: BucketSampler, e: int) -> list[list[int]]:
    return [sampler.batch(e * len(sampler) + k) for k in range(len(sampler))]


def test_any_batch_without_the_ones_before():
    whole = make()
    sequence = [whole.batch(k) for k in range(6 * len(whole))]
    order = list(range(len(sequence)))
    random.Random(0).shuffle(order)
    hopping = make()
    assert all(hopping.batch(k) == sequence[k] for k in order)
    assert make().batch(len(sequence) - 1) == sequence[-1]


def test_seed_decides_the_order():
    first = [make(seed=1).batch(k) for k in range(10)]
    assert first == [make(seed=1).batch(k) for k in range(10)]
    assert first != [make(seed=2).batch(k) for k in range(10)]


def test_the_order_never_changes_between_versions():
    sampler = BucketSampler([(0, (9, 32, 32))] * 6, [1.0], 2, 7)
    assert [sampler.batch(k) for k in range(6)] == [[0, 3], [1, 5], [2, 4], [1, 5], [0, 2], [3, 4]], (
        "runs resume by it"
    )


def test_one_shape_per_batch_and_full_but_for_the_last():
    sampler = make()
    for e in range(4):
        batches = epoch(sampler, e)
        sizes: dict[str, list[int]] = {}
        for batch in batches:
            shapes = {ENTRIES[i][1] for i in batch}
            assert len(shapes) == 1
            sizes.setdefault(shapes.pop(), []).append(len(batch))
        assert {k: sorted(v) for k, v in sizes.items()} == {
            "wide": [3, 4, 4, 4, 4, 4, 4],
            "tall": [4],
            "short": [1],
        }
    assert len(sampler) == 9


def test_repeats_one_shows_every_window_once_per_epoch():
    sampler = make(shares=[1, 1, 1])
    for e in range(5):
        assert sorted(i for b in epoch(sampler, e) for i in b) == list(range(len(ENTRIES)))


@pytest.mark.parametrize("share", [0.3, 0.5, 1.0, 1.7, 2.0, 3.0])
def test_counts_differ_by_at_most_one_at_every_epoch(share):
    entries = [(0, "a")] * 11
    sampler = make(entries, [share])
    counts: Counter[int] = Counter(dict.fromkeys(range(11), 0))
    shown = round(11 * share)
    for e in range(12):
        counts.update(i for b in epoch(sampler, e) for i in b)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert sum(counts.values()) == shown * (e + 1)


def test_weights_set_the_shares():
    entries = [(0, "a")] * 10 + [(1, "a")] * 10
    sampler = make(entries, [2.0, 1.0], batch=3)
    for e in range(3):
        sources = Counter(entries[i][0] for b in epoch(sampler, e) for i in b)
        assert sources == {0: 20, 1: 10}
    half = make(entries, [0.5, 1.0])
    assert Counter(entries[i][0] for b in epoch(half, 0) for i in b) == {0: 5, 1: 10}


def test_a_rare_shape_is_never_dropped():
    sampler = make([(0, "a")] * 10 + [(0, "b")], [0.1])
    assert 10 in {i for b in epoch(sampler, 0) for i in b}


def test_epochs_and_batches_are_in_different_orders():
    sampler = make([(0, "a")] * 24, [1.0])
    orders = [epoch(sampler, e) for e in range(4)]
    assert all(a != b for a, b in pairwise(orders))
    shapes = make([(0, "a")] * 16 + [(0, "b")] * 16, [1.0])
    firsts = {tuple(ENTRY[0] // 16 for ENTRY in epoch(shapes, e)) for e in range(6)}
    assert len(firsts) > 1, "shapes are mixed, not one after the other"
    assert any(a != b for order in firsts for a, b in pairwise(order[:7]))


def test_sources_of_one_shape_share_batches():
    entries = [(0, "a")] * 8 + [(1, "a")] * 8
    batches = epoch(make(entries, [1.0, 1.0]), 0)
    assert any(len({entries[i][0] for i in b}) == 2 for b in batches)


def test_sources_do_not_disturb_each_other():
    alone = make([(0, "a")] * 9, [1.0], batch=100)
    mixed = make([(0, "a")] * 9 + [(1, "a")] * 5, [0.5, 1.0], batch=100)
    half = {i for i in mixed.batch(0) if i < 9} | {i for i in mixed.batch(1) if i < 9}
    assert half <= set(alone.batch(0))
    assert len(half) == 9 or len(half) == 8


def test_nothing_to_train_on():
    with pytest.raises(ValueError, match="no windows"):
        make([])
