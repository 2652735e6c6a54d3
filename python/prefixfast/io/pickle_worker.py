"""Reader of torch pickles from untrusted files in a process of its own: ``python -m prefixfast.io.pickle_worker``.

``torch.load`` builds the tensors with its weights-only loader, which runs no code of the file. A damaged or hostile
file can still ask for any amount of memory, disk or time, so that a child process with limits of all three reads it.
The child writes a safetensors file, which is the only thing that the caller reads.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixfast.errors import DataError
from prefixfast.io.untrusted import file_size, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

SECONDS = 120  # for the start of the process, which imports torch, and the reading
MEMORY = 2 * 2**30  # bytes beside a multiple of the file's size
COPIES = 4  # of the tensors: as they are read, contiguous, as bytes, and one of reserve


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file that ``torch.save`` has written, without running its code.

    Args:
        path: File with a mapping of names to tensors.

    Raises:
        DataError: If the file is missing, damaged or hostile, holds something else, or takes too much memory or time.
    """
    try:
        limit = MEMORY + COPIES * file_size(path)
    except OSError as e:
        msg = f"{path.name}: cannot be read: {e}"
        raise DataError(msg, path=str(path)) from e
    with tempfile.TemporaryDirectory(prefix="prefixfast-") as folder:
        target = Path(folder, "tensors.safetensors")
        command = [sys.executable, "-m", __name__, str(path.absolute()), str(target), str(limit)]
        # The child imports this package from where the caller has it, and nothing from the working directory.
        paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        environment = {**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired as e:
            msg = f"{path.name}: expected tensors, got a pickle that is not read within {SECONDS} seconds"
            raise DataError(msg, path=str(path)) from e
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"its reader ended with {done.returncode}"])[-1][:300]
            msg = f"{path.name}: expected tensors of torch.save, this file is damaged, hostile or too large: {reason}"
            raise DataError(msg, path=str(path))
        return read_tensors(target)


def main(source: Path, target: Path, limit: int) -> None:
    """Read a pickle under limits, and write its tensors.

    Args:
        source: File of ``torch.save``.
        target: New safetensors file.
        limit: Number of bytes of memory beside those that the process has, and of bytes written.

    Raises:
        TypeError: If the file holds something else than tensors by name.
    """
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    _limit(limit)
    found: Any = torch.load(source, map_location="cpu", weights_only=True)
    if not isinstance(found, Mapping) or not all(
        isinstance(n, str) and type(t) is torch.Tensor for n, t in found.items()
    ):
        msg = f"expected a mapping of names to tensors, got {type(found).__name__}"
        raise TypeError(msg)
    save_file({name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in found.items()}, target)


def _limit(extra: int) -> None:
    """Limit the memory, the written bytes and the processor seconds of this process, where the system can."""
    try:
        import resource
    except ImportError:  # Windows; the caller's time limit is left
        return
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + extra,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (extra,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS,) * 2)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
    except pickle.UnpicklingError as e:  # torch's text advises to run the code
        parts = (part.strip() for part in str(e).split("\n\n"))
        reason = next((part for part in parts if part.startswith(("Trying", "Unsupported"))), "no pickle of tensors")
        sys.exit(" ".join(f"it holds other things than tensors: {reason}".split()))
    except Exception as e:  # the last line of the error is the reason that the caller shows
        sys.exit(" ".join(f"{type(e).__name__}: {e}".split()))
