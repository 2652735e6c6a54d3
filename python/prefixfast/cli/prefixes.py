"""`prefixfast prefixes COMMAND STORE`: what lies in a `PrefixStore`, and changing it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixfast.cli.output import in_bytes, printable, show, show_one

if TYPE_CHECKING:
    from prefixfast.store import Outcome, PrefixStore, StoredPrefix

app = typer.Typer(
    help="Prefixes in a store: list, show, inspect, add, rm, rollback, verify, export, import.", no_args_is_help=True
)
SOME_FAILED = 3

Store = Annotated[Path, typer.Argument(metavar="STORE", help="folder of the store")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="name of the prefix")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Keep = Annotated[int, typer.Option(help="versions of a name that are kept")]


@app.command("list")
def list_(store: Store, as_json: Json = False) -> None:
    """The newest version of every name."""
    rows, failed = [], 0
    for one in _open(store).scan():
        row = dict.fromkeys(
            ("name", "version", "length", "nbytes", "size", "base", "created", "digest", "problem"), None
        ) | _row(one)
        failed += row["problem"] is not None
        rows.append(row)
    columns = ("name", "version", "length", "size", "base", "created", *(("problem",) if failed else ()))
    show(rows, columns, as_json=as_json, title=f"{store}: {len(rows)} prefixes")
    _exit(failed)


@app.command("show")
def show_(
    store: Store,
    name: Name,
    version: Annotated[int | None, typer.Option(help="by default the newest")] = None,
    as_json: Json = False,
) -> None:
    """Everything about one prefix."""
    from prefixfast.errors import UnknownPrefixError

    versions = {v.version: v for v in _open(store).versions(name)}
    number = max(versions) if version is None else version
    if number not in versions:
        msg = f"{name!r:.200} has no version {number}; it has {', '.join(map(str, versions))}"
        raise UnknownPrefixError(msg)
    values = _everything(versions[number])
    show_one(
        {
            **values,
            "versions": [{"version": v.version, "created": v.created, "digest": v.digest} for v in versions.values()],
        },
        as_json=as_json,
    )


@app.command("inspect")
def inspect(
    store: Store,
    name: Name,
    rows: Annotated[
        Path, typer.Argument(metavar="ROWS", help="rows to look at it with (.jsonl .json .csv .parquet, also .gz)")
    ],
    model: Annotated[
        str | None, typer.Option(help="hub id or folder of the base; by default the one that the prefix names")
    ] = None,
    words: Annotated[int, typer.Option(help="nearest words of each row; 0: none")] = 3,
    plot: Annotated[Path | None, typer.Option(help="draw it into this file (.png, .svg, .pdf)")] = None,
) -> None:
    """What a prefix does to its base: attention mass, divergence, nearest words."""
    from prefixfast.data.rows import read_rows
    from prefixfast.errors import ConfigError

    prefix = _open(store)[name]
    base = model or (prefix.base or {}).get("name")
    if not base:
        msg = f"{name!r} does not name its base: say --model"
        raise ConfigError(msg)
    found = prefix.inspect(str(base), read_rows(rows), words=words)
    typer.echo(str(found))
    if plot is not None:
        found.plot(plot)


@app.command("add")
def add(
    store: Store,
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of a prefix, or PEFT adapter folder")],
    keep_versions: Keep = 2,
    as_json: Json = False,
) -> None:
    """Put a prefix under a name; what has the name becomes its version before."""
    from prefixfast.prefix.prefix import Prefix

    prefix = Prefix.from_pretrained(folder)
    _changed(_open(store, make=True, keep_versions=keep_versions).put(name, prefix), as_json=as_json)


@app.command("rm")
def rm(
    store: Store,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="names of prefixes")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    as_json: Json = False,
) -> None:
    """Delete prefixes, all versions of each, and print the receipts."""
    opened = _open(store, make=False)
    for name in names:
        if name not in opened:
            opened.info(name)  # raises
    if not yes:
        if not sys.stdin.isatty():
            msg = "nobody can be asked here: say --yes to delete"
            raise typer.BadParameter(msg, param_hint="--yes")
        typer.confirm(f"delete {', '.join(map(printable, names))} from {store}, all versions?", abort=True)
    receipts: list[dict[str, Any]] = []
    try:
        for name in dict.fromkeys(names):
            receipts.append({"name": name, **asdict(opened.delete(name))})  # noqa: PERF401 - what was deleted is told, whatever comes next
    finally:
        show(receipts, ("name", "digests", "files", "bytes", "time"), as_json=as_json, title="deleted")


@app.command("rollback")
def rollback(
    store: Store,
    name: Name,
    to: Annotated[int | None, typer.Option(help="version; by default the one before the newest")] = None,
    as_json: Json = False,
) -> None:
    """Make an earlier version the newest again, as a new version."""
    opened = _open(store, make=False, keep_versions=sys.maxsize)
    _changed(opened.rollback(name, to), as_json=as_json)


@app.command("verify")
def verify(
    store: Store,
    absent: Annotated[
        str | None, typer.Option(metavar="DIGEST", help="look also for anything that holds this prefix")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read every version again and compare it with what was put."""
    check = _open(store, make=False).verify(absent=absent)  # what killed writers left is removed first
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
        typer.echo(f"{store}: {check.versions} versions, all whole" + (f"; nothing holds {absent}" if absent else ""))
    _exit(len(problems))


