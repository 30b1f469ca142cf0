"""Measure time, memory and FLOP utilization of training steps: published sizes, random weights.

    python benchmarks/gpu.py [--only NAME] [--steps 4]
    python benchmarks/gpu.py --toy

No download: the network is built from its published configuration and initialized with random weights on the
device. Tuner, gradient checkpointing, step and optimizer are those of `inlaid train`. Each row is written to
`benchmarks/results/gpu-<device>.json` and `.md` as soon as it is finished and skipped in later runs, so the
command can be stopped and run again. Out of memory is recorded as a result. No row starts after `--minutes`.
`--toy` runs tiny networks on the CPU, for tests.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from inlaid import config, families
from inlaid.adapters import tuners
from inlaid.check import estimate
from inlaid.data.batch import Batch
from inlaid.families import Family
from inlaid.networks import quantize
from inlaid.runs.folder import environment
from inlaid.runs.launch import DevicePlan, Devices, resolve_devices
from inlaid.tiny import random
from inlaid.training import memory
from inlaid.training.meters import peak_memory
from inlaid.training.optim import make_optimizer
from inlaid.training.steps import DenoisingStep

RESULTS = Path(__file__).parent / "results"

DENSE_BFLOAT16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}
"""Peak dense bfloat16 throughput with float32 accumulation, from the data sheets (H100: SXM)."""

SHAPES = {"wan": (81, 480, 832), "cogvideox": (49, 480, 720), "mochi": (79, 480, 848)}
"""Frames, height and width per family."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    name: str
    family: str
    checkpoint: str
    tuner: dict[str, Any] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)


