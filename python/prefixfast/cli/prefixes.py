"""Commands ``prefixfast prefixes ...``, which show and change the prefixes in a store."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixfast.cli.generate import ENCODING, FORMATS
from prefixfast.cli.help import Command, Group
from prefixfast.cli.output import SOME_FAILED, in_bytes, printable, show, show_one
from prefixfast.cli.prefix_flags import check_kind
from prefixfast.cli.receipts import receipt_lines

if TYPE_CHECKING:
    from prefixfast.store import Outcome, PrefixStore, StoredPrefix

app = typer.Typer(
    cls=Group,
    help="Show and change the prefixes in a store.",
    epilog="prefixfast prefixes list store",
    no_args_is_help=True,
)

Store = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of the prefix.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BASE = typer.Option(
    "--model",
    help="Hub id or folder of the base, which computes the keys and values of a PROMPT_TUNING or P_TUNING adapter.",
    show_default="no base",
)
KeepVersions = Annotated[int, typer.Option(help="Number of versions of a name that the store keeps.")]


@app.command("list", cls=Command, epilog="prefixfast prefixes list store")
def list_(store: Store, as_json: Json = False) -> None:
    """List the newest version of every name, sorted by name.

    The exit status is 3 if some versions cannot be read.
    """
    keys = ("name", "version", "length", "nbytes", "size", "base", "created", "digest", "problem")
    found = [dict.fromkeys(keys, None) | _summary(one) for one in _open(store).scan()]
    rows = sorted(found, key=lambda row: (row["name"] is None, row["name"] or row["problem"]))
    failed = sum(row["problem"] is not None for row in rows)
    columns = ("name", "version", "length", "size", "base", "created", *(("problem",) if failed else ()))
    if not as_json:
        rows = [row | {"length": _by_site(row["length"])} for row in rows]
    show(rows, columns, as_json=as_json, title=f"{store}: {len(rows)} prefixes")
    _exit_if_failed(failed)


@app.command("show", cls=Command, epilog="prefixfast prefixes show store ann --version 2")
def show_(
    store: Store,
    name: Name,
    version: Annotated[int | None, typer.Option(help="Number of the version.", show_default="the newest")] = None,
    as_json: Json = False,
) -> None:
    """Show all properties of one prefix and its versions."""
    from prefixfast.errors import UnknownPrefixError, shown

    versions = {v.version: v for v in _open(store).versions(name)}
    number = max(versions) if version is None else version
    if number not in versions:
        msg = f"{shown(name)} has no version {number}; it has {', '.join(map(str, versions))}"
        raise UnknownPrefixError(msg)
    listed = [{"version": v.version, "created": v.created, "digest": v.digest} for v in versions.values()]
    show_one({**_details(versions[number]), "versions": listed}, as_json=as_json)


@app.command("inspect", cls=Command, epilog="prefixfast prefixes inspect store ann rows.jsonl --plot ann.png")
def inspect(
    store: Store,
    name: Name,
    rows: Annotated[Path, typer.Argument(metavar="ROWS", help=f"File of rows that the base reads ({FORMATS}).")],
    model: Annotated[
        str | None,
        typer.Option(help="Hub id or folder of the base.", show_default="the base that the prefix names"),
    ] = None,
    encoding: Annotated[str | None, ENCODING] = None,
    words: Annotated[
        int, typer.Option(help="Number of nearest words shown for each row of the prefix; 0 shows none.")
    ] = 3,
    plot: Annotated[
        Path | None, typer.Option(help="File of a plot to write (.png, .svg or .pdf).", show_default="no plot")
    ] = None,
) -> None:
    """Show attention to a prefix, divergence of predictions from the base's, and words nearest to prefix rows."""
    from prefixfast.data import read_rows
    from prefixfast.errors import ConfigError, shown

    prefix = _open(store)[name]
    base = model or (prefix.base or {}).get("name")
    if not base:
        msg = f"{shown(name)} does not name its base: give it with --model"
        raise ConfigError(msg)
    found = prefix.inspect(str(base), read_rows(rows, encoding), words=words)
    typer.echo(str(found))
    if plot is not None:
        found.plot(plot)


