"""Phrases by which texts say the values of E2E's slots with few values, in the way of its slot aligners."""

from __future__ import annotations

from collections.abc import Sequence

# Phrases by slot and value, both as words in lower case.
PHRASES: dict[tuple[str, str], tuple[str, ...]] = {
    ("area", "riverside"): ("river", "river side", "waterside"),
    ("area", "city centre"): ("city center", "centre of the city", "center of the city", "city s centre", "downtown"),
    ("eattype", "coffee shop"): ("coffee shops", "coffeeshop", "cafe"),
    ("food", "fast food"): ("fastfood",),
    ("pricerange", "cheap"): ("low price", "low priced", "low prices", "low cost", "inexpensive", "affordable"),
    ("pricerange", "less than £ 20"): ("under £ 20", "below £ 20", "cheap", "low price", "low priced", "inexpensive"),
    ("pricerange", "moderate"): ("moderately", "mid price", "mid priced", "medium price", "average price", "average"),
    ("pricerange", "£ 20 25"): ("£ 20 to £ 25", "£ 20 to 25", "£ 20 and £ 25", "£ 20 £ 25", "20 25", "moderate"),
    ("pricerange", "high"): ("expensive", "high price", "high priced", "high prices", "pricey", "costly"),
    ("pricerange", "more than £ 30"): ("over £ 30", "above £ 30", "expensive", "high price", "high priced"),
    ("customer rating", "1 out of 5"): ("one out of five", "1 star", "one star", "1 of 5", "low", "poor", "1 5"),
    ("customer rating", "3 out of 5"): (
        "three out of five",
        "3 star",
        "three star",
        "3 stars",
        "three stars",
        "3 of 5",
    ),
    ("customer rating", "5 out of 5"): ("five out of five", "5 star", "five star", "5 stars", "five stars", "5 of 5"),
    ("customer rating", "low"): ("poor", "poorly", "bad", "1 out of 5", "1 star", "one star", "lowly", "badly"),
    ("customer rating", "average"): ("mediocre", "3 out of 5", "3 star", "three star", "decent", "averagely"),
    ("customer rating", "high"): ("highly", "excellent", "5 out of 5", "5 star", "five star", "well rated", "great"),
}
YES_NO = ("familyfriendly",)  # slots whose values are yes and no
FAMILY = ("family", "families", "kid", "kids", "child", "children")
NOT = ("not", "no", "non", "isn", "aren", "doesn", "don", "never", "without", "un", "nor", "neither", "unsuitable")
ADULTS = ("adult", "adults")
WINDOW = 5  # words before a mention in which a negation counts


def said_yes_or_no(name: str, words: Sequence[str]) -> bool | None:
    """Yes or no that a text says of a slot, None if it says neither.

    Args:
        name: Name of the slot, one of `YES_NO`.
        words: Words of the text in lower case.
    """
    assert name in YES_NO
    mentions = [i for i, word in enumerate(words) if word in FAMILY]
    if not mentions:
        return False if any(word in ADULTS for word in words) else None
    negated = [any(word in NOT for word in words[max(0, i - WINDOW) : i]) for i in mentions]
    return not any(negated)
