"""Inputs that hung, filled the memory or ended with a traceback when somebody tried to break the program."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from inlaid import config
from inlaid.adapters.read import read_adapter
from inlaid.cli.run_commands import _lines
from inlaid.data.layouts import find_clips
from inlaid.families.wan import Wan
from inlaid.media.arrays import probe_array
from inlaid.media.kinds import MediaError
from inlaid.paths import Root
from inlaid.runs.folder import Run, open_run
from inlaid.runs.launch import Context
from support.commands import inlaid


def test_a_folder_that_a_link_precedes_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "z/deep").mkdir(parents=True)
    (tmp_path / "z/deep/x.mp4").write_bytes(b"x")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/link").symlink_to(tmp_path / "z/deep")
    (tmp_path / "b").symlink_to(tmp_path / "z")
    (tmp_path / ".store/hidden").mkdir(parents=True)
    (tmp_path / ".store/hidden/y.mp4").write_bytes(b"y")
    (tmp_path / "c").symlink_to(tmp_path / ".store/hidden")
    (tmp_path / "d").symlink_to(tmp_path / ".store/hidden")
    found = [Path(parent, f) for parent, _, files in Root(tmp_path).walk() for f in files]
    assert found == [tmp_path / "c/y.mp4", tmp_path / "z/deep/x.mp4"]


@pytest.mark.parametrize("links", [1, 12])
def test_linked_folders_that_contain_each_other_are_entered_once(tmp_path: Path, links: int) -> None:
    for name, other in ("ab", "ba"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.mp4").touch()
        for i in range(links):
            (tmp_path / name / f"link{i}").symlink_to(f"../{other}")
    found = [Path(parent, f) for parent, _, files in Root(tmp_path).walk() for f in files]
    assert sorted(f.name for f in found) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("fps", [1e-4, 1e-9, 1e-310, 0.0, -1.0, 1e9, np.inf, np.nan])
def test_frame_rates_of_arrays_are_bounded(tmp_path: Path, fps: float) -> None:
    np.savez(tmp_path / "n.npz", frames=np.zeros((9, 16, 16, 3), np.uint8), fps=np.array(fps))
    with pytest.raises(MediaError, match=r"`fps` is .*between 0\.001 and"):
        probe_array(tmp_path / "n.npz")


@pytest.mark.parametrize(
    "state", [{1: torch.zeros(4), None: torch.zeros(2)}, {"a": torch.zeros(2).to_sparse()}]
)
def test_torch_files_that_are_not_named_dense_tensors(tmp_path: Path, state: dict) -> None:
    torch.save(state, tmp_path / "keys.pt")
    with pytest.raises(ValueError, match=r"keys\.pt"):
        read_adapter(tmp_path / "keys.pt", Wan)


def test_prompt_files_are_regular_text(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p")
    for path in (tmp_path / "p", Path("/dev/zero"), tmp_path / "missing", tmp_path):
        with pytest.raises(ValueError, match="--file: "):
            _lines(path)


def test_prompts_are_unicode_text(tmp_path: Path) -> None:
    for words in (["\udcff"], ["a cat", "--negative", "\udcff"]):
        done = inlaid("generate", tmp_path, *words)
        assert done.code == 2 and "is not UTF-8 text" in done.err


def test_a_run_in_the_folder_of_its_data_is_refused(recipe: Callable[..., dict], tmp_path: Path) -> None:
    raw = recipe()
    raw["run"] = raw["data"]["sources"]
    with pytest.raises(ValueError, match=r"run: .* is the folder of a data source"):
        config.build(raw)


def test_damaged_metrics(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.metrics.write_bytes(b'\xff\xfe junk\n{}\n[1]\n{"step": "x"}\n{"step": 1}\n{"step": 9}\n')
    run.truncate_metrics(5)
    assert run.metrics.read_text("utf-8") == '{"step": 1}\n'


def test_files_in_place_of_folders_are_refused_at_launch(recipe: Callable[..., dict], tmp_path: Path) -> None:
    config_ = config.build(recipe())
    run = Path(config_.run)
    run.mkdir()
    (run / "adapter").touch()
    os.mkfifo(run / "metrics.jsonl")
    (run / "environment.json").mkdir()
    with (
        pytest.raises(ValueError) as error,
        open_run(config_, Context(torch.device("cpu"), torch.float32, "")),
    ):
        pass
    for cause in (
        f"{run / 'adapter'} is not a folder",
        f"{run / 'metrics.jsonl'} is not a regular file",
        f"{run / 'environment.json'} is not a regular file",
    ):
        assert cause in str(error.value)
    shutil.rmtree(run)
    run.mkdir()
    os.mkfifo(run / "run.lock")
    with (
        pytest.raises(ValueError, match=r"run\.lock: is not a regular file"),
        open_run(config_, Context(torch.device("cpu"), torch.float32, "")),
    ):
        pass


@pytest.mark.parametrize("made", [["run.lock"], ["check/report.json"], ["config.yaml", "environment.json"]])
def test_a_run_below_its_data_is_not_data(
    tmp_path: Path, make_clips: Callable[..., Path], made: list
) -> None:
    folder = make_clips(2)
    run = folder / "runs" / "first"
    shutil.copytree(folder, run / "samples" / "step-000001")
    source = config.Source(path=str(folder))
    assert len(find_clips(source, 0, None, 3).clips) == 4
    for name in made:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    found = find_clips(source, 0, None, 3)
    assert [c.name for c in found.clips] == ["00.mp4", "01.mp4"]
    assert [(p.severity, p.code, p.name) for p in found.problems] == [("warning", "run", "runs/first")]


@pytest.mark.parametrize("place", ["/", "~"])
def test_a_run_has_a_folder_of_its_own(recipe: Callable[..., dict], place: str) -> None:
    with pytest.raises(ValueError, match=r"run: .* choose a folder of its own, such as .*runs/first"):
        config.build(recipe() | {"run": str(Path(place).expanduser())})


def test_paths_of_a_recipe_may_be_in_the_home_folder(recipe: Callable[..., dict]) -> None:
    raw = recipe(
        data__cache="~/c", data__sources=[{"path": "~/clips", "root": "~/r"}], sample__images=["~/a.png"]
    )
    made = config.build(raw | {"run": "~/run"})
    home = str(Path.home())
    assert (made.run, made.data.cache) == (f"{home}/run", f"{home}/c")
    assert (made.data.sources[0].path, made.data.sources[0].root) == (f"{home}/clips", f"{home}/r")
    assert made.sample.images == [[f"{home}/a.png"]]


def test_a_run_is_no_file(recipe: Callable[..., dict], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"run: .*file cannot be a folder, because .*file is a file"):
        config.build(recipe() | {"run": str(tmp_path / "file")})


def test_a_table_may_begin_with_empty_lines(tmp_path: Path, make_clips: Callable[..., Path]) -> None:
    folder = make_clips(1)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "m.csv").write_text("\n\n\nvideo,caption\n00.mp4,x\n", "utf-8")
    assert [c.name for c in find_clips(config.Source(path=str(copy / "m.csv")), 0, None, 3).clips] == [
        "00.mp4"
    ]


@pytest.mark.parametrize("values", [{"data__size": [8192, 8192]}, {"train__batch": 10**15}])
def test_impossible_sizes_are_a_sentence(recipe: Callable[..., dict], tmp_path: Path, values: dict) -> None:
    import json

    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(recipe(**values)), "utf-8")
    done = inlaid("check", file)
    assert done.code == 2
    assert "data.size" in done.err + done.out or "train.batch" in done.err