@app.command("add", cls=Command, epilog="prefixfast prefixes add store ann my-prefix")
def add(
    store: Store,
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of a prefix or of a PEFT adapter.")],
    model: Annotated[str | None, BASE] = None,
    keep_versions: KeepVersions = 2,
    as_json: Json = False,
) -> None:
    """Put a prefix into a store under a name, as the newest version of that name."""
    from prefixfast.prefix.prefix import Prefix

    prefix = Prefix.from_pretrained(folder, model=model)
    _show_change(_open_to_write(store, keep_versions).put(name, prefix), as_json=as_json)


@app.command("rm", cls=Command, epilog="prefixfast prefixes rm store ann --yes")
def rm(
    store: Store,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of prefixes.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    as_json: Json = False,
) -> None:
    """Delete prefixes, all versions of each and their rows in checkpoints, and print a receipt for each."""
    from prefixfast.store.runs import is_mentioned

    opened = _open_existing(store)
    for name in names:
        if name not in opened and not is_mentioned(opened.path, name):
            opened.info(name)  # raises
    if not yes:
        if not sys.stdin.isatty():
            msg = "no terminal to ask on: give --yes to delete without asking"
            raise typer.BadParameter(msg, param_hint="--yes")
        typer.confirm(f"delete {', '.join(map(printable, names))} from {store}, all versions?", abort=True)
    receipts: list[dict[str, Any]] = []
    try:
        for name in dict.fromkeys(names):
            receipt = {"name": name, **asdict(opened.delete(name))}
            receipts.append(receipt)  # in a loop, so that an error leaves the receipts of the earlier names
    finally:
        if as_json:
            show(receipts, (), as_json=True)
        else:
            for line in receipt_lines(receipts, store):
                typer.echo(line)


