"""The page in a real browser, against the application behind its gate: what people see, do and cannot break."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import NUM_ITEMS

from serve.api import Limits, build_api
from serve.explain import KnowledgeSource
from serve.gate import Gate
from serve.served import Served
from serve.tokens import Tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from explained_workspace import build_with_checkpoint
from live_site import Site

playwright = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")
expect = playwright.expect

TOKEN = "a-token-of-the-page-01"
BIG = 2**53 + 1
MARKUP = "<img src=x onerror=document.title='broken'>&amp;"
NUM_SHOWN = 24
WAIT_MS = 20_000


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    """A model with histories, knowledge from prompts, and an item whose text looks like markup."""
    root = tmp_path_factory.mktemp("page") / "ws"
    uri = build_with_checkpoint(str(root))
    items = pq.read_table(f"{uri}/items.parquet")
    texts = pa.array([MARKUP, *items["text"].to_pylist()[1:]])
    pq.write_table(items.set_column(1, items.schema.field("text"), texts), f"{uri}/items.parquet")
    served = Served()
    served.change({"checkpoint_uri": uri})
    limits = Limits(candidate_sets={"a few": [7003, 7001, BIG]})
    return build_api(served, limits, KnowledgeSource(str(root / "knowledge" / "k1")))


@pytest.fixture(scope="module")
def open_site(api):
    site = Site(Gate(api, None, 2**20, 64, lambda record: None))
    yield site
    site.close()


@pytest.fixture
def site(open_site):
    yield open_site
    open_site.fault = None


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("needs Chromium: none of chromium, chromium-browser, google-chrome is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens a page that complains of nothing unless it is told to, and asks nobody else."""
    contexts, troubles = [], []

    def visit(url, width=1400, height=1000, ready=True, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(WAIT_MS)
        expect.set_options(timeout=WAIT_MS)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
        page.on("request", lambda asked: asked.url.startswith((url, "data:")) or troubles.append(asked.url))
        page.goto(url)
        if ready:
            settled(page)
        return page

    yield visit
    for context in contexts:
        context.close()
    own = [trouble for trouble in troubles if "Failed to load resource" not in trouble]
    assert own == []


def settled(page):
    """Waits until a ranking is shown and its user is described."""
    expect(page.locator("#rows tr").first).to_be_visible()
    expect(page.locator("#rank")).to_be_enabled()
    expect(page.locator("#about-body summary").first).to_be_visible()


def ranked(site, user, scenario, items, **headers):
    body = {"user": user, "scenario": scenario, "items": items}
    answer = httpx.post(f"{site.url}v1/rank", json=body, headers=headers).raise_for_status()
    return [(str(one["item"]), f"{one['score']:.3f}") for one in answer.json()["results"]]


def rows(page):
    """What the table says: item and score of each row, in the chosen scenario."""
    ids = page.locator("#rows th > div").all_inner_texts()
    return list(zip(ids, page.locator("#rows .asked b").all_inner_texts(), strict=True))


def ask(page, user, items=None):
    page.get_by_label("User", exact=True).fill(user)
    if items is not None:
        page.get_by_label("My list").check()
        page.get_by_label("Items").fill(items)
    page.get_by_role("button", name="Rank", exact=True).click()


def test_people_see_a_ranking_and_why(site, visit):
    page = visit(site.url)
    assert page.locator("#rows tr").count() == NUM_SHOWN
    assert page.locator("#head th").all_inner_texts() == ["#", "Item", "search ▾", "rec"]

    ask(page, "1000", "7003, 7001\n7001\n7009")
    expect(page.locator("#status")).to_have_text("3 candidates ranked for 1000 in search.")
    assert rows(page) == ranked(site, 1000, "search", [7003, 7001, 7009])
    others = dict(ranked(site, 1000, "rec", [7003, 7001, 7009]))
    both = page.locator("#rows td[data-scenario=rec] b").all_inner_texts()
    assert both == [others[item] for item, _ in rows(page)]
    assert page.locator("#rows .change").first.inner_text().startswith("without 0.")
    expect(page.locator("#latency")).to_contain_text("ms")
    assert [text.split("\n")[0] for text in page.locator("#latency div").all_inner_texts()][:3] == [
        "Browser",
        "Median of 2",
        "Server",
    ]

    item, score = rows(page)[1]
    page.locator("#rows tr").nth(1).locator(".score").first.click()  # anywhere in the row
    why = page.locator("#why")
    expect(why.locator("tbody tr")).to_have_count(5)
    expect(why).to_contain_text(item)
    assert why.locator("dd").first.inner_text() == score
    assert "this model does not compare user and item" in why.inner_text()
    why.get_by_text("User 1000").click()
    expect(why.locator("pre").first).to_have_text("likes 1000")

    about = page.locator("#about")
    about.get_by_text("Liked in all").click()
    assert about.locator("details").first.locator("li").first.inner_text().startswith("genre ")
    about.get_by_text("Nearest users by knowledge").click()
    about.get_by_role("button", name="1003").click()
    expect(page.locator("#about-title")).to_have_text("User 1003")
    assert rows(page) == ranked(site, 1003, "search", [7003, 7001, 7009])
    expect(why).to_contain_text("Choose a row of the ranking.")


def test_scenario_examples_and_sets_can_be_chosen(site, visit):
    page = visit(site.url)
    page.get_by_label("Scenario").select_option("rec")
    expect(page.locator("#status")).to_contain_text("in rec.")
    expect(page.locator("#scenario-text")).to_have_text("Recommended items.")
    lacking = page.locator("#user-example optgroup[label='Without knowledge'] option").first.get_attribute("value")
    page.get_by_label("Examples of users").select_option(lacking)
    expect(page.locator("#about-title")).to_have_text(f"User {lacking}")
    expect(page.locator("#summary")).to_contain_text("There is no knowledge of this user")
    page.get_by_label("A candidate set").check()
    page.get_by_role("button", name="Rank", exact=True).click()
    expect(page.locator("#rows tr")).to_have_count(3)
    assert rows(page) == ranked(site, int(lacking), "rec", [7003, 7001, BIG])  # the large id is not rounded
    page.locator("#rows tr", has_text=str(BIG)).get_by_role("button").click()
    expect(page.locator("#why")).to_contain_text(str(BIG))
    assert "unknown item" not in page.locator("#why").inner_text()
    ask(page, "-12345")
    expect(page.locator("#summary")).to_contain_text("The model does not know this user.")


def test_text_is_never_markup(site, visit):
    page = visit(site.url)
    ask(page, "1000", f"7000,{NUM_ITEMS}")
    expect(page.locator("#rows tr")).to_have_count(2)
    title = page.locator("#rows tr", has_text="7000").get_by_role("button")
    expect(title).to_have_text(MARKUP)
    title.click()
    expect(page.locator("#why strong")).to_have_text(MARKUP)
    assert page.locator("img").count() == 0 and page.title() == "llm4msr ranker"


def test_the_keyboard_is_enough(site, visit):
    page = visit(site.url)
    page.evaluate("document.activeElement.blur()")

    def tab_to(selector, most=60):
        """Presses Tab until the element has the focus, and sees that people see where they are."""
        for _ in range(most):
            page.keyboard.press("Tab")
            width = page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
            style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert width >= 2 and style == "solid", page.evaluate("document.activeElement.outerHTML")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"Tab does not lead to {selector}")

    tab_to(".skip", most=1)
    tab_to("#scenario", most=1)
    page.keyboard.press("ArrowUp")
    expect(page.locator("#status")).to_contain_text("in rec.")
    tab_to("#user")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("1003")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(f"{NUM_SHOWN} candidates ranked for 1003 in rec.")
    settled(page)
    page.locator("#user").focus()
    tab_to("#rows button")
    title = page.locator("#rows button").first
    expect(title).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#why tbody tr")).to_have_count(5)
    expect(page.locator("#why-title")).to_be_focused()
    page.keyboard.press("Escape")
    expect(title).to_be_focused()
    for field in page.locator("input:visible, select:visible, textarea:visible").all():
        assert field.evaluate("(field) => field.labels.length") == 1