@app.command("export")
def export(
    store: Store,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="where to; made if it is not there")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME...]", help="by default all")] = None,
    as_json: Json = False,
) -> None:
    """Write prefixes as adapter folders, which PEFT reads where it can hold them."""
    outcomes(_open(store).export_dir(folder, names or None), as_json=as_json)


@app.command("import")
def import_(
    store: Store,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="folder of adapter folders")],
    keep_versions: Keep = 2,
    as_json: Json = False,
) -> None:
    """Put every adapter folder in FOLDER, ours or PEFT's, under its name."""
    outcomes(_open(store, make=True, keep_versions=keep_versions).import_dir(folder), as_json=as_json)


def outcomes(done: list[Outcome], *, as_json: bool) -> None:
    """Print what became of each; exit 3 if some failed."""
    rows = [asdict(o) | {"result": "ok" if o.ok else "refused"} for o in done]
    show(rows, ("result", "name", "path", "why"), as_json=as_json, title=f"{sum(o.ok for o in done)} of {len(done)}")
    _exit(sum(not o.ok for o in done))


def _open(path: Path, *, make: bool | None = None, keep_versions: int = 2) -> PrefixStore:
    """The store: to read it, or, with ``make``, to change one that is there (False) or that is made if need be (True)."""
    from prefixfast.errors import ConfigError
    from prefixfast.store import PrefixStore

    if make is False and not path.is_dir():
        msg = f"store: expected a directory, got {str(path)!r}"
        raise ConfigError(msg)
    return PrefixStore(path, read_only=make is None, keep_versions=keep_versions)


def _changed(put: StoredPrefix, *, as_json: bool) -> None:
    if as_json:
        show_one(_row(put), as_json=True)
    else:
        typer.echo(f"{printable(put.name)}: version {put.version}, digest {put.digest}")


def _row(one: StoredPrefix | Outcome) -> dict[str, Any]:
    from prefixfast.store import Outcome

    if isinstance(one, Outcome):
        return {"problem": f"{one.path}: {one.why}"}
    told = {field: getattr(one, field) for field in ("name", "version", "length", "nbytes", "created", "digest")}
    return {**told, "size": in_bytes(one.nbytes), "base": (one.base or {}).get("name"), "problem": None}


def _everything(stored: StoredPrefix) -> dict[str, Any]:
    prefix = stored.read()
    layers = {tuple(shape) for shape in stored.shapes.values()}
    return {
        **_row(stored),
        "folder": str(stored.folder),
        "numbers": prefix.num_stored,
        "layers": list(prefix.layers),
        "shape": [list(shape) for shape in sorted(layers)],
        "dtype": sorted({str(t.dtype).removeprefix("torch.") for t in prefix.kv.values()}),
        "pos_start": stored.pos_start,
        "window": stored.window,
        "base": stored.base,
        "task": stored.task,
        "decoding": dict(stored.decoding),
        "training": dict(prefix.training),
    }


def _exit(failed: int) -> None:
    if failed:
        raise typer.Exit(SOME_FAILED)
