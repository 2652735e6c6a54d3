"""`Prefix`, a learned block of keys and values: saving, loading, composition, inspection and sharing."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefixfast.config.json_types import JSON
from prefixfast.errors import ConfigError, DataError, check_flag, shown
from prefixfast.io.atomic import read_stable
from prefixfast.io.paths import as_path
from prefixfast.prefix import folder as files
from prefixfast.prefix.concat import concat_prefixes
from prefixfast.prefix.hub import find_folder, push_to_hub
from prefixfast.prefix.peft_format import TYPES, PeftType
from prefixfast.prefix.peft_read import VirtualTokens, base_needed
from prefixfast.prefix.record import PrefixData
from prefixfast.prefix.tensors import shared_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from prefixfast.model.base import Model
    from prefixfast.prefix.inspect import Inspection


class Prefix(PrefixData):
    """A learned block of keys and values that every layer of a frozen base model attends to.

    A prefix holds everything that generation needs besides the base model: the tensors, the position at which the text
    starts, the task that turns rows into prompts, and default generation parameters. `train` makes a prefix from rows,
    `from_text` makes one from a text without training, and `from_pretrained` reads a saved prefix or a PEFT adapter.

    A prefix is immutable. It holds copies of the tensors and mappings that it is made of, and every access to a tensor
    of ``kv`` returns a copy. Two prefixes are compared by their `digest`.

    Shape letters: P prefix rows, H key-value heads, D head dimension.

    Attributes:
        kv: Tensors ``{site}.{layer}.k`` and ``{site}.{layer}.v`` by name, shape ``[P, H, D]``. Keys are stored after
            RoPE. Layers may differ in P, H and D, and may be absent.
        pos_start: Position of the first token after the prefix: P as in PEFT, or 0.
        window: Treatment of the prefix by sliding windows. ``"slide"``: the window hides old prefix rows, as in PEFT.
            ``"always"``: prefix rows stay visible.
        base: Fingerprint of the base model, None if unknown (an imported PEFT adapter).
        task: Task that turns rows into prompts, as `Task.spec` gives it; None for plain prompts.
        decoding: Default `GenerationParams` of the prefix.
        training: Settings, number of steps and final losses of the training, or another origin.
        position: Place of the prefix in a sequence. ``"prefix"``: before the first token. ``"infix"``: before the last
            prompt token. Earlier prompt tokens do not see an infix, and the last one starts ``pos_start`` positions
            after them.

    Raises:
        DataError: If a tensor or convention is not one that a prefix can have.

    Example:
        >>> prefix = Prefix.from_text(base, "table-to-text:")
        >>> (prefix.length, prefix.pos_start, prefix.kv["self.0.k"].shape)
        (14, 14, torch.Size([14, 4, 8]))
        >>> (prefix.num_stored, prefix.num_trained, prefix.nbytes, prefix.requires["dtype"])
        (2688, 0, 10752, 'float32')
    """

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Save the prefix to a folder.

        The folder is a PEFT adapter folder whenever PEFT can hold the prefix exactly. Otherwise the key
        ``not_peft_because`` of its ``prefixfast.json`` gives the reason.

        Args:
            folder: Path of the folder, which is created with its parents. A prefix in the folder is replaced
                atomically; other files stay.
            overwrite: Whether trained weights in the folder, which `TunedWeights` has saved, are replaced too.

        Raises:
            ConfigError: If the folder holds trained weights, or a PEFT adapter of another program that is no prefix,
                such as LoRA, which would be lost.
            OSError: If the files cannot be written. The old content of the folder is intact then.

        Example:
            >>> prefix.save_pretrained("mill")
            >>> sorted(os.listdir("mill"))
            ['adapter_config.json', 'adapter_model.safetensors', 'prefixfast.json']
        """
        check_flag("overwrite", overwrite)
        own = files.prefix_files(shared_tensors(self.kv), self.digest, self.fields)
        files.write_folder(as_path("folder", folder), own, "prefix", overwrite=overwrite)

    def to_peft(self, folder: str | os.PathLike[str], *, peft_type: PeftType | None = None) -> None:
        """Save the prefix as a PEFT adapter, without the data that only prefixfast reads.

        The numbers of the adapter are equal to those of the prefix to the bit.

        Args:
            folder: Path of the folder, which is created with its parents. A prefix in the folder is replaced
                atomically; other files stay.
            peft_type: Type of the adapter, ``"PREFIX_TUNING"`` or ``"CARTRIDGE"``. None is ``"CARTRIDGE"`` for an
                imported CARTRIDGE and for a prefix with frozen rows, else ``"PREFIX_TUNING"``.

        Raises:
            ConfigError: If PEFT cannot hold the prefix exactly, with the reason, or the folder holds trained weights or
                a PEFT adapter that is no prefix, such as LoRA, which would be lost.
            OSError: If the files cannot be written. The old content of the folder is intact then.

        Example:
            >>> prefix.to_peft("adapter", peft_type="CARTRIDGE")  # then: PeftModel.from_pretrained(model, "adapter")
            >>> sorted(os.listdir("adapter"))
            ['adapter_config.json', 'adapter_model.safetensors']
        """
        if peft_type is not None and not (isinstance(peft_type, str) and peft_type in TYPES):
            msg = f"peft_type: expected {' or '.join(map(repr, TYPES))}, got {shown(peft_type)}"
            raise ConfigError(msg)
        if self.peft_incompatibility:
            msg = f"PEFT cannot hold this prefix exactly: {self.peft_incompatibility}; save_pretrained keeps all of it"
            raise ConfigError(msg)
        fields = self.fields
        chosen = peft_type or files.adapter_type(fields)
        own = files.adapter_files(shared_tensors(self.kv), fields, chosen)
        files.write_folder(as_path("folder", folder), own, "prefix")

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        model: str | Path | PreTrainedModel | Model | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> Prefix:
        """Load a prefix from a local folder or from the Hugging Face hub.

        The folder was saved by `save_pretrained` or by PEFT, or is a BART checkpoint of Li & Liang's code. An adapter
        of type PREFIX_TUNING or CARTRIDGE holds keys and values, of an encoder-decoder base those of the decoder's
        self-attention. One of type PROMPT_TUNING or P_TUNING of a decoder-only base holds embeddings of virtual
        tokens. Their keys and values are those of one forward of the base model, in its compute dtype. A checkpoint of
        Li & Liang holds an MLP for each site, whose output is taken. It is a pickle, which torch's weights-only loader
        reads in a process with limited memory.

        Args:
            path: Path of a folder. A string ``"name/repository"`` that is not a local folder is a hub id, of which only
                JSON and safetensors files are downloaded.
            model: Base model of a PROMPT_TUNING or P_TUNING adapter: hub id, folder, Hugging Face model or `Model`.
                Other folders do not need it, and then it is not loaded.
            revision: Branch, tag or commit of a hub id.
            local_files_only: Whether a hub id is read from the local cache only.

        Returns:
            Prefix of the class on which the method was called.

        Raises:
            DataError: If the folder is missing or damaged, holds something else, or holds virtual tokens and no
                ``model`` is given; the message names the file, or what was looked for.
            BaseMismatchError: If virtual tokens were made for a base model of other sizes.
            ConfigError: If a revision is given for a local folder, the hub cannot be reached, or the results of virtual
                tokens would not be PEFT's.

        Example:
            >>> prefix.save_pretrained("mill")
            >>> Prefix.from_pretrained("mill").digest == prefix.digest
            True
        """
        folder = find_folder(path, revision, local_files_only=local_files_only)
        try:
            found = read_stable(folder, cls._read)
        except DataError:
            again = find_folder(path, revision, local_files_only=local_files_only)
            if folder.is_dir() or again == Path(path):
                raise
            found = read_stable(again, cls._read)  # another process removed the download from the cache
        return found if isinstance(found, Prefix) else cls._of_virtual_tokens(found, model)

    @classmethod
    def _of_virtual_tokens(cls, tokens: VirtualTokens, model: str | Path | PreTrainedModel | Model | None) -> Prefix:
        from prefixfast.prefix.virtual_tokens import virtual_tokens_prefix

        if model is None:
            raise base_needed(tokens)
        kv, fields = virtual_tokens_prefix(model, tokens)
        return cls(kv, **fields)

    @classmethod
    def _read(cls, path: Path) -> Prefix | VirtualTokens:
        content = files.read_folder(path)
        if isinstance(content, VirtualTokens):
            return content
        try:
            prefix = cls(content.kv, **content.fields)
        except DataError as e:
            msg = f"{content.tensor_file.name}: {e}"
            raise DataError(msg, path=str(content.tensor_file)) from e
        if content.digest is not None and prefix.digest != content.digest:
            meta = files.META
            msg = (
                f"the tensors are not those that {meta} describes: another program changed the folder; delete {meta} "
                "to read it as a PEFT adapter"
            )
            raise DataError(msg, path=str(path / meta))
        return prefix

    @classmethod
    def from_text(
        cls,
        model: str | Path | PreTrainedModel | Model,
        text: str | Sequence[int] | Sequence[Mapping[str, JSON]],
        *,
        prefix_length: int | None = None,
        after: Prefix | Sequence[Prefix] = (),
    ) -> Prefix:
        """Make a prefix of the keys and values that the base model computes for a text, without training.

        Generation from a prompt with the prefix is equal to generation from text and prompt together.

        The encoder of an encoder-decoder base reads the text. The prefix has rows for the sites ``enc`` and ``cross``,
        and the decoder's text starts at position 0. An encoder reads in both directions, so that the rows are those of
        the text without the prompt.

        Args:
            model: Base model: hub id, folder, Hugging Face model or `Model`.
            text: Text of the prefix. A string is tokenized as a prompt is, with the begin token if the tokenizer adds
                one. Token ids are used unchanged. Chat messages ``{"role", "content"}`` are written by the tokenizer's
                chat template without its generation prompt.
            prefix_length: Number of rows P. A shorter text is repeated, a longer text is cut to its first tokens. None
                is the number of tokens of the text.
            after: Prefix, or several from left to right, that the text follows and attends to, with the positions
                counted on. Requests then use ``[after, result]``.

        Returns:
            Prefix of fp32 numbers (fp64 for a base model in fp64), which does not contain the text itself.

        Raises:
            ConfigError: If the text is empty or wrong, the base model has too few positions, or messages are given to
                a tokenizer without a chat template.
            BaseMismatchError: If ``after`` was made for another base model.

        Example:
            >>> rules = Prefix.from_text(base, "Answer in one sentence. ")
            >>> chat = Prefix.from_text(base, "Be polite. ", after=rules)
            >>> answer = generate(["Why is the sky blue?"], [[rules, chat]], model=base, max_new_tokens=8)[0]
            >>> (chat.pos_start, answer.usage["prefix_rows"])
            (35, 35)
        """
        from prefixfast.prefix.from_text import text_prefix

        kv, fields = text_prefix(model, text, prefix_length, (after,) if isinstance(after, Prefix) else after)
        return cls(kv, **fields)

    def concat(self, *others: Prefix) -> Prefix:
        """Join prefixes to one that is equivalent to composing them from left to right (``[a, b]`` in a request).

        The text of the result starts at the largest ``pos_start``. Task and decoding defaults are those of the last
        prefix that has them, as in a composition.

        Args:
            others: Prefixes of the same base model, ``window`` and dtype.

        Returns:
            Prefix with the rows of all prefixes.

        Raises:
            BaseMismatchError: If the prefixes were made for different base models, or have different heads.
            ConfigError: If no single prefix is equivalent (for example because the prefixes lie in different layers),
                with the reason.

        Example:
            >>> both = Prefix.from_text(base, "Be brief. ").concat(Prefix.from_text(base, "Be polite. "))
            >>> (both.length, both.pos_start)
            (21, 11)
        """
        kv, fields = concat_prefixes((self, *others))
        return Prefix(kv, **fields)

    def inspect(
        self,
        model: str | Path | PreTrainedModel | Model,
        prompts: Sequence[str | Sequence[int] | Mapping[str, JSON]],
        *,
        words: int = 3,
        rows: Sequence[int] | None = None,
    ) -> Inspection:
        """Measure the effect of the prefix on its base model.

        The result holds the attention mass on the prefix, the divergence of the next-token distributions from those of
        the base model alone, and the vocabulary tokens that are nearest to the prefix rows.

        Args:
            model: Base model: hub id, folder, Hugging Face model or `Model`.
            prompts: Strings, token ids or rows as in training, at least one. If a row has a target, only the target's
                tokens are measured, else every token.
            words: Number of nearest tokens for each row. 0 skips the search, which compares each row to the whole
                vocabulary.
            rows: Numbers of the rows whose nearest tokens are searched; None is the first 16.

        Returns:
            `Inspection`, which prints as tables and plots to a file.

        Raises:
            BaseMismatchError: If the prefix was made for another base model.
            RequestError: If a prompt is wrong or too long, with its number.
            ConfigError: If another argument is wrong.

        Example:
            >>> found = prefix.inspect(base, ["name : The Mill | food : Italian"], words=1)  # print(found) shows tables
            >>> (found.mass.shape, len(found.divergence[0]), found.words[0][0][0])
            (torch.Size([3, 4]), 32, 't')
        """
        from prefixfast.prefix.inspect import inspect_prefix

        return inspect_prefix(model, self, prompts, words=words, rows=rows)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Upload the prefix, with a model card, to the Hugging Face hub.

        The repository is created if it does not exist. The files are those of `save_pretrained`. The card names the
        base model, the sizes, and settings and metrics of the training, but never a text of the training data.

        Args:
            repo_id: Hub id ``"name/repository"``.
            private: Whether a new repository is private; None is the account's default.
            token: Access token; None is the token of the login.
            commit_message: Message of the commit; None is "Prefix" and the start of the digest.

        Returns:
            Address of the commit.

        Raises:
            ConfigError: If the hub refuses or cannot be reached, with advice.

        Example:
            >>> prefix.push_to_hub("ann/mill", private=True)
            'https://huggingface.co/ann/mill/commit/...'
        """
        return push_to_hub(self, repo_id, private=private, token=token, commit_message=commit_message)
