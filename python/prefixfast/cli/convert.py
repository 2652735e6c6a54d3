"""Command ``prefixfast convert SRC DST``.

It reads adapter folders of every known format and writes folders of prefixfast, which PEFT also reads where it can
hold the prefix.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefixfast.cli.prefixes import BASE, Json, show_outcomes
from prefixfast.io.progress import track

if TYPE_CHECKING:
    from prefixfast.store import Outcome

EXAMPLE = "prefixfast convert peft-adapters prefixes --recursive --verify"


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of a prefix or of a PEFT adapter.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write to; an adapter in it is replaced.")],
    recursive: Annotated[
        bool,
        typer.Option(
            "--recursive",
            help="Convert every adapter folder below SRC to the same place below DST; symbolic links are not followed.",
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read each written folder and compare it with its source.")
    ] = False,
    model: Annotated[str | None, BASE] = None,
    as_json: Json = False,
) -> None:
    """Convert adapter folders to folders of prefixfast, which PEFT also reads where it can hold the prefix.

    The exit status is 3 if some folders cannot be converted.
    """
    from prefixfast.errors import ConfigError, DataError, shown

    if target.exists() and source.exists() and target.samefile(source):
        msg = f"DST: {shown(str(target))} is SRC, which it would replace; give another folder"
        raise ConfigError(msg)
    if not recursive:
        done = convert_folder(source, target, model, verify=verify)
        if not done.ok:
            raise DataError(done.why, path=str(source))
        show_outcomes([done], as_json=as_json)
        return
    if not source.is_dir():
        msg = f"SRC: expected a folder, got {shown(str(source))}"
        raise ConfigError(msg)
    if target.resolve().is_relative_to(source.resolve()):
        msg = f"DST: {shown(str(target))} lies in SRC; give another folder"
        raise ConfigError(msg)
    found = adapter_folders(source)
    if not found:
        msg = f"SRC: no adapter folder in {source}; expected folders with adapter_config.json or prefixfast.json"
        raise ConfigError(msg)
    with track(found, "convert", len(found), "folders") as each:
        outcomes = [convert_folder(f, target / f.relative_to(source), model, verify=verify) for f in each]
    show_outcomes(outcomes, as_json=as_json)


def convert_folder(source: Path, target: Path, model: str | None, *, verify: bool) -> Outcome:
    """Convert one folder and report how it went.

    Args:
        source: Folder to read.
        target: Folder to write.
        model: Hub id or folder of the base of adapters with virtual tokens, None without one.
        verify: Whether to read the written folder and compare it with its source.

    Raises:
        OSError: If the folder cannot be written; an adapter that was in ``target`` is intact.
    """
    from prefixfast.errors import BaseMismatchError, ConfigError, DataError
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.store import Outcome

    name = str(source)
    try:
        prefix = Prefix.from_pretrained(source, model=model)
    except (DataError, BaseMismatchError, ConfigError, OSError) as e:
        return Outcome(name, str(target), False, str(e))
    try:
        prefix.save_pretrained(target)
    except ConfigError as e:  # something else lies there
        return Outcome(name, str(target), False, str(e), prefix.digest)
    if verify:
        try:
            if Prefix.from_pretrained(target).digest != prefix.digest:
                return Outcome(name, str(target), False, "the written folder holds another prefix", prefix.digest)
        except DataError as e:
            return Outcome(name, str(target), False, f"the written folder cannot be read: {e}", prefix.digest)
    if (target / "adapter_config.json").exists():
        return Outcome(name, str(target), True, "PEFT reads it too", prefix.digest)
    why = f"only prefixfast reads it: {prefix.peft_incompatibility}"
    return Outcome(name, str(target), True, why, prefix.digest)


def adapter_folders(root: Path) -> list[Path]:
    """All adapter folders below ``root``, in alphabetical order, and ``root`` itself if it is one."""
    from prefixfast.store.import_export import is_adapter

    found = []
    for folder, below, _ in os.walk(root):
        below.sort()
        if is_adapter(Path(folder)):
            found.append(Path(folder))
    return found
