"""What the generated logs are about: the catalogue, each user's tastes, and how a click comes about.

Every user likes three second-level categories in recommendation and three in search, one of them shared, drawn from
three first-level categories of which one is liked in both. A click follows

    click ~ Bernoulli(sigmoid(bias + TASTE * affinity(user, category, scenario) + quality(item) + noise))

with affinity 1 in a liked second-level category, `NEAR_AFFINITY` in the rest of a liked first-level category, 0
elsewhere. A user has so few rows that an id embedding hardly learns this, while the names of the clicked categories
give it away; tastes of one scenario hint at those of the other. Left out: files, sessions and times (see
`llm4msr.data.synthetic`), trends, and any effect of user features, captions or authors.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from llm4msr.config import SyntheticConfig
from llm4msr.data.synthetic_files import LEVELS, NUM_CATEGORIES, PER_FIRST, number_lists, pick, quote

# With these values a ranker that knew all but the noise would reach an AUC of 0.80 to 0.85 in both scenarios.
TASTE = 3.4
NEAR_AFFINITY = 0.5
QUALITY_STD = 0.5
NOISE_STD = 0.5
BIAS = {"rec": -2.0, "search": -2.2}
LIKED_SHARE, NEAR_SHARE = 0.4, 0.15  # of shown rec items and of search topics; the rest is random

UNLISTED_SHARE = 0.02  # videos beyond num_items that have no feature row
BIG_ID_SHARE = 0.02  # items whose id is above 2^24, where float32 merges neighbours
PADDING_SHARE = 0.02  # items with author 0; with upload_time 1970-01-01; without categories; without second level
OTHER_TYPES = ("USER", "IMAGE_ATLAS", "LIVE", "COMMODITY", "MUSIC", "ADVERT")

_BIG_ID = 103_656_000_000
_ITEM_TYPES = ("NORMAL", "AD", "LIVEGAME_PLAYBACK", "UNKNOWN")
_UPLOAD_TYPES = ("ShortImport", "LongImport", "Kmovie", "PictureSet", "ShortCamera", "UNKNOWN")
_WORDS_PER_CATEGORY = 50


def generator(config: SyntheticConfig, stream: str) -> np.random.Generator:
    """Returns the random numbers of one part of the data, so that parts do not depend on one another."""
    return np.random.default_rng([config.seed, *stream.encode()])


def draw_tastes(config: SyntheticConfig) -> dict[str, np.ndarray]:
    """Draws the liked second-level categories of every user: (num_users, 3) for "rec" and "search"."""
    rng = generator(config, "tastes")
    first = rng.random((config.num_users, NUM_CATEGORIES // PER_FIRST), dtype=np.float32).argsort(axis=1)[:, :3]
    second = rng.random((config.num_users, 3, PER_FIRST), dtype=np.float32).argsort(axis=2)
    liked = (first[:, :, None] * PER_FIRST + second).astype(np.int16)
    both, rec, search = liked[:, 0], liked[:, 1], liked[:, 2]
    return {
        "rec": np.stack([both[:, 0], both[:, 1], rec[:, 0]], axis=1),
        "search": np.stack([both[:, 0], both[:, 2], search[:, 0]], axis=1),
    }


def affinity(liked: np.ndarray, category: np.ndarray) -> np.ndarray:
    """Returns how much rows with liked categories (n, 3) lean to `category` (n,), which is -1 for none."""
    exact = (liked == category[:, None]).any(axis=1)
    near = (liked // PER_FIRST == (category // PER_FIRST)[:, None]).any(axis=1)
    return np.where(exact, 1.0, np.where(near, NEAR_AFFINITY, 0.0))


def draw_categories(rng: np.random.Generator, liked: np.ndarray) -> np.ndarray:
    """Draws a second-level category for each row of liked ones (n, 3): a liked one, one near it, or any."""
    n = len(liked)
    favourite = liked[np.arange(n), rng.integers(3, size=n)].astype(np.int64)
    near = favourite // PER_FIRST * PER_FIRST + rng.integers(PER_FIRST, size=n)
    chance = rng.random(n)
    anything = rng.integers(NUM_CATEGORIES, size=n)
    return np.where(chance < LIKED_SHARE, favourite, np.where(chance < LIKED_SHARE + NEAR_SHARE, near, anything))


def draw_words(rng: np.random.Generator, category: np.ndarray, max_words: int) -> pa.Array:
    """Draws a list of word numbers per category (n,): seven of ten are the category's own, the rest anyone's."""
    lengths = rng.integers(1, max_words + 1, size=len(category))
    owner = np.repeat(category + 1, lengths)
    base = np.where(rng.random(len(owner)) < 0.7, owner, 0) * _WORDS_PER_CATEGORY
    return number_lists(lengths, base + rng.integers(_WORDS_PER_CATEGORY, size=len(owner)))


class Items:
    """The catalogue: videos with a feature row first, then videos without, then other types, also without.

    Attributes:
        num_videos: Videos of both sorts.
        category: Second-level category (n,), -1 for other types.
        quality: What an item adds to the logit of a click (n,).
        duration_ms: Length in milliseconds (n,), whole tenths of a second.
        item_id: Raw ids (n,).
    """

    def __init__(self, config: SyntheticConfig) -> None:
        rng = generator(config, "items")
        self.num_videos = config.num_items + max(1, round(config.num_items * UNLISTED_SHARE))
        total = self.num_videos + max(len(OTHER_TYPES), config.num_items // 20)
        self.category = np.full(total, -1, np.int64)
        self.category[: self.num_videos] = rng.permutation(self.num_videos) % NUM_CATEGORIES
        self.quality = rng.normal(0, QUALITY_STD, total)
        self.duration_ms = (rng.lognormal(5.9, 0.8, total)).astype(np.int64) * 100
        self.item_id = rng.permutation(2 * total)[:total] + 1
        big = rng.random(total) < BIG_ID_SHARE
        big[: min(2, config.num_items)] = True
        self.item_id[big] = _BIG_ID + np.arange(big.sum())
        videos = self.category[: self.num_videos]
        self._by_category = np.argsort(videos, kind="stable")
        self._count = np.bincount(videos, minlength=NUM_CATEGORIES)
        self._first = np.cumsum(self._count) - self._count

    def draw(self, rng: np.random.Generator, category: np.ndarray) -> np.ndarray:
        """Draws a video of each category, the first ones more often; any video where a category has none."""
        chance = rng.random(len(category)) ** 1.3
        place = self._first[category] + (chance * self._count[category]).astype(np.int64)
        anything = (chance * self.num_videos).astype(np.int64)
        return self._by_category[np.where(self._count[category] > 0, place, anything)]

    def draw_other(self, rng: np.random.Generator, num_rows: int) -> np.ndarray:
        """Draws items that are no videos."""
        return rng.integers(self.num_videos, len(self.item_id), size=num_rows)

    def types(self, item: np.ndarray) -> pa.Array:
        """Returns the type of each item as search rows name it."""
        return pick(np.where(item < self.num_videos, 0, 1 + item % len(OTHER_TYPES)), ("VIDEO", *OTHER_TYPES))

    def features(self, config: SyntheticConfig, truth: dict[str, object]) -> dict[str, pa.Array]:
        """Returns the columns of item_features; notes in `truth` what they lack."""
        rng = generator(config, "item_features")
        n = config.num_items
        category = self.category[:n]
        no_category, no_second, no_author, no_upload = rng.random((4, n)) < PADDING_SHARE
        third = np.where(rng.random(n) < 0.6, category * 2 + rng.integers(2, size=n), -1)
        fourth = np.where(rng.random(n) < 0.1, third, -1)
        hidden = no_category
        columns: dict[str, pa.Array] = {}
        for depth, value in enumerate((category // PER_FIRST, category, third, fourth)):
            level, names = LEVELS[depth]
            hidden = hidden | (no_second & (depth >= 1))
            value = np.where(hidden, -1, value)
            columns[f"{level}_level_category_id"] = pa.array(np.where(value < 0, 0, value + 10 ** (depth + 1)))
            chinese_empty = "empty" if config.release == "small" else "空"
            for kind, part, empty in (("name_en", 0, "empty"), ("name", 1, chinese_empty)):
                texts = [quote(name[part]) for name in names] + [empty]
                columns[f"{level}_level_category_{kind}"] = pick(np.where(value < 0, len(names), value), texts)
        days = np.datetime64("2023-05-22") - rng.exponential(200, n).astype("timedelta64[D]")
        days[no_upload] = np.datetime64("1970-01-01")
        truth["items_without_category"] = int(no_category.sum())
        truth["items_without_author"] = int(no_author.sum())
        truth["items_without_upload_time"] = int(no_upload.sum())
        return columns | {
            "item_id": pa.array(self.item_id[:n]),
            "caption": draw_words(rng, category, 8),
            "author_id": pa.array(np.where(no_author, 0, rng.integers(1, n // 3 + 2, size=n))),
            "item_type": pick(np.where(rng.random(n) < 0.97, 0, rng.integers(1, 4, size=n)), _ITEM_TYPES),
            "upload_time": pa.array(days),
            "upload_type": pick(rng.integers(len(_UPLOAD_TYPES), size=n), _UPLOAD_TYPES),
            "music_id": pa.array(np.where(rng.random(n) < 0.3, 0, rng.integers(1, n + 2, size=n))),
        }
