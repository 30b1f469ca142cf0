"""Train the RGBA VAE of the tiny Wan: `python -m tiny_models.rgba`, then with `--evaluate`.

A merge block and two low-rank decoders on the frozen VAE of the tiny Wan, trained with the losses of
`inlaid train`, first on images and then on clips of `rgba_world`. Training resumes from its last checkpoint
in the work folder; batch k depends only on k. Unlike `inlaid train`, this script uses Muon: with AdamW,
such a small network stays on a loss plateau, which Muon leaves within minutes.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from inlaid.networks import rgba_vae_checkpoint, rgba_vae_metrics
from inlaid.networks.rgba_vae import RgbaVae
from inlaid.networks.rgba_vae_checkpoint import FILES, GROUND
from inlaid.networks.rgba_vae_losses import RgbaLoss, hard_render
from inlaid.tiny import path, rgba_judge, rgba_vae_path, rgba_world
from tiny_models.training import MuonAdamW, Progress, ahead, load_state, save_state
from tiny_models.wan_vae import fast_norm

RANK = 16

COLORS = [[c / 127.5 - 1 for c in GROUND]]
"""Background color for encoding. With all eight corner colors of the RGB cube, such a small merge block loses
the foreground before it learns to remove the background."""

ANCHOR, VISIBLE, NOISE = 0.3, 1.0, 0.12
"""Arguments of `rgba_vae_checkpoint.losses`, for a pretrained transformer whose latents have small errors."""

DECODERS = 0.03
"""Learning rate of Muon for the decoders; the rate of the merge block is smaller, see `Phase`."""


@dataclass(frozen=True)
class Phase:
    """Training phase on clips of one length."""

    frames: int
    batch: int
    steps: int
    rate: tuple[float, float]
    """Factors on the learning rates at the start and end of the phase."""
    merge: float
    """Learning rate of Muon for the merge block; small, because larger steps destroy its initialization from
    the encoder's head."""
    visible_alpha: float = 0.0
    """Argument of `rgba_vae_checkpoint.losses`."""
    halves: float = 0.0
    """Share of clips from `rgba_world.halves`."""


PHASES = (
    Phase(1, 4, 124, (1.0, 0.752), 0.002),
    Phase(1, 4, 150, (1.0, 0.7), 0.01),
    Phase(9, 1, 68, (0.7, 0.390909), 0.01),
    Phase(9, 1, 146, (0.7, 0.198125), 0.01),
    Phase(9, 1, 36, (0.198125, 0.0), 0.01),
    Phase(9, 1, 122, (0.6, 0.345833), 0.01),
    Phase(1, 4, 120, (0.6, 0.6), 0.01, 1.0),
    Phase(9, 1, 200, (0.6, 0.1), 0.01, 1.0),
    Phase(17, 1, 40, (0.1, 0.0), 0.01, 1.0),
    Phase(1, 4, 300, (0.7, 0.5), 0.01, 1.0, 0.35),
    Phase(9, 1, 300, (0.5, 0.08), 0.01, 1.0, 0.35),
    Phase(17, 1, 60, (0.08, 0.0), 0.01, 1.0, 0.35),
    Phase(9, 8, 955, (0.7, 0.2), 0.01, 1.0, 0.35),
    Phase(17, 8, 274, (0.2, 0.0834), 0.01, 1.0, 0.35),
    Phase(17, 1, 130, (0.0834, 0.0), 0.01, 1.0, 0.35),
)

ENDS = list(itertools.accumulate(p.steps for p in PHASES))


def batch(phase: Phase, key: int) -> Tensor:
    """Return training batch `key`: uint8 (b, 4, t, 64, 64)."""
    rng = np.random.default_rng([phase.frames, key, 59])
    clips = [
        rgba_world.training(int(rng.integers(1 << 40)), phase.frames, phase.halves)
        for _ in range(phase.batch)
    ]
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3)


def rate(step: int) -> float:
    """Return the factor on the learning rates: a short warmup, then linear within each phase."""
    which = bisect.bisect_right(ENDS, step)
    begin, end = PHASES[which].rate
    done = 1 - (ENDS[which] - step) / PHASES[which].steps
    return min(1.0, (step + 1) / 20) * (begin + (end - begin) * done)


def load_vae() -> AutoencoderKLWan:
    """Return the VAE of the tiny Wan in float32."""
    return AutoencoderKLWan.from_pretrained(path("wan"), subfolder="vae", torch_dtype=torch.float32).eval()


@torch.no_grad()
def begin() -> RgbaVae:
    """Return an untrained RGBA VAE, initialized for training on images before clips.

    Images train only the last tap of a temporal convolution. The other taps are initialized to zero, because
    random weights would disturb the trained features when training on clips starts.
    """
    rgba_vae = rgba_vae_checkpoint.new(load_vae(), RANK, 0, "encoder")
    blocks: Any = rgba_vae.merge.res
    random = [*rgba_vae.rgb.a, *rgba_vae.alpha.a, *(block.conv1.weight for block in blocks)]
    for weight in random:
        if weight.ndim == 5 and weight.shape[2] > 1:
            weight[:, :, :-1] = 0
    return rgba_vae


