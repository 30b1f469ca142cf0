"""Where mistakes are made: clips, a cache, a checkpoint and a run that must stay as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.commands import Done

WEIGHTS = "adapter/pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class Ground:
    """What all tests stand on and none may change."""

    clips: Path
    cache: Path
    checkpoint: Path
    run: Path

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A recipe that works; keyword `section__key` changes a value, None removes a section."""
        raw: dict[str, Any] = {
            "run": "run",
            "model": {"family": "wan", "checkpoint": str(self.checkpoint)},
            "data": {
                "sources": str(self.clips),
                "size": [32, 32],
                "frames": 9,
                "validation": 0,
                "cache": str(self.cache),
            },
            "tuner": {"kind": "lora", "rank": 2},
            "train": {"steps": 2, "save_every": 1, "log_every": 1, "trackers": []},
            "sample": {"prompts": ["a cat"], "steps": 1},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                raw[section] = {**raw.get(section, {}), name: value}
            elif value is None:
                del raw[section]
            else:
                raw[section] = value
        return raw

    def write(self, **changes: Any) -> Path:
        """The same as a file in the current folder."""
        path = Path("r.yaml")
        path.write_text(json.dumps(self.recipe(**changes)), "utf-8")  # JSON is YAML
        return path


def refused(done: Done, *words: str, code: int = 2) -> str:
    """Asserts one clear message and gives it."""
    assert done.code == code, f"exit code {done.code}\n{done.out}{done.err}"
    assert "Traceback" not in done.output
    assert done.output.lower().count("error: ") == (code == 2), done.output
    message = done.output[done.output.lower().find("error: ") :]
    for word in words:
        assert word in message, f"`{word}` is missing in: {message}"
    return message


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


class Evil:
    """What a pickle may do to who opens it."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("opened",)


def raw(change: Callable[[bytes], bytes]) -> Any:
    def put(path: Path, ground: Ground) -> None:
        path.write_bytes(change((ground.run / WEIGHTS).read_bytes()))

    return put
