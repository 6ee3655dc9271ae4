"""Recipes of several documents: which of them is the result, what it needs, and in which order they are planned.

Reference: mergekit's ``mergekit-multi``, which runs them one after the other through folders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.located import Located

MAX_DOCUMENTS = 100  # of a recipe: each may need the one before it
_ONE = "exactly one document without a name: the result"


@dataclass(frozen=True)
class Document:
    """One document of a recipe.

    Attributes:
        root: All of it.
        name: What others call its result; None for the last, which is written.
        models: Every model that it names, with the place.
    """

    root: Located
    name: str | None
    models: Mapping[str, Located]


def in_order(documents: Sequence[Document]) -> tuple[int, ...]:
    """Indices of the documents, each behind those that it needs, so the result last. Their own order does not matter.

    Raises:
        RecipeError: no result or several, a name twice, documents that need each other or that nothing needs; or too
            many.
    """
    if len(documents) > MAX_DOCUMENTS:
        place = documents[MAX_DOCUMENTS].root
        place.fail("the recipe has too many documents", expected=f"at most {MAX_DOCUMENTS}", got=len(documents))
    index: dict[str | None, int] = {}
    for i, document in enumerate(documents):
        if document.name is None and None in index:
            document.root.fail("two documents have no name", expected=_ONE, got="another one without a name")
        if document.name in index:
            document.root.value["name"].fail("two documents have one name", expected="each name once")
        index[document.name] = i
    if None not in index:
        hint = "leave the name of the result away"
        documents[-1].root.fail("every document has a name", expected=_ONE, got=", ".join(index), hint=hint)
    done: list[int] = []

    def visit(i: int, above: tuple[int, ...]) -> None:
        for name, place in documents[i].models.items():
            if name not in index:
                continue
            needed = index[name]
            if needed in (*above, i):
                way = [documents[j].name for j in (*above, i)][(*above, i).index(needed) :]
                place.fail("documents need each other", expected="no circle", got=" -> ".join([*way, name]))
            if needed not in done:
                visit(needed, (*above, i))
        done.append(i)

    visit(index[None], ())
    for i, document in enumerate(documents):
        if i not in done:
            document.root.value["name"].fail(
                "no document uses this one", expected="a document that names it as a model", hint="use it, or remove it"
            )
    return tuple(done)
