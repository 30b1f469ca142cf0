"""Compare the memory estimate of `inlaid check` with measured memory on the CPU and with published numbers.

    python benchmarks/estimate.py [--only NAME]

Each setting trains three steps in a separate process. The measured value is the peak resident set size minus
the resident size before the network was loaded (imports, and kernels loaded by one step of a tiny network).
Allocations of 64 KB and more are mapped and unmapped individually (`MALLOC_MMAP_THRESHOLD_`), so that
resident memory equals live memory. Writes `benchmarks/results/estimate.json` and `.md`; finished settings are
kept and measured again only with `--only` or if the files are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results/estimate.json"

SIZES = {
    "4 M": {"heads": 4, "head": 64, "layers": 4, "ffn": 1024},
    "50 M": {"heads": 8, "head": 64, "layers": 12, "ffn": 2048},
    "300 M": {"heads": 8, "head": 128, "layers": 18, "ffn": 4096},
}
COG_SIZES = {"30 M": {"heads": 8, "head": 64, "layers": 8}}
MIDI_SIZES = {
    "80 M": {"heads": 8, "head": 64, "layers": 13, "tokens": 1024},
    "80 M, encoders of 21 M": {"heads": 8, "head": 64, "layers": 13, "tokens": 1024, "sight": 384},
}

CLIP = (17, 128, 192)
"""Default frames, height and width of a setting."""

SETTINGS: dict[str, dict[str, Any]] = {
    "wan 4 M, lora": {"size": "4 M", "clip": (33, 192, 320)},
    "wan 4 M, lora, no checkpointing": {"size": "4 M", "memory": {"gradient_checkpointing": False}},
    "wan 50 M, lora": {"size": "50 M"},
    "wan 50 M, lora, batch 2, every 3rd": {
        "size": "50 M",
        "train": {"batch": 2},
        "memory": {"gradient_checkpointing": 3},
    },
    "wan 50 M, dora, no checkpointing": {
        "size": "50 M",
        "tuner": {"kind": "dora"},
        "memory": {"gradient_checkpointing": False},
    },
    "wan 50 M, dora, bfloat16": {
        "size": "50 M",
        "tuner": {"kind": "dora"},
        "runtime": {"precision": "bfloat16"},
    },
    "wan 50 M, full": {"size": "50 M", "tuner": {"kind": "full"}},
    "wan 50 M, full, no checkpointing, accumulate 2": {
        "size": "50 M",
        "tuner": {"kind": "full"},
        "train": {"accumulate": 2},
        "memory": {"gradient_checkpointing": False},
    },
    "wan 300 M, lora": {"size": "300 M"},
    "wan 300 M, lora, bfloat16": {"size": "300 M", "runtime": {"precision": "bfloat16"}},
    "wan 300 M, lora, int8": {"size": "300 M", "memory": {"quantize": "int8"}},
    "wan 300 M, lora, int4": {"size": "300 M", "memory": {"quantize": "int4"}},
    "wan 50 M, full, adamw8bit, ema": {
        "size": "50 M",
        "tuner": {"kind": "full"},
        "optim": {"name": "adamw8bit", "ema": 0.99},
    },
    "wan 50 M, lokr": {"size": "50 M", "tuner": {"kind": "lokr"}},
    "cogvideox 30 M, lora": {"family": "cogvideox", "size": "30 M"},
    "cogvideox 30 M, full, no checkpointing": {
        "family": "cogvideox",
        "size": "30 M",
        "tuner": {"kind": "full"},
        "memory": {"gradient_checkpointing": False},
    },
    "midi 80 M, lora, 3 objects": {"family": "midi", "size": "80 M", "clip": (3, 1, 1)},
    "midi 80 M, lora, 3 objects, bfloat16": {
        "family": "midi",
        "size": "80 M",
        "clip": (3, 1, 1),
        "runtime": {"precision": "bfloat16"},
    },
    "midi 80 M, dora, 4 objects, no checkpointing": {
        "family": "midi",
        "size": "80 M",
        "clip": (4, 1, 1),
        "tuner": {"kind": "dora"},
        "memory": {"gradient_checkpointing": False},
    },
    "midi 80 M, lora on encoders of 21 M too, 3 objects": {
        "family": "midi",
        "size": "80 M, encoders of 21 M",
        "clip": (3, 1, 1),
        "options": {"image_encoders": "both"},
    },
    "midi 80 M, lora on encoders of 21 M too, 3 objects, no checkpointing": {
        "family": "midi",
        "size": "80 M, encoders of 21 M",
        "clip": (3, 1, 1),
        "options": {"image_encoders": "both"},
        "memory": {"gradient_checkpointing": False},
    },
}

PUBLISHED: list[dict[str, Any]] = [
    {
        "name": "CogVideoX-5b, LoRA r64, checkpointed, batch 1",
        "checkpoint": "THUDM/CogVideoX-5b",
        "tuner": {"rank": 64},
        "published": 20.8,
        "note": "the source does not state which counter was read",
    },
    {
        "name": "CogVideoX-5b, LoRA r64, checkpointed, batch 4",
        "checkpoint": "THUDM/CogVideoX-5b",
        "tuner": {"rank": 64},
        "train": {"batch": 4},
        "published": 47.8,
        "note": "27 GiB more for three more samples leaves 11.8 GiB constant: no encoder was resident",
    },
    {
        "name": "CogVideoX-2b, LoRA r64, no checkpointing, batch 1",
        "checkpoint": "THUDM/CogVideoX-2b",
        "tuner": {"rank": 64},
        "memory": {"gradient_checkpointing": False},
        "published": 44.3,
        "note": "adapters are 16-bit there; float32 here, with inputs kept in their dtype",
    },
    {
        "name": "CogVideoX-5b, LoRA r128, checkpointed, batch 1",
        "checkpoint": "THUDM/CogVideoX-5b",
        "tuner": {"rank": 128},
        "published": 20.7,
        "note": "peak reserved memory, reached before training: an upper bound",
    },
    {
        "name": "CogVideoX-5b, full, checkpointed, batch 1",
        "checkpoint": "THUDM/CogVideoX-5b",
        "tuner": {"kind": "full"},
        "published": 52.9,
        "note": "weights, gradients and moments are bfloat16 there and float32 here",
    },
]
"""Peak memory in GiB published by a CogVideoX trainer for 49x480x720 in bfloat16 on an 80 GB GPU."""


def recipe(setting: dict[str, Any], checkpoint: str) -> Any:
    """Return the recipe of a setting."""
    from inlaid import config

    sections = {k: v for k, v in setting.items() if k in ("tuner", "optim", "train", "memory", "runtime")}
    raw = {
        "run": "unused",
        "model": {
            "family": setting.get("family", "wan"),
            "checkpoint": checkpoint,
            "options": setting.get("options", {}),
        },
        "data": {"sources": "unused"},
        **sections,
    }
    raw["tuner"] = (
        {"rank": 16, **raw.get("tuner", {})} if raw.get("tuner", {}).get("kind") != "full" else raw["tuner"]
    )
    return config.build(raw)


def estimate(made: Any, clip: tuple[int, int, int], device: Any, precision: Any) -> Any:
    """Return the estimate of `inlaid check`."""
    from inlaid import families
    from inlaid.check.estimate import estimate_recipe

    family = families.get(made.model.family)(made.model)
    options = {"device": device, "precision": precision, "optimizer": made.optim.name}
    return estimate_recipe(family, made, {clip: 1}, {clip: 1}, [""], **options)


def steps(made: Any, clip: tuple[int, int, int], times: int) -> None:
    """Train a few steps on random tensors, in the same way as `inlaid train`."""
    import torch

    from inlaid import families
    from inlaid.adapters import tuners
    from inlaid.check.estimate import text_width
    from inlaid.data.batch import Batch
    from inlaid.networks import quantize
    from inlaid.runs.launch import Devices, resolve_devices
    from inlaid.training import memory
    from inlaid.training.optim import EMA, make_optimizer
    from inlaid.training.steps import DenoisingStep

    plan = resolve_devices(made, Devices())
    family = families.get(made.model.family)(made.model)
    full, device = made.tuner.kind == "full", torch.device("cpu")
    denoiser = family.load_denoiser(torch.float32 if full else plan.precision)
    for tensor in [*denoiser.parameters(), *denoiser.buffers()]:
        tensor.data = tensor.data.clone()  # otherwise the whole file stays mapped
    quantize.shrink_weights(made.memory, denoiser, device, plan.precision)
    if made.memory.gradient_checkpointing:
        memory.enable_checkpointing(denoiser, made.memory.gradient_checkpointing)
    parameters = tuners.attach(made.tuner, family.targets, denoiser.train(), seed=0)
    optimizer = make_optimizer(plan.optimizer, made.optim, list(parameters.values()))
    ema = EMA(made.optim.ema, parameters) if made.optim.ema else None
    mixed = torch.autocast("cpu", plan.precision, enabled=full and plan.precision is not torch.float32)
    step = DenoisingStep(family, family.objective(made.objective, clip[1:]), mixed)
    n = made.train.batch
    item = {k: torch.randn(n, *s) for k, s in family.shapes(*clip).items()}
    width = text_width(denoiser)
    read = {"text": torch.randn(family.text_length, width)} if family.text_length else {}
    text = family.collate([read] * n)
    batch = Batch(item.pop("latents"), {**text, **item})
    settle()
    for i in range(times):
        for _ in range(made.train.accumulate):
            loss = step(denoiser, batch, torch.Generator().manual_seed(i))["loss"]
            (loss / made.train.accumulate).backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(parameters, i)


def settle() -> None:
    """Release free memory to the operating system, and reset the peak resident size."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident(name: str) -> int:
    """Return `VmRSS` (resident size) or `VmHWM` (its peak) in bytes."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def child(setting: dict[str, Any], folder: Path) -> None:
    """Measure one setting in this process, and print the result as JSON."""
    import torch

    from inlaid.runs.launch import Devices, resolve_devices

    clip = tuple(setting.get("clip", CLIP))
    small = {**setting, "train": {}, "size": None}
    steps(recipe(small, str(folder / "small")), (5, 32, 32), 1)
    settle()
    before = resident("VmRSS")
    made = recipe(setting, str(folder / "model"))
    steps(made, clip, 3)
    measured = resident("VmHWM") - before
    plan = resolve_devices(made, Devices())
    found = estimate(made, clip, torch.device("cpu"), plan.precision)
    row = {
        "parameters": found.parameters,
        "measured": measured,
        "estimated": found.peak,
        "memory": found.memory,
    }
    print(json.dumps(row))


def measure(name: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Measure one setting in a separate process."""
    from inlaid.tiny import random

    family = setting.get("family", "wan")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        random.build(family, folder / "model", **(SIZES | COG_SIZES | MIDI_SIZES)[setting["size"]])
        random.build(family, folder / "small")
        steady = {
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536",
        }
        done = subprocess.run(
            [sys.executable, __file__, "--child", name, "--folder", str(folder)],
            env=os.environ | steady | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    row = json.loads(done.stdout.splitlines()[-1])
    return {**row, "ratio": round(row["estimated"] / row["measured"], 3)}


def against_published() -> list[dict[str, Any]]:
    """Return estimates for the published settings; loads no weights."""
    import torch

    rows = []
    for each in PUBLISHED:
        made = recipe({"family": "cogvideox", **each}, each["checkpoint"])
        found = estimate(made, (49, 480, 720), torch.device("meta"), torch.bfloat16)
        here = found.peak / 2**30
        rows.append(
            {
                "setting": each["name"],
                "published_gib": each["published"],
                "estimated_gib": round(here, 2),
                "ratio": round(here / each["published"], 2),
                "note": each["note"],
            }
        )
    return rows


def markdown(found: dict[str, Any]) -> str:
    """Format both tables."""
    out = [
        "# Memory: estimate of `inlaid check` against measurements",
        "",
        "Generated by `python benchmarks/estimate.py`: three training steps on the CPU, peak resident size",
        "minus the resident size before the network was loaded. Gradient checkpointing is on unless noted.",
        "",
        "| setting | parameters | measured, MB | estimated, MB | ratio |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in found["settings"].items():
        out.append(
            f"| {name} | {row['parameters'] / 1e6:,.1f} M | {row['measured'] / 1e6:,.0f} "
            f"| {row['estimated'] / 1e6:,.0f} | {row['ratio']:.2f} |"
        )
    out += [
        "",
        "## Against published numbers",
        "",
        "Peak memory while training at 49x480x720 in bfloat16, in GiB.",
        "",
        "| setting | published | estimated | ratio | note |",
        "|---|---:|---:|---:|---|",
    ]
    for row in found.get("published", []):
        out.append(
            f"| {row['setting']} | {row['published_gib']:.1f} | {row['estimated_gib']:.1f} "
            f"| {row['ratio']:.2f} | {row['note']} |"
        )
    return "\n".join([*out, ""])


def main() -> None:
    """Measure the missing settings, and write both files after each setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="part of a setting's name: measure these again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(SETTINGS[args.child], args.folder)
        return
    from inlaid import families
    from inlaid.runs.folder import environment

    RESULTS.parent.mkdir(exist_ok=True)
    found = json.loads(RESULTS.read_text("utf-8")) if RESULTS.is_file() else {"settings": {}}
    for name, setting in SETTINGS.items():
        wanted = args.only in name if args.only else name not in found["settings"]
        if wanted and setting.get("family", "wan") in families.names():
            row = found["settings"][name] = measure(name, setting)
            print(
                f"{name:<50} measured {row['measured'] / 1e6:7,.0f} MB   "
                f"estimated {row['estimated'] / 1e6:7,.0f} MB   ratio {row['ratio']:.2f}",
                flush=True,
            )
            found["settings"] = {k: found["settings"][k] for k in SETTINGS if k in found["settings"]}
            write(found, environment()["packages"])
    if "cogvideox" in families.names():
        found["published"] = against_published()
    write(found, environment()["packages"])
    ratios = [row["ratio"] for row in found["settings"].values()]
    print(f"{len(ratios)} settings, ratio {min(ratios):.2f} to {max(ratios):.2f}")
    sys.exit(not all(0.75 <= r <= 1.25 for r in ratios))


def write(found: dict[str, Any], packages: dict[str, str]) -> None:
    RESULTS.write_text(json.dumps({**found, "packages": packages}, indent=1) + "\n", "utf-8")
    RESULTS.with_suffix(".md").write_text(markdown(found), "utf-8")


if __name__ == "__main__":
    main()
