"""Runs whose terminal, pipe or other process goes away."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from inlaid.runs.folder import Run, read_metrics
from inlaid.runs.ranks import Peer, Watch
from support import forks, ranks
from support.processes import ended_process
from support.ranks import free_port
from support.slow import slow

ENDLESS = {"train__steps": 100_000, "train__save_every": 100_000, "train__log_every": 1}


def write(raw: dict, path: Path) -> Path:
    path.write_text(json.dumps(raw), "utf-8")
    return path


def wait_for(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "it ended early"
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.02)


def steps(run: Path) -> int:
    lines = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    return max((int(x["step"]) for x in lines), default=0)


@pytest.mark.parametrize("name", ["SIGTERM", slow("SIGHUP"), "twice"])
def test_a_signal_saves(recipe: Callable[..., dict], tmp_path: Path, name: str) -> None:
    """A session that ends sends SIGHUP from the kernel and from the shell, so two are no hurry."""
    file = write(recipe(**ENDLESS), tmp_path / "r.yaml")
    command = [str(forks.python()), "-m", "inlaid", "train", str(file)]
    default = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # noqa: E731 - tests under nohup ignore it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=default)
    wait_for(lambda: steps(tmp_path / "run") > 1, process)
    for number in {"twice": [signal.SIGHUP, signal.SIGHUP]}.get(name, [getattr(signal, name, signal.SIGHUP)]):
        process.send_signal(number)
    _, message = process.communicate(timeout=120)
    assert process.returncode == 130 and "run the same command again" in message
    assert len(Run(tmp_path / "run").checkpoints()) == 1


def test_a_signal_that_is_ignored_stays_ignored(recipe: Callable[..., dict], tmp_path: Path) -> None:
    """`nohup inlaid train`: the end of the session is no reason to stop."""
    from inlaid.runs.launch import Interrupt

    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.wanted
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("closed", ["pipe", slow("descriptors")])
def test_closed_output_does_not_end_a_run(recipe: Callable[..., dict], tmp_path: Path, closed: str) -> None:
    file = write(recipe(sample__every=3), tmp_path / "r.yaml")
    python = forks.python() if closed == "pipe" else sys.executable  # a fork inherits open streams
    command = f"'{python}' -m inlaid train '{file}'"
    tail = "2>&1 | head -c 1" if closed == "pipe" else "1>&- 2>&-"
    code = f"set -o pipefail; {command} {tail}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    run = Run(tmp_path / "run")
    assert [p.name for p in run.checkpoints()][-1] == "step-000006"
    assert (run.adapter / "README.md").is_file()


class Ranks:
    """Two processes of a run, each with its own output."""

    def __init__(self, file: Path, *overrides: str) -> None:
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
        shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        self.processes = [
            subprocess.Popen(
                [str(forks.python()), "-m", "inlaid", "train", str(file), *overrides],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **shared, "RANK": str(k), "LOCAL_RANK": str(k)},
            )
            for k in range(2)
        ]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def pid_in(run: Path) -> int:
    return json.loads((run / "run.lock").read_text("utf-8"))["pid"]


@pytest.mark.parametrize("rank", [slow(0), 1])
def test_a_dead_rank_is_one_sentence_in_the_other(
    recipe: Callable[..., dict], tmp_path: Path, rank: int
) -> None:
    file = write(recipe(**ENDLESS), tmp_path / "r.yaml")
    with Ranks(file) as both:
        dead, other = both.processes[rank], both.processes[1 - rank]
        wait_for(lambda: steps(tmp_path / "run") > 1, other)
        dead.kill()  # and with it its fork
        began = time.monotonic()
        _, message = other.communicate(timeout=60)
        assert time.monotonic() - began < 8
    assert other.returncode == 1
    assert "Traceback" not in message
    said = [x for x in message.splitlines() if "error:" in x]
    assert len(said) == 1 and f"rank {rank} (process" in said[0] and "has ended" in said[0]
    assert "resume from the last checkpoint" in said[0]


def test_a_stopped_rank_is_reported(recipe: Callable[..., dict], tmp_path: Path) -> None:
    file = write(recipe(**ENDLESS, runtime__rank_timeout=1), tmp_path / "r.yaml")
    with Ranks(file) as both:
        _, second = both.processes
        wait_for(lambda: steps(tmp_path / "run") > 1, second)
        pid = pid_in(tmp_path / "run")
        os.kill(pid, signal.SIGSTOP)
        try:
            _, message = second.communicate(timeout=60)
        finally:
            os.kill(pid, signal.SIGCONT)
    assert second.returncode == 1 and "Traceback" not in message
    assert f"rank 0 (process {pid} on" in message
    assert "has given no sign of life for 1 s (runtime.rank_timeout)" in message


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_joins_is_named(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """A process that dies before it has joined the others is not waited for without end."""
    from inlaid.runs import ranks as watch

    monkeypatch.setattr(watch, "JOIN_LEAST", 0.3)
    where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(ranks.free_port())}
    for name, value in {**where, "WORLD_SIZE": "2", "RANK": str(rank)}.items():
        monkeypatch.setenv(name, value)
    wanted = f"{['others', 'rank 0'][rank]} of 2 processes did not join within 0.5 s"
    with pytest.raises(watch.RankLostError, match=wanted):
        watch.join(0.5)


def test_a_rank_that_ends_while_joining_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlaid.runs import ranks as watch

    monkeypatch.setattr(watch, "JOIN_LEAST", 0.3)
    store = dist.HashStore()
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(store, 0, 3)]))
    for name, value in {"MASTER_ADDR": "h", "MASTER_PORT": "1", "WORLD_SIZE": "3", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    store.set("inlaid/mark/1", "of a process that has ended")
    with pytest.raises(watch.RankLostError, match="rank 1, 2 of 3 processes did not join"):
        watch.join(0.5)


def test_a_rank_of_another_machine_that_is_silent() -> None:
    watch = Watch(0, [Peer(0, "a", 1, "x"), Peer(1, "elsewhere", 7, "y")], timeout=2)
    watch._check(1.5)
    assert watch.lost is None
    watch._check(1.0)
    assert (
        watch.lost is not None and "rank 1 (process 7 on elsewhere) has given no sign of life" in watch.lost
    )


def test_ranks_that_run_are_not_lost() -> None:
    from inlaid.files import HOST, process_start

    pid = os.getpid()
    assert Watch(0, [Peer(1, HOST, pid, process_start(pid))], timeout=1).cause() is None
    assert "has ended" in str(Watch(0, [Peer(1, HOST, ended_process(), "5")], timeout=1).cause())


def test_a_refusal_of_one_rank_is_told_once(recipe: Callable[..., dict], tmp_path: Path) -> None:
    """Both processes find the mistake; neither reports the other as lost."""
    file = write(recipe(runtime__world_size=3), tmp_path / "r.yaml")
    done = ranks.launch(["train", file])
    assert "requires 3 process(es)" in done.stderr and "has ended" not in done.stderr


@pytest.mark.slow
def test_restarts_of_torchrun_end_with_the_same_bits(recipe: Callable[..., dict], tmp_path: Path) -> None:
    """`torchrun --max-restarts=3`: a rank is killed at three random steps."""
    seed = time.time_ns() % 2**32
    rng = random.Random(seed)
    kills = [(step, rng.randrange(2)) for step in sorted(rng.sample(range(1, 57), 3))]
    print(f"seed {seed}: steps and ranks {kills}")
    changes = {"train__steps": 60, "train__save_every": 3, "train__log_every": 1}
    whole = write(recipe(run=str(tmp_path / "whole"), **changes), tmp_path / "whole.yaml")
    assert ranks.launch(["train", whole]).returncode == 0
    file = write(recipe(run=str(tmp_path / "run"), **changes), tmp_path / "run.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3"]
    command += ["--monitor-interval=0.1", "--nproc-per-node=2", "-m", "inlaid", "train", str(file)]
    environment = {**os.environ, "PYTHON_EXEC": str(forks.python()), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        killed = []
        for step, victim in kills:
            wait_for(lambda step=step: steps(tmp_path / "run") >= step, process)
            owner = pid_in(tmp_path / "run")
            pid = owner if victim == 0 else other_rank(process.pid, owner)
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            wait_for(lambda: pid_in_or_none(tmp_path / "run") not in (None, owner), process)  # noqa: B023
        assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text("utf-8")[-3000:]
    assert len(set(killed)) == 3
    for name in ("trainer.safetensors", "adapter/pytorch_lora_weights.safetensors"):
        a, b = (tmp_path / r / "checkpoints/step-000060" / name for r in ("whole", "run"))
        assert a.read_bytes() == b.read_bytes()


def pid_in_or_none(run: Path) -> int | None:
    try:
        return pid_in(run)
    except (OSError, ValueError):
        return None


def other_rank(launcher: int, owner: int) -> int:
    """Return the process of rank 1: the fork's client, which ends and takes its fork with it."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) not in (owner, launcher):
            with contextlib.suppress(OSError):
                parent = (entry / "stat").read_text("utf-8").rsplit(")", 1)[1].split()[1]
                environment = (entry / "environ").read_bytes().split(b"\0")
                if b"RANK=1" in environment and int(parent) == launcher:
                    return int(entry.name)
    raise AssertionError("no process of rank 1")
