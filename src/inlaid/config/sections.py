"""Sections of a recipe; the attribute docstrings are the help texts of the keys.

A value comes from the first of these that sets it: `key=value` override, YAML file, default of the model
family, default of the section. An unknown key is an error.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from inlaid.config.conflicts import conflicts
from inlaid.config.parse import Decimal, Integer, shorten
from inlaid.config.values import read_values

ALPHA_EPS = 2 / 255
"""Alpha up to this value, on a scale of 0 to 1, counts as transparent, because lossy codecs leave small
values in empty regions."""

UserPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""Path of a recipe; `~` is the home folder, as in a shell."""


class Section(BaseModel):
    """Base class of the sections of a recipe. Instances are immutable.

    The attribute docstrings of a section are the help texts of its keys.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
    prose: ClassVar[frozenset[str]] = frozenset()
    """Keys whose texts may contain tabs and line breaks, such as prompts."""

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, value: Any) -> Any:
        return read_values(cls, value, cls.prose) if isinstance(value, dict) else value


class Model(Section):
    """The network to train."""

    family: str
    """Architecture: `wan`, `cogvideox`, `mochi`, `midi`, or the name of a plug-in (entry point group
    `inlaid.families`)."""
    checkpoint: str
    """Base model: Hugging Face Hub ID, local folder in diffusers layout, or one of the tiny trained models
    that ship with inlaid (`tiny:wan`, `tiny:midi`)."""
    revision: str | None = None
    """Branch, tag or commit of a checkpoint on the Hugging Face Hub."""
    task: Literal["t2v", "i2v"] | None = None
    """`t2v` trains text-to-video; `i2v` trains image-to-video, from text and a first image. Default: the task
    of the checkpoint. Only Wan 2.2 TI2V-5B supports both tasks."""
    expert: Literal["high", "low"] | None = None
    """Wan 2.2 A14B only: the expert to train, `high` for the high-noise expert or `low` for the low-noise
    expert. Each expert is trained on its own interval of noise levels."""
    options: dict[str, str | int | float | bool] = {}
    """Options of the model family, as `name: value`. The how-to page of the family lists them."""


class Source(Section):
    """One data source: a folder or manifest of training clips."""

    path: UserPath
    """Path of the clips: a folder of clips, a manifest (`.csv`, `.tsv`, `.jsonl`, `.json`), a folder with
    `prompts.txt` and `videos.txt`, or a folder of precomputed latents from another trainer."""
    layout: Literal["auto", "folder", "lines", "csv", "jsonl", "precomputed"] = "auto"
    """Layout of clips and captions; `auto` detects it. `precomputed` reads latents and text embeddings
    instead of clips. `auto` selects `precomputed` if the folder contains precomputed latents and no video
    that lacks them."""
    root: UserPath | None = None
    """Base folder of the relative paths in a manifest. A path outside of this folder is an error. Default:
    the folder of the manifest."""
    video_column: str | None = None
    """Manifest column with the path of the clip. Default: the first existing column of video, file_name,
    file, path, image, frames_path, video_path, filename, file_path, image_path and, in runs that train on
    alpha, video_rgb, video_fgr, rgb, fgr. With `layout: lines`, the name of the file that lists the clips
    (default `videos.txt`)."""
    caption_column: str | None = None
    """Manifest column with the caption. Default: the first existing column of caption, prompt, text. With
    `layout: lines`, the name of the file that lists the captions (default `prompts.txt`, `prompt.txt` or
    `captions.txt`)."""
    alpha_column: str | None = None
    """Manifest column with the path of the alpha matte, in runs that train on alpha. Default: the first
    existing column of video_alpha, video_pha, alpha, pha, matte. If there is none, an alpha matte beside the
    clip is used."""
    group_column: str | None = None
    """Manifest column by which `inlaid evaluate` groups its table, such as an activity or a subject."""
    repeats: int = Field(default=1, ge=1)
    """Number of times each clip appears in one epoch."""
    weight: float = Field(default=1.0, gt=0)
    """Sampling weight of this source relative to other sources, multiplied by `repeats`. With a weight of
    0.5, each clip appears in every second epoch."""
    prior_preservation: float = Field(default=0.0, ge=0)
    """Weight of the prior preservation loss for clips of this source. 0 disables it: the clips are trained on
    normally. Above 0, the training target is the prediction without the adapter, so the adapter preserves
    what the base model generates for such captions. A weight of 10 preserves nearly everything. Unlike in
    DreamBooth, the clips need not be generated by the base model."""


class Matte(Section):
    """Reading and correction of alpha in clips and alpha mattes. Ignored when `alpha.kind` is `opaque`."""

    premultiplied: bool | Literal["auto"] = "auto"
    """`true`: color in the files is premultiplied by alpha, so inlaid divides it by alpha. `auto` decides for
    each clip; `inlaid check` lists the clips that are treated as premultiplied."""
    invert: bool = False
    """`true`: white means transparent in the alpha mattes."""
    limited: bool = False
    """`true`: alpha mattes use limited range (black 16, white 235) but do not declare it in the file."""
    snap: int = Field(default=0, ge=0, le=127)
    """Alpha values within this distance of 0 or 255 are set to 0 or 255. A value of 2 removes the residue
    that lossy codecs leave in empty regions."""
    decontaminate: bool = False
    """Remove the color of an old background from soft edges, by extending color outward from opaque pixels.
    Do not use it for smoke or glass, because it replaces the color of partially transparent pixels."""
    background: Literal["grow", "blur", "keep"] = "grow"
    """Color of fully transparent pixels: `grow` extends the color of the visible pixels, `blur` fills with a
    blurred copy of that color, `keep` leaves the color in the file. Composites never show this color, but the
    network is trained on it."""


class Data(Section):
    """The training clips, and how they are cropped, sampled and captioned."""

    prose: ClassVar[frozenset[str]] = frozenset({"trigger", "caption_prefix"})

    sources: list[Source]
    """One path, a list of paths, or a list of sources."""
    size: tuple[int, int] = (480, 832)
    """Height and width in pixels. If `aspects` is set, only the area (height x width) is used."""
    aspects: list[str] = []
    """Aspect ratio buckets as `width:height`, such as `16:9`, `1:1` or `9:16`. Each clip is assigned to the
    bucket with the nearest aspect ratio. Empty: a single bucket of `size`."""
    frames: list[int] = [81]
    """Clip lengths in frames, one number or a list. Each clip is used at the longest of these lengths that it
    can fill."""
    fps: float | None = Field(default=None, ge=0.001, le=1000)
    """Frame rate at which clips are sampled. Default: the frame rate at which the base model was trained."""
    stride: int | None = Field(default=None, ge=1)
    """Minimum distance between the starts of two windows (training examples) of a long clip, in frames at
    `fps`. Does not skip frames within a window. Default: the length of a window, so windows do not
    overlap."""
    max_windows: int = Field(default=1, ge=1)
    """Maximum number of windows (training examples) per clip, spread evenly over the clip."""
    slow: Literal["repeat", "keep"] = "repeat"
    """Treatment of clips with a frame rate below `fps`: `repeat` duplicates frames and keeps the speed,
    `keep` uses the frames unchanged, which plays the clip faster."""
    matte: Matte = Matte()
    trigger: str = ""
    """Trigger word, added at the start of every caption that does not contain it."""
    caption_prefix: str = ""
    """Text added at the start of every caption."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Fraction of training samples that use the empty caption, so that the model keeps supporting
    classifier-free guidance."""
    validation: float = Field(default=0.1, ge=0)
    """Clips excluded from training to measure the validation loss. A value below 1 is a fraction of the
    clips; a value of 1 or more is a number of clips."""
    cache: UserPath | None = None
    """Folder for cached latents and text embeddings; several runs may share it. Default: `cache` in the run
    folder."""
    bad_clips: Literal["stop", "quarantine"] = "stop"
    """Reaction of `inlaid cache` and `inlaid train` to clips with errors. `stop` ends the command.
    `quarantine` continues without these clips and lists them in `quarantine.json` in the run folder."""

    @field_validator("sources", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        many = value if isinstance(value, list) else [] if value is None else [value]
        return [
            {"path": getattr(v, "text", v)} if isinstance(v, (str, Integer, Decimal)) else v
            for v in (str(v) if isinstance(v, Path) else v for v in many)
        ]

    @field_validator("sources")
    @classmethod
    def _some(cls, value: list[Source]) -> list[Source]:
        if not value:
            raise ValueError("needs at least one source")
        return value

    @field_validator("frames", mode="before")
    @classmethod
    def _frames(cls, value: Any) -> Any:
        return value if isinstance(value, (list, tuple)) else [value]

    @field_validator("frames")
    @classmethod
    def _positive(cls, value: list[int]) -> list[int]:
        if min(value, default=0) < 1:
            raise ValueError("needs at least one length, each of at least 1 frame")
        return sorted(set(value))

    @field_validator("aspects")
    @classmethod
    def _ratios(cls, value: list[str]) -> list[str]:
        for text in value:
            parts = [p.strip() for p in text.split(":")]
            if len(parts) != 2 or not all(
                re.fullmatch(r"\d{1,6}(\.\d{0,6})?", p, re.ASCII) and float(p) > 0 for p in parts
            ):
                raise ValueError(f"`{shorten(text, 60)}` is not an aspect ratio such as `16:9`")
        return value


class Objective(Section):
    """Distribution and loss weight of the noise levels; the model family defines the noising process."""

    preset: Literal["logit_normal", "diffsynth", "uniform"] = "logit_normal"
    """`logit_normal`: logit-normal noise levels, loss weight 1. `diffsynth` (as in DiffSynth-Studio): table
    of 1000 levels, shift 5, bell-shaped loss weight. `uniform`: uniform noise levels, loss weight 1."""
    shift: float | None = Field(default=None, gt=0)
    """Timestep shift (flow shift) s: a sampled level u in [0, 1] becomes s u / (1 + (s - 1) u). Default: the
    shift of the preset, else the model family's shift for this size."""
    mean: float = 0.0
    """Mean of the normal distribution of `logit_normal`."""
    std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal distribution of `logit_normal`."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Interval of noise levels to train on, within [0, 1]. The experts of Wan 2.2 A14B are limited to their
    own interval automatically."""

    @field_validator("interval")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("needs 0 <= low < high <= 1")
        return value


class LowRank(Section):
    """Low-rank adapter on the frozen denoiser, implemented with peft."""

    kind: Literal["lora", "dora", "lokr", "loha"] = "lora"
    """`lora`: low-rank update. `dora`: LoRA plus a trained magnitude per output row of the weight; slower,
    often better. `lokr`: Kronecker product; a much smaller file. `loha`: elementwise (Hadamard) product of
    two low-rank updates, which has a higher rank."""
    rank: int = Field(default=32, ge=1)
    """Rank of the update. A higher rank has more capacity and needs more memory."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha: the update is scaled by alpha / rank. Default: alpha = rank. The scale is then 1, so the
    adapter also loads correctly in tools that ignore alpha."""
    targets: list[str] = []
    """Modules to adapt, as regular expressions over full module names; an expression without a match is an
    error. Default: the targets of the model family."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout probability before the low-rank update; LoRA and DoRA only."""


