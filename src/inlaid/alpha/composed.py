"""Base class of wrappers that add an alpha channel to a model family.

A wrapper holds the family without alpha, defines the methods that alpha changes, and forwards all other
attributes to the wrapped family. The rest of the package uses only the interface of `Family`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inlaid.families.base import Family

if TYPE_CHECKING:
    _Contract = Family
else:
    _Contract = object


class Composed(_Contract):
    """Base class of model families with alpha; each wraps a family without alpha in the attribute `opaque`.

    Attributes that a subclass does not define are looked up in the wrapped family. The wrapped family calls
    its own methods, never the methods of the subclass. If a method of the wrapped family calls a method that
    the subclass replaces, the subclass must replace both.
    """

    channels: int = 4

    def __init__(self, opaque: Family) -> None:
        self.opaque = opaque

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped family; called only for attributes that the wrapper lacks."""
        if name == "opaque":  # while an instance is copied, before it has any attribute
            raise AttributeError(name)
        return getattr(self.opaque, name)

    @property
    def single(self) -> Family:
        """Model family that processes a single clip: `self`, unless a subclass overrides this property."""
        return self
