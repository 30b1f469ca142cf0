"""Train the tiny MIDI: `python -m tiny_models.midi`, then `python -m tiny_models.midi --evaluate`.

A small MIDI-3D checkpoint, trained on the procedural scenes of `inlaid.tiny.midi_world`. Stages:

1. `vae`: train the shape VAE on objects like those of the scenes and on unions of solids (`midi_vae`);
2. `scenes`: render and encode the training scenes once (`midi_data`);
3. `encoders`: pretrain the image encoders to describe objects (`midi_images`);
4. `dit`: train the transformer together with the encoders (`midi_dit`);
5. `export`: write the checkpoint folder, weights in float16.

Every stage resumes from its last checkpoint in the work folder. Each batch is a function of its step number,
so repeating the training with the same machine, library versions and thread count gives identical files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from inlaid.networks.triposg import TripoSGVAE
from inlaid.tiny import path
from tiny_models import midi_data, midi_dit, midi_images, midi_vae
from tiny_models.midi_data import SHIFT, Scenes
from tiny_models.midi_dit import Settings
from tiny_models.midi_vae import CONFIG, TOKENS
from tiny_models.training import load_state

STAGES = ("vae", "scenes", "encoders", "dit", "export")


def load_vae(work: Path) -> TripoSGVAE:
    """Return the trained shape VAE; its latents are not normalized yet."""
    vae = TripoSGVAE(**CONFIG)
    vae.load_state_dict(load_state(work / "vae.safetensors")[1]["average"])
    return vae.eval()


@torch.no_grad()
def normalize(vae: TripoSGVAE, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold latent normalization (mean 0, standard deviation 1) into a VAE.

    MIDI has no latent shift or scale in its configuration.
    """
    c = len(mean)
    vae.post_quant.bias.add_(vae.post_quant.weight @ mean)
    vae.post_quant.weight.mul_(std)
    vae.quant.bias[:c] = (vae.quant.bias[:c] - mean) / std
    vae.quant.bias[c:] -= 2 * std.log()
    vae.quant.weight[:c] /= std[:, None]


def _rewrite(file: Path, **facts: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | facts, indent=2) + "\n", "utf-8")


def export(work: Path, out: Path, scenes: int) -> None:
    """Write the trained weights as a checkpoint folder; an existing model card and report are kept.

    Args:
        work: The work folder.
        out: Checkpoint folder.
        scenes: Number of cached scenes.
    """
    vae, data = load_vae(work), Scenes(work, scenes)
    normalize(vae, data.mean, data.std)
    model = midi_dit.build()
    model.load_state_dict(load_state(work / "dit.safetensors")[1]["average"])
    parts: dict[str, Any] = {
        "transformer": model["dit"].half(),
        "vae": vae.half(),
        "image_encoder_1": model["clip"].half(),
        "image_encoder_2": model["dino"].half(),
    }
    parts |= dict(zip(("feature_extractor_1", "feature_extractor_2"), midi_images.processors(), strict=True))
    for name, part in parts.items():
        shutil.rmtree(out / name, ignore_errors=True)
        part.save_pretrained(out / name)
    for name in ("image_encoder_1", "image_encoder_2"):  # the dtype in which transformers loads
        _rewrite(out / name / "config.json", dtype="float32")
    _rewrite(out / "transformer" / "config.json", num_tokens=TOKENS)
    (out / "scheduler").mkdir(exist_ok=True)
    scheduler = {
        "_class_name": "RectifiedFlowScheduler",
        "num_train_timesteps": 1000,
        "shift": SHIFT,
        "use_dynamic_shifting": False,
    }
    (out / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n", "utf-8")
    index: dict[str, Any] = {"_class_name": "MIDIPipeline"}
    for name, part in parts.items():
        library = "inlaid.networks.triposg" if name in ("transformer", "vae") else "transformers"
        index[name] = [library, type(part).__name__.removesuffix("Pil")]
    index["scheduler"] = ["inlaid", "RectifiedFlowScheduler"]
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {total / 1e6:.2f} MB")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m tiny_models.midi", description="Train the tiny MIDI.")
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="device for training")
    parser.add_argument("--workers", type=int, default=0, help="processes that render and prefetch")
    parser.add_argument("--work", type=Path, default=Path(".work/tiny-midi"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=path("midi"), help="checkpoint folder")
    parser.add_argument(
        "--evaluate", action="store_true", help="measure the checkpoint in --out, write its REPORT.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.evaluate:
        from tiny_models.midi_report import evaluate

        report = evaluate(args.out)
        (args.out / "REPORT.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    stages = STAGES if args.stage == "all" else (args.stage,)
    settings, place = Settings(), (torch.device(args.device), args.workers)
    if "vae" in stages:
        midi_vae.train(args.work, *place)
    if "scenes" in stages:
        midi_data.cache(args.work, load_vae(args.work), settings.scenes, args.workers)
    if "encoders" in stages:
        midi_images.train(args.work, Scenes(args.work, settings.scenes), *place)
    if "dit" in stages:
        midi_dit.train(args.work, Scenes(args.work, settings.scenes), settings, *place)
    if "export" in stages:
        export(args.work, args.out, settings.scenes)


if __name__ == "__main__":
    main()
