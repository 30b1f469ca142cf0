"""Measure whether an adapter learns transparency, compared with the base model, in the alpha demos.

    python benchmarks/rgba.py [--kind merged] [--subject 40] [--world 40] [--out runs/rgba-merged]
    python benchmarks/rgba.py --kind joint [--world 40]

`merged` trains on 16 transparent clips of a new subject and clips of original subjects, then generates
prompts of both with the same seeds. A rule-based judge decides whether the subject is visible and
whether alpha matches the subject; the alpha error is relative to the best-fitting template of the subject.
`joint` trains on clips of original subjects with alpha mattes and generates prompts of these subjects; alpha
is correct if its IoU with the visible subject is at least 0.8. Writes `benchmarks/results/rgba-KIND.json`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from inlaid import config
from inlaid.cli import demo_joint, demo_rgba
from inlaid.cli.demo import SUBJECT
from inlaid.console import console, quiet
from inlaid.evaluation.evaluate import Prompt, evaluate
from inlaid.evaluation.report import summary_table
from inlaid.tiny import rgba_judge
from inlaid.tiny.rgba_judge import Verdict
from inlaid.training.loop import train

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Train, generate, judge, print the table and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("merged", "joint"), default="merged")
    parser.add_argument("--subject", type=int, default=40)
    parser.add_argument("--world", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet()
    folder = args.out or Path(f"runs/rgba-{args.kind}")
    how = demo_rgba if args.kind == "merged" else demo_joint
    how.write_clips(folder)
    train(config.build(how.recipe(folder)))
    seen: list[Verdict] = []

    def judged(frames: np.ndarray) -> bool:
        seen.append(rgba_judge.judge_subject(frames))
        return seen[-1].both

    prompts = how.prompts(max(args.subject, args.world))
    chosen = [Prompt(p.text, p.group, judged) for p in prompts if p.group == SUBJECT][: args.subject]
    chosen += [p for p in prompts if p.group != SUBJECT][: args.world]
    report = evaluate(folder, prompts=chosen)
    console.print(summary_table(report))
    print(report.path)
    sides = {"base": seen[: args.subject], "tuned": seen[args.subject :]}
    groups = {
        g.name: {"videos": g.judged, "base": g.base_matches, "tuned": g.tuned_matches} for g in report.groups
    }
    found = {
        "kind": args.kind,
        "date": report.created,
        "as_asked": groups,
        "subject": {
            side: {
                "seen": sum(v.subject for v in verdicts),
                "alpha": sum(v.alpha for v in verdicts),
                "both": sum(v.both for v in verdicts),
                "alpha_mae": round(float(np.mean([v.error for v in verdicts])), 2),
                "overlap": round(float(np.mean([v.overlap for v in verdicts])), 3),
            }
            for side, verdicts in sides.items()
            if verdicts
        },
        "threads": torch.get_num_threads(),
        "packages": report.environment["packages"],
        "settings": report.settings,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"rgba-{args.kind}.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