def rows() -> list[Row]:
    """Return the measurements: LoRA for every size; full fine-tuning, int8 and compile where they fit."""
    lora, full = {"rank": 32}, {"kind": "full"}
    quantised = {"memory": {"quantize": "int8"}}
    compiled = {"runtime": {"compile": True}}
    found = [
        Row("Wan 1.3B LoRA", "wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", lora),
        Row("Wan 1.3B full", "wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", full),
        Row("CogVideoX-5B LoRA", "cogvideox", "THUDM/CogVideoX-5b", lora),
        Row("Mochi LoRA", "mochi", "genmo/mochi-1-preview", lora),
        Row("Wan 14B LoRA", "wan", "Wan-AI/Wan2.1-T2V-14B-Diffusers", lora),
        Row("CogVideoX-5B LoRA int8", "cogvideox", "THUDM/CogVideoX-5b", lora, quantised),
        Row("Wan 1.3B LoRA compiled", "wan", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", lora, compiled),
        Row("CogVideoX-5B full", "cogvideox", "THUDM/CogVideoX-5b", full),
    ]
    return [r for r in found if r.family in families.names()]


def toys(folder: Path) -> list[Row]:
    """Return a tiny version of the first variant of every family."""
    out = []
    for name in dict.fromkeys(family for family, _ in random.cases()):
        if name in SHAPES:
            path = str(random.build(name, folder / name))
            out += [
                Row(f"{name} LoRA, toy", name, path, {"rank": 4}),
                Row(f"{name} full, toy", name, path, {"kind": "full"}),
            ]
    return out


def network(
    family: Family, made: config.Config, device: torch.device, precision: torch.dtype
) -> torch.nn.Module:
    """Return the published network with random weights, created on the device one parameter at a time."""
    full = made.tuner.kind == "full"
    denoiser = family.load_denoiser(precision, meta=True)
    for module in denoiser.modules():
        for name, parameter in module.named_parameters(recurse=False):
            dtype = torch.float32 if full else precision
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            value.normal_(std=0.02) if parameter.ndim > 1 else value.fill_(
                float("norm" in name or name == "weight")
            )
            module.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    fresh = type(denoiser)
    for path, buffer in list(denoiser.named_buffers()):
        if buffer.is_meta:
            *above, name = path.split(".")
            owner = denoiser.get_submodule(".".join(above))
            owner.register_buffer(name, rebuilt(fresh, denoiser, path, device), persistent=False)
    return denoiser


def rebuilt(kind: Any, denoiser: Any, path: str, device: torch.device) -> torch.Tensor:
    """Return a buffer that the constructor of a network computes, from a small network with one layer."""
    few = {k: 1 for k in ("num_layers",) if k in denoiser.config}
    return dict(kind.from_config({**denoiser.config, **few}).named_buffers())[path].to(device)


def run(row: Row, shape: tuple[int, int, int], device: torch.device, steps: int) -> dict[str, Any]:
    """Measure one row; out of memory is recorded as the outcome."""
    rest = {"runtime": {**row.rest.get("runtime", {}), "device": device.type}}
    raw = {
        "run": "x",
        "model": {"family": row.family, "checkpoint": row.checkpoint},
        "data": {"sources": "x"},
    }
    made = config.build({**raw, "tuner": row.tuner, **row.rest, **rest})
    plan = resolve_devices(made, Devices.here())
    family = families.get(row.family)(made.model)
    about = {"device": device, "precision": plan.precision, "optimizer": plan.optimizer}
    expected = estimate.estimate_recipe(family, made, {shape: 1}, {shape: 1}, [""], **about)
    out: dict[str, Any] = {
        "row": row.name,
        "checkpoint": Path(row.checkpoint).name if Path(row.checkpoint).is_dir() else row.checkpoint,
        "shape": shape,
        "parameters": expected.parameters,
        "trained": expected.trained,
        "precision": expected.precision,
        "estimated_bytes": expected.peak,
        "tflop_per_step": expected.flops / 1e12,
    }
    try:
        seconds, peak, loss = train(family, made, plan, shape, device, steps)
    except torch.OutOfMemoryError:
        return {**out, "outcome": "out of memory"}
    except Exception as error:  # continue with the next row
        return {**out, "outcome": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    rate = expected.flops / seconds
    return {
        **out,
        "outcome": "ok",
        "seconds": seconds,
        "peak_bytes": peak,
        "loss": loss,
        "flop_per_second": rate,
    }


def train(
    family: Family,
    made: config.Config,
    plan: DevicePlan,
    shape: tuple[int, int, int],
    device: torch.device,
    steps: int,
) -> tuple[float, int, float]:
    """Return the median step time after the first step, peak allocated bytes, and the last loss."""
    full = made.tuner.kind == "full"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    denoiser = network(family, made, device, plan.precision)
    quantize.shrink_weights(made.memory, denoiser, device, plan.precision)
    memory.enable_checkpointing(denoiser, made.memory.gradient_checkpointing)
    parameters = tuners.attach(made.tuner, family.targets, denoiser.train(), seed=0)
    if made.runtime.compile:
        memory.compile_blocks(denoiser)
    optimizer = make_optimizer(plan.optimizer, made.optim, list(parameters.values()))
    mixed = torch.autocast(device.type, plan.precision, enabled=full and plan.precision is not torch.float32)
    step = DenoisingStep(family, family.objective(made.objective, shape[1:]), mixed)
    item = {k: torch.randn(made.train.batch, *s) for k, s in family.shapes(*shape).items()}
    text = [{"text": torch.randn(family.text_length, estimate.text_width(denoiser))}] * made.train.batch
    batch = Batch(item.pop("latents"), {**family.collate(text), **item}).to(device)
    seconds, loss = [], torch.zeros(())
    for i in range(steps):
        start = time.perf_counter()
        loss = step(denoiser, batch, torch.Generator().manual_seed(i))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = loss.detach()
        loss.item()  # synchronizes with the device
        seconds.append(time.perf_counter() - start)
    later = sorted(seconds[1:] or seconds)
    return later[len(later) // 2], peak_memory(device), float(loss)


def markdown(found: dict[str, Any]) -> str:
    """Format the table."""
    out = [
        f"# Training steps on {found['device']}",
        "",
        (
            f"{found['date']}, torch {found['packages']['torch']}, diffusers "
            f"{found['packages']['diffusers']}; random weights, batch 1, gradient "
            "checkpointing. Generated by `python benchmarks/gpu.py`."
        ),
        "FLOPs are those executed, including recomputation; matrix multiplication reaches "
        f"{found['matrix_tflops']:.1f} TFLOP/s here"
        + (f", the data sheet states {found['sheet_tflops']:.0f}." if found["sheet_tflops"] else "."),
        "",
        "| row | shape | weights | s/step | peak GB | estimated GB | TFLOP/step | of matmul | of sheet |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in found["rows"]:
        shape = "x".join(map(str, r["shape"]))
        start = f"| {r['row']} | {shape} | {r['parameters'] / 1e9:.2f} B"
        planned = f"{r['estimated_bytes'] / 1e9:.2f} | {r['tflop_per_step']:.2f}"
        if r["outcome"] != "ok":
            out.append(f"{start} | - | {r['outcome']} | {planned} | - | - |")
            continue
        rate = r["flop_per_second"] / 1e12
        sheet = f"{rate / found['sheet_tflops']:.0%}" if found["sheet_tflops"] else "-"
        out.append(
            f"{start} | {r['seconds']:.2f} | {r['peak_bytes'] / 1e9:.2f} | {planned} "
            f"| {rate / found['matrix_tflops']:.0%} | {sheet} |"
        )
    return "\n".join([*out, ""])


def main() -> None:
    """Measure the missing rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="part of a row's name: measure these again")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=8.0, help="start no row after this many minutes")
    parser.add_argument("--toy", action="store_true", help="tiny networks on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not args.toy and not torch.cuda.is_available():
        raise SystemExit("no CUDA device; use `--toy` to run tiny networks on the CPU")
    start = time.perf_counter()
    device = torch.device("cpu" if args.toy else "cuda")
    precision = torch.float32 if args.toy else torch.bfloat16
    name = "toy" if args.toy else estimate.describe_device(device)[0]
    path = args.out / f"gpu-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    done = json.loads(path.read_text("utf-8"))["rows"] if path.is_file() else []
    found = {
        "device": name,
        "date": str(date.today()),
        "packages": environment()["packages"],
        "matrix_tflops": estimate.measure_speed(device, precision) / 1e12,
        "sheet_tflops": next((v / 1e12 for k, v in DENSE_BFLOAT16.items() if k in name), None),
        "rows": done,
    }
    with tempfile.TemporaryDirectory() as folder:
        for row in toys(Path(folder)) if args.toy else rows():
            have = [r["row"] for r in found["rows"]]
            again = args.only is not None and args.only in row.name
            if not again and (row.name in have or args.only is not None):
                continue
            if time.perf_counter() - start > args.minutes * 60:
                print("time limit reached: run the same command again for the remaining rows")
                break
            family = families.get(row.family)(config.Model(family=row.family, checkpoint=row.checkpoint))
            grid = family.grid
            small = (grid.snap_frames(9 + grid.temporal), 4 * grid.spatial, 4 * grid.spatial)
            result = run(row, small if args.toy else SHAPES[row.family], device, args.steps)
            found["rows"] = [r for r in found["rows"] if r["row"] != row.name] + [result]
            path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
            path.with_suffix(".md").write_text(markdown(found), "utf-8")
            details = (
                f"{result['seconds']:.2f} s, {result['peak_bytes'] / 1e9:.2f} GB"
                if "seconds" in result
                else ""
            )
            print(f"{row.name:<28} {result['outcome']} {details}", flush=True)


if __name__ == "__main__":
    main()
