"""The order in which the documents of a recipe are planned.

Reference: mergekit's ``mergekit-multi``, which runs documents one after the other through folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.located import Located
from ..core.text import some_of

MAX_DOCUMENTS = 100  # the order is found by recursion over documents that need each other
_ONE = "exactly one document without a name: the result"


@dataclass(frozen=True)
class Document:
    """One document of a recipe.

    Attributes:
        root: The document as YAML.
        name: The name of its result in other documents; None for the document whose result is written.
        models: The place of every model that it names.
    """

    root: Located
    name: str | None
    models: Mapping[str, Located]


def in_order(documents: Sequence[Document]) -> tuple[int, ...]:
    """The order of planning: each document after the documents that it needs, so the written one is last.

    Args:
        documents: The documents in any order.

    Returns:
        Indices into ``documents``.

    Raises:
        RecipeError: no written document or several, a duplicate name, a circular dependency, a document that no other
            uses; or too many.
    """
    if len(documents) > MAX_DOCUMENTS:
        place = documents[MAX_DOCUMENTS].root
        place.fail("the recipe has too many documents", expected=f"at most {MAX_DOCUMENTS}", got=len(documents))
    index: dict[str, int] = {}
    result: int | None = None
    for i, document in enumerate(documents):
        if document.name is None:
            if result is not None:
                document.root.fail("two documents have no name", expected=_ONE, got="another one without a name")
            result = i
            continue
        if document.name in index:
            document.root.child("name").fail("two documents have one name", expected="each name once")
        index[document.name] = i
    if result is None:
        hint = "remove the name of the result: in a mergekit-mega recipe it has one, too"
        documents[-1].root.fail("every document has a name", expected=_ONE, got=some_of(index), hint=hint)
    done: list[int] = []

    def visit(i: int, above: tuple[int, ...]) -> None:
        for name, place in documents[i].models.items():
            if name not in index:
                continue
            needed = index[name]
            if needed in (*above, i):
                cycle = [str(documents[j].name) for j in (*above, i)][(*above, i).index(needed) :]
                place.fail(
                    "circular dependency between documents",
                    expected="documents that do not need each other",
                    got=" -> ".join([*cycle, name]),
                )
            if needed not in done:
                visit(needed, (*above, i))
        done.append(i)

    visit(result, ())
    for i, document in enumerate(documents):
        if i not in done:
            document.root.child("name").fail(
                "no document uses this one", expected="a document that names it as a model", hint="use it, or remove it"
            )
    return tuple(done)
