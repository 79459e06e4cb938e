"""Data files: JSONL and Parquet whose rows or bytes are wrong."""

import datetime
import decimal
import functools
import io
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from nemo_jepo.config.errors import DataError
from nemo_jepo.config.schema import AnswerConfig, DataConfig
from nemo_jepo.data.dataset import load_prompts
from nemo_jepo.data.examples import solved_examples
from tests.fuzz.nasty import changed, damaged, values, written
from tests.fuzz.runner import Campaign

GOOD = {"question": "What is 6 * 7?", "answer": "42", "chain_of_thought": "six times seven"}
KEYS = ["question", "answer", "chain_of_thought"]


@functools.cache
def folder() -> Path:
    """Where the inputs lie; it goes with the process."""
    holder = tempfile.TemporaryDirectory(prefix="nemo_jepo_fuzz_rows_")
    folder.holder = holder  # type: ignore[attr-defined]
    return Path(holder.name)


@functools.cache
def tokenizer() -> Any:
    """A small one that writes every text."""
    from nemo_jepo.data.tokenizer import train_tokenizer

    return train_tokenizer(["What is 6 * 7? The final answer is 42"], 300, folder() / "tokenizer")


def read(file: Path) -> None:
    """The file as training data in every way, and as solved examples; the last error of them."""
    faults = []
    for name, on_bad_row in (("jsonl", "error"), ("jsonl", "skip"), ("gsm8k", "skip")):
        config = DataConfig(
            name=name, train_path=str(file), on_bad_row=on_bad_row, chain_of_thought_key="chain_of_thought"
        )
        try:
            dataset = load_prompts(config, "train", tokenizer(), AnswerConfig())
            assert on_bad_row == "skip" or not dataset.bad_rows
            assert all(str(row).isprintable() for row in dataset.bad_rows)
        except DataError as error:
            faults.append(error)
    try:
        solved_examples(file, AnswerConfig())
    except DataError as error:
        faults.append(error)
    if faults:
        raise faults[0]


def read_jsonl(content: bytes) -> None:
    """Bytes as a .jsonl file."""
    file = folder() / "rows.jsonl"
    file.write_bytes(content)
    read(file)


def read_parquet(content: bytes) -> None:
    """Bytes as a .parquet file."""
    file = folder() / "rows.parquet"
    file.write_bytes(content)
    read(file)


line = st.one_of(
    changed(GOOD, most=2).map(written),
    changed(GOOD, most=1).map(written),
    st.fixed_dictionaries({key: values for key in KEYS}).map(written),
    st.fixed_dictionaries({"question": st.just("1?"), "answer": values}).map(written),
    damaged(written(GOOD)),
    values.map(written) | st.binary(max_size=60),
)
jsonl = st.builds(
    lambda lines, end, bom: bom + end.join(lines),
    st.lists(line | st.just(written(GOOD)), min_size=1, max_size=4),
    st.sampled_from([b"\n"] * 8 + [b"\r\n", b"\n\n", b"\r", b"\0", b"\n "]),
    st.sampled_from([b""] * 8 + [b"\xef\xbb\xbf", b"\xff\xfe"]),
)


def table(columns: dict[str, Any], **options: Any) -> bytes:
    """Columns as the bytes of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out, **options)
    return out.getvalue()


@functools.cache
def parquet_files() -> tuple[bytes, ...]:
    """Whole files: of every encoding and compression, and of types that are no text."""
    import pyarrow as pa

    texts = [f"What is {i} * 7?" for i in range(40)]
    plain = {"question": texts, "answer": [str(7 * i) for i in range(40)], "chain_of_thought": ["so"] * 40}
    invalid = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\3\0\0\0\4\0\0\0"), pa.py_buffer(b"a\xff\xfeb")]
    )
    far = pa.array([2**62, 0, -(2**62)], pa.int64())
    others: list[Any] = [
        invalid,
        far,
        far.cast(pa.timestamp("us", tz="UTC")),
        far.cast(pa.timestamp("ms", tz="No/Such_Zone")),
        far.cast(pa.duration("s")),
        pa.array([decimal.Decimal("1.5"), None, decimal.Decimal("-0.25")]),
        pa.array([{"a": 1}, None, {"a": 2}]),
        pa.array([[1], None, []]),
        pa.array([b"a", b"\xff", None]),
        pa.array([float("nan"), float("inf"), 1e308]),
        pa.array([datetime.date(1, 1, 1), None, datetime.date(9999, 12, 31)]),
        pa.array([None, None, None]),
        pa.array([True, False, None]),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        pa.array([2**64 - 1, 0, 1], pa.uint64()),
    ]
    files = [table(plain, compression=it) for it in ("none", "snappy", "gzip", "zstd", "brotli", "lz4")]
    files += [table(plain, use_dictionary=False, data_page_version="2.0", row_group_size=7)]
    files += [table(plain, write_page_checksum=True, compression="none")]
    files += [table({"question": other, "answer": ["1", "2", "3"]}) for other in others]
    files += [table({"other": ["a"]}), table({"question": [], "answer": []})]
    return tuple(files)


parquet = st.integers(0, 10**6).flatmap(
    lambda number: damaged(parquet_files()[number % len(parquet_files())])
) | st.sampled_from(range(24)).map(lambda number: parquet_files()[number % len(parquet_files())])


def prepare() -> None:
    """Make the tokenizer and the whole files."""
    tokenizer(), parquet_files()  # noqa: B018


ROWS = Campaign(jsonl, read_jsonl, share=1.5, prepare=prepare)
PARQUET = Campaign(parquet, read_parquet, share=1.5, prepare=prepare)