def test_nothing_to_rank_is_said(site, visit):
    page = visit(site.url)
    ask(page, "1000", " \n, ")
    expect(page.locator("#empty")).to_have_text("No candidates: type at least one item.")
    expect(page.locator("#table")).to_be_hidden()
    ask(page, "  ", "7001")
    expect(page.locator("#empty")).to_contain_text("No user: type an id")
    ask(page, "1000")
    expect(page.locator("#rows tr")).to_have_count(1)


def failing(status, body=b"", **headers):
    return status, [(name.encode(), value.encode()) for name, value in headers.items()], body


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (failing(503, b"{}", **{"retry-after": "7"}), "The server is busy: try again in 7 s."),
        (failing(500, b'{"detail": "internal error"}'), "The server failed (500). internal error"),
        (failing(502, b"<html>a proxy's page</html>"), "The server failed (502)."),
    ],
)
def test_a_failure_is_said_and_can_be_tried_again(site, visit, fault, said):
    page = visit(site.url, 390, 844)
    site.fault = fault
    ask(page, "1001")
    problem = page.get_by_role("alert")
    expect(problem).to_contain_text(said)
    expect(page.locator("#table")).to_be_hidden()
    assert problem.bounding_box()["y"] >= 0
    site.fault = None
    problem.get_by_role("button", name="Try again").click()
    expect(page.locator("#status")).to_contain_text("ranked for 1001")
    expect(problem).to_be_hidden()


