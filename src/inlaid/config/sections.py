"""Sections of a recipe, with the help of every key.

Values are layered: section default < family default < YAML < `key=value`. An unknown key is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from inlaid.config.conflicts import conflicts
from inlaid.config.parse import Decimal, Integer, shorten
from inlaid.config.values import read_values

ALPHA_EPS = 2 / 255
"""Alpha up to this value, in [0, 1], counts as transparent: lossy files keep small values there."""


class Section(BaseModel):
    """Frozen section of a recipe; its attribute docstrings are the help texts of its keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )
    prose: ClassVar[frozenset[str]] = frozenset()
    """Keys with text for people or for the text encoder, which may contain tabs and line breaks."""

    @model_validator(mode="before")
    @classmethod
    def _as_meant(cls, value: Any) -> Any:
        return read_values(cls, value, cls.prose) if isinstance(value, dict) else value


class Model(Section):
    """The network to train."""

    family: str
    """Architecture: `wan`, `cogvideox`, `mochi`, `midi`, or a plug-in (entry points `inlaid.families`)."""
    checkpoint: str
    """Base model: Hub id, local folder in diffusers layout, or `tiny:wan` or `tiny:midi` for the tiny trained
    models that ship with inlaid."""
    revision: str | None = None
    """Branch, tag or commit of a Hub checkpoint."""
    task: Literal["t2v", "i2v"] | None = None
    """`t2v` trains text-to-video, `i2v` trains video from text and a first image. Default: the task of the
    checkpoint; only Wan 2.2 TI2V-5B supports both."""
    expert: Literal["high", "low"] | None = None
    """Wan 2.2 A14B only: which of the two experts to train, `high` noise or `low` noise. Each expert trains
    on its own interval of noise levels."""
    options: dict[str, str | int | float | bool] = {}
    """Options of the family, as `name: value`; the how-to page of the family lists its options."""


class Source(Section):
    """One source of training clips."""

    path: str = Field(min_length=1)
    """Folder of clips, manifest (`.csv`, `.jsonl`, `.json`), folder with `prompts.txt` and `videos.txt`, or
    folder of precomputed latents from another trainer."""
    layout: Literal["auto", "folder", "lines", "csv", "jsonl", "precomputed"] = "auto"
    """Layout of clips and captions; `auto` detects it. `precomputed` reads latents and text embeddings, not
    clips; `auto` selects it if the folder has such files, and either no videos or such a file for every
    video."""
    root: str | None = None
    """Folder that the paths in the manifest are relative to; paths outside of it are errors. Default:
    the folder of the manifest."""
    video_column: str | None = None
    """Column with the path of the clip. Default: the first that exists of video, file_name, file, path,
    image, frames_path, video_path, filename, file_path, image_path and, for transparent runs, video_rgb,
    video_fgr, rgb, fgr. With `layout: lines`, the file that lists the clips; default `videos.txt`."""
    caption_column: str | None = None
    """Column with the caption. Default: the first that exists of caption, prompt, text. With `layout: lines`,
    the file that lists the captions; default `prompts.txt`, `prompt.txt` or `captions.txt`."""
    alpha_column: str | None = None
    """Column with the path of the alpha matte, for transparent runs. Default: the first that exists of
    video_alpha, video_pha, alpha, pha, matte; without such a column, the alpha matte beside the clip if there
    is one."""
    group_column: str | None = None
    """Column that groups the table of `inlaid evaluate`, for example an activity or a subject."""
    repeats: int = Field(default=1, ge=1)
    """Number of times each clip appears in one epoch."""
    weight: float = Field(default=1.0, gt=0)
    """Sampling weight of this source relative to the others, in addition to `repeats`; with 0.5, each clip
    appears in every second epoch."""
    prior_preservation: float = Field(default=0.0, ge=0)
    """Weight of the prior preservation loss for clips of this source. Above 0, the training target is the
    prediction without the adapter, so the adapter preserves what the base model generates for such captions.
    Unlike in DreamBooth, any clips can be used. 10 preserves nearly everything; 0 trains on the clips."""


