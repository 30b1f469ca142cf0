"""The run folder: one owner, nothing written before the checks, complete when it is complete."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from inlaid import config, files
from inlaid.files import HOST, atomic, process_start, save_file, sweep
from inlaid.runs import lock
from inlaid.runs.folder import Run, read_metrics
from inlaid.runs.lock import owned
from inlaid.training import job
from inlaid.training.checkpoints import verify
from inlaid.training.loop import train
from support.checkpoints import load_state
from support.commands import files as content
from support.processes import ended_process
from support.slow import slow

WEIGHTS = "adapter/pytorch_lora_weights.safetensors"


def run(raw: dict) -> Run:
    return Run(train(config.build(raw)))


# --- one owner ----------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)


@pytest.mark.usefixtures("impatient")
def test_a_second_run_on_a_folder_is_refused(tmp_path: Path) -> None:
    with (
        owned(tmp_path / "a" / "run"),
        pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "),
        owned(tmp_path / "a" / "run"),
    ):
        pass
    assert list(tmp_path.iterdir()) == [], "a folder in which nothing was written does not stay"
    with owned(tmp_path / "run"):
        (tmp_path / "run/x").touch()
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["x"]


@pytest.mark.usefixtures("impatient")
def test_the_lock_of_a_process_that_runs(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    values = {"pid": process.pid, "host": HOST, "start": process_start(process.pid), "since": "today"}
    file = tmp_path / lock.NAME
    try:
        file.write_text(json.dumps(values), "utf-8")
        message = f"run is in use by process {process.pid} on {HOST}, started today: wait until it has ended"
        with pytest.raises(ValueError, match=message), owned(tmp_path):
            pass
        assert json.loads(file.read_text("utf-8")) == values
        file.write_text(json.dumps({**values, "start": "0"}), "utf-8")  # its number was used again
        with owned(tmp_path):
            assert json.loads(file.read_text("utf-8"))["pid"] == os.getpid()
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"pid": "x"}', "[" * 5000])
def test_the_lock_of_a_process_that_has_ended_is_taken_over(tmp_path: Path, text: str | None) -> None:
    values = {"pid": ended_process(), "host": HOST, "start": "5", "since": "yesterday"}
    (tmp_path / lock.NAME).write_text(json.dumps(values) if text is None else text, "utf-8")
    with owned(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text("utf-8"))["pid"] == os.getpid()
    assert not (tmp_path / lock.NAME).exists()


@pytest.mark.usefixtures("impatient")
def test_the_lock_of_another_machine_expires(tmp_path: Path) -> None:
    file = tmp_path / lock.NAME
    file.write_text(json.dumps({"pid": 1, "host": "elsewhere", "start": "5", "since": "today"}), "utf-8")
    with pytest.raises(ValueError, match=r"process 1 on elsewhere.* or delete .*run\.lock"), owned(tmp_path):
        pass
    os.utime(file, (1, file.stat().st_mtime - lock.EXPIRES - 1))
    with owned(tmp_path):
        pass


def test_only_temporaries_of_ended_processes_are_deleted(tmp_path: Path) -> None:
    ended = ended_process()
    gone = [f".tmp-{ended}-a", f"sub/.tmp-{ended}.{files._HOST_TAG}-b.mp4"]
    kept = [f".tmp-{os.getpid()}-c", f"sub/.tmp-{ended}.0000-d", "sub/tmp-1", ".tmp-notes"]
    for name in (*gone, *kept):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x").touch()
    sweep(tmp_path)
    assert not any((tmp_path / name).exists() for name in gone)
    assert all((tmp_path / name / "x").exists() for name in kept)
    (tmp_path / f"sub/.tmp-{ended}-e").touch()
    with atomic(tmp_path / "sub/new") as part:  # whoever writes to a folder sweeps it
        part.touch()
    assert not (tmp_path / f"sub/.tmp-{ended}-e").exists()


def test_a_run_sweeps_its_folders_and_its_cache(recipe: Callable[..., dict], tmp_path: Path) -> None:
    raw = recipe(data__cache=str(tmp_path / "elsewhere"), train__steps=2)
    left = [
        tmp_path / p / f".tmp-{ended_process()}-x" for p in ("run/samples/step-000001", "elsewhere/media/ab")
    ]
    for path in left:
        path.mkdir(parents=True)
    run(raw)
    assert not any(path.exists() for path in left)
    assert not list(tmp_path.rglob(lock.NAME))


# --- checks before writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__accumulate": 2}, "1 micro-batches per step over all processes, this launch has 2"),
        ({"optim__lr": 0.5}, r"optim\.lr was 0\.01, is 0\.5"),
        slow({"runtime__world_size": 2}, "requires 2 process"),
        slow({"memory": {"offload_optimizer": True}}, "offload_optimizer"),
        slow({"data__size": [32, 31]}, "31"),
    ],
)
def test_a_refused_launch_writes_nothing(
    recipe: Callable[..., dict], tmp_path: Path, changes: dict, message: str
) -> None:
    run(recipe(train__steps=2))
    before = content(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(recipe(**{"train__steps": 4, "sample__steps": 9, **changes}))
    assert content(tmp_path) == before
    run(recipe(train__steps=4))


def change_caption(clips: Path) -> None:
    (clips / "01.txt").write_text("something else", "utf-8")


def change_bytes(clips: Path) -> None:
    with (clips / "01.mp4").open("ab") as file:
        file.write(b"\0\0\0\x08free")


def remove(clips: Path) -> None:
    (clips / "01.mp4").unlink()


def add(clips: Path) -> None:
    for suffix in (".mp4", ".txt"):
        shutil.copy(clips / f"01{suffix}", clips / f"77{suffix}")
    (clips / "77.txt").write_text("another", "utf-8")


def rename(clips: Path) -> None:
    for suffix in (".mp4", ".txt"):
        (clips / f"01{suffix}").rename(clips / f"99{suffix}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_caption, "1 clip(s) with another caption: 01.mp4: `clip number 1` is now `something else`"),
        (change_bytes, "1 clip(s) with other content: 01.mp4"),
        slow(remove, "1 clip(s) removed: 01.mp4"),
        slow(add, "1 clip(s) added: 77.mp4"),
        (rename, "1 clip(s) renamed: 01.mp4 is now 99.mp4"),
    ],
)
def test_changed_data_stop_a_resumed_run(
    recipe: Callable[..., dict],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None],
    message: str,
) -> None:
    raw = recipe(train__steps=2, data__validation=0)
    run(raw)
    change(tmp_path / "clips")
    before = content(tmp_path / "run")
    with pytest.raises(ValueError, match=r"the data have changed since step-000002.*") as error:
        run(recipe(train__steps=4, data__validation=0))
    assert message in str(error.value) and "train.accept_changed_data=true" in str(error.value)
    assert content(tmp_path / "run") == before
    longer = recipe(train__steps=4, data__validation=0, train__accept_changed_data=True)
    assert run(longer).checkpoints()[-1].name == "step-000004"
    assert message in " ".join(capsys.readouterr().err.split())
    assert not run(recipe(train__steps=5, data__validation=0)).config().train.accept_changed_data


def test_metrics_of_a_run_that_was_killed_before_its_first_checkpoint(recipe: Callable[..., dict]) -> None:
    raw = recipe(train__steps=4, train__save_every=4, train__log_every=1)
    place = Run(Path(raw["run"]))
    place.folder.mkdir()
    place.metrics.write_text('{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 9.0}\n{"step": 3, "lo', "utf-8")
    run(raw)
    assert [x["step"] for x in read_metrics(place.metrics) if "loss" in x] == [1, 2, 3, 4]


# --- a complete run is complete -----------------------------------------------------------------------------


class Killed(BaseException):
    """What `kill -9` does to a process, as far as a test in the same process can."""


@pytest.mark.parametrize("where", ["before", *map(slow, ("within", "missing", "old", "card")), "samples"])
def test_a_complete_run_makes_what_is_missing(
    recipe: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    changes = {"train__steps": 4, "sample__every": 2, "train__validate_every": 4}
    whole = run(recipe(run=str(tmp_path / "whole"), **changes))
    raw = recipe(run=str(tmp_path / "run"), **changes)
    place = Run(tmp_path / "run")
    if where in ("before", "within"):

        def killed(self: job.Job, step: int) -> None:
            if where == "within":
                (place.folder / f".tmp-{ended_process()}-adapter").mkdir()
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(job.Job, "publish", killed)
            run(raw)
        assert not place.adapter.exists()
    else:
        run(raw)
    if where == "missing":
        shutil.rmtree(place.adapter)
    elif where == "old":
        shutil.copy(place.checkpoint("2") / WEIGHTS, place.folder / WEIGHTS)
    elif where == "card":
        (place.adapter / "README.md").unlink()
    elif where == "samples":
        for file in (place.folder / "samples/step-000004").iterdir():
            file.unlink()
    run(raw)
    ours, theirs = content(place.folder), content(whole.folder)
    for mine in (ours, theirs):
        for name in ("config.yaml", "metrics.jsonl", "environment.json", "adapter/README.md"):
            assert mine.pop(name)
    assert ours == theirs, "down to the last byte"


@pytest.mark.slow
def test_equal_runs_are_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    """The order in safetensors and in sets of strings differs from process to process."""
    code = (
        "import sys, torch, pathlib; from inlaid.files import save_file; "
        "from inlaid.adapters.write import write_peft; folder = pathlib.Path(sys.argv[1]); "
        "save_file({'b': torch.ones(3), 'a': torch.ones(2, dtype=torch.float16)}, folder / 'x.safetensors', "
        "{'z': 'é\"\\\\\\n', **{c: c for c in 'qwertyuiop'}}); "
        "write_peft(folder, {f'{n}.lora_A.weight': torch.ones(1) for n in 'qwertyuiop'}, "
        "{'r': 1, 'lora_alpha': 1, 'use_dora': False}, {c: c for c in 'asdfgh'})"
    )
    made = []
    for i in range(2):
        folder = tmp_path / str(i)
        folder.mkdir()
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
        made.append(content(folder))
    assert made[0] == made[1] and len(made[0]) == 3
    from safetensors import safe_open

    with safe_open(tmp_path / "0/x.safetensors", "pt") as file:
        assert file.metadata()["z"] == 'é"\\\n' and list(file.metadata()) != []
        assert torch.equal(file.get_tensor("b"), torch.ones(3))


# --- the state of a checkpoint ------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "state.json").read_text("utf-8"))
        change(values)
        (folder / "state.json").write_text(json.dumps(values), "utf-8")

    return edit


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (edited(lambda v: v.update(step=2)), "state.json was changed after it was written"),
        slow(edited(lambda v: v.update(step="4")), "state.json was changed"),
        slow(edited(lambda v: v.update(per_step=9)), "state.json was changed"),
        slow(edited(lambda v: v["optimizer"].clear()), "state.json was changed"),
        slow(edited(lambda v: v.pop("digest")), "missing: digest in state.json"),
        slow(edited(lambda v: v.pop("optimizer")), "missing: optimizer in state.json"),
        (lambda f: (f / "state.json").write_text("[" * 100_000, "utf-8"), "state.json: nested too deeply"),
        slow(lambda f: (f / "state.json").write_bytes(b"\xff\xfe"), "state.json: "),
        (lambda f: (f / "data.json").write_text("{}", "utf-8"), "truncated or changed: data.json"),
        (lambda f: shutil.copy(f.with_name("step-000002") / "state.json", f), "it is that of step 2"),
    ],
)
def test_a_mangled_state_is_named(
    recipe: Callable[..., dict], tmp_path: Path, damage: Callable[[Path], Any], cause: str
) -> None:
    run(recipe(train__steps=4))
    damage(tmp_path / "run/checkpoints/step-000004")
    with pytest.raises(ValueError, match=r"step-000004: this checkpoint is damaged") as error:
        run(recipe(train__steps=6))
    assert cause in str(error.value)
    assert "delete the folder to resume from the previous one, step-000002" in str(error.value)
    assert verify(tmp_path / "run/checkpoints/step-000002")["step"] == 2


# --- modes, full disks, names -------------------------------------------------------------------------------


# 002 alone gives neither the usual 644 nor the 600 of a temporary file.
@pytest.mark.parametrize("mask", [slow(0o022), slow(0o077), 0o002])
def test_files_have_the_modes_of_the_umask(recipe: Callable[..., dict], tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        run(recipe(train__steps=2, sample__every=2, data__cache=str(tmp_path / "cache")))
    finally:
        os.umask(old)
    found = [p for part in ("run", "cache") for p in (tmp_path / part).rglob("*")]
    assert len(found) > 20
    for path in found:
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


def test_content_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(number: int) -> None:
        calls.append(Path(f"/proc/self/fd/{number}").readlink().name.split("-")[-1])
        real_sync(number)

    def replace(a: Path, b: Path) -> None:
        calls.append("rename")
        real_replace(a, b)

    monkeypatch.setattr("inlaid.files.os.fsync", fsync)
    monkeypatch.setattr("inlaid.files.os.replace", replace)
    with atomic(tmp_path / "folder") as part:
        part.mkdir()
        (part / "file").write_text("x", "utf-8")
    assert calls == ["file", "folder", "rename", tmp_path.name.split("-")[-1]]


def test_a_full_disk_names_the_file_and_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space") as error, Run(tmp_path).writing(4) as folder:
        save_file({"a": torch.zeros(1_000_000)}, folder / "trainer.safetensors")
    assert error.value.filename == str(tmp_path / "checkpoints/step-000004/trainer.safetensors")
    assert str(error.value.strerror).startswith("No space left on device (it needs 4.0 MB, ")
    assert ".tmp-" not in str(error.value)
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("x", "utf-8")
    monkeypatch.setattr("shutil.copyfile", lambda a, b, **_: full(None, b))
    with pytest.raises(OSError, match="No space") as error, atomic(tmp_path / "b") as part:
        shutil.copytree(tmp_path / "a", part)
    assert error.value.filename == str(tmp_path / "b") and ".tmp-" not in str(error.value)


def test_names_of_255_bytes(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".txt", "é" * 125 + ".mp4"):
        with atomic(tmp_path / name) as part:
            assert part.suffix == Path(name).suffix and len(os.fsencode(part.name)) <= 255
            part.write_text(name, "utf-8")
        assert (tmp_path / name).read_text("utf-8") == name
    with pytest.raises(OSError, match="name too long") as error, atomic(tmp_path / ("x" * 256)) as part:
        part.touch()
    assert ".tmp-" not in str(error.value)


def test_a_run_folder_that_is_deleted_meanwhile(
    recipe: Callable[..., dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete(self: job.Job, step: int) -> None:
        shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(job.Job, "validate", delete)
    with pytest.raises(ValueError, match="the run folder has been deleted or moved"):
        run(recipe(train__validate_every=2))
    assert not (tmp_path / "run").exists()


def test_the_state_loads(recipe: Callable[..., dict]) -> None:
    tensors, values = load_state(run(recipe(train__steps=2)).checkpoint("2"))
    assert values["step"] == 2 and values["per_step"] == 1 and tensors
