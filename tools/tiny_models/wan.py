"""Train the tiny Wan: `python -m tiny_models.wan`, then `python -m tiny_models.wan --evaluate`.

A small `WanPipeline`, trained on the procedural clips of `inlaid.tiny.world`. Stages:

1. `vae`: train the video VAE on images, then short clips, then full clips (`wan_vae`);
2. `latents`: encode the training clips of the transformer once (`wan_dit.cache`);
3. `dit`: train the transformer and the text encoder (`wan_dit`);
4. `decoder`: continue training only the VAE decoder; latents do not change, so stage 3 can run in parallel;
5. `export`: write the pipeline folder, weights in float16.

Every stage resumes from its last checkpoint in the work folder. Each batch is a function of its step number,
so repeating the training with the same machine, library versions and thread count gives identical files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

from inlaid.tiny import path
from tiny_models import wan_dit, wan_vae
from tiny_models.training import load_state
from tiny_models.wan_dit import SHIFT, Settings
from tiny_models.wan_vae import CONFIG

STAGES = ("vae", "latents", "dit", "decoder", "export")


def load_vae(work: Path, *, decoder: bool = False) -> AutoencoderKLWan:
    """Return the trained VAE in float32, with weights rounded to float16 as in the exported folder.

    Args:
        work: The work folder.
        decoder: Use the decoder of the `decoder` stage if it exists.
    """
    vae = AutoencoderKLWan(**CONFIG)
    weights = load_state(work / "vae.safetensors")[1]["model"]
    if decoder and (work / "decoder.safetensors").exists():
        weights |= load_state(work / "decoder.safetensors")[1]["model"]
    vae.load_state_dict({name: t.half().float() for name, t in weights.items()})
    return vae.eval()


def export(work: Path, out: Path, clips: int) -> None:
    """Write the latest weights as a pipeline folder; an existing model card and report are kept.

    Args:
        work: The work folder.
        out: Pipeline folder.
        clips: Number of cached latents.
    """
    _, mean, std = wan_dit.load_latents(work, clips)
    vae = load_vae(work, decoder=True)
    vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist())
    average = load_state(work / "dit.safetensors")[1]["average"]
    words = wan_dit.tokenizer()
    text = wan_dit.text_encoder(len(words))
    dit = wan_dit.transformer(average["dit.blocks.0.ffn.net.2.weight"].shape[1])
    for prefix, module in (("text.", text), ("dit.", dit)):
        mine = {name.removeprefix(prefix): t for name, t in average.items() if name.startswith(prefix)}
        missing = module.load_state_dict(mine, strict=False).missing_keys
        tied = {"encoder.embed_tokens.weight"}
        assert set(missing) <= tied, f"not in the checkpoint: {missing}"
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    parts: dict[str, Any] = {"tokenizer": words, "text_encoder": text.half(), "vae": vae.half()}
    pipeline = WanPipeline(**parts, scheduler=cast(Any, scheduler), transformer=dit.half())
    for part in ("vae", "transformer", "text_encoder", "tokenizer", "scheduler"):
        shutil.rmtree(out / part, ignore_errors=True)
    pipeline.save_pretrained(out)
    config = out / "text_encoder" / "config.json"
    facts = json.loads(config.read_text()) | {"dtype": "float32"}  # the dtype in which transformers loads
    config.write_text(json.dumps(facts, indent=2) + "\n")
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {total / 1e6:.2f} MB")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tiny_models.wan", description="Train the tiny Wan.")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--minutes", type=float, help="scale the stage's training to this duration")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path(".work/tiny-wan"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=path("wan"), help="pipeline folder")
    parser.add_argument(
        "--part", default="0/1", help="stage latents: part to encode, such as 0/2 and 1/2 in parallel"
    )
    parser.add_argument(
        "--evaluate", action="store_true", help="measure the pipeline in --out, write its REPORT.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        from tiny_models.wan_report import evaluate

        report = evaluate(args.out)
        (args.out / "REPORT.json").write_text(json.dumps(report, indent=1) + "\n")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    stages = STAGES if args.stage == "all" else (args.stage,)
    settings = Settings()
    if "vae" in stages:
        wan_vae.train(args.work, args.minutes)
    if "latents" in stages:
        part, parts = map(int, args.part.split("/"))
        wan_dit.cache(args.work, load_vae(args.work), settings.clips, part, parts)
    if "dit" in stages:
        latents, mean, std = wan_dit.load_latents(args.work, settings.clips)
        wan_dit.train(args.work, (latents - mean) / std, settings, args.minutes)
    if "decoder" in stages:
        wan_vae.train_decoder(args.work, load_vae(args.work), args.minutes)
    if "export" in stages:
        export(args.work, args.out, settings.clips)


if __name__ == "__main__":
    main()
