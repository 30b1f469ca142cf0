"""Windows, buckets and validation clips are functions of the data and the seed."""

from __future__ import annotations

import numpy as np
import pytest

from inlaid import config
from inlaid.data.plan import plan_dataset, require_usable
from inlaid.data.windows import sizes, spread
from inlaid.media.kinds import frames_on_show
from support import videos
from support.sources import GRID, SIZE, codes, message, plan

# --- windows and buckets ------------------------------------------------------------------------------------


def test_spread_is_even_apart_and_inside():
    for there in range(5, 60):
        for length in (1, 5, 9):
            for stride in (1, 3, 9):
                for most in (1, 2, 5):
                    if length > there:
                        continue
                    starts = spread(there, length, stride, most)
                    assert 1 <= len(starts) <= most
                    assert starts[0] >= 0
                    assert starts[-1] + length <= there
                    gaps = np.diff(starts)
                    assert (gaps >= stride).all()
                    assert gaps.size == 0 or gaps.max() - gaps.min() <= 1
                    room = there - length
                    assert len(starts) == min(most, room // stride + 1), "as many as fit"
    assert spread(127, 81, 81, 1) == [23], "a single window is in the middle"
    assert spread(200, 81, 81, 2) == [0, 119], "several reach from end to end"


def test_windows_of_a_long_clip(tmp_path):
    videos.write(tmp_path / "long.mp4", 120, 24, SIZE)
    (tmp_path / "long.txt").write_text("x")
    made = plan(str(tmp_path), max_windows=4, frames=[9, 17])
    assert [(w.start, w.extent.frames, w.fps) for w in made.train] == [
        (s / 16, 17, 16.0) for s in (0, 21, 42, 63)
    ]
    stamps = np.arange(120) / 24
    for window in made.train:
        wanted = window.start + np.arange(17) / 16
        assert videos.numbers(window.read()) == frames_on_show(stamps, wanted, 16).tolist()
    assert len(plan(str(tmp_path), max_windows=4, stride=40).train) == 2
    assert len(plan(str(tmp_path), max_windows=99, stride=8).train) == 9


def test_each_clip_takes_the_longest_length_that_it_fills(tmp_path):
    for n in (9, 16, 17, 40):
        videos.write(tmp_path / f"{n:02d}.mp4", n, 16, SIZE)
        (tmp_path / f"{n:02d}.txt").write_text("x")
    made = plan(str(tmp_path), frames=[9, 17, 33])
    assert [w.extent.frames for w in made.train] == [9, 9, 17, 33]


def test_fps_of_the_recipe_wins(tmp_path):
    videos.write(tmp_path / "a.mp4", 24, 24, SIZE)
    (tmp_path / "a.txt").write_text("x")
    assert plan(str(tmp_path), frames=[17]).problems[0].code == "too-short"
    window = plan(str(tmp_path), frames=[17], fps=24.0).train
    assert [w.fps for w in window] == [24.0]
    made = plan_dataset(
        config.Data(sources=[str(tmp_path)], size=SIZE, frames=[17], fps=24, validation=0), GRID, 16, 0
    )
    assert [w.fps for w in made.train] == [24.0]


def test_slow_clips_repeat_or_keep_their_frames(tmp_path):
    videos.write(tmp_path / "a.mp4", 12, 8, SIZE)
    (tmp_path / "a.txt").write_text("x")
    repeat, keep = (plan(str(tmp_path), slow=s).train[0] for s in ("repeat", "keep"))
    assert (repeat.fps, keep.fps) == (16.0, 8.0)
    assert len(set(videos.numbers(repeat.read()))) == 5
    assert len(set(videos.numbers(keep.read()))) == 9
    assert codes(plan(str(tmp_path), slow="keep", frames=[13])) == {"too-short": ["a.mp4"], "slow": ["a.mp4"]}
    assert codes(plan(str(tmp_path), slow="repeat", frames=[13])) == {"slow": ["a.mp4"]}


def test_buckets_keep_the_area_and_lie_on_the_grid():
    section = config.Data(sources=["x"], size=(480, 832), aspects=["16:9", "1:1", "9:16", "4:3"])
    made = sizes(section, GRID)
    assert made == [(480, 848), (624, 624), (848, 480), (544, 736)]
    assert all(abs(h * w / (480 * 832) - 1) < 0.03 for h, w in made)
    assert sizes(config.Data(sources=["x"], size=(480, 832)), GRID) == [(480, 832)]
    assert sizes(config.Data(sources=["x"], size=(64, 64), aspects=["1:1", "1:1.02"]), GRID) == [(64, 64)]


def test_clips_go_to_the_nearest_aspect(tmp_path):
    for name, size in {"wide": (36, 64), "tall": (64, 36), "square": (50, 48), "turned": (36, 64)}.items():
        videos.write(tmp_path / f"{name}.mp4", 10, 16, size, rotation=90 if name == "turned" else 0)
        (tmp_path / f"{name}.txt").write_text(name)
    made = plan(str(tmp_path), size=(48, 48), aspects=["16:9", "1:1", "9:16"])
    found = {w.clip.name.split(".")[0]: w.extent[1:] for w in made.train}
    assert found == {"wide": (32, 64), "tall": (64, 32), "square": (48, 48), "turned": (64, 32)}
    assert {w.read().shape for w in made.train} == {(9, *s, 3) for s in found.values()}


def test_key_holds_all_that_decides_pixels(clips):
    base = plan(str(clips)).train[0]
    assert base.key == plan(str(clips), trigger="x").train[0].key, "captions do not change pixels"
    others = [
        plan(str(clips), size=(32, 32)).train[0],
        plan(str(clips), frames=[5]).train[0],
        plan(str(clips), fps=15.0).train[0],
        plan(str(clips), frames=[5], max_windows=2).train[0],
    ]
    assert len({base.key, *(w.key for w in others)}) == 5
    hash(base)


# --- held out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "count"), [(0, 0), (0.1, 1), (0.25, 3), (0.04, 0), (3, 3), (1, 1), (5, 5)]
)
def test_validation_count(many, wanted, count):
    names = {w.clip.name for w in plan(str(many), validation=wanted).validation}
    assert count <= len(names) <= count + 2, "copies come together, so a few more may be held out"
    if "01.mp4" not in names:
        assert len(names) == count