class Matte(Section):
    """How alpha is read from clips and alpha mattes, and corrected. Ignored when `alpha.kind` is `opaque`."""

    premultiplied: bool | Literal["auto"] = "auto"
    """Color in the files is premultiplied by alpha; inlaid divides it by alpha. `auto` decides for each clip,
    and `inlaid check` lists the clips that it treats as premultiplied."""
    invert: bool = False
    """White means transparent in the alpha mattes."""
    limited: bool = False
    """Alpha mattes use limited range (black 16, white 235) without declaring it in the file."""
    snap: int = Field(default=0, ge=0, le=127)
    """Alpha values within this many levels of 0 or 255 are set to 0 or 255. A value of 2 removes the residue
    that lossy codecs leave in empty regions."""
    decontaminate: bool = False
    """Remove the color of an old background from soft edges by growing color outward from opaque pixels. Do
    not use it for smoke or glass, whose own color is in soft pixels."""
    background: Literal["grow", "blur", "keep"] = "grow"
    """Color of fully transparent pixels: `grow` extends the color of the visible pixels, `blur` fills with a
    blurred copy of that color, `keep` leaves what the file contains. A composite never shows this color, but
    the network is trained on it."""


class Data(Section):
    """The training clips, and how they are cropped, sampled and captioned."""

    prose: ClassVar[frozenset[str]] = frozenset({"trigger", "caption_prefix"})

    sources: list[Source]
    """One path, a list of paths, or a list of sources."""
    size: tuple[int, int] = (480, 832)
    """Height and width in pixels. With several `aspects` only the area (height x width) is used."""
    aspects: list[str] = []
    """Aspect ratio buckets as `width:height`, such as `16:9`, `1:1` or `9:16`; each clip uses the nearest.
    Empty: one bucket of `size`."""
    frames: list[int] = [81]
    """Clip lengths in frames, one number or a list; each clip uses the longest length that it can fill."""
    fps: float | None = Field(default=None, gt=0)
    """Frame rate at which clips are sampled. Default: the frame rate the base model was trained at."""
    stride: int | None = Field(default=None, ge=1)
    """Minimum distance between the starts of two windows of a long clip, in frames at `fps`; skips no frames
    within a window. Default: the length of a window (no overlap)."""
    max_windows: int = Field(default=1, ge=1)
    """Maximum number of windows per clip, spread evenly over the clip."""
    slow: Literal["repeat", "keep"] = "repeat"
    """Clips with a frame rate below `fps`: `repeat` duplicates frames and keeps the speed, `keep` uses the
    frames unchanged, which plays the clip faster."""
    matte: Matte = Matte()
    trigger: str = ""
    """Trigger word, put before every caption that does not contain it."""
    caption_prefix: str = ""
    """Text put before every caption."""
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    """Fraction of training samples that use the empty caption, so that classifier-free guidance keeps
    working."""
    validation: float = Field(default=0.1, ge=0)
    """Clips excluded from training to measure the validation loss: a fraction if below 1, else a count."""
    cache: str | None = Field(default=None, min_length=1)
    """Folder for cached latents and text embeddings; several runs may share it. Default: `cache` in the run
    folder."""
    bad_clips: Literal["stop", "quarantine"] = "stop"
    """What `cache` and `train` do with clips that have errors: `stop`, or `quarantine` to continue without
    them and list them in `quarantine.json` of the run."""

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
    """Distribution and weight of the noise levels in training; the family defines the noising process."""

    preset: Literal["logit_normal", "diffsynth", "uniform"] = "logit_normal"
    """`logit_normal`: logit-normal noise levels, weight 1. `diffsynth`: table of 1000 levels, shift 5,
    bell-shaped weight. `uniform`: uniform levels, weight 1."""
    shift: float | None = Field(default=None, gt=0)
    """Timestep shift (flow shift) s: a sampled level u in [0, 1] becomes s u / (1 + (s - 1) u). Default: the
    shift of the preset, else the family's shift for this size."""
    mean: float = 0.0
    """Mean of the normal distribution of `logit_normal`."""
    std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal distribution of `logit_normal`."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Train only on noise levels in this interval, within [0, 1]. The experts of Wan 2.2 A14B are limited to
    their own interval automatically."""

    @field_validator("interval")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= value[0] < value[1] <= 1:
            raise ValueError("needs 0 <= low < high <= 1")
        return value


class LowRank(Section):
    """Low-rank adapter on a frozen network, through peft."""

    kind: Literal["lora", "dora", "lokr", "loha"] = "lora"
    """`lora`: low-rank update. `dora`: LoRA plus a trained magnitude per output row; slower, often better.
    `lokr`: Kronecker product; a much smaller file. `loha`: elementwise (Hadamard) product of two low-rank
    updates, which has a higher rank."""
    rank: int = Field(default=32, ge=1)
    """Rank of the update. A higher rank has more capacity and needs more memory."""
    alpha: float | None = Field(default=None, gt=0)
    """LoRA alpha: the update is scaled by alpha / rank. Default: alpha = rank, a scale of 1, which stays
    correct in tools that drop alpha."""
    targets: list[str] = []
    """Regular expressions over full module names; an expression without a match is an error. Default: the
    targets of the family."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before the low-rank update, LoRA and DoRA only."""


