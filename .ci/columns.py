"""Settings that stand in columns in our docstrings, as code blocks of the site. An extension of griffe."""

import re
from typing import Any

from griffe import Extension, Object

_COLUMNS = re.compile(r"^\w[\w, ]*? {2,}\S")


class Columns(Extension):
    """Fences the paragraphs whose lines are names, two spaces or more, and what they mean."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of `obj`."""
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(f"```text\n{p}\n```" if _COLUMNS.match(p) else p for p in paragraphs)
