"""Makes text and numbers of what stands in the metadata of Amazon's products, where pieces of web pages leaked in.

The pages were cut by pattern, so that a title may hold character references (``&amp;``), tags, whole scripts and
style rules, or be nothing but these. What a reader of the page saw is kept; where nothing is left, there is no value.

What is left out: names that only look wrong, and lines of a product's description among its categories, where nothing
marks them.
"""

from __future__ import annotations

import html
import re

_NAMES = (
    "a|abbr|b|big|body|br|button|center|code|dd|div|dl|dt|em|font|footer|form|h[1-6]|head|header|hr|html|i|iframe|img|"
    "input|label|li|link|meta|nav|noscript|ol|option|p|pre|s|script|section|select|small|span|strike|strong|style|sub|"
    "sup|svg|table|tbody|td|th|thead|title|tr|tt|u|ul"
)
_WHOLE_SCRIPT = re.compile(r"<(script|style)\b.*?(?:</\1\s*>|\Z)", re.IGNORECASE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)|<!\[CDATA\[|\]\]>|<!doctype[^<>]*>", re.IGNORECASE | re.DOTALL)
# A tag may be cut off at the end of the text. Words in angle brackets that name no tag are the seller's own.
_TAG = re.compile(rf"</?(?:{_NAMES})(?:\s[^<>]*|/)?(?:>|\Z)", re.IGNORECASE)
_REFERENCE = re.compile(r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")
# Where the source of a page begins: what follows was never a title.
_SOURCE = re.compile(
    r"\bvar\s+[A-Za-z_$][\w$]*\s*="
    r"|\bfunction\s*[\w$]*\s*\([\w$, ]{0,200}\)\s*\{"
    r"|\.getTime\s*\(|\b(?:document|window)\s*\.\s*\w+\s*[(.=\[]|\bP\s*\.\s*when\s*\("
    r"|(?:^|(?<=[\s}>,;]))[.#][A-Za-z_][\w\-.#:> ,]{0,300}\{[^{}]{0,500}:"
    r"|@(?:media|import|charset|font-face)\b[^{};]{0,300}[{;]"
)
_BY = re.compile(r"\s*by\s*\n\s*", re.IGNORECASE)
_PRICE = re.compile(r"\s*\$\s*([0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?)(?![0-9,])")
_BARE_PRICE = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?")


def clean_text(text: str | None) -> str | None:
    """Returns what a reader of the page saw, on one line; None where that holds no letter and no digit.

    Tags, comments, scripts and style rules are dropped, character references are resolved (also those resolved into
    further ones), and space is made single.
    """
    if text is None:
        return None
    for _ in range(2):
        if "<" in text:
            text = _TAG.sub(" ", _COMMENT.sub(" ", _WHOLE_SCRIPT.sub(" ", text)))
        if "&" not in text:
            break
        text = _REFERENCE.sub(lambda found: html.unescape(found.group()), text)
    if "<" in text:
        text = _TAG.sub(" ", _COMMENT.sub(" ", _WHOLE_SCRIPT.sub(" ", text)))
    if source := _SOURCE.search(text):
        text = text[: source.start()]
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if any(c.isalnum() for c in text) else None


def clean_brand(text: str | None) -> str | None:
    """Returns the brand's name without the word "by" and the line break that the page put before it."""
    return None if text is None else clean_text(_BY.sub("", text, count=1) if _BY.match(text) else text)


def clean_categories(names: list[str | None] | None) -> list[str]:
    """Returns a product's categories from the widest to the narrowest, each once.

    Some lists go on with lines of the product's description after an entry that is nothing but closing tags; the list
    ends there.
    """
    found: dict[str, None] = {}
    for name in names or ():
        cleaned = clean_text(name)
        if cleaned is not None:
            found[cleaned] = None
        elif name and "</" in name:
            break
    return list(found)


def parse_price(text: str | None) -> float | None:
    """Returns a price in US dollars, of a range the lower one; None where the text is no price.

    Prices stand as ``$1,234.56``, as ``$5.00 - $25.00``, or as a bare number.
    """
    if text is None:
        return None
    found = _PRICE.match(text)
    number = found.group(1).replace(",", "") if found else text.strip()
    return float(number) if _BARE_PRICE.fullmatch(number) else None
