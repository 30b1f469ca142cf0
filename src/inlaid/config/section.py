"""Base class of the sections of a recipe."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from inlaid.config.values import read_values

UserPath = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""Path as the value of a recipe key; `~` is the home folder, as in a shell."""


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
