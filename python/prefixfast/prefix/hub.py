"""Prefixes on the Hugging Face hub: download of a folder, and upload with a model card."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Set
from pathlib import Path
from typing import Any

from prefixfast.errors import ConfigError, DataError, shown
from prefixfast.io.atomic import write_file
from prefixfast.io.paths import as_path
from prefixfast.prefix.folder import OWNED, PREFIX_FILES, prefix_files
from prefixfast.prefix.model_card import CARD, model_card
from prefixfast.prefix.record import PrefixData
from prefixfast.prefix.tensors import shared_tensors

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_folder(
    path: str | os.PathLike[str],
    revision: str | None,
    *,
    local_files_only: bool,
    files: Set[str] = PREFIX_FILES,
) -> Path:
    """Local folder of a path or hub id. Only the named JSON and safetensors files are downloaded.

    Args:
        path: Local folder, or hub id ``"name/repository"`` if no such folder exists.
        revision: Branch, tag or commit of a hub id.
        local_files_only: Whether the hub id is read from the local cache only.
        files: Names of the files of a repository that are downloaded.

    Raises:
        DataError: If the hub does not have the repository.
        ConfigError: If a revision is given for a local folder, or the hub cannot be reached.
    """
    try:
        as_path("path", path)
    except ConfigError as e:
        msg = f"{shown(path)}: no such folder: {e}"
        raise DataError(msg) from e
    if not isinstance(path, str) or Path(path).exists() or not HUB_ID.fullmatch(path):
        if revision is not None:
            msg = f"revision: expected only with a hub id, got {shown(revision)} for the folder {shown(str(path))}"
            raise ConfigError(msg)
        return Path(path)
    from huggingface_hub import errors, snapshot_download

    what = repr(path) + ("" if revision is None else f" at revision {shown(revision)}")
    how: dict[str, Any] = {"revision": revision, "local_files_only": local_files_only}
    try:
        return Path(snapshot_download(path, allow_patterns=sorted(files), **how))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as e:
        msg = (
            f"{what}: neither a folder here nor a repository on the hub: {_first_line(e)}; check the name, or log in "
            "(hf auth login) if it is private"
        )
        raise DataError(msg, path=path) from e
    except errors.LocalEntryNotFoundError as e:
        asked = "local_files_only was asked for" if local_files_only else "the hub cannot be reached"
        msg = (
            f"{what}: neither a folder here nor in the local cache, and {asked}: {_first_line(e)}; fetch it once while "
            "online, or give a folder"
        )
        raise DataError(msg, path=path) from e
    except Exception as e:  # the hub's client also raises errors of its HTTP library, which have no common class
        raise ConfigError(_unreachable(f"{what} cannot be fetched from the hub", e)) from e


def push_to_hub(
    prefix: PrefixData, repo_id: str, *, private: bool | None, token: str | None, commit_message: str | None
) -> str:
    """Upload the files and the model card of a prefix in one commit, in place of those in the repository.

    Args:
        prefix: Prefix.
        repo_id: Hub id ``"name/repository"``.
        private: Whether a new repository is private; None is the account's default.
        token: Access token; None is the token of the login.
        commit_message: Message of the commit; None is "Prefix" and the start of the digest.

    Returns:
        Address of the commit.

    Raises:
        ConfigError: If the hub refuses or cannot be reached.
    """
    files = prefix_files(shared_tensors(prefix.kv), prefix.digest, prefix.fields)
    if not isinstance(repo_id, str) or not HUB_ID.fullmatch(repo_id):
        msg = f"repo_id: expected 'name/repository', got {shown(repo_id)}"
        raise ConfigError(msg)
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="prefixfast-") as folder:
        for name, data in {**files, CARD: model_card(prefix, repo_id).encode()}.items():
            write_file(Path(folder, name), data)
        message = commit_message or f"Prefix {prefix.digest[:12]}"
        other_form = sorted(OWNED - set(files))  # of a prefix that PEFT can hold, of one that it cannot, or of weights
        try:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            info: Any = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=other_form
            )
        except Exception as e:  # the hub's client also raises errors of its HTTP library, which have no common class
            raise ConfigError(_unreachable(f"{shown(repo_id)} cannot be written on the hub", e)) from e
    return str(getattr(info, "commit_url", info))


def _unreachable(what: str, e: Exception) -> str:
    return (
        f"{what}: {type(e).__name__}: {_first_line(e)}; check the connection (HF_HUB_OFFLINE is off?), the name, and "
        "that you are logged in (hf auth login)"
    )


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
