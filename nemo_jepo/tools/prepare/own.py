"""A file of one's own, prepared as a published training split is."""

from nemo_jepo.config.errors import ConfigError
from nemo_jepo.data.files import Keys
from nemo_jepo.tools.prepare.origin import Origin
from nemo_jepo.tools.prepare.records import Example, Published, Row, as_text

OWN = "own"
"""The NAME that stands for it."""


def own_file(origin: Origin) -> Published:
    """How the file is read: the training split alone, from the columns that the user names.

    A column `id` is kept. A number counts as its decimal text.

    Raises:
        ConfigError: no file is given.
    """
    if origin.local is None:
        raise ConfigError("--from", None, "the rows of your own are in a file", f"Add --from FILE to {OWN}")
    keys = origin.keys or Keys("question", "answer")

    def read(row: Row) -> Example | str:
        question, answer, row_id = (as_text(row.get(key)) for key in (keys.prompt, keys.answer, "id"))
        if not question or not answer:
            return "blank"
        chain_of_thought = as_text(row[keys.chain_of_thought]) if keys.chain_of_thought else ""
        return Example(question, answer, chain_of_thought or None, OWN, row_id or None)

    columns = tuple(key for key in (keys.prompt, keys.answer, keys.chain_of_thought) if key is not None)
    return Published(
        home=f"a file of one's own, its columns {', '.join(columns)}",
        revision="",
        licence="not known",
        files={"train": ""},
        columns=columns,
        read=read,
        filters=("blank",),
        remedy="Name the columns with --prompt-key, --answer-key and --chain-of-thought-key",
    )
