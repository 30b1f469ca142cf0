"""Monitoring of the processes of a run: if a process ends or does not respond, the others end too."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from inlaid.files import HOST, process_start

INTERVAL = 0.25
"""Seconds between checks of the other processes."""

GRACE = 3.0
"""Seconds after the loss of another process until this process is ended. With gloo, an error ends it sooner;
with NCCL, it might otherwise wait forever."""

JOIN_LEAST = 60.0
"""Minimum time in seconds to wait for all processes at the start, because imports are slow on some
machines."""


class RankLostError(RuntimeError):
    """Error raised when another process of the run has ended or does not respond."""


@dataclass(frozen=True)
class Peer:
    """Another process of the run."""

    rank: int
    host: str
    pid: int
    start: str | None

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"


class Watch:
    """Monitor of the other processes of a run, in background threads.

    Processes on this machine are looked up by process ID. Processes on other machines write heartbeats to the
    key-value store of the process group.
    """

    def __init__(self, rank: int, peers: list[Peer], timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.peers = [p for p in peers if p.rank != rank]
        self.lost: str | None = None
        """Error message about the process that was lost; None while all processes run."""
        self._leaving = threading.Event()
        self._silent = dict.fromkeys((p.rank for p in self.peers), 0.0)
        self._beats: dict[int, bytes] = {}

    def start(self) -> None:
        """Start to monitor the other processes in background threads."""
        threading.Thread(target=self._look, name="watch", daemon=True).start()
        if any(p.host != HOST for p in self.peers):
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def leave(self) -> None:
        """Stop monitoring, because this process is about to leave the run."""
        self._leaving.set()

    def cause(self) -> str | None:
        """Return the error message about a lost process; None if no process is found lost within a second.

        A process is lost if it has ended or does not respond.
        """
        until = time.monotonic() + 4 * INTERVAL
        while self.lost is None and time.monotonic() < until:
            self._check(0)
            time.sleep(INTERVAL / 5)
        return self.lost

    def _look(self) -> None:
        while self.lost is None:
            if self._leaving.wait(INTERVAL):
                return
            self._check(INTERVAL)
        if not self._leaving.wait(GRACE):
            with suppress(OSError, ValueError):
                print(f"error: {self.lost}", file=sys.stderr, flush=True)
            os._exit(1)

    def _check(self, seconds: float) -> None:
        """Check whether the other processes still run. `seconds` is the time since the last check."""
        for peer in self.peers:
            if peer.host == HOST:
                ended, silent = process_start(peer.pid) != peer.start, _stopped(peer.pid)
                self._silent[peer.rank] = self._silent[peer.rank] + seconds if silent else 0.0
                if ended:
                    self.lost = self.lost or f"{peer} has ended. {_WAY_OUT}"
            else:
                self._silent[peer.rank] += seconds
            if self._silent[peer.rank] > self.timeout:
                self.lost = self.lost or (
                    f"{peer} has given no sign of life for {self.timeout:g} s (runtime.rank_timeout): it is "
                    f"stopped, or its machine cannot be reached. {_WAY_OUT}"
                )

    def _beat(self) -> None:
        """Write heartbeats to the store of the process group, and read heartbeats from other machines."""
        import torch.distributed as dist

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store: Any = None
        beat = 0
        while not self._leaving.wait(INTERVAL * 4):
            with suppress(RuntimeError, ValueError):  # no store: the reports of all others are missing
                store = store or dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
                beat += 1
                store.set(f"inlaid/beat/{self.rank}", str(beat))
                for peer in self.peers:
                    key = f"inlaid/beat/{peer.rank}"
                    if peer.host != HOST and store.check([key]):
                        value = store.get(key)
                        if value != self._beats.get(peer.rank):
                            self._beats[peer.rank], self._silent[peer.rank] = value, 0.0


_WAY_OUT = "This process ends too; run the same command again to resume from the last checkpoint"


def _stopped(pid: int) -> bool:
    """Return True if a process on this machine is suspended, for example by SIGSTOP."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return False
    return text[text.rindex(")") + 2] in "Tt"


def join(timeout: float) -> Any:
    """Return a key-value store that the running processes share, without entries of ended processes.

    After a restart, `torchrun --max-restarts` reuses its store, so the new processes would read the addresses
    of ended processes (https://github.com/pytorch/pytorch/issues/135712). Therefore, rank 0 chooses a random
    prefix for the keys. Every other process writes a random ID to the store. Rank 0 answers each ID with the
    prefix, until all processes have confirmed the prefix. IDs of ended processes are harmless, because ended
    processes never confirm. The prefix is not the restart count, because each machine counts its restarts.

    Args:
        timeout: seconds to wait for the other processes. Values below `JOIN_LEAST` are raised to it.

    Raises:
        RankLostError: if a process does not join in time.
    """
    import torch.distributed as dist

    seconds, missing = max(timeout, JOIN_LEAST), "rank 0" if int(os.environ["RANK"]) else "others"
    until = time.monotonic() + seconds
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=seconds)))
        mark = uuid.uuid4().hex
        if rank:
            store.set(f"inlaid/mark/{rank}", mark)
            name = store.get(f"inlaid/name/{mark}").decode()
            store.set(f"inlaid/confirmed/{name}/{rank}", "")
            return dist.PrefixStore(name, store)
        answered: set[bytes] = set()
        waiting = set(range(1, world))
        while waiting := {r for r in waiting if not store.check([f"inlaid/confirmed/{mark}/{r}"])}:
            missing = f"rank {', '.join(map(str, sorted(waiting)))}"
            for key in (f"inlaid/mark/{r}" for r in waiting):
                if store.check([key]) and (theirs := store.get(key)) not in answered:
                    store.set(f"inlaid/name/{theirs.decode()}", mark)
                    answered.add(theirs)
            if time.monotonic() > until:
                raise dist.DistStoreError(missing)
            time.sleep(0.01)
        return dist.PrefixStore(mark, store)
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise RankLostError(
            f"{missing} of {os.environ['WORLD_SIZE']} processes did not join within {seconds:g} s "
            "(runtime.rank_timeout), at "
            f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}. {_WAY_OUT}"
        ) from error


@contextmanager
def watched(rank: int, timeout: float) -> Iterator[None]:
    """Context manager that monitors the other processes of the run, and waits for all of them at exit.

    Args:
        rank: rank of this process.
        timeout: seconds without a response after which a process counts as lost.

    Raises:
        RankLostError: if a collective operation fails because another process is lost. NCCL may hang instead
            of failing. Therefore, this process prints the error and exits with code 1 if it does not leave
            the context within `GRACE` seconds of the loss.
    """
    import torch.distributed as dist

    me = json.dumps([rank, HOST, os.getpid(), process_start(os.getpid())])
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, me)
    watch = Watch(rank, [Peer(*json.loads(each)) for each in found], timeout)
    watch.start()
    try:
        yield
        dist.barrier()  # processes end together: one that ends earlier would count as lost
    except RuntimeError as error:
        cause = watch.cause()
        if cause is None:
            raise
        raise RankLostError(cause) from error
    finally:
        watch.leave()
