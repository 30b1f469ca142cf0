"""Evaluation of the shipped tiny MIDI: VAE reconstruction, and scenes with and without joint attention.

Lengths are in scene coordinates, in which the box has sides of length 2: 0.02 of the box is 0.04.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
    Dinov2Model,
)

from inlaid.evaluation.metrics import mesh
from inlaid.media import meshes
from inlaid.media.isosurface import extract
from inlaid.networks.triposg import TripoSGTransformer, TripoSGVAE, choose_points
from inlaid.tiny import midi_world
from inlaid.tiny.midi_solids import Thing, bounds, surface
from inlaid.tiny.midi_world import SUBJECT, Scene

STEPS, GUIDANCE = 20, 2.0

SHAPE, SCENE, PLACE = 0.04, 0.1, 0.2
"""Distance thresholds of VAE surfaces, scene surfaces and object centers."""

CELLS = 64
"""Grid cells per side when decoding a surface."""

POINTS = 4096


@dataclass
class TinyModel:
    """Components of the tiny MIDI, loaded in float32."""

    dit: TripoSGTransformer
    vae: TripoSGVAE
    clip: Any
    dino: Any
    processors: tuple[Any, Any]
    tokens: int
    shift: float


def load(folder: Path) -> TinyModel:
    """Load the checkpoint in a folder."""

    def read(part: str) -> dict[str, Any]:
        return json.loads((folder / part).read_text("utf-8"))

    parts: list[Any] = [
        kind.from_pretrained(folder / part).eval()  # type: ignore[attr-defined]
        for kind, part in (
            (TripoSGTransformer, "transformer"),
            (TripoSGVAE, "vae"),
            (CLIPVisionModelWithProjection, "image_encoder_1"),
            (Dinov2Model, "image_encoder_2"),
        )
    ]
    first = CLIPImageProcessor.from_pretrained(folder / "feature_extractor_1")
    second = BitImageProcessor.from_pretrained(folder / "feature_extractor_2")
    tokens = read("transformer/config.json")["num_tokens"]
    shift = read("scheduler/scheduler_config.json")["shift"]
    values: list[Any] = [*parts, (first, second), tokens, shift]
    return TinyModel(*values)


def contexts(model: TinyModel, image: np.ndarray, ids: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return both contexts of each object, computed with the image processors."""
    masks = [ids == n for n in np.unique(ids) if n]
    masked = [np.where(m[..., None], image, np.uint8(255)) for m in masks]

    def preprocess(images: Sequence[np.ndarray], processor: Any) -> Tensor:
        return processor(images=list(images), return_tensors="pt").pixel_values

    own, whole = (preprocess(p, model.processors[1]) for p in (masked, [image] * len(masks)))
    mask = torch.from_numpy(np.stack(masks))[:, None].float()
    mask = torch.nn.functional.interpolate(mask, own.shape[-2:])
    token = model.clip(preprocess(masked, model.processors[0])).image_embeds[:, None]
    return token, model.dino(torch.cat([own, whole, mask], 1)).last_hidden_state


@torch.no_grad()
def generate(
    model: TinyModel,
    scenes: Sequence[tuple[np.ndarray, np.ndarray]],
    *,
    seed: int = 42,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    together: bool = True,
) -> list[Tensor]:
    """Generate the latents (objects, tokens, channels) of each scene from its input image and object ids.

    Args:
        model: loaded checkpoint.
        scenes: input image (h, h, 3) and object ids (h, h) of each scene; the noise of scene k has seed
            `seed + k`.
        seed: seed of the noise.
        steps: number of Euler steps.
        guidance: guidance scale; the unconditional prediction has no images.
        together: let the objects of a scene attend to each other.
    """
    seen = [contexts(model, *scene) for scene in scenes]
    rows = [len(token) for token, _ in seen]
    shape = (model.tokens, model.dit.config["in_channels"])
    noises = [
        torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed + k)) for k, n in enumerate(rows)
    ]
    x, both = torch.cat(noises), [torch.cat(c) for c in zip(*seen, strict=True)]
    groups = rows if together else [1] * len(x)
    u = 1 - torch.arange(steps + 1) / steps
    sigma = model.shift * u / (1 + (model.shift - 1) * u)
    doubled = [torch.cat([torch.zeros_like(c), c]) for c in both]
    for now, then in pairwise(sigma):
        flow = model.dit(x.repeat(2, 1, 1), (1000 * now).expand(2 * len(x)), *doubled, groups=groups * 2)
        without, with_images = flow.chunk(2)
        x = x + (now - then) * (without + guidance * (with_images - without))
    return list(x.split(rows))