@fast_norm()
def train(work: Path, device: torch.device, workers: int) -> RgbaVae:
    """Train in `work`, resuming from a checkpoint; `workers` processes prefetch batches."""
    rgba_vae = begin()
    rgba_vae.to(device)
    modules = torch.nn.ModuleDict({name: getattr(rgba_vae, name) for name in FILES})
    optimizers = {
        name: MuonAdamW(
            [(n, p) for n, p in modules.named_parameters() if n.startswith("merge.") == (name == "merge")],
            muon=DECODERS,
            adamw=1e-3,
        )
        for name in ("merge", "decoders")
    }
    state, facts = work / "rgba_vae.safetensors", {"done": 0, "seconds": 0.0}
    if state.exists():
        facts, groups = load_state(state)
        modules.load_state_dict(groups["model"])
        for name, optimizer in optimizers.items():
            optimizer.load(groups[name])
    loss = RgbaLoss("paper", hard_mask="true")
    step, total = facts["done"], ENDS[-1]
    progress, saved = Progress("RGBA VAE", total, step), time.monotonic()
    for clips in ahead(lambda k: batch(PHASES[bisect.bisect_right(ENDS, k)], k), step, total, workers):
        phase = PHASES[bisect.bisect_right(ENDS, step)]
        generator = torch.Generator().manual_seed(step)
        weights = {"anchor": ANCHOR, "visible": VISIBLE, "noise": NOISE}
        weights["visible_alpha"] = phase.visible_alpha
        terms = rgba_vae_checkpoint.losses(
            rgba_vae, clips.to(device), loss, generator, **weights, colors=COLORS
        )
        terms["loss"].backward()
        optimizers["merge"].rates = phase.merge, 1e-3
        for optimizer in optimizers.values():
            optimizer.step(rate(step))
        step += 1
        progress(step, **{n: t.detach() for n, t in terms.items()})
        if time.monotonic() - saved > 60 or step == total:
            facts["seconds"] += time.monotonic() - saved
            facts["done"], saved = step, time.monotonic()
            moments = {name: optimizer.tensors() for name, optimizer in optimizers.items()}
            save_state(state, facts, model=modules.state_dict(), **moments)
    return rgba_vae


def export(work: Path, out: Path) -> str:
    """Write the current weights as an RGBA VAE folder in float16; return its rgba_vae_id."""
    rgba_vae = begin()
    facts, groups = load_state(work / "rgba_vae.safetensors")
    modules = torch.nn.ModuleDict({name: getattr(rgba_vae, name) for name in FILES})
    modules.load_state_dict(groups["model"])
    about = {
        "loss": "paper",
        "hard_mask": "true",
        "steps": facts["done"],
        "anchor": ANCHOR,
        "visible": VISIBLE,
        "noise": NOISE,
    }
    return rgba_vae_checkpoint.save(rgba_vae, out, about=about, dtype=torch.float16, colors=COLORS)


@torch.no_grad()
def reconstruct(rgba_vae: RgbaVae, clips: np.ndarray) -> np.ndarray:
    """Encode and decode clips with the RGBA VAE: uint8 (n, t, 64, 64, 4)."""
    out = []
    for clip in torch.from_numpy(clips).permute(0, 4, 1, 2, 3):
        rgb, alpha = rgba_vae_checkpoint.to_video(clip[None])
        seen = hard_render(rgb, alpha, torch.tensor(COLORS[0]))
        out.append(rgba_vae_checkpoint.to_pixels(*rgba_vae.decode(rgba_vae.encode(seen, alpha)))[0])
    return torch.stack(out).permute(0, 2, 3, 4, 1).numpy()


@fast_norm()
def evaluate(folder: Path) -> dict[str, Any]:
    """Measure reconstructions of unseen clips by kind, and those of trivial predictors."""
    rgba_vae = rgba_vae_checkpoint.load(folder, load_vae())
    kinds = {
        "world": np.stack([c.frames for c in rgba_world.clips(1, 32, validation=True)]),
        "wild": np.stack([rgba_world.wild((1 << 50) + k) for k in range(16)]),
        "zorble": np.stack([c.frames for c in rgba_world.subject_clips(12, 1)]),
    }
    report: dict[str, Any] = {"rgba_vae_id": rgba_vae_checkpoint.read_config(folder)["rgba_vae_id"]}
    for kind, clips in kinds.items():
        again = reconstruct(rgba_vae, clips)
        pairs = (torch.from_numpy(np.stack(p)).permute(0, 4, 1, 2, 3) for p in zip(clips, again, strict=True))
        found = rgba_vae_metrics.report(torch.stack([rgba_vae_metrics.tally(*pair) for pair in pairs]).sum(0))
        report[kind] = {"clips": len(clips), **{n: round(v, 3) for n, v in found.items()}}
        print(kind, {n: v for n, v in report[kind].items() if "alpha_mae" in n or "rgb" in n}, flush=True)
    judged = [rgba_judge.judge_subject(clip) for clip in again]
    report["zorble"] |= {"judged": round(100 * float(np.mean([v.both for v in judged])), 1)}
    report["megabytes"] = round(sum(f.stat().st_size for f in folder.iterdir()) / 1e6, 3)
    return report


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tiny_models.rgba", description="Train the RGBA VAE.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="device for training")
    parser.add_argument("--workers", type=int, default=0, help="processes that prefetch batches")
    parser.add_argument("--work", type=Path, default=Path(".work/tiny-merged"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=rgba_vae_path("wan"), help="RGBA VAE folder")
    parser.add_argument(
        "--evaluate", action="store_true", help="measure the RGBA VAE in --out, write REPORT.json"
    )
    parser.add_argument("--export", action="store_true", help="only export the latest weights")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        (args.out / "REPORT.json").write_text(json.dumps(evaluate(args.out), indent=1) + "\n")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.export:
        train(args.work, torch.device(args.device), args.workers)
    print(json.dumps({"rgba_vae_id": export(args.work, args.out)}))


if __name__ == "__main__":
    main()
