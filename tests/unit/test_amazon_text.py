"""What is left of titles, brands, categories and prices when the pieces of web pages in them are gone."""

from __future__ import annotations

import pytest

from llm4msr.data.amazon_text import clean_brand, clean_categories, clean_text, parse_price


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Plain  title\n", "Plain title"),
        ('<span class="a-size-medium a-color-secondary"', None),
        ("<b>Soap</b><br/>&amp;#39;n&nbsp;more", "Soap 'n more"),
        ("&lt;i&gt;Vogue&lt;/i&gt;", "Vogue"),
        ("I <3 soap, A <Large>, 3 < 4 & AT&T&copy", "I <3 soap, A <Large>, 3 < 4 & AT&T&copy"),
        ("var aPageStart = (new Date()).getTime();\nvar ue_t0 = 1;", None),
        ("Soap var aPageStart = (new Date()).getTime();", "Soap"),
        ("<script type='x'>if (a < b) { c() }</script>Soap", "Soap"),
        ("Soap <style>.a{b:c}", "Soap"),
        ("Soap .a-box-inner{background-color:#fff}#aloha .b{c:d}", "Soap"),
        ("@media (max-width: 9px){a{b:c}}", None),
        ("(function(a, b){ return a })()", None),
        ("<!-- hidden --> Soap", "Soap"),
        ("Rolling Stone June 2014{the Country Issue} #1", "Rolling Stone June 2014{the Country Issue} #1"),
        ("Function (5 pack) of var. sizes, P. when", "Function (5 pack) of var. sizes, P. when"),
        ("&#x1F600;&hearts; !", None),
        ("Bell\x07\x1b[31m", "Bell [31m"),
        ("", None),
        (None, None),
    ],
)
def test_clean_text(text, cleaned):
    assert clean_text(text) == cleaned


@pytest.mark.timeout(30)
def test_clean_text_takes_linear_time():
    for piece in ("<", "<a ", " .a ", " .a{b", "#a{", "&amp;", "<script", "var ", "function(a,", "@media ", "<!--"):
        clean_text(piece * 50_000)


def test_brands_categories_and_prices():
    assert [clean_brand(b) for b in ("by\n    \n    Microsoft", "By Terry", "F&amp;W", None)] == [
        "Microsoft",
        "By Terry",
        "F&W",
        None,
    ]
    assert clean_categories(["A", "B &amp; C", "", "A", None, "</span>", "D"]) == ["A", "B & C"]
    assert clean_categories(None) == []
    prices = ["$5", " $1,234.56", "$5.00 - $25.00", "19.99", "1e3", "", "$", "$1,23", ".a{b:c}", "free", "-3", None]
    assert [parse_price(p) for p in prices] == [5, 1234.56, 5, 19.99, 1000, *[None] * 7]