@torch.no_grad()
def surfaces(vae: TripoSGVAE, latents: Tensor) -> list[np.ndarray | None]:
    """Return points (POINTS, 3) of the surface decoded from each latent (tokens, channels); None if empty."""
    out: list[np.ndarray | None] = []
    for tokens in vae.tokens(latents):

        def field(p: np.ndarray, tokens: Tensor = tokens) -> np.ndarray:
            return vae.field(tokens[None], torch.from_numpy(np.asarray(p, np.float32))[None])[0].numpy()

        found, _ = extract(field, resolution=CELLS, coarse=CELLS // 2)
        out.append(None if found is None else meshes.sample_surface(found, POINTS)[:, :3])
    return out


def true_surface(thing: Thing, seed: int = 0) -> np.ndarray:
    """Return points (POINTS, 3) of the surface of an object."""
    return surface(thing, POINTS, seed)[:, :3]


@torch.no_grad()
def reconstruction(vae: TripoSGVAE, tokens: int, things: Sequence[Thing]) -> list[float]:
    """Return the F-score (at 0.02 of the box) of each object after encoding and decoding."""
    scores = []
    for thing in things:
        points = surface(thing, 8192, 1)
        chosen = points[choose_points(points, tokens, 0)]
        moments = vae.encode(torch.from_numpy(points)[None], torch.from_numpy(chosen)[None])
        found = surfaces(vae, moments.chunk(2, -1)[0])[0]
        scores.append(0.0 if found is None else mesh.f_score(found, true_surface(thing), SHAPE))
    return scores


def judge(scenes: Sequence[Scene], found: Sequence[Sequence[np.ndarray | None]]) -> dict[str, Any]:
    """Compare generated scenes with the ground truth.

    Args:
        scenes: true scenes.
        found: surface points of the objects of each scene, in order.

    Returns:
        `f_score` of whole scenes and `object_f_score` of each object, both at 0.1; `placed`, the share of
        objects with a center offset below 0.1 of the box; `off`, the mean center offset. The offset of an
        empty object counts as one side of the box.
    """
    whole, each, off, kinds = [], [], [], {}
    for scene, objects in zip(scenes, found, strict=True):
        true = [true_surface(t) for t in scene.things]
        there = [o for o in objects if o is not None]
        whole.append(mesh.f_score(np.concatenate(there), np.concatenate(true), SCENE) if there else 0.0)
        for thing, one, points in zip(scene.things, objects, true, strict=True):
            each.append(0.0 if one is None else mesh.f_score(one, points, SCENE))
            kinds.setdefault(thing.kind, []).append(each[-1])
            middle = bounds(thing).mean(0)
            off.append(2.0 if one is None else float(np.linalg.norm((one.min(0) + one.max(0)) / 2 - middle)))
    return {
        "scenes": len(scenes),
        "objects": len(off),
        "f_score": round(float(np.mean(whole)), 3),
        "object_f_score": round(float(np.mean(each)), 3),
        "placed": round(float(np.mean(np.array(off) < PLACE)), 3),
        "off": round(float(np.mean(off)), 3),
        "by_kind": {kind: round(float(np.mean(scores)), 3) for kind, scores in sorted(kinds.items())},
    }


def obedience(model: TinyModel, scenes: Sequence[Scene], **options: Any) -> dict[str, Any]:
    """Generate scenes from their input images and return the results of `judge`."""
    latents = generate(model, [midi_world.render(s) for s in scenes], **options)
    return judge(scenes, [surfaces(model.vae, one) for one in latents])


def evaluate(folder: Path) -> dict[str, Any]:
    """Evaluate the checkpoint in a folder; print and return the report."""
    began, model = time.monotonic(), load(folder)
    held = midi_world.scenes(1, 40, counts=(2, 3))
    things = [thing for scene in midi_world.scenes(1, 24) for thing in scene.things]
    tables = midi_world.subject_scenes(12, seed=1)
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "sampling": {"steps": STEPS, "guidance": GUIDANCE},
        "limits": {"shape": SHAPE, "scene": SCENE, "place": PLACE},
        "shape_vae": {
            "objects": len(things),
            "f_score": round(float(np.mean(reconstruction(model.vae, model.tokens, things))), 3),
            SUBJECT: round(
                float(np.mean(reconstruction(model.vae, model.tokens, [s.things[0] for s in tables]))), 3
            ),
        },
        "validation": obedience(model, held),
        "validation_each_alone": obedience(model, held, together=False),
        SUBJECT: obedience(model, tables),
        "megabytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6,
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "numpy")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    report["minutes"] = round((time.monotonic() - began) / 60, 1)
    for name in ("shape_vae", "validation", "validation_each_alone", SUBJECT):
        print(f"{name:20}", report[name])
    return report
