"""MIDI-3D (Huang et al. 2025, https://arxiv.org/abs/2412.03558) and its base model TripoSG.

A training example is a scene instead of a clip: an input image, the objects in the image, and the surface of
each object.

Pitfalls:

- All objects share one coordinate frame, so the latents of an object also encode its position.
- All objects of a scene have the same timestep.
- The network predicts data - noise.
- Text is not used. The image conditioning of an object consists of DINO tokens, and in MIDI-3D also of a CLIP
  token. Dropout for classifier-free guidance drops all of these tokens together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlaid import config as recipe
from inlaid.console import once
from inlaid.families.base import Family, sequence_problems
from inlaid.families.checkpoint import Checkpoint
from inlaid.families.grid import Grid
from inlaid.media import meshes
from inlaid.media.scene import MAX_OBJECTS, invalid_pairs, make_meshes, thinned
from inlaid.media.texture import textured
from inlaid.networks import midi_checkpoint, midi_image_encoders
from inlaid.networks.midi_image_encoders import ImageConditioning, ImageEncoder, LoadedEncoders
from inlaid.networks.midi_pipeline import ScenePipeline
from inlaid.networks.triposg import (
    Field,
    TripoSGTransformer,
    TripoSGVAE,
    choose_points,
    partial_heads,
    sample_posterior,
    stored_blocks,
)
from inlaid.objectives import FlowMatching

BLOCK = r"(?:blocks\.)?(\d+)(?:\.attn1(?:\.processor)?)?"
"""Regular expression that matches a block's number, a block's name, or the name of its self-attention."""

CELLS = {"MIDI-3D": 256, "TripoSG": 512}
"""Published mesh resolution of each model: number of grid cells along each side of an object's box."""


class _Open(tuple[Any, ...]):
    """Allowed values of an option: fixed values, followed by a regular expression for other values."""

    def __contains__(self, value: object) -> bool:
        return re.fullmatch(str(self[-1]), str(value)) is not None or value in self[:-1]


@dataclass(frozen=True)
class Encoder:
    """Encoders of a scene: the shape VAE and the image encoders."""

    vae: TripoSGVAE
    images: LoadedEncoders


LAYERS = (
    r"blocks\.\d+\.(ff\.net\.(0\.proj|2)|skip_linear)",
    r"proj_in|proj_out|time_proj\.linear_[12]",
)
"""Regular expressions for the linear layers of the transformer outside attention."""


