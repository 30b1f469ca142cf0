"""Compare time per step and peak memory with DiffSynth-Studio on the same task.

    python benchmarks/peers.py --diffsynth /path/to/a/venv/bin/python [--pairs 3] [--precision float32]

DiffSynth-Studio needs a separate environment: `pip install torch==2.13.0 diffsynth==2.1.12 librosa`. Each
side trains a LoRA of rank 16 on the attention layers of a random Wan of 22 M parameters with its own training
loop: latents 16 x 5 x 16 x 16, 512 text tokens, batch 1, AdamW, gradient checkpointing, one thread, 16 steps.
Both start from cached tensors. Times are CPU time, median over the steps after the fourth; memory is the peak
resident set size of the process, including imports. Runs alternate so that both see the same machine load.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS, SKIPPED = 16, 4
SIZES = {"heads": 3, "head": 128, "layers": 8, "ffn": 1536}
TEXT = 32
"""Width of the text embeddings (arbitrary)."""


def inlaid(folder: Path, precision: str) -> list[float]:
    """Train with `inlaid train`; return the CPU time at the end of each step."""
    from inlaid import config
    from inlaid.alpha.opening import open_family
    from inlaid.console import quiet
    from inlaid.data.prepare import build_cache
    from inlaid.media import video
    from inlaid.runs.folder import open_run
    from inlaid.runs.launch import start_processes
    from inlaid.tiny import random
    from inlaid.training.job import Job
    from inlaid.training.loop import train

    quiet()
    import numpy as np

    clips = folder / "clips"
    if not clips.is_dir():
        random.build("wan", folder / "model", **SIZES)
        clips.mkdir()
        pixels = np.random.default_rng(0).integers(0, 255, (17, 128, 128, 3), dtype=np.uint8)
        video.write_video(clips / "a.mp4", pixels, 16)
        (clips / "a.txt").write_text("a clip", "utf-8")
    raw = {
        "run": str(folder / f"run-{time.time_ns()}"),
        "model": {"family": "wan", "checkpoint": str(folder / "model")},
        "data": {
            "sources": str(clips),
            "size": [128, 128],
            "frames": 17,
            "validation": 0,
            "cache": str(folder / "cache"),
        },
        "tuner": {"rank": 16, "targets": [r"blocks\.\d+\.attn[12]\.(to_q|to_k|to_v|to_out\.0)"]},
        "train": {"steps": STEPS, "save_every": STEPS, "validate_every": STEPS},
        "runtime": {"precision": precision, "device": "cpu"},
    }
    seconds: list[float] = []
    update = Job.update

    def timed(job: Any, step: int) -> Any:
        norm = update(job, step)
        seconds.append(time.process_time())
        return norm

    Job.update = timed  # type: ignore[method-assign]
    if not (folder / "cache").is_dir():  # encode in a process of its own, which is not measured
        built = config.build(raw)
        with start_processes(built) as ctx, open_run(built, ctx) as run:
            build_cache(built, open_family(built), run, ctx)
        return []
    train(config.build(raw))
    return seconds


def diffsynth(folder: Path, precision: str) -> list[float]:
    """Train with DiffSynth-Studio's loop, loss and LoRA; return the CPU time at the end of each step."""
    import torch

    library = torch.library.Library("torchvision", "DEF")  # the wheel is for CUDA; its operators are not used
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from accelerate import Accelerator
    from diffsynth.diffusion.loss import FlowMatchSFTLoss  # type: ignore[import-not-found]
    from diffsynth.diffusion.runner import launch_training_task  # type: ignore[import-not-found]
    from diffsynth.diffusion.training_module import DiffusionTrainingModule  # type: ignore[import-not-found]
    from diffsynth.models.wan_video_dit import WanModel  # type: ignore[import-not-found]
    from diffsynth.pipelines.wan_video import WanVideoPipeline  # type: ignore[import-not-found]

    dtype = getattr(torch, precision)

    class Module(DiffusionTrainingModule):
        def __init__(self) -> None:
            super().__init__()
            self.pipe = WanVideoPipeline(device="cpu", torch_dtype=dtype)
            self.pipe.dit = WanModel(
                dim=SIZES["heads"] * SIZES["head"],
                in_dim=16,
                ffn_dim=SIZES["ffn"],
                out_dim=16,
                text_dim=TEXT,
                freq_dim=256,
                eps=1e-6,
                patch_size=(1, 2, 2),
                num_heads=SIZES["heads"],
                num_layers=SIZES["layers"],
                has_image_input=False,
            ).to(dtype)
            self.pipe.scheduler.set_timesteps(1000, training=True)
            self.pipe.requires_grad_(False)
            self.pipe.dit.train()
            targets = ["q", "k", "v", "o"]
            self.pipe.dit = self.add_lora_to_model(self.pipe.dit, target_modules=targets, lora_rank=16)

        def forward(self, data: Any, inputs: Any = None) -> Any:
            return FlowMatchSFTLoss(self.pipe, use_gradient_checkpointing=True, **inputs)

    class Data(torch.utils.data.Dataset):
        load_from_cache = True

        def __len__(self) -> int:
            return STEPS

        def __getitem__(self, i: int) -> Any:
            g = torch.Generator().manual_seed(i)
            latents = torch.randn(1, 16, 5, 16, 16, generator=g).to(dtype)
            return {"input_latents": latents, "context": torch.randn(1, 512, TEXT, generator=g).to(dtype)}

    seconds: list[float] = []

    class Logger:
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.process_time())

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            pass

        on_training_end = on_epoch_end

    launch_training_task(Accelerator(cpu=True), Data(), Module(), Logger(), learning_rate=1e-4, num_workers=0)
    return seconds


def child(side: str, folder: Path, precision: str) -> None:
    import torch

    torch.set_num_threads(1)
    stamps = {"inlaid": inlaid, "diffsynth": diffsynth}[side](folder, precision)
    steps = [b - a for a, b in zip(stamps[SKIPPED - 1 :], stamps[SKIPPED:], strict=False)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    value = {"seconds": statistics.median(steps) if steps else None, "peak": peak}
    print("RESULT " + json.dumps(value), flush=True)


def run(python: str, side: str, folder: Path, precision: str) -> dict[str, float]:
    """Run one side in a separate process."""
    command = [python, __file__, "--child", side, "--folder", str(folder), "--precision", precision]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def main() -> None:
    """Run the pairs and print their ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--diffsynth", help="python of the environment with DiffSynth-Studio")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.folder, args.precision)
        return
    if not args.diffsynth:
        parser.error("--diffsynth is required")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run(sys.executable, "inlaid", folder, args.precision)  # creates the checkpoint and the cache
        rows = []
        for i in range(args.pairs):
            ours = run(sys.executable, "inlaid", folder, args.precision)
            theirs = run(args.diffsynth, "diffsynth", folder, args.precision)
            rows.append({"inlaid": ours, "diffsynth": theirs})
            print(
                f"pair {i + 1}: {ours['seconds']:.3f} s and {ours['peak'] / 2**20:.0f} MiB, DiffSynth-Studio "
                f"{theirs['seconds']:.3f} s and {theirs['peak'] / 2**20:.0f} MiB",
                flush=True,
            )
    ratios = {key: [r["inlaid"][key] / r["diffsynth"][key] for r in rows] for key in ("seconds", "peak")}
    for key, values in ratios.items():
        print(
            f"{key}, ratio: median {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
        )
    if args.out:
        about = {"precision": args.precision, "date": time.strftime("%Y-%m-%d"), "cores": os.cpu_count()}
        args.out.write_text(json.dumps({**about, "pairs": rows, "ratios": ratios}, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
