"""`check --vram` predicts memory and time of each memory setting, and chooses the fastest that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from inlaid import config
from inlaid.check import ladder
from inlaid.check.counting import Counts
from inlaid.families import get
from inlaid.families.grid import VideoExtent
from support.commands import inlaid

RAW: dict[str, Any] = {
    "run": "x",
    "model": {"family": "wan", "checkpoint": "tiny:wan"},
    "data": {"sources": "x", "size": [64, 64], "frames": 17},
}


def climbed(vram: float = 24, **sections: Any) -> list[ladder.Rung]:
    made = config.build({**RAW, **sections})
    return ladder.climb(get("wan")(made.model), made, VideoExtent(17, 64, 64), vram)


def rung(seconds: float, gigabytes: float, vram: float = 24, **settings: Any) -> ladder.Rung:
    return ladder.Rung(settings, "", round(gigabytes * 1e9), seconds, gigabytes * 1e9 <= ladder.usable(vram))


def test_settings_trade_time_for_memory() -> None:
    rungs = {r.text: r for r in climbed()}
    assert len(rungs) == len(ladder.LADDER)
    assert not any(r.problem for r in rungs.values())
    whole, second, kept, recomputed = (
        rungs[f"gradient_checkpointing={each}"] for each in ("false", "2", "attention", "true")
    )
    assert whole.peak > second.peak > kept.peak >= recomputed.peak
    assert whole.seconds < second.seconds < recomputed.seconds
    assert whole.seconds < kept.seconds <= recomputed.seconds
    away = rungs["gradient_checkpointing=true, offload=all"]
    assert away.peak < recomputed.peak
    small = [rungs[f"gradient_checkpointing=true, quantize={q}"].peak for q in ("int8", "nf4")]
    assert recomputed.peak > small[0] > small[1]


def test_what_a_recipe_cannot_use_is_refused_with_the_reason() -> None:
    rungs = climbed(tuner={"kind": "full"})
    refused = {r.text: r.problem for r in rungs if r.problem}
    assert all("quantize" in text or "offload=all" in text for text in refused)
    assert "memory.quantize" in refused["gradient_checkpointing=true, quantize=int8"]
    assert "frozen base model" in refused["gradient_checkpointing=true, offload=all"]
    assert all(r.peak > 0 for r in rungs if not r.problem)


def test_a_recipe_that_quantizes_keeps_its_format() -> None:
    rungs = climbed(tuner={"kind": "lora"}, memory={"quantize": "int8"})
    assert {r.settings.get("quantize") for r in rungs} == {None, "int8"}
    plain = {r.text: r for r in climbed(tuner={"kind": "lora"})}
    assert all(r.peak < plain[r.text].peak for r in rungs if "quantize" not in r.settings)


def test_copies_from_the_host_take_time_only_if_they_take_longer_than_the_work() -> None:
    counts = Counts(0, 0, linear=650e12, attention=0.0, across=0.0)
    assert ladder.seconds_of(counts, copied=int(40e9)) == pytest.approx(1)
    assert ladder.seconds_of(counts, copied=int(100e9)) == pytest.approx(2)


def test_the_fastest_that_fits_is_chosen_and_the_next_faster_explained() -> None:
    rungs = [
        rung(1.0, 40, gradient_checkpointing=False),
        rung(1.2, 26, gradient_checkpointing=2),
        rung(1.3, 20, gradient_checkpointing="attention"),
        rung(1.4, 18, gradient_checkpointing=True),
    ]
    assert ladder.choose(rungs) is rungs[2]
    text = ladder.explain(rungs, 24)
    assert text == (
        "fastest that fits into 24 GB: memory.gradient_checkpointing=attention (20.0 GB); "
        "gradient_checkpointing=2 needs 26.0 GB, and 23.4 GB are usable"
    )


def test_nothing_fits() -> None:
    text = ladder.explain([rung(1.0, 40), rung(1.4, 30)], 24)
    assert text.startswith("nothing fits into 24 GB: at least 30.0 GB are needed")


def test_the_time_is_that_of_operations_and_bytes() -> None:
    counts = Counts(0, 0, linear=65e12, attention=58e12, across=0.0, moved=2.9e12)
    assert ladder.seconds_of(counts) == pytest.approx(0.1 + 0.1 + 1)
    assert ladder.seconds_of(counts, 3) == pytest.approx(3.6)


def test_bytes_of_operations_are_counted() -> None:
    from inlaid.check.counting import _Ledger

    x, w = torch.empty(8, 16, device="meta"), torch.empty(16, 4, device="meta")
    with _Ledger([x, w]) as counted:
        y = (x * 2).reshape(4, 32)
        y.view(8, 16).bfloat16() @ w.bfloat16()
    # x * 2 and two casts; the bytes of a bfloat16 product do not limit its speed
    assert counted.moved == 2 * 512 + (512 + 256) + (256 + 128)
    assert counted.launches == 4


def test_check_prints_the_ladder(recipe: Any, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(recipe()), "utf-8")
    done = inlaid("check", tmp_path / "r.yaml", "--vram", 24)
    assert done.code == 0, done.output
    assert "fastest that fits into 24 GB: memory.gradient_checkpointing=false" in done.output
    report = json.loads((tmp_path / "run/check/report.json").read_text("utf-8"))
    assert report["vram"] == 24
    assert len(report["ladder"]) == len(ladder.LADDER)
