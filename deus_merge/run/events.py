"""Events of a run, as JSON data: who makes what, and who was lost. docs/many-machines.md lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

#: called with an event: ``event`` is its name, the other keys are its facts
OnEvent = Callable[[Mapping[str, object]], None]


def unheard(event: Mapping[str, object]) -> None:
    """What is called with events where nobody listens."""
