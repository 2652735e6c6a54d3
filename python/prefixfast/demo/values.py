"""Values of the demo's tables and text, split into training values and held-out values.

A value consists of three or more pieces (``Nor`` + ``a`` + ``wick``, or ``spiced`` + ``plum`` + ``dumplings``). The
value is held out if the sum of its pieces' indices is a multiple of five. With two pieces a model would learn which
pairs never occur. Training text contains every piece but no held-out value, so that a model that writes one has
copied it.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product
from random import Random
from typing import Literal

Split = Literal["train", "heldout"]

_PLACE = (
    "Nor Brim Dorn Wex Kel Tarn Hol Ash Cald Mer Stav Lin Grim Pell Thorn Ux Yar Bram Cor Fen Gar Hex Ist "
    "Jor Lud Mal Ned Ost Quen Ros Sel Tul Ulm Ver Wol Zel"
    " Bec Dun Elm Fal"
)
_PLACE_MIDDLE = "a e o i u ar en el or in"
_PLACE_END = (
    "vale low by ham wick mere ford ton stead gate port field holm well brook crest den more wood bridge dale "
    "mouth cliff pool shaw thorpe worth bury cott ley"
)
_PERSON = (
    "Me Ta Jo Ka Lu Ri So Ve Ni Pa Ze Da Fi Ga Hu Is Le Mo Ol Pe Qua Re Su Ti Ur Vi Wa Yo Bel Cor Dar Em Fer Hal "
    "Jas Kir"
)
_PERSON_MIDDLE = "li ro va mi sha to ne ra du be"
_PERSON_END = "ka n na ss th lo ra m ya x da r ne vo la d ris go sa tte l bo ta ski k ma rin za sh fa"
_STYLE = "spiced fried baked smoked stuffed glazed toasted steamed sweet crispy"
_FLAVOUR = (
    "plum pepper walnut onion cherry ginger potato pumpkin apple lemon honey cheese mushroom almond carrot "
    "bean rice barley oat fig pear lentil garlic herb"
    " tomato turnip beetroot chestnut cabbage leek quince mint"
)
_DISH = (
    "dumplings pancakes noodles pies tarts rolls cakes fritters buns skewers waffles pasties muffins wraps "
    "patties biscuits loaves puffs strudels rings"
)
_LOOK = "small big tiny new rusty shiny broken painted heavy lucky"
_MATERIAL = (
    "copper silver paper wooden glass velvet steel woollen leather silk brass clay linen golden straw marble tin "
    "cotton bone stone bamboo felt canvas"
)
_THING = (
    "kettle kite lantern whistle drum flute blanket basket mirror ladder compass puppet candle bottle clock "
    "spoon hammer button ribbon saddle bucket trumpet"
    " pillow trunk map wheel anchor"
)
_SORT = "summer winter midnight village royal grand travelling yearly famous little"
_THEME = (
    "lantern harvest kite poetry puppet garden river candle pottery meadow bicycle folk chess sheep marble "
    "snow flower barn wool boat comic tulip coin clock"
    " cider stamp music"
)
_GATHERING = (
    "fair festival parade contest concert market show dance race supper exhibition party workshop meeting picnic "
    "auction lecture quiz gala play"
)
_WEEKDAY = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
_MONTH = "January February March April May June July August September October November December"

# Separator and pieces of each kind. Days have two digits and prices three, so that "4 May" is not part of "14 May".
_POOLS: dict[str, tuple[str, tuple[list[str], ...]]] = {
    "place": ("", (_PLACE.split(), _PLACE_MIDDLE.split(), _PLACE_END.split())),
    "person": ("", (_PERSON.split(), _PERSON_MIDDLE.split(), _PERSON_END.split())),
    "food": (" ", (_STYLE.split(), _FLAVOUR.split(), _DISH.split())),
    "item": (" ", (_LOOK.split(), _MATERIAL.split(), _THING.split())),
    "event": (" ", (_SORT.split(), _THEME.split(), _GATHERING.split())),
    "price": (
        "",
        (list("123456789"), list("0123456789"), list("0123456789"), [" crowns", " pence", " shillings", " florins"]),
    ),
    "day": (" ", (_WEEKDAY.split(), [str(n) for n in range(10, 29)], _MONTH.split())),
}
KINDS = tuple(_POOLS)


@cache
def _side(kind: str, heldout: bool) -> tuple[str, ...]:
    glue, parts = _POOLS[kind]
    chosen = (c for c in product(*(enumerate(p) for p in parts)) if (sum(i for i, _ in c) % 5 == 0) is heldout)
    return tuple(dict.fromkeys(glue.join(text for _, text in c) for c in chosen))


@cache
def _heldout() -> frozenset[str]:
    return frozenset(v.lower() for kind in KINDS for v in _side(kind, True))


@cache
def pool(kind: str, split: Split) -> tuple[str, ...]:
    """Values of a kind on one side of the split; a string that both sides can make is held out."""
    if split == "heldout":
        return _side(kind, True)
    return tuple(v for v in _side(kind, False) if v.lower() not in _heldout())


def heldout_values(text: str) -> list[str]:
    """Held-out values that ``text`` contains as whole words, in any letter case."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    spans = (" ".join(words[i : i + n]) for n in (1, 2, 3) for i in range(len(words) - n + 1))
    return [s for s in spans if s in _heldout()]


def has_table(text: str) -> bool:
    """Whether ``text`` contains a sign of a table: a bar, a tab, or a colon that does not precede a quotation."""
    return re.search(r"[|\t=]|:(?! \")", text) is not None


def draw(rng: Random, kind: str, split: Split) -> str:
    """Random value of a kind."""
    return rng.choice(pool(kind, split))