class Full(Section):
    """Full fine-tuning of the denoiser."""

    kind: Literal["full"] = "full"
    """Trains all weights of the denoiser, or only the parameters that match `targets`."""
    targets: list[str] = []
    """Parameters to train, as regular expressions over full parameter names; an expression without a match is
    an error. Default: all parameters."""


class RgbaVae(Section):
    """Training of an RGBA VAE instead of the denoiser: a merge block and two decoders on the frozen VAE.

    The merge block combines the encodings of color and alpha into one latent. The decoders reconstruct color
    and alpha from that latent.
    """

    train: Literal["merge+decoders", "merge"] = "merge+decoders"
    """`merge+decoders` trains the merge block and both decoders. `merge` trains only the merge block, with
    the frozen decoders of `init_from`."""
    rank: int = Field(default=128, ge=1)
    """Rank of the low-rank update of each decoder. With `init_from`, the rank stored in that RGBA VAE is
    used."""
    init_from: str | None = Field(default=None, min_length=1)
    """Folder of an RGBA VAE to initialize from. Default: a new merge block (see `init`) and the decoders of
    the base VAE."""
    init: Literal["random", "encoder"] = "random"
    """Initialization of the merge block without `init_from`. `random`: random weights. `encoder`: the merge
    block initially returns the VAE's encoding of the color. Color is then correct from the start, and only
    alpha remains to be learned."""
    loss: Literal["paper", "reference"] = "paper"
    """Preset of the loss. `paper`: edge terms use the Sobel filter, and perceptual terms the norm of the
    difference of VGG features, with ImageNet normalization of the images. `reference` (the published training
    code): edge terms use central differences, and perceptual terms the squared error of VGG features, without
    normalization."""
    perceptual: str = Field(default="none", min_length=1)
    """VGG16 weights for the perceptual loss terms: a local file, or `OWNER/NAME/FILE` on the Hugging Face
    Hub. `none` disables these terms."""
    edge: Literal["sobel", "central"] | None = None
    """Filter of the edge terms of the loss. Default: the filter of the preset `loss`."""
    vgg_normalize: Literal["imagenet", "none"] | None = None
    """Normalization of images before VGG16. Default: the normalization of the preset `loss`."""
    hard_mask: Literal["reconstructed", "true"] = "reconstructed"
    """Alpha that determines the transparent pixels of the reconstruction in the loss. Three loss terms
    replace these pixels with a background color. `reconstructed`: the reconstructed alpha. `true`: the alpha
    of the clip."""
    alpha_eps: float = Field(default=ALPHA_EPS, ge=0, lt=0.5)
    """Alpha up to this value, in [0, 1], counts as transparent, because lossy codecs leave small values in
    empty regions. The paper uses 0."""
    colors: list[tuple[int, int, int]] = []
    """Background colors, RGB in 0-255, over which clips are composited before encoding. Empty: the eight
    corners of the RGB cube as in the paper, so that no single color means transparency."""
    anchor: float = Field(default=0.0, ge=0)
    """Weight of a loss term that keeps latents close to the base VAE's latents of the clip over dark gray. A
    denoiser trained on opaque clips then adapts faster. Not in the paper."""
    visible: float = Field(default=0.0, ge=0)
    """Weight of an additional loss term: the color error over visible pixels only. Needed for small subjects.
    Not in the paper."""
    visible_alpha: float = Field(default=0.0, ge=0)
    """Weight of an additional loss term: the alpha error over visible pixels only. Needed for glass and
    smoke. Not in the paper."""
    noise: float = Field(default=0.0, ge=0)
    """Maximum standard deviation of the noise that is added to latents before decoding, in units of the
    latents' standard deviation. It makes the decoders robust to imperfect latents. Not in the paper."""


