"""The load of the benchmarks of serving: what it counts as what, against a real server."""

from __future__ import annotations

import itertools

import pytest
from live_site import Site

from benchmarks.serve_sides import COME_BACK, load, missing_tool

pytestmark = pytest.mark.skipif(missing_tool() is not None, reason=missing_tool() or "")


class Moody:
    """Answers with each kind in turn, of which the last is none."""

    KINDS = ((200, []), (503, [(b"retry-after", b"1")]), (503, []), (500, []), None)

    def __init__(self):
        self.turn, self.given = itertools.count(), []

    async def __call__(self, scope, receive, send):
        kind = self.KINDS[next(self.turn) % len(self.KINDS)]
        self.given.append(kind)
        while (await receive()).get("more_body"):
            pass
        if kind is None:
            return  # the server then answers 500 by itself
        status, headers = kind
        await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"{}"})


def test_what_is_told_to_come_back_is_not_what_failed(tmp_path):
    (tmp_path / "bodies").write_text('{"a": 1}\n')
    app = Moody()
    site = Site(app)
    try:
        found = load(site.url.rstrip("/"), tmp_path / "bodies", 1, 1)
    finally:
        site.close()
    num_each = len(app.given) // len(app.KINDS)
    assert num_each > 1 and set(found.kinds) == {COME_BACK, "503", "500"}
    for kind, times in ((COME_BACK, 1), ("503", 1), ("500", 2)):  # one may be under way when the time is over
        assert abs(found.kinds[kind] - times * num_each) <= 2 * times
    assert found.told_to_come_back == found.kinds[COME_BACK]
    assert found.failed == found.kinds["503"] + found.kinds["500"]


def test_nobody_there_is_an_error(tmp_path):
    (tmp_path / "bodies").write_text('{"a": 1}\n')
    site = Site(Moody())
    site.close()
    with pytest.raises(RuntimeError, match="wrk ended with"):
        load(site.url.rstrip("/"), tmp_path / "bodies", 1, 1)
