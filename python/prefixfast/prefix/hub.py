"""Prefixes on the Hugging Face hub: fetching a folder, and pushing one with its model card."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prefixfast.errors import ConfigError, DataError
from prefixfast.io.atomic import write_file
from prefixfast.prefix.model_card import CARD, model_card
from prefixfast.prefix.record import PrefixData

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_folder(
    path: str | os.PathLike[str], revision: str | None, *, local_files_only: bool, names: Iterable[str]
) -> Path:
    """The local folder that ``path`` means; of a hub id only the files of these names are fetched.

    Raises:
        DataError: If the hub does not have it.
        ConfigError: For a revision of a local folder, or a hub that cannot be reached.
    """
    if not isinstance(path, str) or Path(path).exists() or not HUB_ID.fullmatch(path):
        if revision is not None:
            msg = f"revision: expected only with a hub id, got {revision!r} for the folder {str(path)!r}"
            raise ConfigError(msg)
        return Path(path)
    from huggingface_hub import errors, snapshot_download

    at = "" if revision is None else f" at revision {revision!r}"
    try:
        return Path(
            snapshot_download(path, revision=revision, local_files_only=local_files_only, allow_patterns=sorted(names))
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as e:
        msg = f"{path!r}{at}: neither a folder here nor a repository on the hub: {_first_line(e)}; check the name, or log in (hf auth login) if it is private"
        raise DataError(msg, path=path) from e
    except errors.LocalEntryNotFoundError as e:
        asked = "local_files_only was asked for" if local_files_only else "the hub cannot be reached"
        msg = f"{path!r}{at}: neither a folder here nor in the local cache, and {asked}: {_first_line(e)}; fetch it once while online, or give a folder"
        raise DataError(msg, path=path) from e
    except Exception as e:  # the client lets errors of its HTTP library through, which share no class
        raise ConfigError(_unreachable(f"{path!r}{at} cannot be fetched from the hub", e)) from e


def push_folder(
    prefix: PrefixData,
    files: Mapping[str, bytes],
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    commit_message: str | None,
    owned: Iterable[str],
) -> str:
    """Upload a prefix's files and card in one commit, in place of any prefix there; returns the commit's address.

    Raises:
        ConfigError: If the hub refuses or cannot be reached.
    """
    if not isinstance(repo_id, str) or not HUB_ID.fullmatch(repo_id):
        msg = f"repo_id: expected 'name/repository', got {repo_id!r:.80}"
        raise ConfigError(msg)
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="prefixfast-") as folder:
        for name, data in {**files, CARD: model_card(prefix, repo_id).encode()}.items():
            write_file(Path(folder, name), data)
        message = commit_message or f"Prefix {prefix.digest[:12]}"
        try:
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            gone = sorted(set(owned) - set(files))  # of a prefix that was there in the other form
            info: Any = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, delete_patterns=gone
            )
        except Exception as e:  # see find_folder
            raise ConfigError(_unreachable(f"{repo_id!r} cannot be written on the hub", e)) from e
    return str(getattr(info, "commit_url", info))


def _unreachable(what: str, e: Exception) -> str:
    return f"{what}: {type(e).__name__}: {_first_line(e)}; check the connection (HF_HUB_OFFLINE is off?), the name, and that you are logged in (hf auth login)"


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:300]
