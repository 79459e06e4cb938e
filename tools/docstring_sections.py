"""Extension of griffe: a section of a docstring (Returns, Raises, Source) need not have an empty line above it."""

import re
from typing import Any

import griffe

HEADING = re.compile(r"(?<=[^\n]\n)(?=(?:Args|Returns|Raises|Source):)")


class DocstringSections(griffe.Extension):
    """Puts the empty line there, which griffe asks for."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = HEADING.sub("\n", obj.docstring.value)
