"""Watch over the other processes of a run: a process that has ended or is stopped ends the others too."""

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
"""Seconds between two looks at the other processes."""

GRACE = 3.0
"""Seconds for the main thread to end after another process is lost: gloo raises an error, NCCL waits on."""

JOIN_LEAST = 60.0
"""Seconds to wait at least for all processes at the start: they may import at different speeds."""


class RankLostError(RuntimeError):
    """Error of a run whose other process has ended or is stopped."""


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
    """Thread that looks at the other processes until the run ends.

    Processes of this machine are looked up. Those of other machines report to the store of the process group
    that they run.
    """

    def __init__(self, rank: int, peers: list[Peer], timeout: float) -> None:
        self.rank, self.timeout = rank, timeout
        self.peers = [p for p in peers if p.rank != rank]
        self.lost: str | None = None
        """Sentence about the process that was lost."""
        self._leaving = threading.Event()
        self._silent = dict.fromkeys((p.rank for p in self.peers), 0.0)
        self._beats: dict[int, bytes] = {}

    def start(self) -> None:
        """Start the threads."""
        threading.Thread(target=self._look, name="watch", daemon=True).start()
        if any(p.host != HOST for p in self.peers):
            threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def leave(self) -> None:
        """End the watch: this process is about to leave the run."""
        self._leaving.set()

    def cause(self) -> str | None:
        """Return the sentence about a lost process, after time to find it; None if all processes run."""
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
        """Look at all processes; `seconds` have passed since the last look."""
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
        """Report to the store of the process group, and read the reports of processes of other machines."""
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
    """Return True if a process of this machine is stopped (SIGSTOP), so that it computes nothing."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
    except OSError:
        return False
    return text[text.rindex(")") + 2] in "Tt"


def join(timeout: float) -> Any:
    """Return a store that is shared by the processes of this launch only.

    `torchrun --max-restarts` reuses its store after a restart, so that the new processes would read the
    addresses of processes that have ended (https://github.com/pytorch/pytorch/issues/135712). The number of
    restarts does not help, because every machine counts its own. Therefore each process writes a random ID,
    and rank 0 replies to each ID with the name of this launch until every process has confirmed the name. IDs
    left by ended processes are harmless: these processes never confirm.

    Args:
        timeout: seconds to wait for the other processes, at least JOIN_LEAST.

    Raises:
        RankLostError: if a process of the launch does not join in time.
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
    """Watch over the processes of the process group inside the context, and wait for all at its end.

    Args:
        rank: number of this process.
        timeout: seconds without a sign of life after which a process counts as stopped.

    Raises:
        RankLostError: if a collective operation fails because another process is lost. If this process does
            not leave the context within `GRACE` seconds of the loss (NCCL hangs instead of failing), it
            prints the message and exits with code 1.
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
