"""Measure the overhead of inlaid over a bare loop with the same tensors, network, adapter and optimizer.

    python benchmarks/overhead.py [--steps 12] [--pairs 3] [--threads 2]

Prints time per step and peak resident memory of `inlaid train` and of a minimal training loop without inlaid,
with their ratios, and writes `benchmarks/results/overhead.json`. Uses a random Wan transformer of about 50 M
parameters and a LoRA of rank 16 on attention and feed-forward layers. Runs of the two alternate. The fastest
step is reported in addition to the median, because other load on the machine only makes steps slower.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZE, FRAMES = 128, 9
RESULTS = Path(__file__).parent / "results/overhead.json"


def prepare(folder: Path, steps: int) -> Path:
    """Write a checkpoint, four clips, a recipe and the cache."""
    from inlaid.media import video
    from inlaid.tiny import random

    random.build("wan", folder / "model", heads=4, head=128, layers=12, ffn=2048)
    (folder / "clips").mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        frames = rng.integers(0, 255, (FRAMES, SIZE, SIZE, 3), dtype=np.uint8)
        video.write_video(folder / f"clips/{i}.mp4", frames, 16)
        (folder / f"clips/{i}.txt").write_text(f"clip {i}", "utf-8")
    recipe = {
        "run": str(folder / "run"),
        "model": {"family": "wan", "checkpoint": str(folder / "model")},
        "data": {"sources": str(folder / "clips"), "size": [SIZE, SIZE], "frames": FRAMES, "validation": 0},
        "tuner": {"rank": 16},
        "train": {"steps": steps, "save_every": steps, "log_every": 1, "validate_every": steps},
    }
    recipe["data"]["cache"] = str(folder / "cache")
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), "utf-8")
    subprocess.run([sys.executable, "-m", "inlaid", "cache", str(path)], check=True, capture_output=True)
    return path


def bare(folder: Path, steps: int) -> None:
    """Train with a minimal loop."""
    import torch
    from diffusers import WanTransformer3DModel
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig
    from safetensors.torch import load_file

    model = WanTransformer3DModel.from_pretrained(folder / "model", subfolder="transformer").requires_grad_(
        False
    )
    targets = r"blocks\.\d+\.((attn1|attn2)\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))"
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=targets))
    cast_training_params([model], torch.float32)
    model.train().enable_gradient_checkpointing()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    latents = [
        load_file(f)["latents"][None].float() for f in sorted((folder / "cache/media").rglob("*.safetensors"))
    ]
    text = torch.zeros(1, 512, 32)
    seconds = []
    for step in range(steps):
        start = time.perf_counter()
        x0 = latents[step % len(latents)]
        noise, t = torch.randn_like(x0), torch.sigmoid(torch.randn(1))
        v = model((1 - t) * x0 + t * noise, t * 1000, text, return_dict=False)[0]
        torch.nn.functional.mse_loss(v, noise - x0).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds[2:]}))


def measure(folder: Path, steps: int, kind: str, index: int) -> dict[str, float]:
    """Return the fastest and median step time after the second step, and peak resident MiB, of a process."""
    if kind == "bare":
        command = [sys.executable, __file__, "--bare", str(folder), "--steps", str(steps)]
    else:
        command = [
            sys.executable,
            "-m",
            "inlaid",
            "train",
            str(folder / "recipe.yaml"),
            f"run={folder}/run{index}",
        ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{kind} failed"
    if kind == "bare":
        seconds = json.loads(out.splitlines()[-1])["seconds"]
    else:
        lines = (folder / f"run{index}/metrics.jsonl").read_text("utf-8").splitlines()
        seconds = [x["seconds_per_step"] for x in map(json.loads, lines) if "seconds_per_step" in x][2:]
    peak = usage.ru_maxrss / 1024
    return {"fastest step, s": min(seconds), "median step, s": statistics.median(seconds), "peak, MiB": peak}


def main() -> None:
    """Run the pairs and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        bare(args.bare, args.steps)
        return
    from inlaid.runs.folder import environment

    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.steps)
        pairs = []
        for i in range(args.pairs):
            order = ("inlaid", "bare") if i % 2 else ("bare", "inlaid")
            pairs.append({kind: measure(Path(folder), args.steps, kind, i) for kind in order})
    table = {}
    for name in pairs[0]["bare"]:
        inlaid, plain = ([pair[kind][name] for pair in pairs] for kind in ("inlaid", "bare"))
        ratios = [a / b for a, b in zip(inlaid, plain, strict=True)]
        row = {"inlaid": statistics.median(inlaid), "bare": statistics.median(plain)}
        row |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        table[name] = {k: round(v, 4) for k, v in row.items()}
        print(
            f"{name:<16} inlaid {row['inlaid']:9.3f}   bare {row['bare']:9.3f}   "
            f"ratio {row['ratio']:.3f} (lowest {row['lowest']:.3f}, highest {row['highest']:.3f})"
        )
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "inlaid", "--help"], check=True, capture_output=True)
    table["inlaid --help, s"] = round(time.perf_counter() - start, 2)
    print(f"inlaid --help     {table['inlaid --help, s']:.2f} s")
    settings = {"steps": args.steps, "pairs": args.pairs, "threads": args.threads}
    RESULTS.parent.mkdir(exist_ok=True)
    text = json.dumps(settings | table | {"packages": environment()["packages"]}, indent=2)
    RESULTS.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
