"""Recipes: every section, its help, and how a recipe is loaded, overridden, saved and described.

A recipe is a YAML file of sections. Values are layered: section default < family default < YAML <
`key=value`. An unknown key is an error, and all errors of a recipe are reported at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from inlaid.files import atomic


class Section(BaseModel):
    """A frozen part of a recipe; attribute docstrings are its help."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )


class Model(Section):
    """Which network is taught."""

    family: str
    """Architecture, the name of a file in `inlaid/families` or of an installed plug-in: `wan`."""
    checkpoint: str
    """Hub id, local folder in diffusers layout, or `twin:wan` for the tiny trained model that ships with
    inlaid."""
    revision: str | None = None
    """Branch, tag or commit of a Hub checkpoint."""
    task: Literal["t2v", "i2v"] | None = None
    """`t2v`: from text. `i2v`: from text and a first image. Default: what the checkpoint was made for; only
    Wan 2.2 TI2V-5B does both."""
    expert: Literal["high", "low"] | None = None
    """Wan 2.2 A14B only: the network for high or for low noise. Each is trained on its own time interval."""
    options: dict[str, str | int | float | bool] = {}
    """Switches that only this family has, by name; its how-to page lists them."""


class Source(Section):
    """One place where clips come from."""

    path: str = Field(min_length=1)
    """Folder, manifest (`.csv`, `.jsonl`, `.json`), folder with `prompts.txt` and `videos.txt`, or folder of
    clips that another trainer has encoded."""
    layout: Literal["auto", "folder", "lines", "csv", "jsonl", "encoded"] = "auto"
    """How captions are stored; `auto` looks. `encoded` reads latents and embeddings instead of clips, and is
    chosen where every clip of a folder has them."""
    root: str | None = None
    """Folder that the manifest's paths are relative to, and may not leave. Default: the manifest's folder."""
    video_column: str | None = None
    """Column with the clip's path. Default: the first of video, file_name, file, path, image,
    frames_path, and in transparent runs video_rgb, video_fgr, rgb, fgr. With `lines` the name of the file, by
    default `videos.txt`."""
    caption_column: str | None = None
    """Column with the caption. Default: the first of caption, prompt, text. With `lines` the name of the
    file, by default `prompts.txt`, `prompt.txt` or `captions.txt`."""
    alpha_column: str | None = None
    """Column with the path of the matte, for transparent runs. Default: the first of video_alpha, video_pha,
    alpha, pha, matte; without such a column the matte beside the clip, if there is one."""
    group_column: str | None = None
    """Column by which `inlaid evaluate` groups its table, such as an activity or a subject."""
    repeats: int = Field(default=1, ge=1)
    """How many times each clip appears in one epoch."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source relative to the others, on top of `repeats`; 0.5 shows each clip every second
    epoch."""
    preserve: float = Field(default=0.0, ge=0)
    """Above 0, clips of what the network knows and should not forget: of them the adapter learns to predict
    what the network predicts without it, not what is in the clip. The number is their weight in the loss; 10
    keeps nearly everything, 0 is for clips that are learned."""


class Matte(Section):
    """How the alpha of transparent clips is read and mended; unused where the recipe's `alpha` is opaque."""

    premultiplied: bool | Literal["auto"] = "auto"
    """Whether colour was multiplied with alpha already, and is to be divided; `auto` guesses for each clip,
    and `inlaid check` says what it took for such."""
    invert: bool = False
    """White is clear in the mattes."""
    limited: bool = False
    """Black is 16 and white is 235 in the mattes: files that do not say that their range is limited."""
    snap: int = Field(default=0, ge=0, le=127)
    """Alpha within so many levels of 255 of clear or opaque becomes just that: 2 takes out what lossy files
    leave in empty regions."""
    decontaminate: bool = False
    """Take the colour of an old background out of soft edges: colour grows outward from opaque pixels. Not
    for smoke or glass, whose own colour is in soft pixels."""
    background: Literal["grow", "blur", "keep"] = "grow"
    """What stands where alpha is clear: colour that grew out of the visible pixels, the same as a `blur`red
    field, or what the file has there. No composite shows it, but a network that learns colour does."""


