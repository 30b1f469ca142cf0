"""Shared fixtures: real classes made small, real media and goldens where they are there."""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import coverage
import numpy as np
import pytest

from inlaid import config
from inlaid.console import quiet
from inlaid.tiny import random
from support import forks

quiet()
gc.disable()  # until everything is imported


def pytest_configure(config: pytest.Config) -> None:
    """Starts the server of forks before the processes that share it; one alone starts it when it needs it.

    The processes wait for it: it imports what they import, and so compiles it for all of them.
    """
    if getattr(config.option, "numprocesses", None):
        forks.start()
    elif hasattr(config, "workerinput"):
        forks.python()


def pytest_collection_finish() -> None:
    """What was imported stays: it is not searched for garbage again and again."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Switches coverage off for a while where a test asks for it."""
    running = coverage.Coverage.current() if item.get_closest_marker("untraced") else None
    if running:
        running.stop()
    try:
        return (yield)
    finally:
        if running:
            running.start()


def _outside(variable: str, name: str) -> Path:
    default = Path(__file__).parent.parent.parent / "shared" / name
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f"no {name} folder: set {variable} to run this test")
    return path


@pytest.fixture(scope="session")
def media_root() -> Path:
    """Real clips, see its README."""
    return _outside("INLAID_MEDIA", "media")


@pytest.fixture(scope="session")
def goldens_root() -> Path:
    """Numeric vectors made with the reference implementations."""
    return _outside("INLAID_GOLDENS", "goldens")


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.1 text-to-video checkpoint."""
    return random.build("wan", tmp_path_factory.mktemp("checkpoints") / "tiny-wan")


@pytest.fixture(scope="session")
def tiny_a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.2 checkpoint with two experts."""
    return random.build("wan", tmp_path_factory.mktemp("checkpoints") / "tiny-a14b", "a14b")


@pytest.fixture(scope="session")
def tiny_5b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Wan 2.2 TI2V-5B checkpoint."""
    return random.build("wan", tmp_path_factory.mktemp("checkpoints") / "tiny-5b", "ti2v")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A function that gives a random checkpoint of a family and kind, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(family: str, variant: str) -> Path:
        if (family, variant) not in made:
            folder = tmp_path_factory.mktemp("checkpoints") / f"tiny-{family}-{variant}"
            made[family, variant] = random.build(family, folder, variant)
        return made[family, variant]

    return get


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all processes that run tests."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def encoded(shared: Path) -> Path:
    """The `data.cache` of recipes: no clip and no caption is encoded twice in a session.

    An item's name is the hash of all that decides its numbers, so tests cannot disturb each other.
    """
    return shared / "precomputed"


@pytest.fixture(scope="session")
def estimated(shared: Path) -> Callable[..., Any]:
    """`cost.estimate` of a recipe, which is asked once: seconds for the published sizes."""
    from inlaid.check import estimate
    from inlaid.files import atomic

    def get(family: Any, settings: Any, *counts: Any, **where: Any) -> Any:
        key = f"{settings.model_dump_json()} {counts} {where}"
        file = shared / "estimates" / hashlib.sha256(key.encode()).hexdigest()
        if not file.is_file():
            with atomic(file) as temporary:
                temporary.write_bytes(pickle.dumps(made(family, settings, *counts, **where)))
        return pickle.loads(file.read_bytes())

    made = estimate.estimate_recipe
    return get


@pytest.fixture(scope="session", autouse=True)
def _looked_up_once() -> Generator[None]:
    """Plug-ins, and the speed of this machine: neither changes while tests run."""
    from inlaid.check import estimate
    from inlaid.config import plugins

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugins, "entry_points", functools.cache(plugins.entry_points))
        patch.setattr(estimate, "measure_speed", functools.cache(estimate.measure_speed))
        yield


@pytest.fixture(scope="session", autouse=True)
def _counted_once() -> Generator[None]:
    """The pass on shapes that an estimate makes of a network is made once for each network and shape."""
    from inlaid.check import estimate

    known: dict[str, estimate.Counts] = {}
    real = estimate.count_operations

    def count(family: Any, denoiser: Any, shape: Any, batch: int, **how: Any) -> estimate.Counts:
        tensors = [(n, type(p), p.shape, p.dtype, p.requires_grad) for n, p in denoiser.named_parameters()]
        about = [type(family), family.model, getattr(family, "section", None), family.text_length]
        about += [family.shapes(*shape), family.tokens(*shape)]
        key = hashlib.sha256(repr([denoiser, tensors, about, shape, batch, how]).encode()).hexdigest()
        if key not in known:
            known[key] = real(family, denoiser, shape, batch, **how)
        return known[key]

    estimate.count_operations = count
    yield
    estimate.count_operations = real


@pytest.fixture(scope="session")
def clips_of_session(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that gives a folder of small captioned clips, written once; not to be changed."""
    made: dict[tuple, Path] = {}

    def get(n: int, size: tuple[int, int], frames: int, fps: int) -> Path:
        from inlaid.media.video import write_video

        if (n, size, frames, fps) not in made:
            folder = made[n, size, frames, fps] = tmp_path_factory.mktemp("clips")
            rng = np.random.default_rng(0)
            for i in range(n):
                still = rng.integers(0, 255, (1, *size, 3), dtype=np.uint8)
                video = np.stack([np.roll(still[0], k, axis=1) for k in range(frames)])
                write_video(folder / f"{i:02d}.mp4", video, fps)
                (folder / f"{i:02d}.txt").write_text(f"clip number {i}", "utf-8")
        return made[n, size, frames, fps]

    return get


