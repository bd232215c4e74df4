"""Writes rows as JSON Lines, CSV or Parquet: in parts, each a complete file, and then joined into one file."""

from __future__ import annotations

import csv
import importlib.util
import io
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from server.dial import r_of, text_of
from server.errors import SettingsError
from server.offline.rows import Row

ROW_GROUP = 1 << 16
"""Rows of a row group in a Parquet file."""


class Format(Protocol):
    """A format of tables."""

    def part(self, rows: Sequence[Row], columns: Sequence[str]) -> bytes:
        """The content of a file of these rows."""
        ...

    def files(self, part: Path) -> list[str]:
        """The column `file` of a part. Raises OSError or ValueError if the file is not a part."""
        ...

    def join(self, parts: Sequence[Path], output: Path, columns: Sequence[str]) -> None:
        """Writes the rows of all parts, in order."""
        ...

    def check(self, file: Path) -> None:
        """Raises OSError or ValueError if a file does not hold a table that this command wrote in this format."""
        ...


def format_of(output: Path) -> Format:
    """The format for the suffix of a file's name.

    Raises:
        SettingsError: The suffix is unknown, or the format's package is not installed.
    """
    kind = _FORMATS.get(output.suffix.lower())
    if kind is None:
        raise SettingsError(f"-o is {output}; its name must end in {', '.join(list(_FORMATS)[:-1])} or .csv")
    return kind()


class JsonLines:
    """One object a line. `r` is as in an answer of the server: a number, or a list if blocks differ."""

    def part(self, rows: Sequence[Row], columns: Sequence[str]) -> bytes:
        return b"".join(_json(row | {"r": r_of(tuple(row["r"]))}) + b"\n" for row in rows)

    def files(self, part: Path) -> list[str]:
        with part.open("rb") as lines:
            return [_named.decode(line).file for line in lines]

    def join(self, parts: Sequence[Path], output: Path, columns: Sequence[str]) -> None:
        with output.open("wb") as joined:
            for part in parts:
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, joined)

    def check(self, file: Path) -> None:
        with file.open("rb") as lines:
            _named.decode(lines.readline())


class Csv:
    """A table with a header. Lists are JSON, `r` is written as `--r` takes it, and missing values are empty."""

    def part(self, rows: Sequence[Row], columns: Sequence[str]) -> bytes:
        text = io.StringIO()
        plain = csv.writer(text, lineterminator="\n")
        quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        plain.writerow(columns)
        for row in rows:
            cells = [_cell(name, row[name]) for name in columns]
            # Readers take a lone \r as the end of a line, but the writer does not quote it.
            (quoted if any("\r" in cell for cell in cells) else plain).writerow(cells)
        return text.getvalue().encode()

    def files(self, part: Path) -> list[str]:
        with part.open(encoding="utf-8", newline="") as lines:
            csv.field_size_limit(1 << 30)
            return [row["file"] for row in csv.DictReader(lines)]

    def join(self, parts: Sequence[Path], output: Path, columns: Sequence[str]) -> None:
        with output.open("wb") as joined:
            joined.write(self.part([], columns))
            for part in parts:
                with part.open("rb") as lines:
                    lines.readline()
                    shutil.copyfileobj(lines, joined)

    def check(self, file: Path) -> None:
        with file.open(encoding="utf-8", newline="") as lines:
            if not lines.readline().startswith("file,model,r,"):
                raise ValueError


class Parquet:
    """A Parquet file, by pyarrow."""

    def __init__(self) -> None:
        if importlib.util.find_spec("pyarrow") is None:
            raise SettingsError("Parquet needs pyarrow; install it with: pip install 'tome-server[parquet]'")

    def part(self, rows: Sequence[Row], columns: Sequence[str]) -> bytes:
        import pyarrow
        from pyarrow import parquet

        schema = _schema(columns)
        arrays = [pyarrow.array([row[field.name] for row in rows], field.type) for field in schema]
        into = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.Table.from_arrays(arrays, schema=schema), into)
        return bytes(into.getvalue())

    def files(self, part: Path) -> list[str]:
        from pyarrow import parquet

        return list(parquet.read_table(part, columns=["file"])["file"].to_pylist())

    def join(self, parts: Sequence[Path], output: Path, columns: Sequence[str]) -> None:
        import pyarrow
        from pyarrow import parquet

        with parquet.ParquetWriter(output, _schema(columns)) as writer:
            for group in _groups(parquet.read_table(part) for part in parts):
                writer.write_table(pyarrow.concat_tables(group).combine_chunks())

    def check(self, file: Path) -> None:
        from pyarrow import parquet

        if not {"file", "model", "r", "tuned"} <= set(parquet.read_schema(file).names):
            raise ValueError


_FORMATS: dict[str, Callable[[], Format]] = {".parquet": Parquet, ".jsonl": JsonLines, ".csv": Csv}


class _Named(msgspec.Struct):
    """The fields that are read of a line."""

    file: str
    model: str


_named = msgspec.json.Decoder(_Named)


def _plain(value: Any) -> Any:
    return value.tolist()  # a vector


_json = msgspec.json.Encoder(enc_hook=_plain).encode


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return text_of(r_of(tuple(value))) if name == "r" else _json(value).decode()


def _schema(columns: Sequence[str]) -> Any:
    import pyarrow as pa

    one = {"label": pa.string(), "index": pa.int32(), "score": pa.float32()}
    types = one | {
        "file": pa.string(),
        "model": pa.string(),
        "r": pa.list_(pa.int32()),
        "tuned": pa.bool_(),
        "top_k": pa.list_(pa.struct(list(one.items()))),
        "vector": pa.list_(pa.float32()),
        "error": pa.string(),
    }
    return pa.schema([(name, types[name]) for name in columns])


def _groups(tables: Iterator[Any]) -> Iterator[list[Any]]:
    """Tables in groups of about `ROW_GROUP` rows, in order."""
    group: list[Any] = []
    for table in tables:
        group.append(table)
        if sum(map(len, group)) >= ROW_GROUP:
            yield group
            group = []
    if group:
        yield group
