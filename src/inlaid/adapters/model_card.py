"""Model card (README.md) of the trained weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from inlaid import config as recipe
from inlaid.adapters.adapter import KINDS, WEIGHTS

_FILE = f'prefix="transformer", weight_name="{WEIGHTS}"'
"""Arguments with which `load_lora_adapter` finds the file; by default, it looks for a `.bin` file."""


def _use(config: recipe.Config, source: str) -> list[str]:
    """Return the lines of Python code that load the trained weights into a diffusers pipeline."""
    component = "transformer_2" if config.model.expert == "low" else "transformer"
    kind = config.tuner.kind
    if not isinstance(config.tuner, recipe.LowRank):
        return [  # not as an argument of `DiffusionPipeline.from_pretrained`, which ignores Wan's transformer
            "from diffusers import AutoModel, DiffusionPipeline\n",
            f'pipe = DiffusionPipeline.from_pretrained("{source}")',
            f'pipe.{component} = AutoModel.from_pretrained("path/to/this/folder")',
        ]
    expert = ", load_into_transformer_2=True" if component == "transformer_2" else ""
    load = {
        "lokr": f'pipe.{component}.load_lora_adapter("path/to/this/folder", {_FILE})',
        "loha": f'inlaid.adapters.lycoris.load(pipe.{component}, Path("path/to/this/folder"))',
    }
    return [
        *(["from pathlib import Path\n", "import inlaid.adapters.lycoris"] if kind == "loha" else []),
        "from diffusers import DiffusionPipeline\n",
        f'pipe = DiffusionPipeline.from_pretrained("{source}")',
        load.get(kind, f'pipe.load_lora_weights("path/to/this/folder"{expert})'),
    ]


def _use_of_scenes(config: recipe.Config, source: str) -> list[str]:
    """Return the lines of Python code that load the trained weights into a MIDI or TripoSG network."""
    start, kind = "from inlaid.networks.triposg import TripoSGTransformer\n", config.tuner.kind
    if not isinstance(config.tuner, recipe.LowRank):
        return [start, 'network = TripoSGTransformer.from_pretrained("path/to/this/folder")']
    own = f'network.load_lora_adapter("path/to/this/folder", {_FILE})'
    load = {
        "loha": 'lycoris.load(network, Path("path/to/this/folder"))',
    }
    return [
        *(["from pathlib import Path\n", "from inlaid.adapters import lycoris"] if kind == "loha" else []),
        start,
        f'network = TripoSGTransformer.from_pretrained("{source}", subfolder="transformer")',
        load.get(kind, own),
    ]


def model_card(
    config: recipe.Config,
    *,
    step: int,
    prompts: Sequence[str] = (),
    task: str = "text-to-video",
    objective: str = "",
    warnings: Sequence[str] = (),
) -> str:
    """Return the model card of the trained weights: front matter for the Hub, loading code and settings.

    Args:
        config: recipe (YAML configuration) of the run. For a local base model, the card contains only the
            name of its folder.
        step: number of training steps.
        prompts: example prompts.
        task: pipeline tag on the Hub, such as `text-to-video`.
        objective: description of the training objective. Default: the name of the recipe's preset.
        warnings: paragraphs about limitations.
    """
    import yaml

    tuner, data, optim = config.tuner, config.data, config.optim
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", config.model.checkpoint) is not None
    name = (
        config.model.checkpoint if on_hub else re.split(r"[/\\]", config.model.checkpoint.rstrip("/\\"))[-1]
    )
    source = name if on_hub else f"path/to/{name.split(':')[-1]}"
    scenes = task == "image-to-3d"  # diffusers has no such network; inlaid provides it
    code = (_use_of_scenes if scenes else _use)(config, source)
    low_rank = isinstance(tuner, recipe.LowRank)
    how = {"rank": tuner.rank, "alpha": tuner.alpha or tuner.rank} if low_rank else {}
    title = KINDS.get(tuner.kind, "Fine-tuned weights")
    front: dict[str, Any] = {"base_model": name} if on_hub else {}
    front |= {
        "library_name": "inlaid" if scenes else "diffusers",
        "tags": ["inlaid", config.model.family, task, tuner.kind],
    }
    front |= {"instance_prompt": data.trigger} if data.trigger else {}
    size = f"{data.size[0]} x {data.size[1]}, {', '.join(map(str, data.frames))} frames"
    settings = {
        "base": name + (f", {config.model.expert}-noise expert" if config.model.expert else ""),
        "steps": step,
        **how,
        "targets": ", ".join(getattr(tuner, "targets", [])) or "default of the family",
        **({} if scenes else {"size": size}),
        "optimizer": f"{optim.name}, learning rate {optim.lr:g}, {optim.schedule}",
        "batch": f"{config.train.batch}, {config.train.accumulate} gradient accumulation steps",
        "objective": objective or config.objective.preset,
        **config.model.options,
        "seed": config.seed,
    }
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n",
        f"# {title} for {name}\n",
        *([f"Use `{data.trigger}` in the prompt.\n"] if data.trigger else []),
        *[f"{paragraph}\n" for paragraph in warnings],
        *["```python", *code, "```\n"],
        *(["Example prompts:\n", *[f"- {' '.join(p.split())}" for p in prompts], ""] if prompts else []),
        "| setting | value |\n|---|---|",
        *[f"| {k} | {str(v).replace('|', chr(92) + '|')} |" for k, v in settings.items()],
    ]
    return "\n".join(lines) + "\n"