class Optim(Section):
    """The optimizer and its learning rate schedule."""

    name: Literal["adamw", "adamw8bit", "adamw4bit", "prodigy"] = "adamw"
    """Optimizer: `adamw` (torch), `adamw8bit` (bitsandbytes, a quarter of the optimizer state), `adamw4bit`
    (torchao, an eighth of the optimizer state), or `prodigy` (prodigyopt, adapts the learning rate)."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate after warm-up. For `prodigy`, the default is 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Epsilon in the denominator of the update, for numerical stability."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay; norms, biases and DoRA magnitudes are excluded."""
    warmup: int = Field(default=0, ge=0)
    """Number of linear warm-up steps."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate schedule after warm-up: `constant`, or `cosine` or `linear` decay to zero at the last
    step."""
    clip: float | None = Field(default=1.0, gt=0)
    """Maximum gradient norm; null disables clipping."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average (EMA) of the trained weights. If set, validation, samples and
    exports use the EMA weights."""

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("needs two numbers >= 0 and < 1")
        return value


class Train(Section):
    """Length of training, batch size, and what is written during training."""

    steps: int = Field(default=1000, ge=1)
    """Number of optimizer steps."""
    batch: int = Field(default=1, ge=1, le=4096)
    """Number of samples per micro-batch on each device."""
    accumulate: int = Field(default=1, ge=1)
    """Gradient accumulation: number of micro-batches per optimizer step on each device."""
    save_every: int = Field(default=250, ge=1)
    """Number of steps between checkpoints. A checkpoint is also written at the last step and on Ctrl-C."""
    keep: int = Field(default=3, ge=1)
    """Number of checkpoints kept on disk; older ones are deleted."""
    log_every: int = Field(default=10, ge=1)
    """Number of steps between records in `metrics.jsonl` and in the trackers."""
    validate_every: int = Field(default=100, ge=1)
    """Number of steps between measurements of the validation loss."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = ["tensorboard"]
    """Experiment trackers that receive the metrics in addition to `metrics.jsonl`."""
    accept_changed_data: bool = False
    """Resume although clips or captions have changed since the checkpoint. Applies to one launch only."""


CARRIERS = ("mov", "webm", "png", "apng", "mkv")
"""File formats for transparent videos."""


class Sample(Section):
    """Samples generated during training, and the defaults of `inlaid generate`."""

    prose: ClassVar[frozenset[str]] = frozenset({"prompts", "negative_prompt"})

    prompts: list[str] = []
    """Prompts for samples during training and for `inlaid evaluate`. Empty: the first captions of the
    dataset."""
    images: list[list[UserPath]] = []
    """Image-to-video: the first image of each prompt, or a list of its first and last image; without prompts,
    the images come from the clips. Scenes: a list of input image and segmentation for each sample."""
    every: int | None = Field(default=None, ge=1)
    """Number of steps between samples during training. Default: no samples."""
    negative_prompt: str = ""
    """Negative prompt of classifier-free guidance."""
    size: tuple[int, int] | None = None
    """Height and width in pixels. Default: `data.size`."""
    frames: int | None = Field(default=None, ge=1)
    """Number of frames. Default: the largest of `data.frames`."""
    steps: int = Field(default=30, ge=1)
    """Number of denoising steps."""
    guidance: float = Field(default=5.0, ge=0)
    """Classifier-free guidance scale."""
    transparent: list[str] = ["mov", "webm"]
    """File formats written for each transparent video, in addition to an mp4 over a checkerboard: `mov`
    (ProRes 4444, for editing), `webm` (VP9, small, for browsers), `png` (a .zip of images, lossless), `apng`
    (lossless), `mkv` (FFV1, lossless)."""
    grid: int = Field(default=256, ge=16, le=1024)
    """Scenes: number of cells per side of the grid from which meshes are extracted, a power of two."""
    triangles: int | None = Field(default=None, ge=100)
    """Scenes: maximum number of triangles per object; larger meshes are simplified. Default: no
    simplification."""
    seed: int = Field(default=42, ge=0, lt=2**63)
    """Seed of the first video of a prompt; video i of the prompt uses seed + i."""

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
            raise ValueError(
                f"`{shorten(wrong[0], 60)}` cannot carry alpha; choose from: {', '.join(CARRIERS)}"
            )
        return value

    @field_validator("prompts")
    @classmethod
    def _said(cls, value: list[str]) -> list[str]:
        if not all(text.strip() for text in value):
            raise ValueError("contains an empty prompt; remove it or write a prompt")
        return value


class Memory(Section):
    """Options that reduce memory at the price of speed or precision."""

    gradient_checkpointing: bool | Annotated[int, Field(ge=1)] = True
    """Gradient checkpointing: recompute activations in the backward pass. This needs far less memory and
    about a third more time. A number n checkpoints only every n-th block."""
    quantize: Literal["int8", "int4", "float8", "nf4"] | None = None
    """Format to which the linear layers of the frozen blocks are quantized (`int8`, `float8`: torchao; `nf4`:
    bitsandbytes; `int4`: built in). Adapters only."""
    layerwise_casting: Literal["float8", "bfloat16"] | None = None
    """Type in which the frozen base model is stored. Each layer is cast to the run's precision while it
    computes. Adapters only."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory and run the optimizer step there (`adamw` on CUDA only)."""


