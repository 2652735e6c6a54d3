"""The text that the demo's base language model is trained on: pages of short notes and stories, written by a small grammar.

A page is a list of documents. Most pages begin with a heading that says how the next two documents hang together:
first the facts in prose, then a description, a question, an announcement or a diary line about the same things.
Pages without a heading (or with one that says so) hold unrelated documents, so the model alone starts something new.
Names are invented afresh in every document: whoever continues one has to copy. There are no tables and no held-out values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from random import Random

from prefixfast.demo.values import Split, draw

Scene = dict[str, str]
# Each scene's keys and the kind of value that each takes.
SCENES: dict[str, dict[str, str]] = {
    "eatery": {"name": "place", "food": "food", "town": "place", "price": "price"},
    "trip": {"friend": "person", "place": "place", "day": "day", "item": "item"},
    "event": {"event": "event", "hall": "place", "day": "day", "host": "person"},
}
REGISTERS = ("description", "question", "announcement", "diary")

# (a/b) is one of the alternatives, {key} a value of the scene.
_FACTS: dict[str, str] = {
    "name": "the name is {name}./the name of the place is {name}./the name over the door is {name}./its name is {name}./{name} is the name.",
    "food": "the food is {food}./the food there is {food}./for food they have {food}./the food to order is {food}./they are known for {food}, the food to try.",
    "town": "the town is {town}./it is in the town of {town}./the name of the town is {town}./the nearest town is {town}./{town} is the town.",
    "price": "the price is {price}./the price for that is {price}./they ask a price of {price}./{price} is the price.",
    "friend": "the friend is {friend}./the friend is called {friend}./a friend named {friend} comes along./my friend {friend} knows about it.",
    "place": "the place is {place}./the place to see is {place}./the place is called {place}./{place} is the place.",
    "day": "the day is {day}./the day for it is {day}./it is on the day of {day}./they chose a day, {day}./{day} is the day.",
    "item": "the item is a {item}./the item to take along is a {item}./one item is needed, a {item}./a {item} is the item to bring.",
    "event": "the event is a {event}./the event is the {event}./the event will be a {event}./it is an event, a {event}./a {event} is the event.",
    "hall": "the hall is {hall}./the hall is called {hall} Hall./they have the hall of {hall}./{hall} is the hall.",
    "host": "the host is {host}./the host is called {host}./{host} is the host./they found a host, {host}./the host that day is {host}.",
}
_CALL = "(Attention/Good news/Last call/Listen), (everyone/neighbours/friends/all),"
_TEXTS: dict[str, dict[str, list[str]]] = {
    "eatery": {
        "description": [
            "{name} is a (cosy/quiet/lively/small/friendly) (restaurant/inn/place) in {town} (that serves/serving/known for its) {food} for {price}.",
            "In {town} (you will find/there is) {name}, a (cosy/quiet/lively/small/friendly) (restaurant/inn/place) (with/that serves) {food} for {price}.",
            "For {price}, {name} in {town} (serves/offers) (the best/a fine plate of/a warm plate of) {food}.",
        ],
        "question": [
            '"(Shall we/Do you want to/Would you like to) go to {name} in {town} and (have/eat/try) (some/the) {food} for {price}?"',
            '"Have you (tried/tasted) the {food} at {name} in {town} (for only/that cost only/for just) {price}?"',
        ],
        "announcement": [f"{_CALL} {{name}} in {{town}} (now serves/is now serving/has) {{food}} for (only/just) {{price}}!"],
        "diary": ["Today I (went/walked/drove) to {town} and had {food} at {name}, and I paid {price} (for them/in the end)."],
    },
    "trip": {
        "description": [
            "{friend} is (going/travelling/walking) to {place} on {day} with a {item} (in the bag/under one arm/for company).",
            "On {day}, {friend} (takes/carries/brings) a {item} to {place}.",
        ],
        "question": [
            '"{friend}, (will you come/would you like to come/are you coming) to {place} (with me/with us) on {day} and bring (the/your) {item}?"',
            '"(Are you free/Do you have time) on {day}, {friend}, to (go/come/travel) to {place} with (the/your) {item}?"',
        ],
        "announcement": [f"{_CALL} {{friend}} (leaves/sets out/departs) for {{place}} on {{day}} with a {{item}}!"],
        "diary": ["Today I (heard/learned) that {friend} and I (go/travel) to {place} on {day}, and I (packed/found) the {item}."],
    },
    "event": {
        "description": [
            "The {event} (takes place/is held/will be held) at {hall} Hall on {day} with {host} as (its/the) host.",
            "On {day}, {host} (opens/leads/hosts) the {event} (in/at) {hall} Hall.",
        ],
        "question": [
            '"(Shall we/Do you want to/Would you like to) (see/visit) the {event} by {host} at {hall} Hall on {day}?"',
            '"(Are you going/Will you come) to the {event} that {host} hosts in {hall} Hall on {day}?"',
        ],
        "announcement": [
            f"{_CALL} {{host}} (opens/hosts/brings) the {{event}} at {{hall}} Hall on {{day}}!",
            f"{_CALL} come to {{hall}} Hall on {{day}} for the {{event}} with {{host}}!",
        ],
        "diary": ["Today I (bought/was given) a ticket for the {event} at {hall} Hall, which {host} (opens/hosts) on {day}."],
    },
}
_HEADING = "(These/The next) two notes (belong together/are about the same things). (First come the facts/The first gives the facts), (then/and after them) "
_ABOUT = {
    "description": "(a description/a sentence that describes them).",
    "question": "(a question to a friend/somebody asks a friend about them).",
    "announcement": "(an announcement/a loud announcement) (to everyone/for all).",
    "diary": "(a line from a diary/a diary).",
}
_UNRELATED = "(These/The next) notes (have nothing to do with each other/are not about the same things/come from different people)."
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
    """One sentence of a pattern: choices made, values filled in."""
    while "(" in pattern:
        pattern = re.sub(r"\(([^()]*)\)", lambda m: rng.choice(m[1].split("/")), pattern)
    return pattern.format_map(scene)


def draw_scene(rng: Random, kind: str, split: Split) -> Scene:
    """A scene's values, in its keys' order."""
    return {key: draw(rng, value, split) for key, value in SCENES[kind].items()}


def facts(rng: Random, scene: Scene) -> str:
    """The scene's facts in prose, in any order."""
    keys = rng.sample(list(scene), len(scene))
    sentences = [expand(rng, rng.choice(_FACTS[k].split("/")), scene) for k in keys]
    return " ".join(s[0].upper() + s[1:] for s in sentences)


