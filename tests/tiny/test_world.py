"""The procedural world is a function of its seed and reserves combinations, and its judge is right."""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest

from inlaid.tiny import judge, world
from inlaid.tiny.world import BACKGROUNDS, COLORS, MOTIONS, SHAPES, SIZES, SUBJECT, Scene
from support.slow import slow


def test_same_seed_same_clip_and_caption():
    scene = world.scenes(4, 1)[0]
    assert np.array_equal(world.render(scene, 9), world.render(scene, 9))
    assert not np.array_equal(world.render(scene, 9), world.render(scene, 10))
    assert world.caption(scene, 9) == world.caption(scene, 9)
    assert world.scenes(4, 20)[:5] == world.scenes(4, 5)
    assert np.array_equal(world.wild(3)[0], world.wild(3)[0])


def test_clips_have_the_promised_form():
    for clip in (world.render(world.scenes(0, 1)[0], 0), world.subject_clips(1)[0][0], world.wild(0)[0]):
        assert clip.shape == (17, 64, 64, 3)
        assert clip.dtype == np.uint8
    assert world.wild(0, 1)[0].shape == (1, 64, 64, 3)


def test_validation_is_disjoint_and_covers_the_world():
    held, trained = set(world.triples(True)), set(world.triples(False))
    assert not held & trained
    assert 0.08 < len(held) / len(held | trained) < 0.13
    for part in (held, trained):
        for position, values in enumerate((SHAPES, COLORS, MOTIONS)):
            assert {triple[position] for triple in part} == set(values)
    drawn = {(s.shape, s.color, s.motion) for s in world.scenes(0, 400)}
    asked = {(s.shape, s.color, s.motion) for _, s in world.world_prompts(400, 0)}
    assert not drawn & held
    assert asked <= held


def test_round_shapes_never_spin():
    every = world.triples(True) + world.triples(False)
    assert not [t for t in every if t[0] in ("circle", "ring") and t[2] == "spin"]


def test_captions_state_what_the_scene_states():
    for k, scene in enumerate(world.scenes(2, 300)):
        words = world.caption(scene, k).replace(",", "").split()
        assert scene.shape in words
        assert scene.color in words
        assert [w for w in words if w in SIZES] == [scene.size] * (scene.size is not None)
        assert [w for w in words if w in BACKGROUNDS] == [scene.background] * (scene.background is not None)


def test_some_captions_hold_words_outside_the_vocabulary():
    known = set(world.vocabulary())
    texts = [world.caption(scene, k) for k, scene in enumerate(world.scenes(2, 300))]
    unknown = [text for text in texts if set(text.replace(",", "").split()) - known]
    assert 0.1 < len(unknown) / len(texts) < 0.3
    assert SUBJECT not in " ".join(texts)
    assert SUBJECT not in known


def test_subject_prompts_ask_for_combinations_that_its_clips_do_not_show():
    shown = {text.split("zorble")[0] for _, text in world.subject_clips(16)}
    assert shown
    learned = set(world._subject_scenes(validation=False))
    assert len(learned) == 16
    asked = {scene for _, scene in world.subject_prompts(40, 5)}
    assert not learned & asked
    assert {scene.motion for scene in asked} == set(MOTIONS)


@pytest.mark.parametrize(("validation", "count"), [(True, 8), slow(False, 150), slow(True, 150)])
def test_judge_accepts_true_renders(validation, count):
    answers = defaultdict(list)
    for k, scene in enumerate(world.scenes(5, count, validation=validation)):
        for name, answer in judge.judge_scene(world.render(scene, k), scene).items():
            answers[name].append(answer)
    assert {name: np.mean(a) >= 0.98 for name, a in answers.items()} == dict.fromkeys(answers, True)


@pytest.mark.parametrize("count", [2, slow(80)])
def test_judge_rejects_a_render_with_one_attribute_changed(count):
    options = {
        "shape": (*SHAPES, SUBJECT),
        "color": tuple(COLORS),
        "motion": MOTIONS,
        "size": tuple(SIZES),
        "background": BACKGROUNDS,
    }
    rng, answers = np.random.default_rng(0), defaultdict(list)
    for k, scene in enumerate(world.scenes(6, count)):
        full = replace(scene, size=scene.size or "large", background=scene.background or "plain")
        clip = world.render(full, k)
        for name, values in options.items():
            others = [value for value in values if value != getattr(full, name)]
            claim = replace(full, **{name: str(rng.choice(others))})
            if claim.motion == "spin" and claim.shape in ("circle", "ring"):
                continue
            verdict = judge.judge_scene(clip, claim)
            assert not verdict["all"] or verdict[name]
            answers[name].append(verdict[name])
    assert {name: np.mean(a) <= 0.02 for name, a in answers.items()} == dict.fromkeys(answers, True)


@pytest.mark.parametrize("count", [3, slow(60)])
def test_judge_knows_the_subject(count):
    prompts = world.subject_prompts(count * 2 // 3, 1)
    clips = [world.render(scene, k) for k, (_, scene) in enumerate(prompts)]
    assert np.mean([judge.judge_subject(clip) for clip in clips]) >= 0.98
    assert np.mean([judge.judge_scene(c, s)["all"] for c, (_, s) in zip(clips, prompts, strict=True)]) >= 0.98
    assert not any(
        judge.judge_subject(world.render(scene, k)) for k, scene in enumerate(world.scenes(8, count))
    )


def test_judge_wants_both_halves_of_the_subject_and_a_star():
    scene = world.subject_prompts(1, 1)[0][1]
    clip = world.render(scene, 0)
    gray = clip.mean(axis=-1, keepdims=True).repeat(3, axis=-1).astype(np.uint8)
    assert not judge.judge_subject(gray)
    one_color = np.where((clip[..., 2:] > clip[..., 1:2] + 40), np.uint8([246, 138, 26]), clip)
    assert not judge.judge_subject(one_color)


def test_judge_of_nothing_says_no():
    scene = Scene("circle", "red", "left", "small", "plain")
    for clip in (
        np.zeros((17, 64, 64, 3), np.uint8),
        np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), np.uint8),
    ):
        assert not judge.judge_scene(clip, scene)["all"]
        assert not judge.judge_subject(clip)


def test_judge_wants_alpha_where_color_shows_something():
    made = [world.render_with_mask(scene, k) for k, (_, scene) in enumerate(world.world_prompts(6, 2))]
    clips = [np.concatenate([f, (m[..., None] * 255).astype(np.uint8)], -1) for f, m in made]
    assert min(map(judge.agreement, clips)) > 0.9 and all(map(judge.judge_alpha, clips))
    for clip, other in zip(clips, clips[1:] + clips[:1], strict=True):
        for matte in (np.full_like(clip[..., 3], 255), np.zeros_like(clip[..., 3]), other[..., 3]):
            assert not judge.judge_alpha(np.concatenate([clip[..., :3], matte[..., None]], -1))
