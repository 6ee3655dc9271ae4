"""Sums of task vectors."""

from __future__ import annotations

from ._task_vectors import TaskVectorMethod, family_parameters


class TaskArithmetic(TaskVectorMethod):
    name = "task_arithmetic"
    summary = "the base model plus a weighted sum of what each source adds to it"
    reference = "Ilharco et al., Editing models with output arithmetic, arXiv 2212.04089"
    parameters = family_parameters(normalize=False, rescale=False)


METHOD = TaskArithmetic()
