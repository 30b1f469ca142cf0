"""The benchmarks that need a GPU, or minutes, as far as a CPU can run them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from inlaid import families
from inlaid.tiny import random

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_toys_and_skips_finished_rows(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--toy", "--steps", "2", "--out", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "gpu-toy.json").read_text("utf-8"))
    toys = {family for family, _ in random.cases()} & set(families.names())
    assert {row["row"].split()[0] for row in found["rows"]} <= toys and len(found["rows"]) >= 2
    for row in found["rows"]:
        assert row["outcome"] == "ok" and row["seconds"] > 0 and row["loss"] > 0 and row["tflop_per_step"] > 0
        assert row["row"] in first.stdout
    table = (tmp_path / "gpu-toy.md").read_text("utf-8")
    assert table.count("toy |") == len(found["rows"])
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ok" not in again.stdout


def test_the_estimate_was_within_a_quarter_of_what_was_measured():
    found = json.loads((BENCHMARKS / "results/estimate.json").read_text("utf-8"))
    ratios = {name: row["estimated"] / row["measured"] for name, row in found["settings"].items()}
    assert len(ratios) >= 8
    assert all(0.75 < ratio < 1.25 for ratio in ratios.values()), ratios


def test_small_objects_have_the_meshes_that_were_promised():
    found = json.loads((BENCHMARKS / "results/meshing.json").read_text("utf-8"))["rows"]
    rows = {(row["radius"], row["way"], row["cells"]): row for row in found}
    before, dense, now = (rows[0.12, way, 256] for way in ("whole box", "dense, own box", "own box"))
    assert now["chamfer"] <= 0.0038 and now["floor"] >= 0.0036 and now["watertight"]
    assert 0.5 < now["triangles"] / dense["triangles"] < 2 and now["triangles"] > 10 * before["triangles"]
    assert now["evaluations"] < 0.05 * dense["evaluations"] and now["peak_mb"] < 0.2 * dense["peak_mb"]
    large = [rows[0.9, way, 256] for way in ("whole box", "own box")]
    assert large[1]["evaluations"] < large[0]["evaluations"], "large objects cost less than before"


def test_containers_keep_what_the_table_says(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "containers.py"), "--toy", "--out", str(tmp_path)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    toys, found = (
        json.loads((folder / "containers.json").read_text("utf-8"))
        for folder in (tmp_path, BENCHMARKS / "results")
    )
    assert toys["containers"].keys() == found["containers"].keys()
    for name, row in (*toys["containers"].items(), *found["containers"].items()):
        limit = 1.5 if name.startswith(("webm", "mp4")) else 0.1
        assert row["mean"]["alpha"] <= limit, name
    assert toys["plain_vp9_lowest_alpha"] == 255
