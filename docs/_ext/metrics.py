"""The directive ``.. metrics::``: a table of every metric, as the HTTP process describes them."""

from __future__ import annotations

from collections.abc import Iterator

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from sqspipes_mp.observer.metrics import METRICS


class Metrics(SphinxDirective):
    """Makes the table."""

    def run(self) -> list[nodes.Node]:
        parent = nodes.section()
        parent.document = self.state.document
        self.state.nested_parse(StringList(list(_lines()), source="observer/metrics.py"), 0, parent)
        return list(parent.children)


def _lines() -> Iterator[str]:
    yield from (".. list-table::", "   :header-rows: 1", "   :widths: 40 15 45", "")
    yield from ("   * - metric", "     - kind", "     - meaning; labels")
    for metric in METRICS:
        labels = ", ".join(f"``{label}``" for label in metric.labels)
        yield from (f"   * - ``{metric.name}``", f"     - {metric.kind}", f"     - {metric.help} {labels}")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("metrics", Metrics)
    return {"parallel_read_safe": True}