class Runtime(Section):
    """Device, precision and processes. These settings change the result only by rounding."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Device to train on. `auto`: CUDA if available, else Apple MPS, else CPU."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the frozen base model and its activations; adapters, losses and optimizer state are
    float32. `auto`: bfloat16 on CUDA, else float32."""
    world_size: int | None = Field(default=None, ge=1)
    """Number of processes that this recipe requires; a launch with another number is an error. Default: any
    number."""
    rank_timeout: float = Field(default=300, gt=0)
    """Seconds after which a process that does not respond counts as stopped, and the other processes end. At
    the start, processes wait for each other this long, but at least 60 s."""
    workers: int = Field(default=2, ge=0)
    """Number of threads that decode clips while the cache is filled."""
    compile: bool = False
    """Compile the repeated blocks with torch.compile: faster steps, but minutes of compilation at the start
    and again at the second clip shape."""
    parallel: Literal["ddp", "fsdp", "zero2", "zero3"] = "ddp"
    """Parallelism over several processes. `ddp`: each process holds all weights. `fsdp` (FSDP2): weights,
    gradients and optimizer state are sharded. `zero3` (DeepSpeed): the same as `fsdp`. `zero2` (DeepSpeed):
    only gradients and optimizer state are sharded."""
    shard_size: int | None = Field(default=None, ge=2)
    """Number of processes over which `fsdp` shards; it must divide the number of processes. Each group of
    this size holds a complete copy (HSDP), so that weights are gathered within a machine. Default: all
    processes."""
    sequence: int = Field(default=1, ge=1)
    """Number of processes that share the tokens of each sample (Ulysses sequence parallelism), for clips
    whose activations do not fit on one GPU. It must divide the number of processes and the model's attention
    heads."""