class _Encoders(Checkpoint):
    """Base class that loads and runs the encoders of MIDI and TripoSG: the shape VAE and image encoders."""

    conditioning: ImageConditioning
    transformer: Mapping[str, Any]

    def load_vae(self, device: torch.device) -> TripoSGVAE:
        """Load the shape VAE in float32."""
        folder = self.folder("vae")
        with self.loading("vae"):
            return midi_checkpoint.load_vae(folder).to(device)  # type: ignore[return-value]

    def load_image_encoders(self, device: torch.device, network: Any = None) -> LoadedEncoders:
        """Load the frozen image encoders in float32, and take the trained image encoders from `network`.

        If `network` is None, the result has no trained encoders.
        """
        found = {}
        for kind, encoder in self.conditioning.encoders.items():
            if kind not in self.conditioning.trained:
                found[kind] = self.load_image_encoder(encoder, torch.float32).to(device)
            elif network is not None:
                found[kind] = network.get_submodule(encoder.name)
        return LoadedEncoders(self.conditioning.encoders, found)

    def load_image_encoder(
        self, encoder: ImageEncoder, dtype: torch.dtype, *, meta: bool = False
    ) -> nn.Module:
        """Load one image encoder. If `meta` is true, create it on the meta device without weights."""
        folder = None if meta else self.folder(encoder.name)
        with self.loading(encoder.name):
            return midi_image_encoders.build(encoder, folder, dtype)

    def load_media_encoder(self, device: torch.device) -> Encoder:
        """Load the shape VAE and the frozen image encoders, for `encode_media`."""
        return Encoder(self.load_vae(device), self.load_image_encoders(device))

    @torch.no_grad()
    def encode_media(self, encoder: Encoder, frames: Any) -> dict[str, Tensor]:
        """Encode the surfaces and the image of a scene (`media.scene.SceneSample`) to the tensors to cache.

        The method `stored` returns the shapes of these tensors.
        """
        found = []
        for each in frames.objects:
            points = thinned(each.surface)
            queries = points[choose_points(points, self.transformer["num_tokens"], seed=0)]
            inputs = (torch.from_numpy(p)[None].to(encoder.vae.device) for p in (points, queries))
            found.append(encoder.vae.encode(*inputs)[0].float())
        images = encoder.images(frames.image, [each.mask for each in frames.objects])
        return {"moments": torch.stack(found), **images}

    def encode_text(self, encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return an empty mapping for each caption, because the network uses no text."""
        return [{} for _ in captions]

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> None:
        """Return None, because the network has no text encoder."""

    # --- training and generation ----------------------------------------------------------------------------


class Midi(_Encoders, Family):
    """MIDI and TripoSG family: flow matching on the latent tokens of all objects in a scene.

    MIDI has two image encoders, CLIP and DINO; TripoSG has only DINO.
    """

    modality: ClassVar[str] = "scene"
    defaults: ClassVar[Mapping[str, Any]] = {
        "optim": {"lr": 5e-5},
        "sample": {"steps": 50, "guidance": 7.0},
    }
    targets: Sequence[str] = (r"blocks\.\d+\.attn(1|2|2_2)\.(to_q|to_k|to_v|to_out\.0)",)  # type: ignore[misc]
    adaptable: ClassVar[Sequence[str]] = LAYERS
    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {
        "VAST-AI/MIDI-3D": {"transformer": {"cross_attention_dim": 768, "cross_attention_2_dim": 1024}},
        "VAST-AI/TripoSG": {"transformer": {"cross_attention_dim": 1024, "cross_attention_2_dim": None}},
    }
    programs: ClassVar[Sequence[str]] = ("midi-3d",)
    text_length: int = 0
    widths: ClassVar[Mapping[int, str]] = {2048: "MIDI and TripoSG"}
    images: Sequence[str] = ("picture", "segmentation")
    choices: ClassVar[Mapping[str, Sequence[str | int | float | bool]]] = {
        "multi_instance": _Open(["checkpoint", "none", "all", rf"{BLOCK}(, ?{BLOCK})*"]),
        "image_dropout": _Open([0.1, r"0(\.\d+)?|1(\.0*)?"]),
        "ff": (False, True),
        "skip_linear": (False, True),
        "image_encoders": ("frozen", "dino", "clip", "both"),
    }

    def __init__(self, model: recipe.Model) -> None:
        meshes.require_mesh_packages()
        super().__init__(model)
        if model.task is not None or model.expert is not None:
            raise ValueError(f"model.{'expert' if model.expert else 'task'}: not used by midi; leave it out")
        config = self.read_config("transformer") or {}
        local = self.source / "transformer" if isinstance(self.source, Path) else None
        with self.loading("transformer"):
            shapes = midi_checkpoint.tensor_shapes(local) if local else None
            self.transformer, self.config_notes = midi_checkpoint.transformer_config(config, shapes)
        c, self.fps, self.grid = self.transformer, 1.0, Grid(1, 1, 1)
        self.single_encoder = c["cross_attention_2_dim"] is None
        self.conditioning = ImageConditioning.of(
            self.read_config, self.single_encoder, str(self.options["image_encoders"])
        )
        self.extractor = self.conditioning.encoders["dino"].extractor
        self.encoders = {"media": ("vae", *self.conditioning.needed), "text": ()}  # type: ignore[misc]
        self.media_key = [
            midi_image_encoders.VERSION,
            *(f"pictures for {kind}" for kind in self.conditioning.trained),
        ]
        self.bytewise = tuple(self.conditioning.trained)
        chosen, layers = str(self.options["multi_instance"]), range(c["num_layers"])
        named = {"checkpoint": [i for i in c["multi_instance"] if i in layers], "none": [], "all": layers}
        self.blocks = sorted(
            named[chosen] if chosen in named else {int(n) for n in re.findall(BLOCK, chosen)}
        )
        if not set(self.blocks) <= set(layers):
            raise ValueError(f"model.options.multi_instance: choose from blocks 0 to {len(layers) - 1}")
        more = {"ff": r"blocks\.\d+\.ff\.net\.(0\.proj|2)", "skip_linear": r"blocks\.\d+\.skip_linear"}
        own = (t for name, t in more.items() if self.options[name])
        self.targets = (*self.targets, *own, *self.conditioning.targets)

    def about(self) -> dict[str, str]:
        """Return metadata for the headers of weights files.

        It includes the timestep shift and the multi-instance blocks. Multi-instance blocks are the
        transformer blocks whose attention spans all objects of a scene.
        """
        blocks = ",".join(map(str, self.blocks))
        return {
            **super().about(),
            "inlaid_multi_instance_blocks": blocks,
            "inlaid_shift": f"{self.shift():g}",
        }

    def warnings(self) -> list[str]:
        """Return a warning for the model card if adapters of the image encoders were trained, else nothing.

        The warning names the folders of the adapters, and explains how to load them.
        """
        names = ", ".join(f"`{encoder.name}`" for encoder in self.conditioning.trained.values())
        how = (
            "are in folders of the same names: `peft.PeftModel.from_pretrained(encoder, folder)` loads each."
        )
        return [f"Adapters of the image encoders {names} {how}"] if names else []

    def accept(self, header: Mapping[str, str]) -> None:
        """Check that an adapter is compatible with this family and with the option `image_encoders`.

        Raises:
            ValueError: if the adapter requires other settings, such as another value of `image_encoders`.
        """
        super().accept(header)
        key, own = "image_encoders", self.options["image_encoders"]
        found = header.get(f"inlaid_{key}", own)
        if found != own:
            raise ValueError(f"this adapter was trained with model.options.{key}={found}, not {own}")

    def shift(self) -> float:
        """Return the timestep shift in the scheduler's configuration.

        If it is missing, print a note and return the shift of the published checkpoint.
        """
        try:
            shift = midi_checkpoint.read_json(self.folder("scheduler") / "scheduler_config.json").get("shift")
        except ValueError:
            shift = None
        if shift is None:
            shift = 1.0 if self.single_encoder else 2.0
            once(f"note: {self.name}: scheduler_config.json or its shift is missing, using shift {shift:g}")
        return float(shift)

    def problems(self, config: recipe.Config) -> list[str]:
        """Return a message for each recipe setting that the family does not support."""
        wrong = invalid_pairs(config.sample.images)
        wrong = [*video_only_keys(config), *(f"sample.images: {p}" for p in wrong)]
        wrong += sequence_problems(self, config.runtime.sequence)
        if self.conditioning.trained:
            key = "model.options.image_encoders"
            kind, parallel = config.tuner.kind, config.runtime.parallel
            wrong += [f"{key}: needs tuner.kind lora or dora, not {kind}"] * (kind not in ("lora", "dora"))
            wrong += [f"{key}: not supported with runtime.parallel={parallel}; use ddp"] * (parallel != "ddp")
        return wrong

    def notes(self, config: recipe.Config) -> list[str]:
        """Return notes about unusual settings.

        A note is returned if the transformer's `config.json` contradicts its tensor shapes, if multi-instance
        attention (across objects) is in other blocks than in pretraining, or if the adapter targets match
        only some projections of an attention layer.
        """
        notes, pretrained = list(self.config_notes), sorted(self.transformer["multi_instance"])
        if self.options["multi_instance"] != "checkpoint" and self.blocks != pretrained:
            notes.append(
                f"multi-instance attention in blocks {self.blocks}, pretrained in blocks {pretrained}"
            )
        return [*notes, *partial_heads(getattr(config.tuner, "targets", []))]

    def missing_images(self, prompts: int, images: Sequence[Sequence[str]]) -> list[str]:
        """Return messages about invalid pairs of input image and segmentation; `prompts` is not used."""
        return invalid_pairs(images)

    # --- shapes ---------------------------------------------------------------------------------------------

    def shapes(self, objects: int, height: int = 0, width: int = 0) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `latents` (n, tokens, channels) and of the image conditioning tensors.

        n is the number of objects in a training sample, at most `MAX_OBJECTS`.
        """
        c, n = self.transformer, min(objects, MAX_OBJECTS)
        widths = [w for w in (c["cross_attention_dim"], c["cross_attention_2_dim"]) if w]
        return {"latents": (n, c["num_tokens"], c["in_channels"]), **self.conditioning.shapes(n, widths)}

    def stored(self, objects: int, height: int = 0, width: int = 0) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the cached tensors: `moments`, and the image conditioning.

        `moments` (n, tokens, 2 * channels) are the means and log-variances of the VAE posterior. n is the
        number of objects.
        """
        latent = self.shapes(objects)
        _, tokens, channels = latent["latents"]
        images = {k: (objects, *latent[k][1:]) for k in self.conditioning.encoders}
        return {"moments": (objects, tokens, 2 * channels), **images}

    def tokens(self, objects: int, height: int = 0, width: int = 0) -> int:
        """Return the number of tokens of a scene.

        Each object has its latent tokens and one timestep token. At most `MAX_OBJECTS` objects are used. In
        multi-instance blocks, attention spans the tokens of all objects.
        """
        return min(objects, MAX_OBJECTS) * (1 + self.transformer["num_tokens"])

    def sample_item(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the training sample of a cached scene: `latents` and image conditioning.

        If the scene has more than `MAX_OBJECTS` objects, a random subset is used. Latents are samples of the
        VAE posteriors. With probability `image_dropout`, the image conditioning of all objects is dropped.
        """
        n = len(item["moments"])
        kept = torch.randperm(n, generator=generator)[:MAX_OBJECTS].sort().values
        moments = item["moments"][kept].float()
        noise = torch.randn(moments.chunk(2, -1)[0].shape, generator=generator)
        conditioned = float(torch.rand(1, generator=generator)) >= float(self.options["image_dropout"])
        return {
            "latents": sample_posterior(moments, noise),
            **self.conditioning.select(item, kept, conditioned),
        }

    def load_denoiser(
        self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None
    ) -> nn.Module:
        """Load the transformer with the multi-instance blocks that the recipe chooses.

        In these blocks, attention spans all objects of a scene. Trained image encoders are added to the
        transformer as submodules.
        """
        path = None if meta else folder or self.folder("transformer")
        config = {**self.transformer, "multi_instance": self.blocks}
        with self.loading("transformer", folder):
            network = midi_checkpoint.build(TripoSGTransformer, config, path, dtype)
        if self.conditioning.trained:
            trained = {
                i: e
                for i, e in enumerate(self.conditioning.encoders.values())
                if e.kind in self.conditioning.trained
            }
            midi_image_encoders.add_encoders(
                network, {i: (e, self.load_image_encoder(e, dtype, meta=meta)) for i, e in trained.items()}
            )
        return network

    def objective(self, section: recipe.Objective, size: tuple[int, int]) -> FlowMatching:
        """Return the flow matching objective; its default timestep shift is the scheduler's."""
        return FlowMatching.from_config(section, family_shift=self.shift())

    def predict(self, denoiser: Any, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Predict `noise - data` for b scenes of n objects each, (b, n, tokens, channels).

        The network's input has one row per object; each group of n rows is a scene. The network predicts
        `data - noise`, so its output is negated.
        """
        b, n = x_t.shape[:2]
        contexts, options = self.conditioning.rows(cond, denoiser.dtype)
        times, x = 1000 * t.repeat_interleave(n), x_t.flatten(0, 1).to(denoiser.dtype)
        return -denoiser(x, times, *contexts, groups=[n] * b, **options).view_as(x_t)

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """Return inlaid's own pipeline, because diffusers has none for MIDI; the VAE stays in float32."""
        network: Any = denoiser if denoiser is not None else self.load_denoiser(dtype).to(device)
        pipe = ScenePipeline(network, self.load_vae(device), self.shift())
        pipe.load_encoders = lambda: self.load_image_encoders(device, network)
        return pipe

    def resolved(self, sample: recipe.Sample) -> recipe.Sample:
        """Return the sampling settings; an unset mesh resolution is set to that of the published model."""
        cells = CELLS["TripoSG" if self.single_encoder else "MIDI-3D"]
        return sample.model_copy(update={"grid": sample.grid or cells})

    def sample(self, pipeline: Any, text: Any, negative: Any, **how: Any) -> Any:
        """Generate a scene with one mesh per object, from an input image and its segmentation.

        Returns:
            A `media.scene.GeneratedScene`.
        """
        image, ids = how["images"]
        objects: Mapping[int, str] = how["objects"]
        contexts = pipeline.encoders(image, [ids == n for n in objects])
        options = {k: how[k] for k in ("steps", "guidance", "generator")}
        latents, vae = pipeline(list(contexts.values()), **options), pipeline.vae
        fields = {name: Field(vae, x) for name, x in zip(objects.values(), latents, strict=True)}
        made = make_meshes(fields, how["grid"], how["triangles"])
        if not how["texture"]:
            return made
        found, note = textured(made.meshes, image, {name: ids == n for n, name in objects.items()})
        return replace(made, meshes=found, notes=(*made.notes, note))

    def load_adapter(self, pipeline: Any, folder: Path) -> None:
        """Load an adapter, and use the same multi-instance blocks as in its training.

        In multi-instance blocks, attention spans all objects of a scene. The adapter file lists these blocks.
        If it lists none, the blocks of the pipeline are unchanged.
        """
        super().load_adapter(pipeline, folder)
        blocks = stored_blocks(folder)
        if blocks is not None:
            pipeline.transformer.multi_instance = frozenset(blocks)


VIDEO_KEYS = {
    "data": ("size", "aspects", "frames", "fps", "stride", "max_windows", "slow", "trigger", "caption_prefix",
             "caption_dropout", "matte"),
    "sample": ("prompts", "negative_prompt", "size", "frames"),
}  # fmt: skip
"""Recipe keys that apply only to videos, by recipe section."""


def video_only_keys(config: recipe.Config) -> list[str]:
    """Return a message for each recipe key that is set but applies only to videos."""
    derived = {"size": config.data.size, "frames": max(config.data.frames)}
    out = []
    for section, keys in VIDEO_KEYS.items():
        values = getattr(config, section)
        for key in keys:
            usual = type(values).model_fields[key].get_default(call_default_factory=True)
            if getattr(values, key) not in (usual, derived.get(key) if section == "sample" else usual):
                out.append(f"{section}.{key}: applies only to videos: remove it")
    return out
