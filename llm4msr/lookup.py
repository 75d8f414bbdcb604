"""From a request's raw ids and values to the rows and indices of the model's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat

import numpy as np
import pyarrow as pa

from llm4msr.request import ContextValue, Key, RequestError
from llm4msr.schema import FIRST_INDEX, PADDING_INDEX, UNSEEN_INDEX, Feature, FeatureSchema, KeyType

INT64 = np.iinfo(np.int64)
# Among N numbers none lies more than sqrt(N - 1) standard deviations from their mean: what is farther is a mistake,
# and large enough a one would leave the model without a finite score.
MAX_DEVIATIONS = 1e6


class KeyIndex:
    """Raw ids to table rows: 0 for an id that the table lacks.

    Args:
        keys: Sorted, distinct ids.
        key_type: int64 or string.
    """

    def __init__(self, keys: pa.Array, key_type: KeyType) -> None:
        self.key_type = key_type
        self.sorted_ids = keys.to_numpy() if key_type == "int64" else None
        self.rows = None if key_type == "int64" else {key: i for i, key in enumerate(keys.to_pylist(), start=1)}

    def __call__(self, keys: Sequence[Key], field: str) -> np.ndarray:
        """Returns int32 rows.

        Raises:
            RequestError: A key is of the wrong type for this data.
        """
        if self.rows is not None:
            wrong = [key for key in keys if not isinstance(key, str)]
            if wrong:
                raise RequestError(
                    field, f"{wrong[0]!r} is not a text id: ids of this data are text, such as {self.example()!r}"
                )
            return np.fromiter(map(self.rows.get, keys, repeat(0)), np.int32, len(keys))
        wrong = [k for k in keys if not isinstance(k, int) or isinstance(k, bool) or not INT64.min <= k <= INT64.max]
        if wrong:
            raise RequestError(
                field, f"{wrong[0]!r} is not a 64-bit integer: ids of this data are integers, such as {self.example()}"
            )
        if not len(self.sorted_ids):
            return np.zeros(len(keys), np.int32)
        wanted = np.asarray(keys, np.int64)
        place = np.minimum(np.searchsorted(self.sorted_ids, wanted), len(self.sorted_ids) - 1)
        return np.where(self.sorted_ids[place] == wanted, place + 1, 0).astype(np.int32)

    def example(self) -> Key | None:
        """Returns some id of the table."""
        if self.rows is not None:
            return next(iter(self.rows), None)
        return int(self.sorted_ids[0]) if len(self.sorted_ids) else None


class ContextEncoder:
    """Values of context features to what prepared rows hold.

    Args:
        schema: Names the features.
        vocabularies: Values of each categorical and sequence feature; the one at position r has index r + 2.
    """

    def __init__(self, schema: FeatureSchema, vocabularies: Mapping[str, pa.Array]) -> None:
        self.features = {f.name: f for f in schema.features if f.source == "context"}
        self.index = {
            name: {value: i for i, value in enumerate(values.to_pylist(), start=FIRST_INDEX)}
            for name, values in vocabularies.items()
        }

    def __call__(self, context: Mapping[str, ContextValue], num_rows: int) -> dict[str, np.ndarray]:
        """Returns the columns of prepared rows that all have these values.

        Raises:
            RequestError: No such feature, or a value of the wrong type.
        """
        unknown = sorted(set(context) - set(self.features))
        if unknown:
            valid = ", ".join(sorted(self.features)) or "this model has none"
            raise RequestError("context", f"no context feature {unknown[0]!r}; valid: {valid}")
        return {
            name: np.full(
                (num_rows, feature.max_length) if feature.kind == "sequence" else num_rows,
                self._encode(feature, context.get(name)),
                np.float32 if feature.kind == "numeric" else np.int32,
            )
            for name, feature in self.features.items()
        }

    def _encode(self, feature: Feature, value: ContextValue | None) -> float | int | list[int]:
        if feature.kind == "sequence":
            return self._encode_list(feature, [] if value is None else value)
        if isinstance(value, (list, tuple)):
            raise RequestError("context", f"{feature.name} is one value, found a list of {len(value)}")
        if feature.kind == "numeric":
            if value is None:
                return 0.0
            if isinstance(value, (str, bool)):
                raise RequestError("context", f"{feature.name} is numeric, found {value!r}")
            try:
                standardised = (float(value) - feature.mean) / feature.std
            except OverflowError:  # a whole number beyond float64
                standardised = np.inf
            if not abs(standardised) <= MAX_DEVIATIONS:
                raise RequestError(
                    "context",
                    f"{feature.name} is {str(value)[:30]}, more than {MAX_DEVIATIONS:.0e} standard deviations "
                    f"({feature.std:.6g} each) from the mean {feature.mean:.6g}",
                )
            return standardised
        return PADDING_INDEX if value is None else self.index[feature.name].get(str(value), UNSEEN_INDEX)

    def _encode_list(self, feature: Feature, values: ContextValue) -> list[int]:
        if not isinstance(values, (list, tuple)):
            raise RequestError("context", f"{feature.name} is a list of values, found {values!r}")
        if wrong := [v for v in values if isinstance(v, bool) or not isinstance(v, (str, int, float))]:
            raise RequestError("context", f"{feature.name} is a list of text or numbers, found {wrong[0]!r} in it")
        index = self.index[feature.name]
        known = [index.get(str(value), UNSEEN_INDEX) for value in values[: feature.max_length]]
        return known + [PADDING_INDEX] * (feature.max_length - len(known))