class Opaque(Section):
    """Training on RGB clips, without alpha."""

    kind: Literal["opaque"] = "opaque"
    """RGB only; transparent clips are composited over white."""


class Joint(Section):
    """Color and alpha as two clips concatenated into one token sequence, with equal token positions."""

    kind: Literal["joint"]
    """Two latents, color first. The adapter changes the alpha tokens only (method of TransPixeler)."""
    text_to_alpha: Literal["block", "bias", "open"] = "block"
    """Attention of text tokens to alpha tokens, in models with text and video in one sequence. `block`: none.
    `bias`: attention weights are divided by e = 2.718, as published for CogVideoX. `open`: the same as to
    color tokens. Wan uses cross-attention and accepts `block` only."""
    domain_embedding: bool = True
    """Add a trained vector, initialized to zero, to every alpha token."""
    shared_noise: bool = True
    """Start sampling from the same noise for color and alpha. Training uses independent noise for each."""
    alpha_from: Literal["mean", "max"] = "mean"
    """Reduction of the three decoded channels of alpha to a single channel. TransPixeler uses `max`."""


class Merged(Section):
    """Color and alpha in one latent that an RGBA VAE encodes and decodes."""

    kind: Literal["merged"]
    """One latent of the usual size (method of Wan-Alpha). Needs an RGBA VAE; see `vae`."""
    vae: str = Field(min_length=1)
    """Folder of an RGBA VAE, from a training run or from an import. `tiny:wan` selects the RGBA VAE that
    ships with inlaid."""
    colors: int = Field(default=4, ge=1, le=8)
    """Number of background colors over which each clip is composited and encoded. Each training sample uses
    one of the resulting latents."""


Tuner = Annotated[LowRank | Full, Field(discriminator="kind")]

Alpha = Annotated[Opaque | Joint | Merged, Field(discriminator="kind")]


class Config(Section):
    """A whole recipe. A model family may override defaults, such as `data.size` and `sample.guidance`."""

    run: UserPath
    """Run folder, which contains all output and is the first argument of later commands."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of clips, of the noise, and of the noise levels."""
    model: Model
    data: Data
    objective: Objective = Objective()
    tuner: Tuner = LowRank()
    alpha: Alpha = Opaque()
    rgba_vae: RgbaVae | None = None
    """Section for training an RGBA VAE instead of the denoiser (method of Wan-Alpha). An RGBA VAE encodes
    color and alpha of a clip into one latent, and decodes both from it. Captions are not used."""
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
        wrong = list(conflicts(self))
        if wrong:
            raise ValueError("\n".join(wrong))
        return self
