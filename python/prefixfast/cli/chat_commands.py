"""Commands of a conversation, which begin with a slash."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

from prefixfast.cli.chat_session import ChatSession, chat_params, with_sampling
from prefixfast.cli.output import printable
from prefixfast.errors import ConfigError, shown, suggestion
from prefixfast.io.yaml import read_yaml

LISTED = 50  # names of prefixes that /prefixes shows
NOTHING = "none"  # name for the base alone


class ChatCommand(NamedTuple):
    """A command.

    Attributes:
        usage: Command with its arguments.
        purpose: Sentence for /help.
        run: Function of the session and the text after the command's name; False ends the conversation.
    """

    usage: str
    purpose: str
    run: Callable[[ChatSession, str], bool]


def run_command(session: ChatSession, line: str) -> bool:
    """Run a command.

    Args:
        session: Conversation.
        line: Line that begins with a slash.

    Returns:
        Whether the conversation goes on.

    Raises:
        PrefixFastError: If the command is unknown or fails.
    """
    name, _, rest = line[1:].strip().partition(" ")
    if name not in COMMANDS:
        hint = suggestion(f"/{name}", [f"/{known}" for known in COMMANDS])
        msg = f"unknown command {shown('/' + name)}; {hint}; a text that begins with / is written with //"
        raise ConfigError(msg)
    return COMMANDS[name].run(session, rest.strip())


def _use(session: ChatSession, rest: str) -> bool:
    try:
        names = shlex.split(rest)
    except ValueError as e:
        msg = f"/prefix: expected names, quoted where they have spaces, got {shown(rest)}: {e}"
        raise ConfigError(msg) from e
    if not names:
        msg = f"/prefix: expected a name, or {NOTHING}; /prefixes lists the names"
        raise ConfigError(msg)
    session.use([] if names == [NOTHING] else names)
    session.notify(session.describe())
    return True


def _list(session: ChatSession, _: str) -> bool:
    names = session.choice.names()
    for name in names[:LISTED]:
        session.notify(f"{'*' if name in session.names else ' '} {printable(name)}")
    if len(names) > LISTED:
        session.notify(f"  and {len(names) - LISTED} more")
    if not names:
        session.notify("no prefix was given; /prefix FOLDER reads one")
    return True


def _reset(session: ChatSession, _: str) -> bool:
    session.reset()
    session.notify("the conversation starts anew")
    return True


def _set(session: ChatSession, rest: str) -> bool:
    if rest:
        name, _, text = rest.replace("=", " ", 1).partition(" ")
        if not text.strip():
            msg = f"/set: expected an option and a value, such as temperature 0.7, got {shown(rest)}"
            raise ConfigError(msg)
        session.params = chat_params(session.params, **{name.replace("-", "_"): _value(name, text.strip())})
    params = with_sampling(session.params)
    given = {n: v for n in params.names() if (v := getattr(params, n)) is not None}
    session.notify(", ".join(f"{n}: {printable(v)}" for n, v in given.items()) or "every option has its default")
    return True


def _value(name: str, text: str) -> Any:
    """Value of an option that is typed as in a YAML file."""
    try:
        return None if text == NOTHING else read_yaml(text)
    except ConfigError as e:
        msg = f"/set {printable(name)}: expected a value as in YAML, such as 0.7, true or [a, b], got {shown(text)}"
        raise ConfigError(msg) from e


def _help(session: ChatSession, _: str) -> bool:
    width = max(len(c.usage) for c in COMMANDS.values())
    for command in COMMANDS.values():
        session.notify(f"{command.usage:{width}}  {command.purpose}")
    session.notify("Ctrl-C stops an answer, Ctrl-D ends. A text that begins with / is written with //.")
    return True


COMMANDS = {
    "prefix": ChatCommand(
        "/prefix NAME...", f"Answer with this prefix; several compose; {NOTHING} is the base alone.", _use
    ),
    "prefixes": ChatCommand("/prefixes", "List the prefixes; * marks those in use.", _list),
    "reset": ChatCommand("/reset", "Forget the conversation.", _reset),
    "set": ChatCommand(
        "/set [OPTION VALUE]",
        f"Set an option of generation, {NOTHING} is its default; alone it shows them.",
        _set,
    ),
    "help": ChatCommand("/help", "List the commands.", _help),
    "quit": ChatCommand("/quit", "End.", lambda *_: False),
}