def test_validation_is_a_function_of_seed_and_name(many):
    for seed in range(6):
        made = plan(str(many), validation=4, seed=seed, max_windows=3)
        train, held = ({w.clip.name for w in part} for part in (made.train, made.validation))
        assert not train & held, "no clip is on both sides"
        copies = {"01.mp4", "04.mp4", "09.mp4"}
        assert copies <= train or copies <= held, "copies stay together"
        assert train | held == {f"{i:02d}.mp4" for i in range(12)}
        again = plan(str(many), validation=4, seed=seed, frames=[17])
        assert {w.clip.name for w in again.validation} == held, "windows do not matter"
    picks = {
        tuple(sorted(w.clip.name for w in plan(str(many), validation=2, seed=s).validation)) for s in range(8)
    }
    assert len(picks) > 3


def test_validation_changes_little_when_clips_come(many):
    before = {w.clip.name for w in plan(str(many), validation=0.3).validation}
    videos.write(many / "99.mp4", 60, 16, SIZE)
    (many / "99.txt").write_text("new")
    after = {w.clip.name for w in plan(str(many), validation=0.3).validation}
    assert len(before - after) <= 1


def test_one_clip_must_stay_to_train_on(clips):
    made = plan(str(clips), validation=3)
    assert codes(made) == {"validation": ["data.validation"]}
    assert "data.validation=3 of 3 clips leaves none to train on" in message(made)
    with pytest.raises(ValueError, match="leaves none"):
        require_usable(made, "quarantine")
    assert len(plan(str(clips), validation=2).train) == 1
