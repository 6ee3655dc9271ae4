"""Drop the smallest and the largest, then merge by sign."""

from __future__ import annotations

from .breadcrumbs import Breadcrumbs


class BreadcrumbsTies(Breadcrumbs):
    name = "breadcrumbs_ties"
    summary = "task vectors, their small elements and their outliers dropped, merged where their signs agree"
    consensus = True


METHOD = BreadcrumbsTies()
