"""Base models on the Hub, from the command line: reached, refused, and cached."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fake_hub import FakeHub, command, fake_hub
from support.ground import Ground


@pytest.fixture
def served(tiny_wan: Path) -> Iterator[FakeHub]:
    with fake_hub(tiny_wan) as made:
        yield made


@pytest.mark.slow
def test_commands_exit_with_2_and_one_sentence(served: FakeHub, ground: Ground, tmp_path: Path) -> None:
    served.mode = "missing"
    recipe = ground.write(model__checkpoint="some/one", data__cache="cache")
    start = time.perf_counter()
    done = command(["train", recipe.absolute()], served.environment(tmp_path / "home"), tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "error: model.checkpoint: " in done.stderr
    assert "some/one" in done.stderr
    assert "Traceback" not in done.stderr
    assert time.perf_counter() - start < 60


@pytest.mark.slow
def test_check_and_train_from_the_hub_then_offline(served: FakeHub, ground: Ground, tmp_path: Path) -> None:
    """`check` reports the download; training downloads it; afterwards training needs no Hub."""
    served.mode = "ok"
    recipe = ground.write(model__checkpoint="some/one", data__cache="cache", run="run").absolute()
    environment = served.environment(tmp_path / "home")
    done = command(["check", recipe], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "some/one: reachable on the Hub," in " ".join(done.stderr.split())
    assert not [r for r in served.requests if r.startswith("GET") and r.endswith((".safetensors", ".bin"))]
    done = command(["train", recipe], environment, tmp_path)
    assert done.returncode == 0, done.stderr
    served.mode = "broken"
    done = command(["train", recipe, "run=again"], environment, tmp_path)
    assert done.returncode == 0, done.stderr
