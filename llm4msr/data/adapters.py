"""Which adapter reads which kind of raw data: an explicit table, so that every layout is found in one place."""

from __future__ import annotations

from llm4msr.config import DataConfig
from llm4msr.data.amazon import AmazonAdapter
from llm4msr.data.kuaisar import KuaisarAdapter
from llm4msr.data.movielens import MovieLensAdapter
from llm4msr.data.source import Adapter, DataError
from llm4msr.data.table import TableAdapter

ADAPTERS: dict[str, type[AmazonAdapter] | type[KuaisarAdapter] | type[MovieLensAdapter] | type[TableAdapter]] = {
    "kuaisar": KuaisarAdapter,
    "synthetic": KuaisarAdapter,  # the generator writes this layout
    "movielens": MovieLensAdapter,
    "table": TableAdapter,
    "amazon": AmazonAdapter,
}


def build_adapter(config: DataConfig, raw_uri: str | None = None) -> Adapter:
    """Builds the adapter of ``config.kind``.

    Args:
        config: The ``data`` section.
        raw_uri: Folder of the raw files where it is another than ``config.raw_uri``.

    Raises:
        DataError: Neither names a folder.
    """
    raw_uri = raw_uri or config.raw_uri
    if raw_uri is None:
        raise DataError(f"data.raw_uri is unset for kind = {config.kind!r}: the folder with the raw files is needed")
    return ADAPTERS[config.kind](config.model_copy(update={"raw_uri": raw_uri}))