def test_a_request_that_is_refused_says_why(site, visit):
    page = visit(site.url)
    ask(page, "somebody")
    expect(page.get_by_role("alert")).to_contain_text("'somebody' is not a 64-bit integer")
    ask(page, "007")  # JSON has no such number
    expect(page.locator("#about-title")).to_have_text("User 7")


def test_a_server_that_is_gone_or_not_there_yet(site, visit):
    page = visit(site.url)
    page.route("**/v1/**", lambda route: route.abort())
    page.locator("#rows button").first.click()
    expect(page.get_by_role("alert")).to_contain_text("The server cannot be reached")
    page.unroute("**/v1/**")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#why tbody tr")).to_have_count(5)
    site.fault = failing(503, b"{}")
    late = visit(site.url, ready=False)
    expect(late.get_by_role("alert")).to_contain_text("The server is busy: try again in a few s.")
    expect(late.locator("#main")).to_be_hidden()
    site.fault = None
    late.get_by_role("button", name="Try again").click()
    settled(late)


def test_work_in_progress_is_said(site, visit):
    page = visit(site.url)
    held = []
    page.route("**/v1/rank:batch", lambda route: held.append(route))
    ask(page, "1001")
    expect(page.locator("#status")).to_have_text("Ranking …")
    expect(page.locator("#rank")).to_be_disabled()
    assert page.locator("#results").get_attribute("aria-busy") == "true"
    while not held:  # the browser says that it asks before the test is told
        page.wait_for_timeout(10)
    held[0].continue_()
    expect(page.locator("#status")).to_contain_text("ranked for 1001")
    expect(page.locator("#rank")).to_be_enabled()
    assert page.locator("#results").get_attribute("aria-busy") is None


def test_a_token_is_asked_for_and_kept_in_the_tab(api, visit):
    site = Site(Gate(api, Tokens({"LLM4MSR_TOKENS": TOKEN}), 2**20, 64, lambda record: None))
    try:
        page = visit(site.url, ready=False)
        field = page.get_by_label("Token", exact=True)
        expect(field).to_be_focused()
        expect(page.get_by_role("alert")).to_contain_text("The server asks for a token.")
        expect(page.locator("#main")).to_be_hidden()
        field.fill("a-wrong-token-0123")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("The server does not accept this token.")
        field.fill(TOKEN)
        page.get_by_role("button", name="Use it").click()
        settled(page)
        expect(field).to_be_hidden()
        expect(page.get_by_role("alert")).to_be_hidden()
        page.reload()
        settled(page)
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        expect(visit(site.url, ready=False).get_by_label("Token", exact=True)).to_be_visible()
    finally:
        site.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(1400, 1000), (900, 1000), (390, 844), (320, 640)])
def test_it_fits_the_screen(site, visit, tmp_path, width, height, scheme):
    page = visit(site.url, width, height, color_scheme=scheme)
    page.locator("#rows button").first.click()
    expect(page.locator("#why tbody tr")).to_have_count(5)
    assert 0 <= page.locator("#why-title").bounding_box()["y"] < height / 2  # people see what they asked for
    for details in page.locator("details").all():
        details.evaluate("(one) => { one.open = true; }")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = {name: page.locator(f"#{name}").bounding_box() for name in ("ask", "results", "why")}
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width for box in boxes.values())
    beside = boxes["ask"]["x"] + boxes["ask"]["width"] <= boxes["results"]["x"]
    assert beside == (width > 760)
    if width == 1400:
        assert boxes["results"]["x"] + boxes["results"]["width"] <= boxes["why"]["x"]
    if width < 500:  # fingers
        heights = [one.bounding_box()["height"] for one in page.locator("button:visible, summary:visible").all()]
        assert min(heights) >= 24
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (max(brightness) < 60) == (scheme == "dark")
    shot = tmp_path / f"{width}-{scheme}.png"
    page.screenshot(path=str(shot), full_page=True)
    assert shot.stat().st_size > 10_000