class Data(Section):
    """The clips and what the model sees of them."""

    sources: list[Source]
    """One path, a list of paths, or a list of sources."""
    size: tuple[int, int] = (480, 832)
    """Height and width in pixels. With several `aspects` it sets the area."""
    aspects: list[str] = []
    """Aspect ratios as `width:height`, such as `16:9`, `1:1` or `9:16`; clips go to the nearest. Empty: only
    `size`."""
    frames: list[int] = [81]
    """Lengths in frames; each clip goes to the longest that it fills. One number or a list."""
    fps: float | None = Field(default=None, gt=0)
    """Frame rate at which clips are sampled. Default: the rate that the family was trained at."""
    stride: int | None = Field(default=None, ge=1)
    """Frames (at `fps`) between the starts of two windows of a long clip. Default: the window's length (no
    overlap)."""
    max_windows: int = Field(default=1, ge=1)
    """At most so many windows of one clip, spread evenly over it."""
    slow: Literal["repeat", "keep"] = "repeat"
    """A clip slower than `fps`: `repeat` frames to keep its speed, or `keep` its frames, which plays it
    faster."""
    matte: Matte = Matte()
    trigger: str = ""
    """Word put before every caption that does not contain it."""
    caption_prefix: str = ""
    """Text put before every caption."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Share of training samples that see the empty caption, so that guidance keeps working."""
    held_out: float = Field(default=0.1, ge=0)
    """Clips kept away from training for the held-out loss: a share below 1, else a count."""
    cache: str | None = Field(default=None, min_length=1)
    """Folder of encoded clips and captions; runs may share one. Default: `cache` in the run folder."""
    bad_clips: Literal["stop", "quarantine"] = "stop"
    """What `cache` and `train` do about clips with errors: `stop`, or go on without them and list them in the
    run."""

    @field_validator("sources", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        many = value if isinstance(value, list) else [] if value is None else [value]
        return [{"path": str(v)} if isinstance(v, (str, Path)) else v for v in many]

    @field_validator("sources")
    @classmethod
    def _some(cls, value: list[Source]) -> list[Source]:
        if not value:
            raise ValueError("needs at least one source")
        return value

    @field_validator("frames", mode="before")
    @classmethod
    def _frames(cls, value: Any) -> Any:
        return sorted(set(value)) if isinstance(value, list) and value else [value] if value != [] else [0]

    @field_validator("frames")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if min(value) < 1:
            raise ValueError("needs one or more lengths of at least 1 frame")
        return value

    @field_validator("aspects")
    @classmethod
    def _ratios(cls, value: list[str]) -> list[str]:
        for text in value:
            parts = text.split(":")
            if len(parts) != 2 or not all(
                p.strip().replace(".", "", 1).isdigit() and float(p) > 0 for p in parts
            ):
                raise ValueError(f"`{text}` is not an aspect ratio such as `16:9`")
        return value


class Objective(Section):
    """Which noise levels are learned, and with what weight; the corruption itself is the family's."""

    preset: Literal["inlaid", "diffsynth", "uniform"] = "inlaid"
    """`inlaid`: logit-normal, weight 1. `diffsynth`: 1000-entry table, shift 5, bell weight. `uniform`: weight
    1."""
    shift: float | None = Field(default=None, gt=0)
    """Noise-level shift s, as in s u / (1 + (s - 1) u). Default: the preset's, else the family's for this
    size."""
    mean: float = 0.0
    """Mean of the normal distribution behind `inlaid`."""
    std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal distribution behind `inlaid`."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Train only on noise levels in this interval of [0, 1]; an expert of Wan 2.2 A14B sets it by itself."""

    @field_validator("interval")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("needs 0 <= low < high <= 1")
        return value


class LowRank(Section):
    """A small adapter on a frozen network, through peft."""

    kind: Literal["lora", "dora", "lokr", "loha"] = "lora"
    """`lora`: low-rank update. `dora`: the same with a trained magnitude per output row; slower, often
    better. `lokr`: Kronecker product, a far smaller file. `loha`: product of two low-rank updates, of higher
    rank."""
    rank: int = Field(default=32, ge=1)
    """Rank of the update; higher holds more and costs more."""
    alpha: float | None = Field(default=None, gt=0)
    """The update is scaled by alpha / rank. Default: rank, which survives tools that drop alpha."""
    targets: list[str] = []
    """Regular expressions over whole module names; one that matches nothing stops. Default: the family's."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the low-rank update; LoRA and DoRA only."""


class Full(Section):
    """Full fine-tuning."""

    kind: Literal["full"] = "full"
    """All weights of the denoiser train, or those of `targets`."""
    targets: list[str] = []
    """Regular expressions over whole parameter names; one that matches nothing stops. Default: everything."""


class Codec(Section):
    """Train a codec for merged alpha instead of the denoiser: a merge block and two decoders."""

    kind: Literal["codec"]
    """Colour and alpha of clips into one latent and back (after Wan-Alpha), on the frozen VAE; no text."""
    train: Literal["merge+decoders", "merge"] = "merge+decoders"
    """`merge+decoders`: all three. `merge`: the merge block alone, towards the decoders of `start`."""
    rank: int = Field(default=128, ge=1)
    """Rank of the update of each decoder; of `start` where one is given."""
    start: str | None = Field(default=None, min_length=1)
    """Folder of a codec to begin with. Default: a random merge block and the VAE's own decoders."""
    begin: Literal["random", "encoder"] = "random"
    """Without `start`, the merge block is random, or at first gives what the encoder does of colour: then
    colour is right at once, and alpha is what is left to learn."""
    loss: Literal["paper", "reference"] = "paper"
    """`paper`: Sobel edges, norm of ImageNet-normalised features. `reference`, the released trainer: central
    differences, squared error of plain features."""
    perceptual: str = Field(default="none", min_length=1)
    """VGG16 weights for the perceptual terms: a local file, or `OWNER/NAME/FILE` on the Hub. `none` leaves
    these three of the nine terms out."""
    edge: Literal["sobel", "central"] | None = None
    """Filter of the edge terms. Default: the preset's."""
    vgg_normalize: Literal["imagenet", "none"] | None = None
    """Normalisation before the perceptual network. Default: the preset's."""
    hard_mask: Literal["reconstructed", "true"] = "reconstructed"
    """Which alpha masks the hard render of the reconstruction."""
    alpha_eps: float = Field(default=2 / 255, ge=0, lt=0.5)
    """Alpha up to this counts as clear; lossy files leave more than 0 in empty regions. 0 is the paper's."""
    colors: list[tuple[int, int, int]] = []
    """Colours, 0-255, that clips are put on before they are encoded. Empty: the eight corners of the colour
    cube, as in the paper, so that no colour means transparency."""
    anchor: float = Field(default=0.0, ge=0)
    """Weight of a term that holds latents near the VAE's own of the clip on dark grey, so that a network that
    learned opaque clips has less to learn. Not in the paper."""
    visible: float = Field(default=0.0, ge=0)
    """Weight of the mean error of colour over visible pixels alone, which small subjects need. Not in the
    paper."""
    visible_alpha: float = Field(default=0.0, ge=0)
    """The same for alpha: glass and smoke need it."""
    noise: float = Field(default=0.0, ge=0)
    """Most noise, in units of the latents' spread, that they are decoded with, so that the decoders forgive.
    Not in the paper."""


class Optim(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw", "adamw8bit", "adamw4bit", "prodigy"] = "adamw"
    """`adamw` (torch), `adamw8bit` (bitsandbytes, a quarter of the state), `adamw4bit` (torchao, an eighth),
    `prodigy` (prodigyopt, finds its own rate; use lr 1)."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Term against division by zero."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up: constant, or down to zero at the last step."""
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; null switches clipping off."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of the trained weights, which then is what is sampled and
    exported."""

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("needs two numbers of at least 0 and less than 1")
        return value


class Train(Section):
    """How long, how much at once, and what is written on the way."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps."""
    batch: int = Field(default=1, ge=1)
    """Samples per device and micro-batch."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches per optimizer step and device."""
    save_every: int = Field(default=250, ge=1)
    """Steps between checkpoints; one is always written at the end and on Ctrl-C."""
    keep: int = Field(default=3, ge=1)
    """How many checkpoints stay on disk."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines of `metrics.jsonl` and the trackers."""
    validate_every: int = Field(default=100, ge=1)
    """Steps between measurements of the held-out loss."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = ["tensorboard"]
    """Where metrics go besides `metrics.jsonl`."""


CARRIERS = ("mov", "webm", "png", "apng", "mkv")
"""What transparent videos are written as."""


class Sample(Section):
    """Videos made during training and the settings of `inlaid generate`."""

    prompts: list[str] = []
    """Prompts to sample during training and to compare in `inlaid evaluate`. Empty: the first captions."""
    images: list[list[str]] = []
    """Image-to-video only: the image that each prompt starts from, or a list of the first and the last one.
    Without prompts, the clips' own."""
    every: int | None = Field(default=None, ge=1)
    """Steps between samples. Default: none during training."""
    negative_prompt: str = ""
    """What to steer away from."""
    size: tuple[int, int] | None = None
    """Height and width. Default: as trained."""
    frames: int | None = Field(default=None, ge=1)
    """Frames. Default: the longest trained."""
    steps: int = Field(default=30, ge=1)
    """Denoising steps."""
    guidance: float = Field(default=5.0, ge=0)
    """Classifier-free guidance scale."""
    transparent: list[str] = ["mov", "webm"]
    """Files of each transparent video, besides the mp4 on a checkerboard: `mov` (ProRes 4444, for editing),
    `webm` (VP9, small, for browsers), `png` (a .zip of images, exact), `apng` or `mkv` (FFV1), exact too."""
    grid: int = Field(default=256, ge=16, le=1024)
    """Scenes: cells per side of the box that objects are meshed in, a power of two."""
    triangles: int | None = Field(default=None, ge=100)
    """Scenes: most triangles of an object; larger meshes are simplified. Default: as they come."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Seed of the first video; video i of a prompt uses seed + i."""

    @field_validator("grid")
    @classmethod
    def _power(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError(f"{value} is not a power of two, such as 128 or 256")
        return value

    @field_validator("images", mode="before")
    @classmethod
    def _each(cls, value: Any) -> Any:
        return [[v] if isinstance(v, str) else v for v in value] if isinstance(value, list) else value

    @field_validator("transparent")
    @classmethod
    def _carriers(cls, value: list[str]) -> list[str]:
        wrong = [name for name in value if name not in CARRIERS]
        if wrong:
            raise ValueError(f"`{wrong[0]}` cannot carry alpha; there are: {', '.join(CARRIERS)}")
        return value

    @field_validator("prompts")
    @classmethod
    def _said(cls, value: list[str]) -> list[str]:
        if not all(text.strip() for text in value):
            raise ValueError("holds an empty prompt; remove it, or write what you want to see")
        return value


class Memory(Section):
    """What is traded for memory."""

    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] = True
    """Recompute activations in the backward pass: far less memory, about a third more time. A number n
    recomputes every n-th block only."""
    quantize: Literal["int8", "int4", "float8", "nf4"] | None = None
    """Keep the linear layers of the frozen blocks in so few bits (int8, float8: torchao; nf4: bitsandbytes).
    For adapters only."""
    layerwise_casting: Literal["float8", "bfloat16"] | None = None
    """Keep the frozen base in this type and compute in the run's precision, layer by layer. For adapters
    only."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in the computer's memory instead of the GPU's, and step there (AdamW,
    CUDA)."""


class Runtime(Section):
    """Where and how it runs; never changes what is learned, up to rounding."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """`auto`: CUDA, else Apple MPS, else CPU."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Of the frozen base and its activations; adapters, losses and the optimizer are float32. `auto`:
    bfloat16 on CUDA, else float32."""
    world_size: int | None = Field(default=None, ge=1)
    """Number of processes that this recipe is meant for; another number stops at the start. Default: any."""
    workers: int = Field(default=2, ge=0)
    """Decoding threads while caching."""
    compile: bool = False
    """Compile the repeated blocks (torch.compile): minutes at the start and again at the second shape, faster
    steps."""
    parallel: Literal["ddp", "fsdp", "zero2", "zero3"] = "ddp"
    """Several processes: `ddp` has all in each; `fsdp` (FSDP2) shards weights, gradients and optimizer state;
    so does `zero3`, and `zero2` all but the weights, both with DeepSpeed."""


class Opaque(Section):
    """No transparency: clips are RGB."""

    kind: Literal["opaque"] = "opaque"
    """Clips without alpha; what a transparent clip shows is put on white."""


class Joint(Section):
    """Colour and alpha side by side: two clips in one sequence of tokens, at the same positions."""

    kind: Literal["joint"]
    """Two latents, colour first; what is trained changes the tokens of alpha only (after TransPixeler)."""
    text_to_alpha: Literal["block", "bias", "open"] = "block"
    """Whether text looks at alpha where both share a sequence: not at all (`block`), e times less (`bias`, as
    published for CogVideoX), or as at colour (`open`). Wan has no such sequence and takes `block` only."""
    domain_embedding: bool = True
    """A trained vector, zero at first, added to every token of alpha."""
    shared_noise: bool = True
    """Samples start from the same noise in both halves; in training each has its own."""
    alpha_from: Literal["mean", "max"] = "mean"
    """Of the three channels that alpha is decoded to; `max` as published."""


class Merged(Section):
    """Colour and alpha in one latent, made and split by a trained codec."""

    kind: Literal["merged"]
    """One latent of the usual size (after Wan-Alpha); needs a `codec`."""
    codec: str = Field(min_length=1)
    """Folder of a codec: of a run that trained one, or of an import; `twin:wan` ships with inlaid."""
    colors: int = Field(default=4, ge=1, le=8)
    """Colours that each clip is encoded on; every showing takes one of them."""


Tuner = Annotated[LowRank | Full | Codec, Field(discriminator="kind")]
Alpha = Annotated[Opaque | Joint | Merged, Field(discriminator="kind")]


class Config(Section):
    """A whole recipe."""

    run: str = Field(min_length=1)
    """Folder that the run is written to and that every later command takes."""
    seed: int = Field(default=0, ge=0)
    """Order, noise and times are functions of it."""
    model: Model
    data: Data
    objective: Objective = Objective()
    tuner: Tuner = LowRank()
    alpha: Alpha = Opaque()
    optim: Optim = Optim()
    train: Train = Train()
    sample: Sample = Sample()
    memory: Memory = Memory()
    runtime: Runtime = Runtime()

    @model_validator(mode="before")
    @classmethod
    def _kind(cls, value: Any) -> Any:
        out = dict(value) if isinstance(value, dict) else value
        for name, kind in (("tuner", "lora"), ("alpha", "opaque")):
            section = out.get(name) if isinstance(out, dict) else None
            if isinstance(section, dict):
                out[name] = {"kind": kind, **section}
        return out

    @model_validator(mode="after")
    def _together(self) -> Config:
        wrong = list(_conflicts(self))
        if wrong:
            raise ValueError("\n".join(wrong))
        return self


def _conflicts(config: Config) -> Iterator[str]:
    """Keys that are fine alone, but not together."""
    memory, tuner, parallel = config.memory, config.tuner, config.runtime.parallel
    if any(source.preserve for source in config.data.sources):
        if tuner.kind == "full":
            yield "data.sources.preserve: full fine-tuning keeps no untuned network; train an adapter"
        elif parallel in ("fsdp", "zero3"):
            yield f"data.sources.preserve: not with runtime.parallel={parallel}; use ddp or zero2"
        if config.alpha.kind != "opaque":
            yield "data.sources.preserve: the untuned network draws no alpha that could be kept; leave it out"
        if all(source.preserve for source in config.data.sources):
            yield "data.sources.preserve: every source has it, and nothing new is learned; leave one without"
    small = [k for k in ("quantize", "layerwise_casting") if getattr(memory, k) is not None]
    if tuner.kind == "full":
        for key in small:
            yield (
                f"memory.{key}: only for a base that stays frozen; full fine-tuning trains it in float32: "
                "leave it out, or train an adapter (tuner.kind=lora)"
            )
    elif isinstance(tuner, LowRank) and tuner.kind in ("lokr", "loha") and tuner.dropout:
        yield f"tuner.dropout: {tuner.kind} has none before its update; leave it out"
    if len(small) == 2:
        yield "memory.layerwise_casting: memory.quantize makes the base small already; leave one of them out"
    elif memory.layerwise_casting == "float8" and tuner.kind == "dora":
        yield (
            "memory.layerwise_casting: a DoRA takes norms of weights, which plain float8 does not have: use "
            "memory.quantize=float8, which costs the same"
        )
    if memory.quantize in ("int4", "nf4") and tuner.kind == "loha":
        yield f"memory.quantize: LoHa needs unpacked weights: use int8 or float8, not {memory.quantize}"
    if memory.offload_optimizer and config.optim.name != "adamw":
        yield f"memory.offload_optimizer: for optim.name=adamw; {config.optim.name} is small already"
    if parallel != "ddp":
        for key in [*small, *(["offload_optimizer"] if memory.offload_optimizer else [])]:
            yield f"memory.{key}: runtime.parallel={parallel} shards instead; use ddp, or leave it out"
    if tuner.kind == "codec":
        yield from _codec_conflicts(config, tuner)
    if config.runtime.compile and memory.layerwise_casting:
        yield "runtime.compile: memory.layerwise_casting moves weights between layers; leave one of them out"


def _codec_conflicts(config: Config, tuner: Codec) -> Iterator[str]:
    """What training a codec leaves no room for."""
    if config.alpha.kind != "opaque":
        yield f"alpha.kind: a codec is what makes {config.alpha.kind} alpha possible; leave `alpha` out"
    if tuner.train == "merge" and tuner.start is None:
        yield (
            "tuner.start: train=merge learns what frozen decoders can split, and the VAE's own know no "
            "alpha; name a codec whose decoders were trained, or use train=merge+decoders"
        )
    if config.runtime.parallel != "ddp":
        yield f"runtime.parallel: every process holds a whole codec: use ddp, not {config.runtime.parallel}"
    if config.runtime.compile:
        yield "runtime.compile: the codec has no repeated blocks to compile; leave it out"
    for key in ("quantize", "layerwise_casting"):
        if getattr(config.memory, key) is not None:
            yield f"memory.{key}: the VAE of a codec stays in float32; leave it out"
    if config.sample.every:
        yield "sample.every: a codec draws nothing, validation reconstructs held-out clips; leave it out"


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would keep the last and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (k for k, _ in node.value if isinstance(k, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"`{key.value}` comes twice; write it once", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merges two nested mappings; `over` wins, lists are replaced whole."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Loads a recipe, or the recipe of a run folder.

    Args:
        path: YAML file, or a run folder (its `config.yaml`), whose `run` then is where it lies now.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        ValueError: with every mistake of the recipe, one per line.
    """
    path, moved = Path(path), {}
    if path.is_dir():
        path, moved = path / "config.yaml", {"run": str(path)}
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe; `inlaid new wan DATA` writes one")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a recipe, it is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{path}: not valid YAML: {where}{what or ' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        found = "the file is empty" if raw is None else f"found {type(raw).__name__}"
        raise ValueError(f"{path}: a recipe is a mapping of sections (run, model, data, ...); {found}")
    return build({**raw, **moved}, overrides, name=str(path))


def build(raw: Mapping[str, Any], overrides: Iterable[str] = (), *, name: str = "recipe") -> Config:
    """Makes a config from a nested mapping: adds the family's defaults and overrides, then validates.

    Raises:
        ValueError: with every mistake, one per line.
    """
    from inlaid import families

    for text in overrides:
        key, mark, value = text.partition("=")
        if not mark or not all(key.strip().split(".")):
            raise ValueError(f"`{text}` is not an override; write section.key=value, such as optim.lr=2e-4")
        try:
            nested: Any = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"`{text}`: the value is not valid YAML") from None
        parts = key.strip().split(".")
        for part in reversed(parts):
            nested = {part: nested}
        raw = merge(raw, nested)
        if len(parts) > 2 and parts[:2] == ["data", "sources"]:
            raise ValueError(f"`{text}`: data.sources is a list; write it whole, such as data.sources=[a, b]")
    section = raw.get("model")
    family = section.get("family") if isinstance(section, Mapping) else None
    defaults = families.get(family).defaults if isinstance(family, str) else {}
    try:
        return Config.model_validate(merge(defaults, raw))
    except ValidationError as error:
        raise ValueError(explain(error, name)) from None


def explain(error: ValidationError, name: str, section: str | None = None) -> str:
    """What is wrong with a recipe, one line per mistake.

    Args:
        error: of `Config`, or of one section.
        name: of the recipe.
        section: name of the section, where the error is of one.
    """
    found = [line for e in error.errors() for line in _mistake(e, [section] if section else []).splitlines()]
    return "\n".join([f"{name}: {len(found)} mistake{'s' if len(found) > 1 else ''}", *found])


_TAGS: dict[tuple[str, ...], type[Section]] = {
    (section, kind): part
    for section, parts in (("tuner", (LowRank, Full, Codec)), ("alpha", (Opaque, Joint, Merged)))
    for part in parts
    for kind in get_args(part.model_fields["kind"].annotation)
}
"""The section of each kind, for sections that come in kinds."""


def _mistake(error: Any, within: list[str]) -> str:
    loc = [*within, *map(str, error["loc"])]
    where = [p for i, p in enumerate(loc) if i == 0 or (loc[i - 1], p) not in _TAGS]
    name, kind, given = ".".join(where), error["type"], repr(error["input"])
    if kind == "extra_forbidden":
        known = list(_TAGS[tuple(loc[:2])].model_fields) if tuple(loc[:2]) in _TAGS else _keys(where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        return f"  {name}: unknown key; {hint}"
    if not where:
        return "\n".join(f"  {line}" for line in str(error["ctx"]["error"]).splitlines())
    if kind == "missing":
        return f"  {name}: missing"
    if kind == "union_tag_invalid":
        kinds = [k for section, k in _TAGS if section == where[0]]
        return f"  {name}.kind: no `{error['ctx']['tag']}`; there are: {', '.join(kinds)}"
    if kind in ("model_type", "model_attributes_type"):
        says = f"needs keys below it ({', '.join(_keys(where))})"
    elif kind in ("tuple_type", "list_type"):
        says = "needs a list, such as [a, b]"
    else:
        says = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"  {name}: {says}" + (f" (got {given})" if len(given) <= 80 and "`" not in says else "")


def _keys(where: list[str]) -> list[str]:
    section: Any = {
        "": Config,
        "data.sources": Source,
        "data.matte": Matte,
        "tuner": LowRank,
        "alpha": Joint,
    }.get(".".join(p for p in where if not p.isdigit()))
    if section is None:
        field = Config.model_fields.get(where[0])
        section = field.annotation if field else Config
    return list(section.model_fields)


def save(config: Config, path: Path) -> None:
    """Writes the fully resolved recipe as YAML."""
    values = json.loads(config.model_dump_json())
    with atomic(path) as temporary:
        temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), "utf-8")


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    return Config.model_json_schema()


