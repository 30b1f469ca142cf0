"""Measure whether a LoRA or DoRA learns the subject of the demo, compared with the base model.

    python benchmarks/subject.py [--kind lora|dora] [--subject 40] [--world 100] [--out runs/subject-lora]

Trains with the recipe of the demo on 16 clips, then generates validation prompts of the new subject and of
original subjects with the same seeds through the stock pipeline. A rule-based judge decides from color, shape
and motion whether a video matches its prompt. Writes `benchmarks/results/subject-KIND.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from inlaid import config
from inlaid.cli import demo
from inlaid.cli.demo import OLD, SUBJECT, recipe, write_clips
from inlaid.console import console, quiet
from inlaid.evaluation.evaluate import evaluate
from inlaid.evaluation.report import summary_table
from inlaid.training.loop import train

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Train, generate, judge, print the table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("lora", "dora"), default="lora")
    parser.add_argument("--subject", type=int, default=40)
    parser.add_argument("--world", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet()
    folder = args.out or Path(f"runs/subject-{args.kind}")
    write_clips(folder)
    train(config.build(recipe(folder, args.kind)))
    prompts = demo.prompts(max(args.subject, args.world))
    chosen = [p for p in prompts if p.group == SUBJECT][: args.subject]
    chosen += [p for p in prompts if p.group == OLD][: args.world]
    report = evaluate(folder, prompts=chosen)
    console.print(summary_table(report))
    print(report.path)
    groups = {
        g.name: {"videos": g.judged, "base": g.base_matches, "tuned": g.tuned_matches} for g in report.groups
    }
    found = {
        "kind": args.kind,
        "date": report.created,
        "as_asked": groups,
    }
    about = {"threads": torch.get_num_threads(), "packages": report.environment["packages"]}
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"subject-{args.kind}.json"
    out.write_text(json.dumps(found | about | {"settings": report.settings}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
