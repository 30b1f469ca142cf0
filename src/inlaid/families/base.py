"""The contract of a model family: everything the rest of the package may ask of an architecture.

A family translates at its edge. Inside the package, pixels are uint8 (t, h, w, c), latents (c, t, h, w) per
sample and normalised, time runs from 0 (data) to 1 (noise), and nobody else knows schedulers, scalings or
module names.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlaid import config as recipe

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

    from inlaid.objectives import Objective


@dataclass(frozen=True)
class Grid:
    """Sizes that a family can represent: pixels a multiple of `spatial`, frames `temporal` n + `offset`."""

    spatial: int
    temporal: int
    offset: int = 1
    only: tuple[int, int, int] | None = None
    """The one length, height and width of a network that learned its positions by heart."""

    def snap_frames(self, n: int) -> int:
        """The largest possible length of at most n frames; 0 where there is none."""
        if self.only:
            return self.only[0] if n >= self.only[0] else 0
        return 0 if n < self.offset else (n - self.offset) // self.temporal * self.temporal + self.offset

    def snap_size(self, height: float, width: float) -> tuple[int, int]:
        """The nearest possible height and width."""
        if self.only:
            return self.only[1:]
        return max(1, round(height / self.spatial)) * self.spatial, max(
            1, round(width / self.spatial)
        ) * self.spatial

    def problems(self, frames: int, height: int, width: int) -> list[str]:
        """Sentences that say what is impossible and what is near; empty when all is well."""
        if self.only:
            there, asked = (f"{n} frames of {h}x{w}" for n, h, w in (self.only, (frames, height, width)))
            how = f"{asked} has no positions: this checkpoint learned them for {there}, use that"
            return [] if there == asked else [f"{how} or a checkpoint without learned positions"]
        out = []
        low = self.snap_frames(frames)
        if low != frames:
            near = " or ".join(str(n) for n in (low, low + self.temporal if low else self.offset) if n)
            out.append(f"{frames} frames is not {self.temporal}n+{self.offset}: use {near}")
        if (height % self.spatial, width % self.spatial) != (0, 0) or min(height, width) < 1:
            h, w = self.snap_size(height, width)
            out.append(f"{height}x{width} is not a multiple of {self.spatial}: use {h}x{w}")
        return out


@dataclass(frozen=True)
class Encoded:
    """How another trainer lays out the clips that it has encoded: paths, where `*` is a clip's name."""

    media: Sequence[str]
    """Latents of the clip, by which it is found, and of the images that it is shown."""
    text: str
    caption: str = "*.txt"
    """What was encoded, where it was kept."""
    video: str = "*"
    """Where the clips lie that were encoded, without suffix."""

    @property
    def says(self) -> str:
        """For messages."""
        return " + ".join((*self.media, self.text)).replace("*", "NAME")


