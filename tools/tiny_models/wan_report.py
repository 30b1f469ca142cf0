"""Evaluation of the shipped tiny Wan through the stock pipeline: VAE reconstruction and prompt adherence.

`benchmarks/subject.py` measures fine-tuning on a new subject with the real trainer.
"""

from __future__ import annotations

import platform
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from inlaid.tiny import judge, world
from inlaid.tiny.world import FRAMES, SIZE, SUBJECT
from tiny_models import wan_vae

STEPS, GUIDANCE = 20, 2.0

Judged = list[dict[str, bool]]


def load(folder: Path) -> Any:
    """Load the pipeline in a folder, without progress bars."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any, prompts: list[str], *, seed: int, steps: int = STEPS, guidance: float = GUIDANCE
) -> np.ndarray:
    """Generate one clip per prompt, `uint8 (n, 17, 64, 64, 3)`; the noise of clip `k` has seed `seed + k`."""
    clips = []
    for start in range(0, len(prompts), 10):
        some = prompts[start : start + 10]
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(some))]
        frames = pipe(
            some,
            height=SIZE,
            width=SIZE,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).frames
        clips.append((np.asarray(frames) * 255).round().astype(np.uint8))
    return np.concatenate(clips)


def shares(verdicts: Judged) -> dict[str, float]:
    """Return the percentage of correct clips per attribute, among clips whose captions state it."""
    names = ("shape", "color", "motion", "size", "background", "all")
    stated = {name: [v[name] for v in verdicts if name in v] for name in names}
    return {name: round(100 * float(np.mean(answers)), 1) for name, answers in stated.items() if answers}


def obedience(pipe: Any, n: int = 100, *, seed: int = 1, **sampling: Any) -> dict[str, float]:
    """Return the percentage of clips that match prompts not used for training, per attribute."""
    pairs = world.world_prompts(n, seed)
    clips = generate(pipe, [prompt for prompt, _ in pairs], seed=seed, **sampling)
    return shares([judge.judge_scene(clip, scene) for clip, (_, scene) in zip(clips, pairs, strict=True)])


def subject(pipe: Any, n: int = 40, *, seed: int = 2, **sampling: Any) -> dict[str, float]:
    """Return the percentage of clips that show the subject of their prompts, and match it per attribute."""
    pairs = world.subject_prompts(n, seed)
    clips = generate(pipe, [prompt for prompt, _ in pairs], seed=seed, **sampling)
    judged = shares([judge.judge_scene(clip, scene) for clip, (_, scene) in zip(clips, pairs, strict=True)])
    return {"subject": round(100 * float(np.mean([judge.judge_subject(clip) for clip in clips])), 1)} | judged


def reconstruction(pipe: Any, n: int = 32) -> dict[str, float]:
    """Return PSNR (dB) and accepted percentage of VAE reconstructions of clips not used for training."""
    held = [(scene, world.render(scene, k)) for k, scene in enumerate(world.scenes(3, n, validation=True))]
    star = [(scene, world.render(scene, k)) for k, (_, scene) in enumerate(world.subject_prompts(n, 3))]
    wild = np.stack([world.wild((1 << 41) + k)[0] for k in range(n)])
    numbers = {"wild_psnr": wan_vae.psnr(wild, wan_vae.reconstruct(pipe.vae, wild))}
    for name, pairs in (("world", held), (SUBJECT, star)):
        clips = np.stack([clip for _, clip in pairs])
        again = wan_vae.reconstruct(pipe.vae, clips)
        verdicts = [
            judge.judge_scene(clip, scene)["all"] for clip, (scene, _) in zip(again, pairs, strict=True)
        ]
        numbers |= {
            f"{name}_psnr": wan_vae.psnr(clips, again),
            f"{name}_judged": 100 * float(np.mean(verdicts)),
        }
    return {name: round(value, 2) for name, value in numbers.items()}


def evaluate(folder: Path) -> dict[str, Any]:
    """Evaluate the pipeline in a folder; print a table and return the report."""
    began, pipe = time.monotonic(), load(folder)
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "sampling": {"steps": STEPS, "guidance": GUIDANCE},
        "prompts": {"world": 100, "world_seed": 1, SUBJECT: 40, f"{SUBJECT}_seed": 2},
        "reconstruction": reconstruction(pipe),
        "obedience": {"world": obedience(pipe), SUBJECT: subject(pipe)},
        "megabytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    print(report["reconstruction"])
    for prompts, numbers in report["obedience"].items():
        print(f"{prompts:8}", *(f"{key} {value:5.1f}" for key, value in numbers.items()), sep="  ")
    return report
