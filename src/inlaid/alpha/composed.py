"""A family composed with a way to carry alpha: an object that holds the opaque family.

A composed family defines what alpha changes and forwards everything else to the family it holds, so that the
rest of the package uses the contract of a family only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from inlaid.families.base import Family

if TYPE_CHECKING:
    _Contract = Family
else:
    _Contract = object


class Composed(_Contract):
    """Forward every attribute and method that a subclass does not define to `opaque`.

    The opaque family calls its own methods, never those of the subclass: where a method builds on another one
    that alpha changes, the subclass defines both.
    """

    channels: int = 4

    def __init__(self, opaque: Family) -> None:
        self.opaque = opaque

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the opaque family; only called for names that are not found here."""
        if name == "opaque":  # while an instance is copied, before it has any attribute
            raise AttributeError(name)
        return getattr(self.opaque, name)

    @property
    def single(self) -> Family:
        """The composed family itself; `Joint` returns the opaque family of one clip."""
        return self
