"""Video metrics on clips whose answer is known, and `evaluate` on a tiny random Wan."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from inlaid import config
from inlaid.adapters.adapter import WEIGHTS
from inlaid.evaluation.evaluate import Prompt, evaluate
from inlaid.evaluation.metrics.video import METRICS, distance, luma, measure
from inlaid.generation.generate import generate
from inlaid.media import video
from inlaid.runs.folder import read_header, read_metrics
from inlaid.training.loop import train
from support.slow import slow


def texture(h: int = 64, w: int = 64, seed: int = 0, smooth: int = 2) -> np.ndarray:
    """A smooth random picture, uint8 (h, w, 3)."""
    x = np.random.default_rng(seed).random((h, w))
    for _ in range(smooth):
        x = (x + np.roll(x, 1, 0) + np.roll(x, 1, 1) + np.roll(x, -1, 0) + np.roll(x, -1, 1)) / 5
    x = (x - x.min()) / (x.max() - x.min())
    return (x[..., None] * 200 + 28).round().astype(np.uint8).repeat(3, axis=2)


def sliding(dy: int, dx: int, frames: int = 9, size: int = 64) -> np.ndarray:
    """A window that slides over a large picture, so that new pixels enter at the edges."""
    big = texture(size * 3, size * 3)
    at = [(size + dy * k, size + dx * k) for k in range(frames)]
    return np.stack([big[y : y + size, x : x + size] for y, x in at])


def still(frames: int = 9) -> np.ndarray:
    return np.repeat(texture()[None], frames, axis=0)


def gray(levels: np.ndarray | list[float], size: int = 32) -> np.ndarray:
    """Flat frames, one per level."""
    return np.tile(np.asarray(levels, np.uint8)[:, None, None, None], (1, size, size, 3))


def noise(deviation: float, frames: int = 33, seed: int = 0) -> np.ndarray:
    y = np.random.default_rng(seed).normal(128, deviation, (frames, 64, 64, 1))
    return y.round().clip(0, 255).astype(np.uint8).repeat(3, axis=3)


def motion(clip: np.ndarray) -> float:
    return measure(clip)["motion"] / 100


def flicker(clip: np.ndarray) -> float:
    return measure(clip)["flicker"] / 100


def consistency(clip: np.ndarray) -> float:
    return measure(clip)["consistency"]


def sharpness(clip: np.ndarray) -> float:
    return measure(clip)["sharpness"]


def test_a_still_has_nothing_but_sharpness() -> None:
    found = measure(still())
    assert found["motion"] == 0 and found["flicker"] == 0 and found["consistency"] == pytest.approx(1)
    assert found["sharpness"] > 0


def test_every_metric_is_measured_in_display_order() -> None:
    assert list(measure(sliding(1, 2))) == list(METRICS)


@pytest.mark.parametrize("step", [(0, 1), (2, 0), (3, -4), (-5, 5)])
def test_motion_is_the_displacement(step: tuple[int, int]) -> None:
    diagonal = 64 * math.sqrt(2)
    found = motion(sliding(*step)) * diagonal
    assert found == pytest.approx(math.hypot(*step), rel=0.2), "all but the strip that enters"


def test_motion_of_a_part_is_that_part_of_it() -> None:
    clip = np.full((9, 64, 64, 3), 40, np.uint8)
    square = texture(16, 16, seed=3, smooth=1)
    for k in range(9):
        clip[k, 24:40, 8 + 3 * k : 24 + 3 * k] = square
    found = motion(clip) * 64 * math.sqrt(2)
    assert 0.5 * 3 * (16 / 64) ** 2 < found < 2 * 3 * (16 / 64) ** 2


def test_slow_motion_counts() -> None:
    fast = sliding(0, 1, frames=9)
    slow = fast[[0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]]
    assert motion(slow) == pytest.approx(motion(fast) / 3, rel=0.25)


def test_noise_and_brightness_do_not_move() -> None:
    assert motion(noise(10)) < 0.0002
    assert motion(gray([100, 140] * 5)) == 0


def test_motion_is_the_same_at_every_size() -> None:
    small = sliding(0, 2)
    large = small.repeat(4, axis=1).repeat(4, axis=2)
    assert motion(large) == pytest.approx(motion(small), rel=0.15)


def test_flicker_of_alternating_brightness_is_its_step() -> None:
    assert flicker(gray([100, 110] * 8)) == pytest.approx(10 / 255, rel=1e-5)


def test_flicker_of_noise_is_its_deviation_over_root_pi() -> None:
    assert flicker(noise(8)) == pytest.approx(8 / 255 / math.sqrt(math.pi), rel=0.03)


@pytest.mark.parametrize(
    "clip",
    [
        pytest.param(gray(np.linspace(0, 250, 11)), id="fade"),
        pytest.param(np.concatenate([gray([20] * 4), gray([220] * 4)]), id="cut"),
        pytest.param(gray([10, 200]), id="two frames"),
        pytest.param(gray([10]), id="one frame"),
    ],
)
def test_what_changes_but_does_not_come_back_is_no_flicker(clip: np.ndarray) -> None:
    assert flicker(clip) == 0


def test_motion_is_hardly_flicker_and_flicker_shows_through_motion() -> None:
    moving = sliding(2, -1)
    shaken = moving.astype(int) + np.where(np.arange(9) % 2, 12, 0)[:, None, None, None]
    assert flicker(moving) < 0.002
    assert flicker(shaken.clip(0, 255).astype(np.uint8)) == pytest.approx(12 / 255, rel=0.25)
    assert np.abs(np.diff(luma(moving), axis=0)).mean() > 0.02, (
        "which neighbors' difference would call flicker"
    )


def test_consistency() -> None:
    assert consistency(sliding(3, 2)) > 0.95
    assert consistency(noise(30)) < 0.4
    unrelated = np.stack([texture(seed=k) for k in range(6)])
    assert consistency(unrelated) < 0.75
    assert consistency(gray([50] * 4)) == 1
    mixed = np.concatenate([gray([50], 64), still(1)])
    assert consistency(mixed) == 0


def test_sharpness() -> None:
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[None, ..., None].repeat(3, axis=3)
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], (1, 64, 1, 3))
    assert sharpness(board) == pytest.approx(1020**2, rel=1e-4)
    assert sharpness(ramp) == pytest.approx(0, abs=1e-4)
    assert sharpness(texture(smooth=6)[None]) < 0.3 * sharpness(texture(smooth=1)[None])


def test_distance() -> None:
    black, white = gray([0] * 3), gray([255] * 3)
    assert distance(black, black) == 0
    assert distance(black, white) == 1
    assert distance(black, gray([51] * 3)) == pytest.approx(0.2)


@pytest.mark.parametrize("shape", [(3, 2, 2, 3), (1, 1, 1, 3), (5, 200, 30, 3), (4, 33, 17, 3)])
def test_odd_shapes_are_measured(shape: tuple[int, ...]) -> None:
    clip = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    assert all(math.isfinite(v) for v in measure(clip).values())


# --- evaluate -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny_wan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds five clips of two groups, two of them held out, and a finished LoRA run on them."""
    folder = tmp_path_factory.mktemp("evaluate")
    rows = []
    for i in range(5):
        video.write_video(folder / f"clips/{i}.mp4", sliding(0, i, size=32), 16)
        rows.append(
            {"video": f"{i}.mp4", "caption": f"clip number {i}", "subject": "cat" if i % 2 else "dog"}
        )
    (folder / "clips/manifest.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    source = {"path": str(folder / "clips/manifest.jsonl"), "group_column": "subject"}
    raw = {
        "run": str(folder / "run"),
        "model": {"family": "wan", "checkpoint": str(tiny_wan)},
        "data": {"sources": [source], "size": [32, 32], "frames": 9, "validation": 2},
        "tuner": {"kind": "lora", "rank": 4},
        "optim": {"lr": 1e-2},
        "train": {"steps": 20, "save_every": 10, "log_every": 2, "validate_every": 5, "trackers": []},
        "sample": {"prompts": ["a clip"], "steps": 2},
    }
    train(config.build(raw))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run that a test may change; it uses the same clips."""
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def test_evaluate_compares_base_and_tuned(run: Path) -> None:
    asked = []

    def yes(frames: np.ndarray) -> bool:
        asked.append(frames.shape)
        return len(asked) > 2

    found = evaluate(run, prompts=[Prompt("a <b>clip</b>", "new", yes), Prompt("another")], count=2)
    assert asked == [(9, 32, 32, 3)] * 4, "two of the base, two tuned"
    assert [(p.prompt, p.group, p.seed) for p in found.pairs] == [
        ("a <b>clip</b>", "new", 42),
        ("a <b>clip</b>", "new", 43),
        ("another", "", 42),
        ("another", "", 43),
    ]
    matches = [(p.base.matches_prompt, p.tuned.matches_prompt) for p in found.pairs]
    assert matches == [(False, True)] * 2 + [(None, None)] * 2
    assert found.path == run / "report/report.html" and found.step == 20 and found.names == ("base", "tuned")
    assert (
        found.verdict.tone == "good"
        and "2 of 2 videos match the prompt, 0 before training" in found.verdict.headline
    )
    for pair in found.pairs:
        assert pair.distance > 0
        for side in (pair.base, pair.tuned):
            path = run / "report" / side.file
            assert (
                path.is_file() and path.with_suffix(".png").is_file() and path.with_suffix(".json").is_file()
            )
    written = json.loads((run / "report/report.json").read_text("utf-8"))
    assert written["pairs"][0]["tuned"]["metrics"] == found.pairs[0].tuned.metrics
    assert written["environment"]["device"] == "cpu" and written["adapter"]["trained"] == "LoRA, rank 4"
    text = found.path.read_text("utf-8")
    assert "a &lt;b&gt;clip&lt;/b&gt;" in text and "<b>clip" not in text
    assert text.count("data:video/mp4;base64,") == 8
    assert not [p for p in run.iterdir() if p.name.startswith(".tmp")]


@pytest.mark.slow
def test_validation_loss_is_the_one_of_training(run: Path) -> None:
    found = evaluate(run)
    last = [x for x in read_metrics(run / "metrics.jsonl") if "validation_loss" in x][-1]
    assert found.validation and len(found.validation.clips) == 2
    assert found.validation.means[1] == pytest.approx(last["validation_loss"], rel=1e-4)
    assert found.validation.change < -0.05, "it learned"
    assert not found.notes and not any("clips have changed" in w for w in found.verdict.warnings)


@pytest.mark.slow
def test_videos_are_those_of_generate(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared before they are encoded: x264 itself varies from call to call below 64 pixels."""
    drawn = []
    write = video.write_video

    def remember(path: Path, frames: np.ndarray, fps: float) -> None:
        drawn.append(frames)
        write(path, frames, fps)

    monkeypatch.setattr(video, "write_video", remember)
    evaluate(run, prompts=[Prompt("a clip")], seed=7, steps=3)
    for name in ("base", None):
        generate(run, ["a clip"], checkpoint=name, seed=7, steps=3)
    base, tuned, base_again, tuned_again = drawn
    assert np.array_equal(base, base_again) and np.array_equal(tuned, tuned_again)
    assert not np.array_equal(base, tuned)


@pytest.mark.slow
def test_prompts_of_each_group_are_chosen(run: Path) -> None:
    found = evaluate(run, per_group=1, steps=1)
    assert found.pairs[0].prompt == "a clip"
    assert [p.group for p in found.pairs] == ["", "cat", "dog"]
    assert found.validation
    validation = {int(name[0]) for name in found.validation.clips}
    for pair in found.pairs[1:]:
        number = int(pair.prompt[-1])
        wanted = {n for n in validation if n % 2 == (pair.group == "cat")}
        assert number in wanted or not wanted, "validation captions first"
        assert number % 2 == (pair.group == "cat")
    few = evaluate(run, limit=2, steps=1)
    assert [p.group for p in few.pairs] == ["", "cat"] and "2 of 5 prompts" in few.notes[0]
    assert [p.group for p in evaluate(run, group_by=False, steps=1).pairs] == [""]


@pytest.mark.slow
def test_an_adapter_that_changes_nothing_is_called_so(run: Path) -> None:
    path = run / "adapter" / WEIGHTS
    header = read_header(path)
    tensors = {k: v * 0 if "lora_B" in k else v for k, v in load_file(path).items()}
    save_file(tensors, path, metadata=header)
    found = evaluate(run)
    assert found.verdict.tone == "bad" and "identical in every pixel" in found.verdict.headline
    assert found.total and found.total.distance == 0
    assert found.validation and found.validation.change == pytest.approx(0, abs=1e-6)


@pytest.mark.slow
def test_checkpoints_are_compared(run: Path) -> None:
    found = evaluate(run, against="10", checkpoint="step-000020")
    assert found.names == ("step-000010", "step-000020") and found.step == 20
    assert found.validation
    curve = {
        x["step"]: x["validation_loss"] for x in read_metrics(run / "metrics.jsonl") if "validation_loss" in x
    }
    assert found.validation.means == pytest.approx((curve[10], curve[20]), rel=1e-4)


@pytest.mark.parametrize("tuner", [slow({"kind": "dora", "rank": 2}), slow({"kind": "full"})])
def test_other_tuners(recipe: Callable[..., dict], tuner: dict) -> None:
    raw = recipe(tuner=tuner, data__validation=1)
    found = evaluate(train(config.build(raw)))
    last = [x for x in read_metrics(Path(raw["run"]) / "metrics.jsonl") if "validation_loss" in x][-1]
    assert found.validation and found.validation.means[1] == pytest.approx(last["validation_loss"], rel=1e-4)
    assert found.total and found.total.distance > 0
    assert found.adapter["trained"] == ("DoRA, rank 2" if tuner["kind"] == "dora" else "all weights")


def test_without_the_clips_the_videos_remain(trained: Path, run: Path) -> None:
    clips = trained / "clips"
    clips.rename(trained / "moved")
    try:
        found = evaluate(run)
    finally:
        (trained / "moved").rename(clips)
    assert found.validation is None and found.training is None
    assert "No validation loss" in found.notes[0] and found.notes[0] in found.verdict.warnings
    assert [p.prompt for p in found.pairs] == ["a clip"]


@pytest.mark.slow
def test_a_failure_leaves_the_old_report(run: Path) -> None:
    def broken(frames: np.ndarray) -> bool:
        raise ValueError("the judge fell asleep")

    before = evaluate(run).path.read_bytes()
    with pytest.raises(ValueError, match="fell asleep"):
        evaluate(run, prompts=[Prompt("a clip", judge=broken)])
    assert (run / "report/report.html").read_bytes() == before
    assert not [p for p in run.iterdir() if p.name.startswith(".tmp")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"checkpoint": "base"}, "compared with itself"),
        ({"checkpoint": "77"}, "no checkpoint `77`; available: step-000010, step-000020"),
        ({"against": "tuned"}, "no checkpoint `tuned`"),
        ({"prompts": []}, "no prompts, or an empty prompt"),
        ({"prompts": [Prompt(" ")]}, "no prompts, or an empty prompt"),
        ({"stepz": 3}, "unknown setting `stepz`; available: size, frames"),
        ({"frames": 8}, "8 frames is not 4n\\+1"),
        ({"steps": 0}, "sample.steps"),
    ],
)
def test_mistakes_are_sentences(run: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(run, **options)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a run folder"):
        evaluate(tmp_path)