class Full(Section):
    """Full fine-tuning."""

    kind: Literal["full"] = "full"
    """Trains all weights of the denoiser, or only the parameters that match `targets`."""
    targets: list[str] = []
    """Regular expressions over full parameter names; an expression without a match is an error. Default: all
    parameters."""


class RgbaVae(Section):
    """Train an RGBA VAE instead of the denoiser: a merge block and two decoders on the frozen VAE."""

    train: Literal["merge+decoders", "merge"] = "merge+decoders"
    """`merge+decoders` trains the merge block and both decoders. `merge` trains only the merge block, with
    the frozen decoders of `init_from`."""
    rank: int = Field(default=128, ge=1)
    """Rank of the low-rank update of each decoder; with `init_from`, the rank of that RGBA VAE."""
    init_from: str | None = Field(default=None, min_length=1)
    """Folder of an RGBA VAE to initialize from. Default: a new merge block (see `init`) and the decoders of
    the base VAE."""
    init: Literal["random", "encoder"] = "random"
    """Initialization of the merge block without `init_from`. `random`: random weights. `encoder`: the block
    initially reproduces the VAE's encoding of the color, so color is correct from the start and only alpha
    remains to be learned."""
    loss: Literal["paper", "reference"] = "paper"
    """Preset of the loss. `paper`: Sobel edges, and the norm of the difference of VGG features of
    ImageNet-normalized images. `reference` (the released trainer): central differences, and squared error of
    features of images without normalization."""
    perceptual: str = Field(default="none", min_length=1)
    """VGG16 weights for the perceptual loss terms: a local file, or `OWNER/NAME/FILE` on the Hub. `none`
    disables these terms."""
    edge: Literal["sobel", "central"] | None = None
    """Filter of the edge terms. Default: the filter of the preset."""
    vgg_normalize: Literal["imagenet", "none"] | None = None
    """Normalization of images before VGG16. Default: the normalization of the preset."""
    hard_mask: Literal["reconstructed", "true"] = "reconstructed"
    """Three loss terms replace transparent pixels of the reconstruction with a background color. Pixels count
    as transparent by the `reconstructed` alpha, or by the `true` alpha of the clip."""
    alpha_eps: float = Field(default=ALPHA_EPS, ge=0, lt=0.5)
    """Alpha up to this value, in [0, 1], counts as transparent; lossy codecs leave small values in empty
    regions. The paper uses 0."""
    colors: list[tuple[int, int, int]] = []
    """Background colors, RGB in 0-255, over which clips are encoded. Empty: the eight corners of the RGB cube
    as in the paper, so that no color means transparency."""
    anchor: float = Field(default=0.0, ge=0)
    """Weight of a loss term that keeps latents close to the base VAE's latents of the clip over dark gray, so
    that a denoiser trained on opaque clips adapts faster. Not in the paper."""
    visible: float = Field(default=0.0, ge=0)
    """Weight of the color error over visible pixels only; needed for small subjects. Not in the paper."""
    visible_alpha: float = Field(default=0.0, ge=0)
    """Weight of the alpha error over visible pixels only; needed for glass and smoke. Not in the paper."""
    noise: float = Field(default=0.0, ge=0)
    """Maximum standard deviation of the noise added to latents before decoding, in units of the
    latents' standard deviation; makes the decoders robust to imperfect latents. Not in the paper."""