@pytest.fixture
def make_clips(clips_of_session: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a folder of small captioned clips: n, size (h, w), frames, fps."""

    def make(
        n: int = 4, *, size: tuple[int, int] = (32, 32), frames: int = 9, fps: int = 16, name: str = "clips"
    ) -> Path:
        folder = tmp_path / name
        shutil.copytree(clips_of_session(n, tuple(size), frames, fps), folder, dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture
def make_scenes(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a folder of small scenes of balls: counts of objects, points of each surface."""

    def make(counts: tuple[int, ...] = (2, 1, 2, 3), *, points: int = 300, name: str = "scenes") -> Path:
        from PIL import Image

        folder = tmp_path / name
        for i, count in enumerate(counts):
            place = folder / f"scene_{i:04d}"
            place.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(i)
            picture, ids = np.full((24, 24, 3), 255, np.uint8), np.zeros((24, 24), np.uint8)
            for k in range(1, count + 1):
                rows = slice(8 * (k - 1), 8 * k - 1)
                picture[rows, 4 + i : 16 + i], ids[rows, 4 + i : 16 + i] = rng.integers(0, 200, 3), k
                normal = rng.standard_normal((points, 3))
                normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
                surface = np.concatenate([0.2 * normal + [0.5 * k - 1, 0, 0.1 * i], normal], -1)
                np.save(place / f"surface_{k}.npy", surface.astype(np.float32))
            Image.fromarray(picture).save(place / "scene_rgb.png")
            Image.fromarray(ids).save(place / "seg.png")
        return folder

    return make


@pytest.fixture
def recipe(
    tiny_wan: Path, make_clips: Callable[..., Path], encoded: Path, tmp_path: Path
) -> Callable[..., dict]:
    """A function that gives a small complete recipe as a mapping; keyword `section__key` changes a value."""

    def make(**changes: object) -> dict:
        clips = tmp_path / "clips"
        raw: dict = {
            "run": str(tmp_path / "run"),
            "model": {"family": "wan", "checkpoint": str(tiny_wan)},
            "data": {
                "sources": str(clips if clips.is_dir() else make_clips()),
                "size": [32, 32],
                "frames": 9,
                "validation": 1,
                "cache": encoded and str(encoded),
            },
            "tuner": {"kind": "lora", "rank": 4},
            "optim": {"lr": 1e-2},
            "train": {"steps": 6, "save_every": 2, "log_every": 2, "validate_every": 3, "trackers": []},
            "sample": {"prompts": ["clip number 1"], "steps": 2},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            if name:
                raw[section] = {**raw.get(section, {}), name: value}
            else:
                raw[section] = value
        return raw

    return make


@pytest.fixture
def contract_recipe(
    checkpoint: Callable[[str, str], Path],
    make_clips: Callable[..., Path],
    make_scenes: Callable[..., Path],
    encoded: Path,
    tmp_path: Path,
) -> Callable[..., dict]:
    """A function that gives a small recipe for a checkpoint of a family; `section__key` changes a value."""

    from support.contract import open_family, shape

    def make(case: tuple[str, str], **changes: object) -> dict:
        folder = checkpoint(*case)
        family = open_family(folder, case)
        frames, *size = shape(family)
        clips, data = tmp_path / "clips", {"size": size, "frames": frames}
        if family.modality == "scene":
            clips, data = tmp_path / "scenes", {}
        if not clips.is_dir() and not data:
            make_scenes((2, 2, 2, 2))
        elif not clips.is_dir():
            make_clips(4, size=tuple(size), frames=frames, fps=round(family.fps))
        raw: dict = {
            "run": str(tmp_path / "run"),
            "seed": 3,
            "model": {**random.model(*case), "checkpoint": str(folder)},
            "data": {"sources": str(clips), "validation": 1, "cache": str(encoded), **data},
            "tuner": {"kind": "lora", "rank": 4},
            "optim": {"lr": 2e-2},
            "train": {"steps": 4, "save_every": 2, "log_every": 1, "validate_every": 4, "trackers": []},
            "sample": {"steps": 2},
        }
        for key, value in changes.items():
            section, _, name = key.partition("__")
            raw[section] = {**raw.get(section, {}), name: value} if name else value
        return raw

    return make


@pytest.fixture(scope="session")
def _contract_runs() -> dict[tuple, config.Config]:
    return {}


@pytest.fixture
def contract_run(
    contract_recipe: Callable[..., dict], _contract_runs: dict[tuple, config.Config]
) -> Callable[..., config.Config]:
    """A function that gives the recipe of a finished run of a case, trained once; not to be changed."""

    from inlaid.training.loop import train

    def get(case: tuple[str, str], kind: str = "lora") -> config.Config:
        if (case, kind) not in _contract_runs:
            settings = config.build(contract_recipe(case, tuner__kind=kind))
            train(settings)
            _contract_runs[case, kind] = settings
        return _contract_runs[case, kind]

    return get
