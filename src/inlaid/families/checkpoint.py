"""Access to a pretrained checkpoint in diffusers layout, on the Hugging Face Hub or in a local folder."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from inlaid import config as recipe
from inlaid.config.parse import shorten
from inlaid.families import hub
from inlaid.reading import parse_json, read_text

if TYPE_CHECKING:
    import torch
    from torch import nn


class Checkpoint:
    """Pretrained checkpoint in diffusers layout, on the Hugging Face Hub or in a local folder.

    Reads the configurations and loads the components, such as the VAE.
    """

    published: ClassVar[Mapping[str, Mapping[str, Mapping[str, Any]]]] = {}
    """Configurations of published checkpoints, by Hub ID and component name. Used instead of downloading the
    configuration files. The first Hub ID is the default checkpoint."""
    component: str = "transformer"
    """Name of the denoiser component in the checkpoint and in the diffusers pipeline."""
    text_encoder: ClassVar[str] = "T5EncoderModel"
    """Class name of the text encoder in transformers."""

    def __init__(self, model: recipe.Model) -> None:
        self.model = model
        self.source = locate(model.checkpoint)

    @property
    def name(self) -> str:
        """Hub ID of the checkpoint, or name of its local folder without the path."""
        return self.source.name if isinstance(self.source, Path) else self.source

    def read_config(self, component: str) -> dict[str, Any] | None:
        """Return the JSON configuration of a component, or None if the checkpoint does not have it.

        For an empty component name, return the content of `model_index.json`.

        Raises:
            ValueError: if a local file is not a JSON object, or if a Hub file is neither cached nor readable.
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
                found = parse_json(read_text(path))
            except ValueError:
                found = None
            if not isinstance(found, dict):
                raise ValueError(
                    f"model.checkpoint: {path} is not a JSON object; copy or download the checkpoint again"
                )
            return found
        with self._asking():
            file = hub.fetch(self.source, self.model.revision, name)
        return json.loads(file.read_text("utf-8")) if file else None

    @contextmanager
    def loading(self, part: str, folder: Path | None = None) -> Iterator[None]:
        """Context manager that converts loading errors to a ValueError; a MemoryError is not converted.

        Args:
            part: component or file of the checkpoint, for the message.
            folder: folder that is loaded instead of the component, for the message.

        Raises:
            ValueError: if loading fails; the message names the component or the folder.
        """
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            what = folder or f"model.checkpoint: `{part}` of {self.model.checkpoint}"
            cause = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            raise ValueError(
                f"{what} cannot be loaded ({cause}); it may be incomplete: copy or download it again"
            ) from error

    def folder(self, component: str) -> Path:
        """Return the local folder of a component; download missing files of a Hub checkpoint first.

        Raises:
            ValueError: if the download fails.
        """
        if isinstance(self.source, Path):
            return self.source / component
        with self._asking():
            return hub.fetch_component(self.source, self.model.revision, component)

    def commit(self) -> str:
        """Return the commit hash of a Hub checkpoint, or the configured revision if the hash is unknown."""
        assert isinstance(self.source, str)
        with self._asking():
            file = hub.fetch(self.source, self.model.revision, "model_index.json")
        found = re.search(r"snapshots[/\\]([0-9a-f]+)", str(file))
        return found[1] if found else str(self.model.revision)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            yield
        except hub.HubError as error:
            raise ValueError(f"model.checkpoint: {error}") from error

    def fetched(self, *components: str) -> dict[str, Any]:
        """Download missing components of a Hub checkpoint; return `from_pretrained` arguments to load them.

        The arguments make `from_pretrained` use local files only. For a local checkpoint, the result is
        empty.

        Raises:
            ValueError: if the download fails.
        """
        if isinstance(self.source, Path):
            return {}
        for component in components:
            self.folder(component)
        return hub.local_options(self.model.revision)

    def availability(self, components: Iterable[str]) -> hub.Availability | None:
        """Check whether components of a Hub checkpoint can be read, and how much must be downloaded.

        Returns:
            Result of the check, or None for a local checkpoint.
        """
        if isinstance(self.source, Path):
            return None
        return hub.availability(self.source, self.model.revision, components)

    def fetched_pipeline(self, given: Collection[str]) -> dict[str, Any]:
        """Download all pipeline components that are not in `given`.

        Returns:
            Arguments for `from_pretrained` that restrict it to local files; empty for a local checkpoint.
        """
        if isinstance(self.source, Path):
            return {}
        with self._asking():
            file = hub.fetch(self.source, self.model.revision, "model_index.json")
        index = json.loads(file.read_text("utf-8")) if file else {}
        return self.fetched(*(k for k, v in index.items() if isinstance(v, list) and v[0] and k not in given))

    def load(self, component: str, dtype: torch.dtype) -> Any:
        """Load a component with all its weights.

        Its class is the diffusers class that the component's configuration names.

        Raises:
            ValueError: if the component cannot be loaded, or its files lack weights.
        """
        kind, options = self._class(component), self.fetched(component)
        with self.loading(component):
            network = kind.from_pretrained(self.source, subfolder=component, torch_dtype=dtype, **options)
            missing = [n for n, p in network.named_parameters() if p.is_meta]
            if missing:
                raise ValueError(f"{len(missing)} weights are missing from its files, such as {missing[0]}")
        return network

    def count_tokens(self, texts: Sequence[str]) -> list[int] | None:
        """Return the number of tokens of each text before truncation to the text encoder's maximum length.

        Nothing is downloaded: the result is None if the checkpoint's tokenizer is not on this machine.
        """
        import transformers

        options: dict[str, Any] = {"revision": self.model.revision, "local_files_only": True}
        try:
            with self.loading("tokenizer"):
                tokenizer = transformers.AutoTokenizer.from_pretrained(
                    self.source, subfolder="tokenizer", **options
                )
        except ValueError:
            return None
        return [len(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False).input_ids]

    def load_text_encoder(self, device: torch.device, dtype: torch.dtype) -> Any:
        """Load the text encoder and return the pair (tokenizer, text encoder)."""
        import transformers

        folders = self.folder("tokenizer"), self.folder("text_encoder")
        with self.loading("tokenizer"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folders[0], local_files_only=True)
        with self.loading("text_encoder"):
            kind: Any = getattr(transformers, self.text_encoder)
            encoder = kind.from_pretrained(folders[1], dtype=dtype, local_files_only=True)
        return tokenizer, encoder.to(device).eval().requires_grad_(False)

    def load_denoiser(
        self, dtype: torch.dtype, *, meta: bool = False, folder: Path | None = None
    ) -> nn.Module:
        """Load the denoiser of the checkpoint, or a fine-tuned denoiser from `folder`.

        If `meta` is true, the denoiser is created on the meta device, and no weights are loaded.
        """
        import torch

        if meta:
            with torch.device("meta"):
                return self._class(self.component).from_config(self.read_config(self.component))
        if folder is not None:
            with self.loading("", folder):
                return self._class(self.component).from_pretrained(folder, torch_dtype=dtype)
        return self.load(self.component, dtype)

    def _class(self, component: str) -> Any:
        """Return the diffusers class that a component's configuration names.

        Raises:
            ValueError: if the installed diffusers version does not have the class.
        """
        import diffusers

        name = str((self.read_config(component) or {}).get("_class_name"))
        if not hasattr(diffusers, name):
            raise ValueError(
                f"model.checkpoint: `{component}` of {self.model.checkpoint} is a `{shorten(name, 60)}`, "
                f"which diffusers {diffusers.__version__} does not have: upgrade diffusers"
            )
        return getattr(diffusers, name)


TINY = "tiny:"


def locate(checkpoint: str) -> Path | str:
    """Convert the checkpoint name of a recipe to a local path; return a Hub ID unchanged.

    `tiny:NAME` gives the path of a tiny model that is part of the inlaid package.

    Raises:
        ValueError: if `checkpoint` is neither a folder in diffusers layout nor a possible Hub ID.
    """
    if checkpoint.startswith(TINY):
        from inlaid import tiny

        return tiny.path(checkpoint.removeprefix(TINY))
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