class Checkpoint:
    """A checkpoint in diffusers layout, on the Hub or in a folder: its configurations and components."""

    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    """Hub ids and what must be known of their configuration before anything is downloaded; the first is the
    default."""
    text_encoder: ClassVar[str] = "T5EncoderModel"
    """Its class in transformers."""

    def __init__(self, model: recipe.Model) -> None:
        self.model = model
        self.source = locate(model.checkpoint)

    @property
    def name(self) -> str:
        """The checkpoint's Hub id, or only the name of a local folder, for files that are given away."""
        return self.source.name if isinstance(self.source, Path) else self.source

    def read_config(self, component: str) -> dict[str, Any] | None:
        """A component's configuration, or for the empty name `model_index.json`; None where there is none.

        Raises:
            ValueError: when the checkpoint is neither a local folder nor reachable on the Hub.
        """
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        if component.startswith("feature_extractor"):
            file = "preprocessor_config.json"
        name = f"{component}/{file}" if component else "model_index.json"
        if self.source in self.published and self.model.revision is None:
            return dict(self.published[self.model.checkpoint].get(component, {})) or None
        if isinstance(self.source, Path):
            path = self.source / name
            if not path.is_file():
                return None
            try:
                found = json.loads(path.read_text("utf-8"))
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise ValueError(f"model.checkpoint: {path} is not a JSON object; copy or download it again")
            return found
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return json.loads(
                Path(hf_hub_download(self.source, name, revision=self.model.revision)).read_text("utf-8")
            )
        except EntryNotFoundError:
            return None
        except Exception as error:
            raise ValueError(
                f"model.checkpoint: `{self.source}` is not a local folder and could not be read from the Hub "
                f"({type(error).__name__}); check the name, the network, or `hf auth login`"
            ) from None

    @contextmanager
    def loading(self, part: str, folder: Path | None = None) -> Iterator[None]:
        """One sentence for whatever the libraries raise while they load a part of the checkpoint or a folder.

        Raises:
            ValueError: when it cannot be loaded.
        """
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            what = folder or f"model.checkpoint: `{part}` of {self.model.checkpoint}"
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(
                f"{what} cannot be loaded ({cause}); is it whole? Copy or download it again"
            ) from error

    def folder(self, component: str) -> Path:
        """Where the files of a component are, downloaded when they are not there.

        Raises:
            ValueError: when they are not to be had.
        """
        if isinstance(self.source, Path):
            return self.source / component
        from huggingface_hub import snapshot_download

        wanted = f"{component}/*"
        with self.loading(component):
            found = snapshot_download(self.source, revision=self.model.revision, allow_patterns=wanted)
        return Path(found) / component

    def load(self, component: str, dtype: torch.dtype) -> Any:
        """A component of the checkpoint, whole, in the diffusers class that its configuration names.

        Raises:
            ValueError: when it cannot be loaded.
        """
        import diffusers

        with self.loading(component):
            network = getattr(diffusers, self._class_name(component)).from_pretrained(
                self.source, subfolder=component, revision=self.model.revision, torch_dtype=dtype
            )
            missing = [n for n, p in network.named_parameters() if p.is_meta]
            if missing:
                raise ValueError(f"{len(missing)} weights are missing from its files, such as {missing[0]}")
        return network

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Tokenizer and text encoder."""
        import transformers

        options: dict[str, Any] = {"revision": self.model.revision}
        with self.loading("tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                self.source, subfolder="tokenizer", **options
            )
        with self.loading("text_encoder"):
            kind: Any = getattr(transformers, self.text_encoder)
            encoder = kind.from_pretrained(self.source, subfolder="text_encoder", dtype=dtype, **options)
        return tokenizer, encoder.to(device).eval().requires_grad_(False)

    def _class_name(self, component: str) -> str:
        return (self.read_config(component) or {})["_class_name"]


class Family(Checkpoint, ABC):
    """One architecture and its conventions. Building one reads configuration files, never weights."""

    defaults: ClassVar[Mapping[str, Any]] = {}
    """Recipe values that differ from the sections' defaults, as a nested mapping."""
    targets: ClassVar[Sequence[str]]
    """Default adapter targets: regular expressions over whole module names."""
    encoders: ClassVar[Mapping[str, Sequence[str]]] = {
        "media": ("vae",),
        "text": ("tokenizer", "text_encoder"),
    }
    """Components of the checkpoint that `media` and `text` are encoded with; they decide what a cached item
    is."""
    original_names: ClassVar[Sequence[tuple[str, str]]] = ()
    """Module names inside a block or at the root, as the original code and as diffusers spells them."""
    widths: ClassVar[Mapping[int, str]] = {}
    """Names of the published sizes by the width of their network, for messages."""
    text_length: ClassVar[int]
    """Tokens of text that the network is given at most."""
    fps: float
    """Frame rate of the published checkpoint's training data."""
    medium: ClassVar[str] = "video"
    """What it is shown and makes, the name of a file in `inlaid/mediums`."""
    component: str = "transformer"
    """Name of the denoiser in the checkpoint and in the pipeline."""
    choices: ClassVar[Mapping[str, Sequence[str | int | float | bool]]] = {}
    """The family's own switches, `model.options` of a recipe, each with its values, the default first. They
    change what `encode_media` gives only together with `media_key`."""
    channels: int = 3
    """Of the clips that `encode_media` takes and `sample` gives: RGB, or 4 for straight RGBA."""
    media_key: Sequence[str] = ()
    """What else than the encoder's files decides the numbers of a cached clip."""
    bytewise: Sequence[str] = ()
    """Names of the tensors of a cached clip that take a byte a number, as pixels do, and not two."""
    images: Sequence[str] = ()
    """Frames that the network is shown besides the text: none, `first`, or `first` and `last`."""
    video_layers: ClassVar[Sequence[str]] = ()
    """Linear layers that all tokens of the video go through, as regular expressions over whole module names:
    the only ones that joint transparency changes. None where the family has no such transparency."""
    text_before: ClassVar[int] = 0
    """Tokens of text that go through these layers before those of the video."""
    joint_attention: ClassVar[Any] = None
    """Makes an attention processor of a rule, see `models.attention`, where text and video share a
    sequence."""
    grid: Grid
    encoded: Encoded | None = None
    """The layout of encoded clips that this family reads: VAE moments, one file for each of `stored`."""

    def __init__(self, model: recipe.Model) -> None:
        super().__init__(model)
        self.options = _chosen(model, self.choices)

    @property
    def single(self) -> Family:
        """The family of one clip: itself, but where two are in one sequence."""
        return self

    def encoded_in(self, folder: Path) -> Encoded | None:
        """How encoded clips are laid out in a folder, if this family reads any."""
        return self.encoded

    def about(self) -> dict[str, str]:
        """What a file of trained weights tells of what it was trained on, for its header."""
        return {"inlaid_base": self.name, **{f"inlaid_{k}": str(v) for k, v in self.options.items()}}

    def warnings(self) -> list[str]:
        """Paragraphs for the model card, of what surprises whoever uses the file."""
        return []

    def accept(self, header: Mapping[str, str]) -> None:
        """Looks at what the header of an adapter says of what it was trained on.

        Raises:
            ValueError: when that is something else than this family.
        """
        said = header.get("inlaid_alpha")
        if said and self.channels == 3:
            raise ValueError(
                f"this adapter was trained with alpha.kind={said}; a run without it would only show noise"
            )

    # --- shapes -------------------------------------------------------------------------------------------

    @abstractmethod
    def shapes(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shape of a clip's `latents` (c, t, h, w), which are learned, and of its conditions, as `draw`n."""

    def stored(self, frames: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a clip that `encode_media` gives and the cache keeps."""
        return self.shapes(frames, height, width)

    @abstractmethod
    def tokens(self, frames: int, height: int, width: int) -> int:
        """Length of the sequence that the denoiser attends over."""

    # --- before the cache ---------------------------------------------------------------------------------

    def load_media_encoder(self, device: torch.device) -> Any:
        """What `encode_media` needs, in the precision it encodes with: the VAE in float32."""
        import torch

        return self.load("vae", torch.float32).to(device).eval().requires_grad_(False)

    @abstractmethod
    def encode_media(self, encoder: Any, frames: np.ndarray) -> dict[str, Tensor]:
        """uint8 (t, h, w, `channels`) -> all that is needed of a clip, float32, for the cache: see `draw`."""

    @abstractmethod
    def encode_text(self, encoder: Any, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Captions -> one item each: `text` (n, d), n the true length where the network is told it."""

    # --- after the cache ----------------------------------------------------------------------------------

    def draw(self, item: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """A cached clip -> `latents`, normalised, which are learned, and conditions, for one showing.

        What is random in a clip (a sample of the posterior, a noised or dropped image) comes from
        `generator`, so that it is a function of the seed and the index of the micro-batch.
        """
        return dict(item)

    def load_denoiser(
        self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None
    ) -> nn.Module:
        """The network that is taught, or a fine-tuned one from `folder`; with `meta` its shape only."""
        import diffusers
        import torch

        kind = getattr(diffusers, self._class_name(self.component))
        if meta:
            with torch.device("meta"):
                return kind.from_config(self.read_config(self.component))
        if folder is not None:
            with self.loading("", folder):
                return kind.from_pretrained(folder, torch_dtype=dtype)
        return self.load(self.component, dtype)

    def share_positions(self, denoiser: nn.Module) -> None:
        """Makes the network see twice the latent frames as two clips, of which both begin at the first place.

        Only of a family with `video_layers`.
        """
        raise NotImplementedError

    def attached(self, denoiser: nn.Module) -> None:
        """Is told that the network has got its adapter; what else trains is opened here."""

    @abstractmethod
    def objective(self, section: recipe.Objective, size: tuple[int, int]) -> Objective:
        """The objective of the published checkpoint, with the recipe's section applied."""

    def collate(self, text: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Text items of a batch -> what `predict` takes as `cond`, besides the clips' own conditions."""
        import torch

        return {name: torch.stack([item[name] for item in text]) for name in text[0]}

    @abstractmethod
    def predict(self, denoiser: nn.Module, x_t: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """Canonical in, canonical out: noise - data for flow matching, v for v-prediction.

        Args:
            denoiser: from `load_denoiser`.
            x_t: noisy latents (n, c, t, h, w).
            t: (n,), 0 = data, 1 = noise.
            cond: from `collate`, and the conditions that `draw` gave, stacked.
        """

    def parts(self, latents: Tensor) -> dict[str, Tensor]:
        """Parts of latents (n, c, t, h, w) whose losses are reported apart, by name; none where it is one."""
        return {}

    def pipeline(self, *, denoiser: nn.Module | None, device: torch.device, dtype: torch.dtype) -> Any:
        """The stock diffusers pipeline around `denoiser` (or the checkpoint's own), all in one precision.

        It has no text encoder: `sample` brings encoded text.
        """
        from diffusers import DiffusionPipeline

        network: Any = denoiser if denoiser is not None else self.load_denoiser(dtype)
        parts: dict[str, Any] = {"text_encoder": None, "tokenizer": None, self.component: network}
        options = {"revision": self.model.revision, "torch_dtype": network.dtype}
        with self.loading("model_index.json"):
            pipe = DiffusionPipeline.from_pretrained(self.source, **options, **parts)
        return pipe.to(device)

    def sample(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        *,
        size: tuple[int, int],
        frames: int,
        steps: int,
        guidance: float,
        generator: torch.Generator,
        images: Sequence[np.ndarray] = (),
    ) -> np.ndarray:
        """Runs the stock pipeline on text and `images` uint8 (h, w, 3) -> uint8 (t, h, w, `channels`)."""
        settings = {"size": size, "frames": frames, "steps": steps, "guidance": guidance}
        video = self.run(pipeline, text, negative, images, generator=generator, **settings)
        # Some decoders turn an even number of latent frames into a few more, all at the start.
        return as_bytes(video[-frames:])

    def run(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        images: Sequence[np.ndarray],
        *,
        size: tuple[int, int],
        frames: int,
        steps: int,
        guidance: float,
        generator: torch.Generator,
        noise: Tensor | None = None,
    ) -> np.ndarray:
        """What the stock pipeline gives, in [0, 1]; from `noise` (c, t, h, w), or from what it draws."""
        start = {} if noise is None else {"latents": self.starts(noise, pipeline)}
        return pipeline(
            **self.given(pipeline, text, negative, images),
            **start,
            height=size[0],
            width=size[1],
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generator,
            output_type="np",
        ).frames[0]

    def starts(self, noise: Tensor, pipeline: Any) -> Tensor:
        """Noise (c, t, h, w) as the stock pipeline takes it."""
        return noise[None]

    def given(
        self,
        pipeline: Any,
        text: Mapping[str, Tensor],
        negative: Mapping[str, Tensor],
        images: Sequence[np.ndarray],
    ) -> dict[str, Any]:
        """What the stock pipeline is called with in place of prompts, in the types that it computes in."""
        from PIL import Image

        device, dtype = pipeline._execution_device, getattr(pipeline, self.component).dtype
        cond, uncond = (self.collate([item])["text"].to(device, dtype) for item in (text, negative))
        names = {"first": "image", "last": "last_image"}
        shown = {names[n]: Image.fromarray(i) for n, i in zip(self.images, images, strict=True)}
        return {"prompt_embeds": cond, "negative_prompt_embeds": uncond, **shown}

    def load_adapter(self, pipeline: Any, folder: Path) -> None:
        """Loads `pytorch_lora_weights.safetensors` of a folder into a pipeline, under the name `inlaid`."""
        pipeline.load_lora_weights(str(folder), adapter_name="inlaid")

    def weaken(self, pipeline: Any, strength: float) -> None:
        """Scales a loaded adapter: 0 is the base, 1 what was trained."""
        pipeline.set_adapters(["inlaid"], [strength])

    def problems(self, config: recipe.Config) -> list[str]:
        """Sentences about what this checkpoint cannot do with this recipe; empty when all is well."""
        data, sample = config.data, config.sample
        asked = [("data", frames, data.size) for frames in data.frames]
        if sample.frames or sample.size:
            asked.append(("sample", sample.frames or max(data.frames), sample.size or data.size))
        found = [f"{section}: {p}" for section, n, size in asked for p in self.grid.problems(n, *size)]
        found += [f"sample.images: {p}" for p in self.missing_images(len(sample.prompts), sample.images)]
        if self.channels == 3 and data.matte != recipe.Matte():
            found.append(
                "data.matte: this run is opaque and reads no mattes; leave it out, or set alpha.kind"
            )
        try:
            self.objective(config.objective, data.size)
        except ValueError as error:
            found.append(str(error))
        return list(dict.fromkeys(found))

    def notes(self, config: recipe.Config) -> list[str]:
        """Sentences about what this recipe asks that is allowed but should be known."""
        return []

    def missing_images(self, prompts: int, given: Sequence[Sequence[str]]) -> list[str]:
        """Sentences about images that the prompts need, or must not have; empty when all is well."""
        name = self.model.checkpoint
        if not self.images:
            return [f"{name} makes videos from text alone; leave images out"] if given else []
        what = " and a ".join(f"{each} image" for each in self.images)
        if prompts != len(given):
            return [f"{name} needs a {what} for each prompt: {prompts} prompts, {len(given)} with images"]
        wrong = [f"prompt {i} has {len(g)}" for i, g in enumerate(given, 1) if len(g) != len(self.images)]
        if wrong:
            return [f"{name} needs a {what} for each prompt: {', '.join(wrong)}"]
        return _unreadable(dict.fromkeys(Path(file) for each in given for file in each))


def _unreadable(images: Iterable[Path]) -> list[str]:
    """Sentences about files that are no images."""
    from inlaid import media

    found = []
    for path in images:
        try:
            if path.suffix.lower() not in media.IMAGES:
                raise ValueError(f"{path}: not an image; name a file such as start.png")
            media.probe(path)
        except ValueError as error:
            found.append(str(error))
    return found


def as_bytes(video: np.ndarray) -> np.ndarray:
    """[0, 1] -> uint8, rounded."""
    return (video * 255).round().clip(0, 255).astype("uint8")


def _chosen(model: recipe.Model, choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The value of each of a family's switches."""
    wrong = []
    for key, value in model.options.items():
        if key not in choices:
            has = f"it has {', '.join(choices)}" if choices else "it has none, leave it out"
            wrong.append(f"model.options.{key}: {model.family} has no such option; {has}")
        elif value not in choices[key]:
            values = ", ".join(map(str, choices[key]))
            wrong.append(f"model.options.{key}: `{value}` is not one of {values}")
    if wrong:
        raise ValueError("; ".join(wrong))
    return {key: model.options.get(key, values[0]) for key, values in choices.items()}


TWIN = "twin:"


def locate(checkpoint: str) -> Path | str:
    """A local folder as a path, a Hub id as it is; `twin:NAME` is the tiny checkpoint that ships with inlaid.

    Raises:
        ValueError: when it can be neither.
    """
    if checkpoint.startswith(TWIN):
        from inlaid import twins

        return twins.path(checkpoint.removeprefix(TWIN))
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"model.checkpoint: {path} is not a diffusers folder (it has no model_index.json)"
            )
        return path
    if path.is_file() or checkpoint.count("/") != 1 or checkpoint.startswith((".", "/", "~")):
        raise ValueError(
            f"model.checkpoint: `{checkpoint}` is neither a folder in diffusers layout nor a Hub id such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
        )
    return checkpoint