def reference() -> str:
    """The reference page of all sections in Markdown (`docs/reference/config.md`)."""
    sections = {
        "(top level)": Config,
        "model": Model,
        "data": Data,
        "data.sources": Source,
        "data.matte": Matte,
        "objective": Objective,
    }
    sections |= {
        "tuner (lora, dora, lokr, loha)": LowRank,
        "tuner (full)": Full,
        "tuner (codec)": Codec,
        "alpha (opaque)": Opaque,
        "alpha (joint)": Joint,
        "alpha (merged)": Merged,
        "optim": Optim,
        "train": Train,
    }
    sections |= {"sample": Sample, "memory": Memory, "runtime": Runtime}
    out = [
        "# Recipe reference",
        "",
        "Generated from the schema by `python -m inlaid.config`; a test keeps it current.",
        "",
    ]
    for title, section in sections.items():
        out += [
            f"## {title}",
            "",
            (section.__doc__ or "").strip().splitlines()[0],
            "",
            "| key | default | meaning |",
            "|---|---|---|",
        ]
        for key, field in section.model_fields.items():
            if field.description is None:
                continue
            default = "required" if field.is_required() else f"`{json.dumps(field.default)}`"
            out.append(
                f"| `{key}` | {default} | {field.description.replace('|', '/').replace(chr(10), ' ')} |"
            )
        out.append("")
    return "\n".join(out)


if __name__ == "__main__":
    print(reference(), end="")
