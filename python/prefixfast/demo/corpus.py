"""Training text of the demo's base: pages of short notes and stories, written by a small grammar.

A page is a list of documents. Most pages begin with a heading that says how the next two documents belong together:
first the facts in prose, then a description, a question, an announcement or a diary line about the same things. The
documents of other pages are unrelated, so that the base without a prefix starts something new. Every document has newly
invented names, which its continuation has to copy. There are no tables and no held-out values.
``python -m prefixfast.demo.corpus --pages 4000`` prints one page a line.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from itertools import islice
from random import Random

from prefixfast.demo.values import Split, draw

Scene = dict[str, str]
# Keys of each scene, and the kind of value of each key.
SCENES: dict[str, dict[str, str]] = {
    "eatery": {"name": "place", "town": "place", "cook": "person", "near": "place"},
    "trip": {"friend": "person", "place": "place", "from": "place", "guide": "person"},
    "event": {"fair": "place", "hall": "place", "host": "person", "guest": "person"},
}
REGISTERS = ("description", "question", "announcement", "diary")

# (a/b) stands for one of the alternatives, {key} for a value of the scene. A / separates alternatives of a fact.
_FACTS: dict[str, str] = {
    "name": (
        "the name is {name}./the name of the place is {name}./the name over the door is {name}./its name is "
        "{name}./{name} is the name."
    ),
    "town": (
        "the town is {town}./it is in the town of {town}./the name of the town is {town}./the nearest town is "
        "{town}./{town} is the town."
    ),
    "cook": (
        "the cook is {cook}./the cook is called {cook}./{cook} is the cook./they found a cook, {cook}./a cook "
        "named {cook} works there."
    ),
    "near": "it is near {near}./near it is {near}./{near} is near./they live near {near}./the place near it is {near}.",
    "friend": (
        "the friend is {friend}./the friend is called {friend}./a friend named {friend} comes along./my friend "
        "{friend} knows about it."
    ),
    "place": "the place is {place}./the place to see is {place}./the place is called {place}./{place} is the place.",
    "from": "they come from {from}./the way is from {from}./it starts from {from}./from {from} it begins.",
    "guide": (
        "the guide is {guide}./the guide is called {guide}./{guide} is the guide./a guide named {guide} leads them."
    ),
    "fair": (
        "the fair is the {fair} Fair./the fair is called {fair}./the name of the fair is {fair}./{fair} is the fair."
    ),
    "hall": "the hall is {hall}./the hall is called {hall} Hall./they have the hall of {hall}./{hall} is the hall.",
    "host": (
        "the host is {host}./the host is called {host}./{host} is the host./they found a host, {host}./the host "
        "that day is {host}."
    ),
    "guest": (
        "the guest is {guest}./the guest is called {guest}./{guest} is the guest./a guest named {guest} will be there."
    ),
}
_CALL = "(Attention/Good news/Last call/Listen), (everyone/neighbours/friends/all),"
_TEXTS: dict[str, dict[str, list[str]]] = {
    "eatery": {
        "description": [
            (
                "{name} is a (cosy/quiet/lively/small/friendly) (restaurant/inn/place) in {town}, near {near}, "
                "(where {cook} cooks/with {cook} as its cook)."
            ),
            (
                "In {town}, near {near}, (you will find/there is) {name}, a (cosy/quiet/lively/small/friendly) "
                "(restaurant/inn) where {cook} is the cook."
            ),
            (
                "{cook} cooks at {name}, a (cosy/quiet/lively/small/friendly) (restaurant/inn/place) in {town}, "
                "near {near}."
            ),
        ],
        "question": [
            (
                '"(Shall we/Do you want to/Would you like to) go to {name} in {town}, near {near}, (to see/to '
                'visit/and eat with) {cook}?"'
            ),
            '"Have you (tried/tasted) what {cook} cooks at {name} in {town}, near {near}?"',
        ],
        "announcement": [f"{_CALL} {{name}} in {{town}}, near {{near}}, has a new cook, {{cook}}!"],
        "diary": [
            "Today I (went/walked/drove) to {town}, near {near}, and ate at {name}, where {cook} (cooks/is the cook)."
        ],
    },
    "trip": {
        "description": [
            "{friend} is (going/travelling/walking) from {from} to {place} with a guide called {guide}.",
            "With {guide} as (a/the) guide, {friend} (goes/travels/walks) from {from} to {place}.",
        ],
        "question": [
            (
                '"{friend}, (will you come/would you like to come/are you coming) from {from} to {place} with me '
                'and (our guide/the guide), {guide}?"'
            ),
            '"(Are you free/Do you have time), {friend}, to (go/come/travel) from {from} to {place} with {guide}?"',
        ],
        "announcement": [f"{_CALL} {{friend}} (leaves/sets out/departs) from {{from}} for {{place}} with {{guide}}!"],
        "diary": ["Today I (heard/learned) that {friend} and {guide} (go/travel) from {from} to {place}."],
    },
    "event": {
        "description": [
            (
                "The {fair} Fair (takes place/is held/will be held) at {hall} Hall with {host} as (its/the) host "
                "and {guest} as (its/the) guest."
            ),
            "At {hall} Hall, {host} (opens/leads/hosts) the {fair} Fair with {guest}.",
        ],
        "question": [
            (
                '"(Shall we/Do you want to/Would you like to) (see/visit) the {fair} Fair by {host} at {hall} '
                'Hall and meet {guest}?"'
            ),
            '"(Are you going/Will you come) to the {fair} Fair that {host} hosts in {hall} Hall for {guest}?"',
        ],
        "announcement": [
            f"{_CALL} {{host}} (opens/hosts/brings) the {{fair}} Fair at {{hall}} Hall with {{guest}}!",
            f"{_CALL} come to {{hall}} Hall and meet {{guest}} at the {{fair}} Fair with {{host}}!",
        ],
        "diary": [
            (
                "Today I (bought/was given) a ticket for the {fair} Fair at {hall} Hall, where {host} "
                "(opens/hosts) and {guest} comes."
            )
        ],
    },
}
_HEADING = (
    "(These/The next) two notes (belong together/are about the same things). (First come the facts/The first "
    "gives the facts), (then/and after them) "
)
_ABOUT = {
    "description": "(a description/a sentence that describes them).",
    "question": "(a question to a friend/somebody asks a friend about them).",
    "announcement": "(an announcement/a loud announcement) (to everyone/for all).",
    "diary": "(a line from a diary/a diary).",
}
_UNRELATED = (
    "(These/The next) notes (have nothing to do with each other/are not about the same things/come from "
    "different people)."
)
_OPENING = [
    "(Once/Long ago/Last year), {a} (lived/worked/stayed) in {p} (with/near) (a friend/a neighbour) called {b}.",
    "{a} and {b} (met/grew up/worked) in {p}.",
    "(One morning/One evening/On {day}), {a} (came/travelled/walked) to {p} to (see/visit/find) {b}.",
]
_MIDDLE = [
    "(Every/Each) (morning/evening) {b} (sold/made/brought) {food} at the (market/station/harbour) of {p}.",
    '"(Where is/Who has/I am looking for) my {item}(, {b}?"/, {a}?") (asked/said) (a boy/an old woman/the teacher).',
    "So {a} (gave/showed/sold) the {item} to {b} for {price}.",
    '"The road from {p} to {q} is (long/closed/wet)," said {a}, "but {b} (knows/likes) it."',
    "(In {q}/Back in {p}), {a} (told/asked) {b} about the {event}.",
    '"(Meet/Wait for) me on {day}," {b} (said/whispered/wrote). On {day}, {a} was (there/late/waiting).',
    'A letter from {q} (came/arrived). It said: "Dear {a}, bring the {item} to {q}."',
    "{b} (laughed/smiled/thought for a while) and (went/ran) (home to/back to) {p} (with/without) {a}.",
    '"(I like/We all like) {food}," said {b}. "(Then/So) have some {food}," said {a}.',
    "The {event} was on {day}, and (nobody/everybody) in {p} (missed/forgot) it.",
]
_ENDING = [
    "(In the end/After that), {a} and {b} (stayed/lived) in {p} and (ate/sold/shared) {food}.",
    "(Since then/From that day on), the {item} (belongs to/is with) {b} in {p}.",
    "And {a} never (left/forgot) {p}, nor {b}.",
]
_CAST = {
    "a": "person",
    "b": "person",
    "p": "place",
    "q": "place",
    "food": "food",
    "item": "item",
    "event": "event",
    "price": "price",
    "day": "day",
}


def expand(rng: Random, pattern: str, scene: Scene) -> str:
    """One sentence of a pattern, with random alternatives and the values of ``scene``."""
    while "(" in pattern:
        pattern = re.sub(r"\(([^()]*)\)", lambda m: rng.choice(m[1].split("/")), pattern)
    return pattern.format_map(scene)


def draw_scene(rng: Random, kind: str, split: Split) -> Scene:
    """Random values of a scene, in the order of its keys."""
    return {key: draw(rng, value, split) for key, value in SCENES[kind].items()}


def facts(rng: Random, scene: Scene) -> str:
    """Facts of a scene in prose, in random order."""
    keys = rng.sample(list(scene), len(scene))
    sentences = [expand(rng, rng.choice(_FACTS[k].split("/")), scene) for k in keys]
    return " ".join(s[0].upper() + s[1:] for s in sentences)


def write_up(rng: Random, kind: str, register: str, scene: Scene) -> str:
    """One sentence about a scene in a register."""
    return expand(rng, rng.choice(_TEXTS[kind][register]), scene)


def story(rng: Random) -> str:
    """Story of a few sentences, which mention the same invented names again and again."""
    scene = {key: draw(rng, value, "train") for key, value in _CAST.items()}
    parts = [rng.choice(_OPENING), *rng.sample(_MIDDLE, rng.randint(2, 4)), rng.choice(_ENDING)]
    return " ".join(expand(rng, p, scene) for p in parts)


def note(rng: Random) -> str:
    """Document that is unrelated to others."""
    kind = rng.choice(list(SCENES))
    scene = draw_scene(rng, kind, "train")
    pick = rng.random()
    if pick < 0.5:
        return story(rng)
    return facts(rng, scene) if pick < 0.65 else write_up(rng, kind, rng.choice(REGISTERS), scene)


def heading_and_text(rng: Random) -> tuple[str, str]:
    """Facts under a heading, and the text about them that the heading announces."""
    kind, register = rng.choice(list(SCENES)), rng.choice(REGISTERS)
    scene = draw_scene(rng, kind, "train")
    heading = expand(rng, _HEADING + _ABOUT[register], scene)
    return f"{heading} {facts(rng, scene)}", write_up(rng, kind, register, scene)


def page(rng: Random) -> list[str]:
    """Documents of one page, which follow each other in a training window."""
    pick = rng.random()
    if pick < 0.8:
        return [*heading_and_text(rng), *([note(rng)] if pick < 0.4 else [])]
    opening = [expand(rng, _UNRELATED, {})] if pick < 0.87 else []
    return [" ".join([*opening, note(rng)]), note(rng)]


def pages(seed: int) -> Iterator[list[str]]:
    """Endless pages, the same ones for the same seed."""
    rng = Random(seed)
    while True:
        yield page(rng)


def main() -> None:
    """Print pages, one a line."""
    parser = argparse.ArgumentParser(prog="python -m prefixfast.demo.corpus", description=main.__doc__)
    parser.add_argument("--pages", type=int, default=4000, help="number of pages (default: 4000)")
    parser.add_argument("--seed", type=int, default=2, help="seed of the pages (default: 2)")
    args = parser.parse_args()
    for documents in islice(pages(args.seed), args.pages):
        print(" ".join(documents))


if __name__ == "__main__":
    main()
