"""`prefixfast convert SRC DST`: adapter folders of any format that can be read, as folders of prefixfast and, where PEFT can hold them, of PEFT."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefixfast.cli.prefixes import Json, outcomes

if TYPE_CHECKING:
    from prefixfast.store import Outcome


def command(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="folder of a prefix, or adapter folder")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="where to; an adapter that is there is replaced")],
    recursive: Annotated[
        bool,
        typer.Option(
            "--recursive", help="every adapter folder below SRC, to the same place below DST; links are not followed"
        ),
    ] = False,
    verify: Annotated[bool, typer.Option("--verify", help="read what was written and compare it")] = False,
    as_json: Json = False,
) -> None:
    """Convert adapter folders; exit 3 if some cannot be converted."""
    from prefixfast.errors import ConfigError, DataError

    if not recursive:
        done = convert(source, target, verify=verify)
        if not done.ok:
            raise DataError(done.why, path=str(source))
        outcomes([done], as_json=as_json)
        return
    if not source.is_dir():
        msg = f"SRC: expected a folder, got {str(source)!r}"
        raise ConfigError(msg)
    if target.resolve().is_relative_to(source.resolve()):
        msg = f"DST: {str(target)!r} lies in SRC; give another folder"
        raise ConfigError(msg)
    found = adapters(source)
    if not found:
        msg = f"SRC: no adapter folder in {str(source)!r}; expected folders with adapter_config.json or prefixfast.json"
        raise ConfigError(msg)
    outcomes([convert(folder, target / folder.relative_to(source), verify=verify) for folder in found], as_json=as_json)


def convert(source: Path, target: Path, *, verify: bool) -> Outcome:
    """Convert one folder.

    Raises:
        OSError: If the disk refuses; what was at ``target`` is intact.
    """
    from prefixfast.errors import DataError
    from prefixfast.prefix.prefix import Prefix
    from prefixfast.store import Outcome

    name = str(source)
    try:
        prefix = Prefix.from_pretrained(source)
    except (DataError, OSError) as e:
        return Outcome(name, str(target), False, str(e))
    prefix.save_pretrained(target)
    if verify:
        try:
            if Prefix.from_pretrained(target).digest != prefix.digest:
                return Outcome(name, str(target), False, "what was written is another prefix", prefix.digest)
        except DataError as e:
            return Outcome(name, str(target), False, f"what was written cannot be read: {e}", prefix.digest)
    why = (
        "PEFT reads it too"
        if (target / "adapter_config.json").exists()
        else "only prefixfast reads it: PEFT cannot hold this prefix"
    )
    return Outcome(name, str(target), True, why, prefix.digest)


def adapters(root: Path) -> list[Path]:
    """All adapter folders below ``root``, and ``root`` itself if it is one."""
    from prefixfast.store.import_export import is_adapter

    return [Path(folder) for folder, folders, _ in os.walk(root) if folders.sort() is None and is_adapter(Path(folder))]
