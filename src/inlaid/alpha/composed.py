"""Base class that adds alpha to a family by composition.

The composed family holds the opaque family, defines what alpha changes, and forwards everything else. The
rest of the package uses only the interface of `Family`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inlaid.families.base import Family

if TYPE_CHECKING:
    _Contract = Family
else:
    _Contract = object


class Composed(_Contract):
    """Base class of families with alpha; attributes that a subclass does not define are those of `opaque`.

    The opaque family calls its own methods, never those of the subclass. If a method of the opaque family
    calls a method that the subclass replaces, the subclass must replace both.
    """

    channels: int = 4

    def __init__(self, opaque: Family) -> None:
        self.opaque = opaque

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the opaque family; Python calls this only for names not found here."""
        if name == "opaque":  # while an instance is copied, before it has any attribute
            raise AttributeError(name)
        return getattr(self.opaque, name)

    @property
    def single(self) -> Family:
        """The family for one clip: self, or in `Joint` the wrapped opaque family."""
        return self
