"""Measure the shipped Wan twin through the stock pipeline: does it reconstruct, obey, and learn a subject?"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline
from peft import LoraConfig

from . import judge, wan_dit, wan_vae, world

STEPS, GUIDANCE = 20, 2.0
TARGETS = r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"

Judged = list[dict[str, bool]]


def load(folder: Path) -> Any:
    """The pipeline in a folder, quiet."""
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(
    pipe: Any, prompts: list[str], *, seed: int, steps: int = STEPS, guidance: float = GUIDANCE
) -> np.ndarray:
    """One clip per prompt, `uint8 (n, 17, 64, 64, 3)`; clip `k` has its own noise, seeded `seed + k`."""
    clips = []
    for start in range(0, len(prompts), 10):
        some = prompts[start : start + 10]
        generators = [torch.Generator().manual_seed(seed + start + k) for k in range(len(some))]
        frames = pipe(
            some,
            height=world.SIZE,
            width=world.SIZE,
            num_frames=world.FRAMES,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            output_type="np",
        ).frames
        clips.append((np.asarray(frames) * 255).round().astype(np.uint8))
    return np.concatenate(clips)


def shares(verdicts: Judged) -> dict[str, float]:
    """Percentage of yes per attribute, over the clips whose captions state it."""
    names = ("shape", "colour", "motion", "size", "background", "all")
    stated = {name: [v[name] for v in verdicts if name in v] for name in names}
    return {name: round(100 * float(np.mean(answers)), 1) for name, answers in stated.items() if answers}


def obedience(pipe: Any, n: int = 100, *, seed: int = 1, **sampling: Any) -> dict[str, float]:
    """How often clips show what held-out prompts say, in percent per attribute."""
    pairs = world.world_prompts(n, seed)
    clips = generate(pipe, [prompt for prompt, _ in pairs], seed=seed, **sampling)
    return shares([judge.judge_scene(clip, scene) for clip, (_, scene) in zip(clips, pairs, strict=True)])


def subject(pipe: Any, n: int = 40, *, seed: int = 2, **sampling: Any) -> dict[str, float]:
    """How often clips show the subject for prompts that name it, in percent; and each attribute."""
    pairs = world.subject_prompts(n, seed)
    clips = generate(pipe, [prompt for prompt, _ in pairs], seed=seed, **sampling)
    told = shares([judge.judge_scene(clip, scene) for clip, (_, scene) in zip(clips, pairs, strict=True)])
    return {"subject": round(100 * float(np.mean([judge.judge_subject(clip) for clip in clips])), 1)} | told


def teach(
    pipe: Any,
    *,
    rank: int = 16,
    dora: bool = False,
    rate: float = 2e-3,
    steps: int = 400,
    batch: int = 8,
) -> float:
    """Train an adapter for the subject into the pipeline. Returns the mean of the last 50 losses."""
    clips = world.subject_clips(16)
    mean, std = (
        torch.tensor(pipe.vae.config[name]).view(1, -1, 1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        video = wan_vae.to_model(np.stack([frames for frames, _ in clips]))
        latents = (pipe.vae.encode(video).latent_dist.mode() - mean) / std
        text = pipe.tokenizer(
            [text for _, text in clips], padding="max_length", max_length=48, return_tensors="pt"
        )
        context, bias = wan_dit.encode_text(pipe.text_encoder, text.input_ids, text.attention_mask)
    transformer = pipe.transformer
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, use_dora=dora, target_modules=TARGETS))
    stock, short = transformer.blocks[0].attn2.processor, wan_dit.shorten(transformer)
    trainable = [p for p in transformer.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0), []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(clips), (batch,), generator=generator)
        x0, noise = latents[chosen], torch.randn(batch, *latents.shape[1:], generator=generator)
        sigma = wan_dit.sample_sigma(batch, generator)
        s, short.bias = sigma.view(-1, 1, 1, 1, 1), bias[chosen]
        x = (1 - s) * x0 + s * noise
        flow = transformer(
            x, timestep=1000 * sigma, encoder_hidden_states=context[chosen], return_dict=False
        )[0]
        loss = (flow - (noise - x0)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20, (steps - step) / (0.3 * steps))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    for block in transformer.blocks:
        block.attn2.set_processor(stock)
    return float(torch.stack(losses[-50:]).mean())


def reconstruction(pipe: Any, n: int = 32) -> dict[str, float]:
    """PSNR in dB of encoding and decoding clips that training never saw, and what the judge says of them."""
    held = [(scene, world.render(scene, k)) for k, scene in enumerate(world.scenes(3, n, held_out=True))]
    star = [(scene, world.render(scene, k)) for k, (_, scene) in enumerate(world.subject_prompts(n, 3))]
    wild = np.stack([world.wild((1 << 41) + k)[0] for k in range(n)])
    numbers = {"wild_psnr": wan_vae.psnr(wild, wan_vae.reconstruct(pipe.vae, wild))}
    for name, pairs in (("world", held), (world.SUBJECT, star)):
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


def evaluate(folder: Path, adapters: Iterable[str] = ("lora", "dora")) -> dict[str, Any]:
    """All of it, printed as a table and returned.

    Args:
        folder: A pipeline folder.
        adapters: Which of "lora" and "dora" to teach the subject with.
    """
    began, pipe = time.monotonic(), load(folder)
    report: dict[str, Any] = {
        "sampling": {"steps": STEPS, "guidance": GUIDANCE},
        "prompts": {"world": 100, "world_seed": 1, world.SUBJECT: 40, f"{world.SUBJECT}_seed": 2},
        "reconstruction": reconstruction(pipe),
        "base": {"world": obedience(pipe), world.SUBJECT: subject(pipe)},
    }
    _table("base", report["base"])
    for name in adapters:
        pipe, start = load(folder), time.monotonic()
        loss = teach(pipe, dora=name == "dora")
        minutes = (time.monotonic() - start) / 60
        report[name] = {"world": obedience(pipe), world.SUBJECT: subject(pipe)}
        _table(name, report[name])
        report[name] |= {"loss": round(loss, 4), "training_minutes": round(minutes, 2)}
    report["versions"] = {
        name: version(name) for name in ("torch", "diffusers", "transformers", "peft", "numpy")
    }
    report["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads"
    report["minutes"] = round((time.monotonic() - began) / 60, 1)
    print(report["reconstruction"])
    return report


def _table(name: str, rows: dict[str, dict[str, float]]) -> None:
    for prompts, numbers in rows.items():
        print(
            f"{name:6} {prompts:8}",
            *(f"{key} {value:5.1f}" for key, value in numbers.items()),
            sep="  ",
            flush=True,
        )
