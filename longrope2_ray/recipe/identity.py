"""The identity of a run: the fields of its recipe that its results depend on.

A field says which results depend on it: ``Annotated[int, PartOf("search")]``. The kinds of results
are ``search`` (what the search finds), ``tokens`` (the tokenized documents), ``segments`` (the
training data packed from them) and ``training`` (the trained weights). ``FREE`` marks a field that
no result depends on: a run may be resumed with another value.
"""

from typing import Any

from pydantic import BaseModel

KINDS = ("search", "tokens", "segments", "training")


class PartOf:
    """The mark of a recipe field that some kinds of results depend on.

    Args:
        kinds: some of ``KINDS``; none if no result depends on the field.

    Raises:
        ValueError: if a kind is unknown.
    """

    def __init__(self, *kinds: str):
        unknown = set(kinds) - set(KINDS)
        if unknown:
            raise ValueError(f"PartOf: expected some of {', '.join(KINDS)}, got {unknown.pop()!r}")
        self.kinds = frozenset(kinds)


SEARCH = PartOf("search")
TRAINING = PartOf("training")
FREE = PartOf()


def marker(model: type[BaseModel], field: str) -> PartOf | None:
    """Return the ``PartOf`` mark of a field; None for a field that is a section."""
    found = [m for m in model.model_fields[field].metadata if isinstance(m, PartOf)]
    return found[0] if found else None


def part_of(section: BaseModel, kind: str) -> dict[str, Any]:
    """Return field -> plain JSON value of the section's fields that a kind of result depends on."""
    values = section.model_dump(mode="json")
    return {
        name: values[name]
        for name in type(section).model_fields
        if (mark := marker(type(section), name)) and kind in mark.kinds
    }


def identity(recipe: BaseModel, kind: str) -> dict[str, Any]:
    """Return ``section.field`` -> plain JSON value of all that a kind of result depends on."""
    found = part_of(recipe, kind)
    for name in type(recipe).model_fields:
        section = getattr(recipe, name)
        if isinstance(section, BaseModel):
            inner = identity(section, kind)
            found.update({f"{name}.{field}": value for field, value in inner.items()})
    return found