class Optim(Section):
    """The optimizer and its learning rate schedule."""

    name: Literal["adamw", "adamw8bit", "adamw4bit", "prodigy"] = "adamw"
    """`adamw` (torch), `adamw8bit` (bitsandbytes, a quarter of the optimizer state), `adamw4bit` (torchao, an
    eighth), `prodigy` (prodigyopt, adapts the learning rate)."""
    lr: float = Field(default=1e-4, gt=0)
    """Learning rate after warm-up. Default for `prodigy`: 1."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the first and second moments."""
    eps: float = Field(default=1e-8, gt=0)
    """Term added to the denominator for numerical stability."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay; norms, biases and DoRA magnitudes are excluded."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after warm-up: `constant`, or `cosine` or `linear` decay to zero at the last step."""
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
    """Optimizer steps."""
    batch: int = Field(default=1, ge=1, le=4096)
    """Samples per micro-batch on each device."""
    accumulate: int = Field(default=1, ge=1)
    """Gradient accumulation: micro-batches per optimizer step on each device."""
    save_every: int = Field(default=250, ge=1)
    """Steps between checkpoints. The last step and Ctrl-C also write one."""
    keep: int = Field(default=3, ge=1)
    """Number of checkpoints kept on disk; older ones are deleted."""
    log_every: int = Field(default=10, ge=1)
    """Steps between lines in `metrics.jsonl` and the trackers."""
    validate_every: int = Field(default=100, ge=1)
    """Steps between measurements of the validation loss."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = ["tensorboard"]
    """Where metrics are sent besides `metrics.jsonl`."""
    accept_changed_data: bool = False
    """Resume although clips or captions have changed since the checkpoint; holds for one launch."""


CARRIERS = ("mov", "webm", "png", "apng", "mkv")
"""File formats for transparent videos."""


class Sample(Section):
    """Samples generated during training, and the defaults of `inlaid generate`."""

    prose: ClassVar[frozenset[str]] = frozenset({"prompts", "negative_prompt"})

    prompts: list[str] = []
    """Prompts for samples during training and `inlaid evaluate`. Empty: the first captions of the data."""
    images: list[list[str]] = []
    """Image-to-video only: for each prompt the first image, or a list of the first and the last image.
    Without prompts, the images come from the clips."""
    every: int | None = Field(default=None, ge=1)
    """Steps between samples. Default: no samples during training."""
    negative_prompt: str = ""
    """Negative prompt of classifier-free guidance."""
    size: tuple[int, int] | None = None
    """Height and width in pixels. Default: `data.size`."""
    frames: int | None = Field(default=None, ge=1)
    """Length in frames. Default: the longest of `data.frames`."""
    steps: int = Field(default=30, ge=1)
    """Number of denoising steps."""
    guidance: float = Field(default=5.0, ge=0)
    """Classifier-free guidance scale."""
    transparent: list[str] = ["mov", "webm"]
    """File formats written for each transparent video, besides an mp4 over a checkerboard: `mov` (ProRes
    4444, for editing), `webm` (VP9, small, for browsers), `png` (a .zip of images, lossless), `apng`
    (lossless), `mkv` (FFV1, lossless)."""
    grid: int = Field(default=256, ge=16, le=1024)
    """Scenes: cells per side of the grid on which meshes are extracted, a power of two."""
    triangles: int | None = Field(default=None, ge=100)
    """Scenes: maximum number of triangles per object; larger meshes are simplified. Default: no
    simplification."""
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
    """Gradient checkpointing: recompute activations in the backward pass, which needs far less memory and
    about a third more time. A number n checkpoints every n-th block only."""
    quantize: Literal["int8", "int4", "float8", "nf4"] | None = None
    """Quantize the linear layers of the frozen blocks to this format (`int8`, `float8`: torchao; `nf4`:
    bitsandbytes; `int4`: built in). Adapters only."""
    layerwise_casting: Literal["float8", "bfloat16"] | None = None
    """Store the frozen base model in this type and cast each layer to the precision of the run while it
    computes. Adapters only."""
    offload_optimizer: bool = False
    """Keep the optimizer state in CPU memory and run the optimizer step there (`adamw` on CUDA only)."""


class Runtime(Section):
    """Device, precision and processes. These settings change the result only by rounding."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """`auto`: CUDA, else Apple MPS, else CPU."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the frozen base model and its activations; adapters, losses and optimizer state are
    float32. `auto`: bfloat16 on CUDA, else float32."""
    world_size: int | None = Field(default=None, ge=1)
    """Number of processes that this recipe requires; any other number is an error. Default: any number."""
    rank_timeout: float = Field(default=300, gt=0)
    """Seconds without a sign of life after which a process counts as stopped, and the others end. Also how
    long processes wait for each other at the start (at least 60 s)."""
    workers: int = Field(default=2, ge=0)
    """Threads that decode clips while caching."""
    compile: bool = False
    """Compile the repeated blocks with torch.compile: faster steps, but minutes of compilation at the start
    and again at the second clip shape."""
    parallel: Literal["ddp", "fsdp", "zero2", "zero3"] = "ddp"
    """How processes share the work. `ddp`: each process holds all weights. `fsdp` (FSDP2): weights, gradients
    and optimizer state are sharded. `zero3` (DeepSpeed): the same. `zero2` (DeepSpeed): only gradients and
    optimizer state are sharded."""


class Opaque(Section):
    """RGB clips without transparency."""

    kind: Literal["opaque"] = "opaque"
    """RGB only; transparent clips are composited over white."""


class Joint(Section):
    """Color and alpha as two clips concatenated into one token sequence, with the same positions."""

    kind: Literal["joint"]
    """Two latents, color first; the adapter changes the alpha tokens only (method of TransPixeler)."""
    text_to_alpha: Literal["block", "bias", "open"] = "block"
    """Attention of text tokens to alpha tokens, in models with both in one sequence: none (`block`),
    attention weights divided by e = 2.718 (`bias`, as published for CogVideoX), or as to color tokens
    (`open`). Wan uses cross-attention and accepts `block` only."""
    domain_embedding: bool = True
    """Add a trained vector, initialized to zero, to every alpha token."""
    shared_noise: bool = True
    """Sampling starts from the same noise for color and alpha. Training uses independent noise for each."""
    alpha_from: Literal["mean", "max"] = "mean"
    """How the three decoded channels of alpha become one; TransPixeler uses `max`."""


class Merged(Section):
    """Color and alpha in one latent that an RGBA VAE encodes and decodes."""

    kind: Literal["merged"]
    """One latent of the usual size (method of Wan-Alpha); needs an RGBA VAE, see `vae`."""
    vae: str = Field(min_length=1)
    """Folder of an RGBA VAE, from a training run or from an import. `tiny:wan` selects the RGBA VAE that
    ships with inlaid."""
    colors: int = Field(default=4, ge=1, le=8)
    """Number of background colors over which each clip is encoded; each training sample uses one of the
    resulting latents."""


Tuner = Annotated[LowRank | Full, Field(discriminator="kind")]

Alpha = Annotated[Opaque | Joint | Merged, Field(discriminator="kind")]


class Config(Section):
    """A whole recipe. A model family may override defaults, such as `data.size` and `sample.guidance`."""

    run: str = Field(min_length=1)
    """Run folder, which contains all output and is the first argument of later commands."""
    seed: int = Field(default=0, ge=0)
    """Seed of the order of clips, the noise and the noise levels."""
    model: Model
    data: Data
    objective: Objective = Objective()
    tuner: Tuner = LowRank()
    alpha: Alpha = Opaque()
    rgba_vae: RgbaVae | None = None
    """Section that trains an RGBA VAE instead of the denoiser (method of Wan-Alpha). An RGBA VAE encodes
    color and alpha of a clip into one latent and decodes both. Captions are not used."""
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
