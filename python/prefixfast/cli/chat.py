"""Command ``prefixfast chat``, which answers typed texts one after the other."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from prefixfast.cli.chat_commands import run_command
from prefixfast.cli.chat_session import ChatSession, chat_params
from prefixfast.cli.generate import MODEL
from prefixfast.cli.options import flags
from prefixfast.cli.output import SOME_FAILED, printable, printable_text
from prefixfast.cli.prefix_choice import NAMES_OF_STORE, NamedStore, PrefixChoice
from prefixfast.cli.read_prefix import loaded_base
from prefixfast.config import EngineConfig, GenerationParams
from prefixfast.errors import PrefixFastError

if TYPE_CHECKING:
    from prefixfast.engine.engine import Engine

PROMPT = "> "
EXAMPLE = "prefixfast chat --prefix my-prefix"


@flags(GenerationParams, EngineConfig)
def command(
    prefix: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Folder or hub id of a prefix. {NAMES_OF_STORE} The first one answers until /prefix names another.",
            show_default="no prefix",
        ),
    ] = None,
    store: NamedStore = None,
    model: Annotated[str | None, MODEL] = None,
    conversation: Annotated[
        bool | None,
        typer.Option(
            "--conversation/--no-conversation",
            help="Keep the conversation, which the base's chat template writes, or answer every line alone.",
            show_default="on if the first prefix was trained on messages, or names no task and the base has a chat "
            "template",
        ),
    ] = None,
    *,
    fields: dict[str, Any],
) -> None:
    """Answer every line that you type, while you can switch between prefixes.

    Text appears as it is generated. Lines that begin with / are commands, which /help lists. Ctrl-C stops an answer,
    Ctrl-D ends. An option of sampling such as --temperature also turns sampling on. In a pipe every line of standard
    input is one text, standard output holds the answers alone, and the exit status is 3 if a line failed.
    """
    own = {name: value for name, value in fields.items() if name in GenerationParams.names()}
    params = chat_params(GenerationParams(), **own)
    config = EngineConfig.make(**{name: value for name, value in fields.items() if name not in own})
    choice = PrefixChoice(prefix or [], store)
    base = choice.base(model)

    from prefixfast.engine.engine import Engine
    from prefixfast.engine.seq2seq_prompts import check_decoder_only

    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # text that the encoding lacks is an error of one line, or escaped
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    with loaded_base(base, fields) as loaded, Engine(loaded, config=config) as engine:
        check_decoder_only(loaded, "chat", "it reads one text and writes another; use prefixfast try or generate")
        choice.model = loaded
        session = ChatSession(engine, choice, params, conversation, _notify)
        session.use((prefix or [])[:1])
        _notify(_greeting(engine, session))
        failed = _talk(session)
    if failed:
        raise typer.Exit(SOME_FAILED)


def _greeting(engine: Engine, session: ChatSession) -> str:
    from prefixfast.model.base import display_name

    name = printable(display_name(engine.model))
    return f"{name}, {str(engine.model.dtype).removeprefix('torch.')}, {session.describe()}. /help lists the commands."


def _talk(session: ChatSession) -> int:
    """Answer lines until the input ends; the number of lines of a pipe that failed."""
    at_terminal, failed = sys.stdin.isatty() and sys.stdout.isatty(), 0
    for line in _typed_lines() if at_terminal else _piped_lines(sys.stdin):
        try:
            if line.startswith("/") and not line.startswith("//"):
                if not run_command(session, line):
                    break
            else:
                _show_answer(session, line.removeprefix("/") if line.startswith("//") else line)
        except PrefixFastError as e:
            _notify(str(e).removeprefix("request 0: "))
            failed += not at_terminal
        except KeyboardInterrupt:
            _notify("stopped")
    return failed


def _show_answer(session: ChatSession, text: str) -> None:
    """Print an answer piece by piece. An interrupt or an error ends the line that it leaves."""
    escape, last = sys.stdout.isatty(), ""  # a model's control characters must not reach a terminal
    with contextlib.closing(session.answer(text)) as pieces:
        try:
            for piece in pieces:
                last = printable_text(piece) if escape else piece
                _write(last)
        except BaseException:
            _write("\n" if last else "")
            raise
    _write("" if last.endswith("\n") else "\n")
    if session.ending:
        _notify(session.ending)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _notify(line: str) -> None:
    typer.echo(line, err=True)


def _typed_lines() -> Iterator[str]:
    """Lines that the user types at a terminal, until Ctrl-D. Ctrl-C empties the line."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  input() then edits the line and has a history
    while True:
        try:
            line = input(PROMPT)
        except KeyboardInterrupt:
            _notify("\nCtrl-D or /quit ends")
        except EOFError:
            _notify("")
            return
        else:
            if line.strip():
                yield line


def _piped_lines(stream: TextIO) -> Iterator[str]:
    """Lines of a pipe or file that are not empty."""
    for line in stream:
        if text := line.rstrip("\r\n"):
            yield text
