"""Writes data in KuaiSAR's raw layout with a planted effect, for demonstrations, tests and benchmarks of any size.

What is planted is told in `llm4msr.data.synthetic_world`: individual tastes for the categories whose names stand in the
files. Shown items mix exploited and random ones, so that test rows hold both.

The files have the quirks of the published ones: headers that differ between the two releases, quoted lists, commas in
names, times as floats, nulls, repeated search rows whose clicks conflict, session ids that two users share, items
without a feature row, ids above 2^24. No row is damaged. What is left out: real words (captions and keywords are
numbers, as published), trends over time, and any use of the user features beyond how active a user is.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from llm4msr import storage
from llm4msr.config import SyntheticConfig, digest
from llm4msr.data.source import DataError
from llm4msr.data.synthetic_files import BEIJING_MS, FILES, NUM_CATEGORIES, beijing_time, pick, write_csv
from llm4msr.data.synthetic_world import (
    BIAS,
    NOISE_STD,
    TASTE,
    Items,
    affinity,
    draw_categories,
    draw_tastes,
    draw_words,
    generator,
)

logger = logging.getLogger("llm4msr.data.synthetic")

VERSION = 1  # part of the digest: a changed generator writes again
MARKER = "_synthetic.json"  # written first, so that an interrupted run may be overwritten and other data never is

TOPIC_SHARE = 0.65  # of the items of a search session that belong to its topic
OTHER_TYPE_SHARE = 0.06  # search rows of a type other than VIDEO
REPEAT_SHARE = 0.05  # search rows that come twice; half of those that were clicked conflict
REUSED_SESSION_SHARE = 0.02  # search sessions with the id of another user's session
NULL_SHARE = 0.01  # rec rows without duration_ms; without playing_time

_SOURCES = ("USER_INPUT", "HISTORY", "RECOMMENDED_QUERY", "HOT_LIST")
_PERIODS = {"small": ("2023-05-22 14:50", "2023-05-31 14:50"), "full": ("2023-05-22 14:30", "2023-06-10 09:30")}


def generate(config: SyntheticConfig, raw_uri: str) -> dict[str, Any]:
    """Writes the raw files below `raw_uri`, unless this very data is there already.

    The rows depend on the configuration's seed and sizes, not on `num_shards`. With one shard the files are named as
    published (``rec_inter.csv``); with more each is a folder of ``part-NNNNN.csv``, the interactions cut by time.

    Returns:
        What is true of the data: counts of rows, events, clicks and quirks, and per scenario ("rec", "search")
        `oracle_auc`, the AUC of the click probability without its noise, and `quality_auc`, that of the item's
        quality alone.

    Raises:
        DataError: The folder holds raw files that were not generated; nothing is touched.
    """
    identity = digest({"version": VERSION, "config": config})
    if storage.is_finished(raw_uri):
        manifest = storage.read_json(storage.join(raw_uri, storage.MANIFEST))
        if manifest.get("synthetic") == identity:
            known: dict[str, Any] = manifest["truth"]
            return known
    _clear(raw_uri, identity)
    truth: dict[str, Any] = {"users": config.num_users, "items": config.num_items}
    items = Items(config)
    tastes = draw_tastes(config)
    rec, rec_counts = _rec_rows(config, items, tastes["rec"], truth)
    search, search_counts = _search_rows(config, items, tastes["search"], truth)
    columns = {
        "rec_inter": rec,
        "src_inter": search,
        "user_features": _user_features(config, rec_counts, search_counts),
        "item_features": items.features(config, truth),
        "social_network": _social_network(config),
    }
    for name in FILES:
        write_csv(raw_uri, name, config.release, columns[name], config.num_shards)
    storage.write_manifest(raw_uri, {"synthetic": identity, "config": config.model_dump(mode="json"), "truth": truth})
    logger.info("Wrote %d rec and %d search rows below %s", truth["rec_rows"], truth["search_rows"], raw_uri)
    return truth


def _clear(raw_uri: str, identity: str) -> None:
    names = [storage.MANIFEST, *(name + end for name in FILES for end in (".csv", ""))]
    places = [storage.join(raw_uri, name) for name in names]
    found = [place for place in places if storage.exists(place)]
    if found and not storage.exists(storage.join(raw_uri, MARKER)):
        raise DataError(
            f"{found[0]} was not generated (no {MARKER} beside it) and is left as it is: "
            "give an empty folder as data.raw_uri, or read these files with data.kind = 'kuaisar'"
        )
    for place in found:  # the manifest first
        storage.remove(place)
    storage.write_json(storage.join(raw_uri, MARKER), {"synthetic": identity})


def _schedule(
    config: SyntheticConfig, rng: np.random.Generator, rows_per_user: int, sizes: tuple[int, int]
) -> tuple[np.ndarray, ...]:
    """Draws how many rows each user has and when: groups of rows share a moment, groups spread over the period.

    Returns:
        Rows' group and place in it, ordered by user; groups' user and timestamp_ms (Unix time).
    """
    mean = rows_per_user * rng.gamma(5, 1 / 5, config.num_users)
    rows = np.maximum(1, rng.poisson(mean))
    size = rng.integers(sizes[0], sizes[1] + 1, config.num_users)
    groups = -(-rows // size)
    group_user = np.repeat(np.arange(config.num_users), groups)
    rank = np.arange(len(group_user)) - np.repeat(np.cumsum(groups) - groups, groups)
    begin, end = (
        int(datetime.fromisoformat(moment).replace(tzinfo=UTC).timestamp() * 1000) - BEIJING_MS
        for moment in _PERIODS[config.release]
    )
    # One group per equal stretch of the period, so that train and test hold rows of (nearly) every user.
    moment = (rank + rng.random(len(rank))) / groups[group_user]
    group_rows = np.minimum(size[group_user], rows[group_user] - rank * size[group_user])
    group = np.repeat(np.arange(len(group_user)), group_rows)
    place = np.arange(len(group)) - np.repeat(np.cumsum(group_rows) - group_rows, group_rows)
    return group, place, group_user, begin + (moment * (end - begin)).astype(np.int64)


def _in_time_order(group: np.ndarray, place: np.ndarray, group_ms: np.ndarray) -> np.ndarray:
    rank = np.empty(len(group_ms), np.int64)
    rank[np.argsort(group_ms, kind="stable")] = np.arange(len(group_ms))
    return np.argsort(rank[group] * 64 + place, kind="stable")


def _draw_clicks(
    rng: np.random.Generator, scenario: str, leaning: np.ndarray, quality: np.ndarray, truth: dict[str, Any]
) -> np.ndarray:
    logit = BIAS[scenario] + TASTE * leaning + quality
    noisy = logit + rng.normal(0, NOISE_STD, len(logit))
    click: np.ndarray = rng.random(len(logit)) < 1 / (1 + np.exp(-noisy))
    truth[f"{scenario}_clicks"] = int(click.sum())
    truth.setdefault("oracle_auc", {})[scenario] = _auc(logit, click)
    truth.setdefault("quality_auc", {})[scenario] = _auc(quality, click)
    return click


def _auc(score: np.ndarray, label: np.ndarray) -> float | None:
    """Returns the share of (positive, negative) pairs in the right order, ties half; None without both."""
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]
    positives = int(label.sum())
    negatives = len(label) - positives
    if not positives or not negatives:
        return None
    return float((rank[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _rec_rows(
    config: SyntheticConfig, items: Items, liked: np.ndarray, truth: dict[str, Any]
) -> tuple[dict[str, pa.Array], np.ndarray]:
    rng = generator(config, "rec")
    group, place, group_user, group_ms = _schedule(config, rng, config.rec_rows_per_user, (2, 6))
    item = items.draw(rng, draw_categories(rng, liked[group_user[group]]))
    keep = np.unique(group * len(items.item_id) + item, return_index=True)[1]  # no item twice in a batch
    keep = keep[_in_time_order(group[keep], place[keep], group_ms)]
    group, item = group[keep], item[keep]
    user, n = group_user[group], len(group)
    click = _draw_clicks(rng, "rec", affinity(liked[user], items.category[item]), items.quality[item], truth)
    duration = items.duration_ms[item]
    playing = (duration * rng.lognormal(np.where(click, -0.2, -2.0), 0.6)).astype(np.int64)
    null = rng.random((2, n)) < NULL_SHARE
    search = rng.random(n) < 0.01
    related = pa.array((search & (rng.random(n) < 0.5)).astype(np.int8))
    truth |= {
        "rec_rows": n,
        "rec_batches": len(np.unique(group)),
        "rec_rows_of_items_without_features": int((item >= config.num_items).sum()),
        "rec_null_duration": int(null[0].sum()),
        "rec_null_playing_time": int(null[1].sum()),
        "rec_playing_above_duration": int(((playing > duration) & ~null.any(axis=0)).sum()),
    }
    ms = group_ms[group]
    acts = click & (rng.random((3, n)) < np.array([[0.01], [0.05], [0.01]]))
    columns = {
        "user_id": pa.array(user + 1),
        "item_id": pa.array(items.item_id[item]),
        "duration_ms": pa.array(duration.astype(float), mask=null[0]),
        "playing_time": pa.array(playing.astype(float), mask=null[1]),
        "timestamp": pa.array(ms.astype(float)),
        "search_item_related": related,
        "search_photo_related": related,
        "search": pa.array(search.astype(np.int8)),
        "click": pa.array(click.astype(np.int8)),
        "time": beijing_time(ms),
    }
    columns |= {name: pa.array(acts[i].astype(np.int8)) for i, name in enumerate(("forward", "like", "follow"))}
    return columns, np.bincount(user, minlength=config.num_users)


def _search_rows(
    config: SyntheticConfig, items: Items, liked: np.ndarray, truth: dict[str, Any]
) -> tuple[dict[str, pa.Array], np.ndarray]:
    rng = generator(config, "search")
    session, place, session_user, session_ms = _schedule(config, rng, config.search_rows_per_user, (3, 8))
    topic = draw_categories(rng, liked[session_user])
    n = len(session)
    category = np.where(rng.random(n) < TOPIC_SHARE, topic[session], rng.integers(NUM_CATEGORIES, size=n))
    item = np.where(rng.random(n) < OTHER_TYPE_SHARE, items.draw_other(rng, n), items.draw(rng, category))
    keep = np.unique(session * len(items.item_id) + item, return_index=True)[1]
    session, place, item = session[keep], place[keep], item[keep]
    user, n = session_user[session], len(session)
    click = _draw_clicks(rng, "search", affinity(liked[user], items.category[item]), items.quality[item], truth)

    # A repeat comes after the rest of its session; of two rows of a clicked item one may not show the click.
    last = np.zeros(len(session_user), place.dtype)
    np.maximum.at(last, session, place)
    repeat = np.flatnonzero((rng.random(n) < REPEAT_SHARE) & (place < last[session]))
    chance = rng.random(len(repeat))
    first_silent, second_silent = click[repeat] & (chance < 0.25), click[repeat] & (chance >= 0.25) & (chance < 0.5)
    shown = np.concatenate([click, click[repeat] & ~second_silent])
    shown[repeat[first_silent]] = False
    row = np.concatenate([np.arange(n), repeat])
    place = np.concatenate([place, place[repeat] + 32])
    order = _in_time_order(session[row], place, session_ms)
    row, shown = row[order], shown[order]

    num_sessions = len(session_user)
    session_id = rng.permutation(num_sessions) + 1
    donor = rng.integers(num_sessions, size=num_sessions)
    reused = (rng.random(num_sessions) < REUSED_SESSION_SHARE) & (session_user[donor] != session_user)
    session_id[reused] = session_id[donor[reused]]
    truth |= {
        "search_rows": len(row),
        "search_events": n,
        "search_sessions": len(np.unique(session)),
        "search_repeats": len(repeat),
        "search_conflicts": int((first_silent | second_silent).sum()),
        "search_reused_sessions": int(reused.sum()),
        "search_events_of_other_types": int((item >= items.num_videos).sum()),
        "search_events_of_items_without_features": int((item >= config.num_items).sum()),
    }
    session, item = session[row], item[row]
    ms = session_ms[session]
    source = pick(np.where(rng.random(num_sessions) < 0.6, 0, rng.integers(1, 4, size=num_sessions)), _SOURCES)
    columns = {
        "keyword": pa.DictionaryArray.from_arrays(pa.array(session.astype(np.int32)), draw_words(rng, topic, 4)),
        "user_id": pa.array(session_user[session] + 1),
        "item_id": pa.array(items.item_id[item]),
        "click_cnt": pa.array(np.where(shown, 1 + rng.poisson(0.15, len(row)), 0)),
        "search_session_id": pa.array(session_id[session]),
        "search_session_timestamp": pa.array(ms),
        "item_type": items.types(item),
    }
    columns["search_source"] = columns["search_session_source"] = source.take(pa.array(session))
    columns["search_session_time"] = columns["time"] = beijing_time(ms)
    return columns, np.bincount(user, minlength=config.num_users)


def _user_features(config: SyntheticConfig, rec_counts: np.ndarray, search_counts: np.ndarray) -> dict[str, pa.Array]:
    rng = generator(config, "users")
    n = config.num_users

    def level(counts: np.ndarray, num_levels: int) -> pa.Array:
        return pa.array(np.argsort(np.argsort(counts, kind="stable"), kind="stable") * num_levels // n)

    columns = {
        "user_id": pa.array(np.arange(1, n + 1)),
        "onehot_feat1": pa.array(rng.integers(8, size=n)),  # the published documentation swaps these two ranges
        "onehot_feat2": pa.array(rng.integers(3, size=n)),
        "search_active_level": level(search_counts, 7),
    }
    columns["reco_active_level"] = columns["rec_active_level"] = level(rec_counts, 4)
    return columns


def _social_network(config: SyntheticConfig) -> dict[str, pa.Array]:
    rng = generator(config, "social")
    user = np.flatnonzero(rng.random(config.num_users) < 0.03)
    friend = (user + rng.integers(1, max(2, config.num_users), size=len(user))) % config.num_users
    return {"user_id": pa.array(user + 1), "user_follow_id": pa.array(friend + 1)}