def write_up(rng: Random, kind: str, register: str, scene: Scene) -> str:
    """The scene in one sentence of a register."""
    return expand(rng, rng.choice(_TEXTS[kind][register]), scene)


def story(rng: Random) -> str:
    """A few sentences that keep coming back to the same invented names."""
    scene = {key: draw(rng, value, "train") for key, value in _CAST.items()}
    parts = [rng.choice(_OPENING), *rng.sample(_MIDDLE, rng.randint(2, 4)), rng.choice(_ENDING)]
    return " ".join(expand(rng, p, scene) for p in parts)


def note(rng: Random) -> str:
    """A document that stands alone."""
    kind = rng.choice(list(SCENES))
    scene = draw_scene(rng, kind, "train")
    pick = rng.random()
    if pick < 0.5:
        return story(rng)
    return facts(rng, scene) if pick < 0.65 else write_up(rng, kind, rng.choice(REGISTERS), scene)


def page(rng: Random) -> list[str]:
    """Documents that follow each other in a training window."""
    pick = rng.random()
    if pick < 0.8:
        kind, register = rng.choice(list(SCENES)), rng.choice(REGISTERS)
        scene = draw_scene(rng, kind, "train")
        heading = expand(rng, _HEADING + _ABOUT[register], scene)
        return [f"{heading} {facts(rng, scene)}", write_up(rng, kind, register, scene), *([note(rng)] if pick < 0.4 else [])]
    opening = [expand(rng, _UNRELATED, {})] if pick < 0.87 else []
    return [" ".join([*opening, note(rng)]), note(rng)]


def pages(seed: int) -> Iterator[list[str]]:
    """Endless pages, the same ones for the same seed."""
    rng = Random(seed)
    while True:
        yield page(rng)
