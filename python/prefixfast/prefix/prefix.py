"""`Prefix`: a learned block of keys and values, with what is done with it: save, load, join, inspect, share."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.errors import ConfigError, DataError
from prefixfast.io.atomic import read_settled
from prefixfast.prefix import folder as files
from prefixfast.prefix.concat import concatenated
from prefixfast.prefix.hub import find_folder, push_folder
from prefixfast.prefix.peft_format import TYPES, PeftType
from prefixfast.prefix.record import PrefixData

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixfast.model.base import Model
    from prefixfast.prefix.inspect import Inspection


class Prefix(PrefixData):
    """A learned prefix. Immutable; compare prefixes by their `digest`.

    Attributes:
        kv: ``{site}.{layer}.k`` and ``.v`` of ``[P, H, D]`` each; keys are stored after RoPE. Layers may differ in P, H and D or be absent.
        pos_start: Position of the first token after the prefix: P as PEFT has it, or 0.
        window: ``"slide"``: sliding windows hide old prefix rows, as in PEFT; ``"always"``: they never do.
        base: Fingerprint of the base model, None if unknown (an imported PEFT adapter).
        task: How rows become prompts: the task's ``name`` and its settings; None for plain prompts.
        decoding: Default `GenerationParams` of this prefix.
        training: How it came about: settings, steps, final losses.

    Example:
        >>> prefix = Prefix.from_text(base, "table-to-text:")
        >>> (prefix.length, prefix.pos_start, prefix.kv["self.0.k"].shape)
        (14, 14, torch.Size([14, 4, 8]))
        >>> (prefix.num_stored, prefix.num_trained, prefix.nbytes, prefix.requires["dtype"])
        (2688, 0, 10752, 'float32')
    """

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the prefix as a folder; an existing prefix there is replaced atomically, other files in it stay.

        The folder is a PEFT adapter folder whenever PEFT can hold the prefix exactly; ``not_peft_because`` in its ``prefixfast.json`` says why if not.

        Args:
            folder: Made with its parents if it is not there.

        Raises:
            OSError: If the disk refuses; what was there before is intact.

        Example:
            >>> prefix.save_pretrained("mill")
            >>> sorted(os.listdir("mill"))
            ['adapter_config.json', 'adapter_model.safetensors', 'prefixfast.json']
        """
        files.write_folder(Path(folder), files.own_files(self.kv, self.digest, self.fields))

    def to_peft(self, folder: str | os.PathLike[str], *, peft_type: PeftType | None = None) -> None:
        """Write a PEFT adapter folder with what PEFT knows and nothing else; the numbers are those of the prefix to the bit.

        Args:
            folder: Made with its parents if it is not there; a prefix in it is replaced atomically, other files stay.
            peft_type: ``"PREFIX_TUNING"`` or ``"CARTRIDGE"``; None: what it was imported as, else PREFIX_TUNING.

        Raises:
            ConfigError: If PEFT cannot hold the prefix exactly, with the reason.
            OSError: If the disk refuses; what was there before is intact.

        Example:
            >>> prefix.to_peft("adapter", peft_type="CARTRIDGE")  # then: PeftModel.from_pretrained(model, "adapter")
            >>> sorted(os.listdir("adapter"))
            ['adapter_config.json', 'adapter_model.safetensors']
        """
        if peft_type not in (None, *TYPES):
            msg = f"peft_type: expected {' or '.join(map(repr, TYPES))}, got {peft_type!r}"
            raise ConfigError(msg)
        if self.peft_incompatibility:
            msg = f"PEFT cannot hold this prefix exactly: {self.peft_incompatibility}; save_pretrained keeps all of it"
            raise ConfigError(msg)
        files.write_folder(
            Path(folder), files.adapter_files(self.kv, self.fields, peft_type or files.kind_of(self.fields))
        )

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], *, revision: str | None = None, local_files_only: bool = False
    ) -> Prefix:
        """Read a `Prefix` from a folder written by `save_pretrained` or by PEFT (decoder-only PREFIX_TUNING and CARTRIDGE), here or on the Hugging Face hub.

        Args:
            path: A folder; a text ``"name/repository"`` that is no folder is a hub id, of which only JSON and safetensors files are fetched.
            revision: Branch, tag or commit of a hub id.
            local_files_only: Take a hub id from the local cache and do not ask the hub.

        Raises:
            DataError: If the folder is missing, damaged, or something else; says which file, or what was looked for.
            ConfigError: For a revision of a local folder, or a hub that cannot be reached.

        Example:
            >>> prefix.save_pretrained("mill")
            >>> Prefix.from_pretrained("mill").digest == prefix.digest
            True
        """
        return read_settled(
            find_folder(path, revision, local_files_only=local_files_only, names=files.OWNED), cls._read
        )

    @classmethod
    def _read(cls, path: Path) -> Prefix:
        file, kv, fields, digest = files.read_folder(path)
        try:
            prefix = cls(kv, **fields)
        except DataError as e:
            msg = f"{file.name}: {e}"
            raise DataError(msg, path=str(file)) from e
        if digest is not None and prefix.digest != digest:
            meta = files.META
            msg = f"the tensors are not those that {meta} describes: another program changed the folder; delete {meta} to read it as a PEFT adapter"
            raise DataError(msg, path=str(path / meta))
        return prefix

    @classmethod
    def from_text(
        cls,
        model: str | Path | PreTrainedModel | Model,
        text: str | Sequence[int] | Sequence[Mapping[str, Any]],
        *,
        prefix_length: int | None = None,
        after: Prefix | Sequence[Prefix] = (),
    ) -> Prefix:
        """The keys and values of a text in the base itself: generating on a prompt with it is generating on text and prompt.

        Args:
            model: The base, as `load` takes it.
            text: A text, tokenized as a prompt is (with the begin token, for tokenizers that add one); token ids, taken as they are; or chat messages
                ``{"role", "content"}``, through the tokenizer's chat template without its generation prompt.
            prefix_length: P; a shorter text is repeated, a longer one is cut to its first tokens. None: all tokens of the text.
            after: A prefix, or several from left to right, that the text follows and that it sees; positions go on. Use the result together with them, as
                ``[after, result]``.

        Returns:
            A prefix of fp32 numbers (fp64 for a base in fp64); the text itself is not kept.

        Raises:
            ConfigError: For an empty or wrong text, a length without room in the base's positions, or messages without a chat template.
            BaseMismatchError: If ``after`` was made for another base.

        Example:
            >>> rules = Prefix.from_text(base, "Answer in one sentence. ")
            >>> chat = Prefix.from_text(base, "Be polite. ", after=rules)
            >>> answer = generate(["Why is the sky blue?"], [[rules, chat]], model=base, max_new_tokens=8)[0]
            >>> (chat.pos_start, answer.usage["prefix_rows"])
            (35, 35)
        """
        from prefixfast.prefix.from_text import text_prefix

        kv, fields = text_prefix(model, text, prefix_length, (after,) if isinstance(after, Prefix) else tuple(after))
        return cls(kv, **fields)

    def concat(self, *others: Prefix) -> Prefix:
        """One `Prefix` that does what this one and the others do together, composed from left to right (``[a, b]`` in a request).

        Its text starts at the largest ``pos_start``, tasks and decoding defaults are the last one's, as in a composition.

        Args:
            others: Prefixes of the same base, ``window`` and dtype.

        Raises:
            BaseMismatchError: If they were made for different bases, or have different heads.
            ConfigError: If no single prefix does the same (they lie in different layers, ...), with the reason.

        Example:
            >>> both = Prefix.from_text(base, "Be brief. ").concat(Prefix.from_text(base, "Be polite. "))
            >>> (both.length, both.pos_start)
            (21, 11)
        """
        kv, fields = concatenated((self, *others))
        return Prefix(kv, **fields)

    def inspect(
        self,
        model: str | Path | PreTrainedModel | Model,
        prompts: Sequence[str | Sequence[int] | Mapping[str, Any]],
        *,
        words: int = 3,
        rows: Sequence[int] | None = None,
    ) -> Inspection:
        """What the prefix does to the base: where attention goes, how far predictions move, which words its rows resemble.

        Args:
            model: The base, as `load` takes it.
            prompts: Texts, token ids or rows as in training; of a row with a target only the target's tokens count, else every token.
            words: Nearest vocabulary tokens of each row; 0 leaves this part out, which reads the whole vocabulary once a row.
            rows: Prefix rows to find words for; None: the first 16.

        Returns:
            See `Inspection`; it prints as a table and plots to a file.

        Raises:
            BaseMismatchError: If the prefix was made for another base.
            RequestError: For a bad or too long prompt, with its number.
            ConfigError: For other arguments that do not fit.

        Example:
            >>> found = prefix.inspect(base, ["name : The Mill | food : Italian"], words=1)  # print(found) shows tables
            >>> (found.mass.shape, len(found.divergence[0]), found.words[0][0][0])
            (torch.Size([3, 4]), 32, 't')
        """
        from prefixfast.prefix.inspect import inspect

        return inspect(model, self, prompts, words=words, rows=rows)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Save the prefix, with a model card, to a repository on the Hugging Face hub; the repository is made if it is not there.

        The files are those of `save_pretrained`. The card says base, sizes, and of ``training`` settings and metrics, never a text.

        Args:
            repo_id: ``"name/repository"``.
            private: Whether a new repository is private; None: the account's default.
            token: Access token; None: the one that is logged in.
            commit_message: None: a default one.

        Returns:
            Address of the commit.

        Raises:
            ConfigError: If the hub refuses or cannot be reached, with what to do.

        Example:
            >>> prefix.push_to_hub("ann/mill", private=True)
            'https://huggingface.co/ann/mill/commit/...'
        """
        written = files.own_files(self.kv, self.digest, self.fields)
        return push_folder(
            self, written, repo_id, private=private, token=token, commit_message=commit_message, owned=files.OWNED
        )