@app.command("rollback", cls=Command, epilog="prefixfast prefixes rollback store ann --to 2")
def rollback(
    store: Store,
    name: Name,
    to: Annotated[
        int | None, typer.Option(help="Number of the version.", show_default="the one before the newest")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an earlier version the newest again, as a new version."""
    opened = _open_existing(store, keep_versions=sys.maxsize)
    _show_change(opened.rollback(name, to), as_json=as_json)


@app.command("verify", cls=Command, epilog="prefixfast prefixes verify store")
def verify(
    store: Store,
    absent: Annotated[
        str | None,
        typer.Option(
            metavar="DIGEST",
            help="Digest of a prefix; also report every file that holds this prefix.",
            show_default="no digest",
        ),
    ] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            help="Further folder to search for --absent, such as the output folder of a training run.",
            show_default="the store only",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Read every version and compare it with the digest that was recorded when it was put into the store.

    The exit status is 3 if some versions are damaged.
    """
    check = _open_existing(store).verify(absent=absent, also=also or ())
    problems = [asdict(d) for d in check.damaged] + [
        {"name": None, "path": p, "why": f"holds {absent}"} for p in check.holding
    ]
    if as_json:
        show_one({"ok": check.ok, **asdict(check)}, as_json=True)
    elif problems:
        show(
            problems,
            ("path", "name", "why"),
            as_json=False,
            title=f"{check.versions} versions, {len(problems)} problems",
        )
    else:
        typer.echo(f"{printable(store)}: {check.versions} versions, all whole")
        if absent:
            places = ", ".join(map(printable, check.searched))
            typer.echo(f"nothing holds {absent} in {places}; other places were not searched, --also DIR adds one")
    _exit_if_failed(len(problems))


@app.command("export", cls=Command, epilog="prefixfast prefixes export store exported ann bob")
def export(
    store: Store,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write to; created if missing.")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Names of prefixes.", show_default="all")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write prefixes as adapter folders, which PEFT reads where it can hold them.

    The exit status is 3 if some prefixes cannot be written.
    """
    show_outcomes(_open(store).export_dir(folder, names or None), as_json=as_json)


@app.command("import", cls=Command, epilog="prefixfast prefixes import store peft-adapters")
def import_(
    store: Store,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of adapter folders.")],
    model: Annotated[str | None, BASE] = None,
    keep_versions: KeepVersions = 2,
    as_json: Json = False,
) -> None:
    """Put every adapter folder in FOLDER, of prefixfast or PEFT, into a store under the folder's name.

    The exit status is 3 if some folders cannot be read.
    """
    show_outcomes(_open_to_write(store, keep_versions).import_dir(folder, model=model), as_json=as_json)


def show_outcomes(outcomes: list[Outcome], *, as_json: bool) -> None:
    """Print the result for each folder or version; exit with 3 if some failed."""
    rows = [asdict(o) | {"result": "ok" if o.ok else "refused"} for o in outcomes]
    done = sum(o.ok for o in outcomes)
    show(rows, ("result", "name", "path", "why"), as_json=as_json, title=f"{done} of {len(outcomes)}")
    _exit_if_failed(len(outcomes) - done)


def _open(path: Path) -> PrefixStore:
    """Store to read."""
    from prefixfast.store import PrefixStore

    opened = PrefixStore(path, read_only=True)
    check_kind("STORE", path, "a store")
    return opened


def _open_existing(path: Path, *, keep_versions: int = 2) -> PrefixStore:
    """Store to write to, which must exist."""
    check_kind("STORE", path, "a store")
    return _open_to_write(path, keep_versions)


def _open_to_write(path: Path, keep_versions: int) -> PrefixStore:
    """Store to write to, created if missing."""
    from prefixfast.store import PrefixStore

    return PrefixStore(path, keep_versions=keep_versions)


def _show_change(stored: StoredPrefix, *, as_json: bool) -> None:
    """Print the version that a command has put into a store."""
    if as_json:
        show_one(_summary(stored), as_json=True)
    else:
        typer.echo(f"{printable(stored.name)}: version {stored.version}, digest {stored.digest}")


def _summary(stored: StoredPrefix | Outcome) -> dict[str, Any]:
    """Columns of `list` for a stored version, or the problem of one that cannot be read."""
    from prefixfast.store import Outcome

    if isinstance(stored, Outcome):
        return {"problem": f"{stored.path}: {stored.why}"}
    values = {field: getattr(stored, field) for field in ("name", "version", "length", "nbytes", "created", "digest")}
    return {**values, "size": in_bytes(stored.nbytes), "base": (stored.base or {}).get("name"), "problem": None}


def _details(stored: StoredPrefix) -> dict[str, Any]:
    """All properties of a stored version."""
    from prefixfast.prefix.header import stored_dtypes, stored_training

    shapes = {tuple(shape) for shape in stored.shapes.values()}
    by_site = {site: list(stored.layers_at(site)) for site in stored.sites}
    return {
        **_summary(stored),
        "folder": str(stored.folder),
        "numbers": sum(p * h * d for p, h, d in stored.shapes.values()),
        "sites": list(stored.sites),
        "rows": stored.num_rows,
        "layers": by_site["self"] if stored.sites == ("self",) else by_site,
        "shape": [list(shape) for shape in sorted(shapes)],
        "dtype": stored_dtypes(stored.folder),
        "pos_start": stored.pos_start,
        "window": stored.window,
        "position": stored.position,
        "base": None if stored.base is None else {k: v for k, v in stored.base.items() if k != "sample"},
        "linearizer": stored.task,  # as in entry.json
        "decoding": dict(stored.decoding),
        "training": dict(stored_training(stored.folder)),
    }


def _by_site(value: Any) -> Any:
    """Values by site in one line of text; other values unchanged."""
    return ", ".join(f"{site} {own}" for site, own in value.items()) if isinstance(value, dict) else value


def _exit_if_failed(failed: int) -> None:
    if failed:
        raise typer.Exit(SOME_FAILED)
