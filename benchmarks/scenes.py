"""Measure whether an adapter learns a new kind of object, compared with the base model, in the MIDI demo.

    python benchmarks/scenes.py [--kind lora|dora] [--image-encoders frozen|dino|clip|both] [--judged 30]

Trains on 24 scenes of the new kind and scenes of known kinds, then generates validation scenes of both from
their images and segmentations with the same seeds. Metrics are those of `inlaid evaluate`, against the true
surfaces: `f_score` of whole scenes at 0.1, in a coordinate frame with a box of side 2. Writes
`benchmarks/results/scenes-KIND.json`, or `scenes-KIND-ENCODERS.json` when image encoders are trained too.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from inlaid import config
from inlaid.cli.demo_scenes import prompts, recipe, write_scenes
from inlaid.console import console, quiet, quiet_bars
from inlaid.evaluation.evaluate import evaluate
from inlaid.evaluation.report import summary_table
from inlaid.training.loop import train

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Train, generate, measure, print the table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("lora", "dora"), default="lora")
    parser.add_argument("--image-encoders", choices=("frozen", "dino", "clip", "both"), default="frozen")
    parser.add_argument("--judged", type=int, default=30)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet()
    quiet_bars()
    name = args.kind if args.image_encoders == "frozen" else f"{args.kind}-{args.image_encoders}"
    folder = args.out or Path(f"runs/scenes-{name}")
    write_scenes(folder, args.judged)
    options = {"model": {"options": {"image_encoders": args.image_encoders}}}
    settings = config.build(config.merge(recipe(folder, args.kind), options))
    train(settings)
    report = evaluate(folder, prompts=prompts(folder, settings))
    console.print(summary_table(report))
    print(report.path)
    sides = {
        group.name: {
            "scenes": args.judged,
            **{side: {k: round(v, 3) for k, v in getattr(group, side).items()} for side in ("base", "tuned")},
        }
        for group in report.groups
    }
    found = {"kind": name, "date": report.created, "groups": sides, "threads": torch.get_num_threads()}
    about = {"packages": report.environment["packages"], "settings": report.settings}
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"scenes-{name}.json"
    out.write_text(json.dumps(found | about, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
