"""Java programs of pycocoevalcap: the PTB tokenizer and METEOR 1.5."""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from prefixfast.io.environment import version
from prefixfast.metrics.result import MetricUnavailable

TOKENIZER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor/meteor-1.5.jar"
# Java takes the sign of decimals, and the letters of lower case, from the language of its environment.
LANGUAGE = ("-Duser.language=en", "-Duser.country=US")
_LINE_BREAKS = re.compile("[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # a superset of what either program takes for one


def java() -> str:
    """Path of the ``java`` command.

    Raises:
        MetricUnavailable: If there is none.
    """
    if path := shutil.which("java"):
        return path
    msg = "needs a java command on PATH, such as that of OpenJDK 17, which was not found: install a Java runtime"
    raise MetricUnavailable(msg)


def jar(name: str) -> Path:
    """Path of a JAR file of pycocoevalcap.

    Args:
        name: Path of the file in the package, for example `METEOR_JAR`.

    Raises:
        MetricUnavailable: If the package or the file is missing.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / name).is_file():
            return path
    msg = f"needs pycocoevalcap with its {Path(name).name}: pip install 'prefixfast[meteor]'"
    raise MetricUnavailable(msg)


def package() -> str:
    """Name and version of the package of the programs."""
    return f"pycocoevalcap {version('pycocoevalcap') or 'of unknown version'}"


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """Context manager of work with a program, which can fail to start, to answer, or to find space for its files.

    Args:
        name: Name of the program.

    Raises:
        MetricUnavailable: If the system refuses a file or process, or the program answers with no text or number.
    """
    try:
        yield
    except MetricUnavailable:
        raise
    except (OSError, ValueError) as e:  # a wrong encoding is a ValueError too
        msg = f"{name} cannot run: {e}"
        raise MetricUnavailable(msg) from e


def one_line(text: str) -> str:
    """Text with each line break as a space.

    Args:
        text: Text.
    """
    return _LINE_BREAKS.sub(" ", text)


def ptb_lines(texts: Sequence[str]) -> list[str]:
    """Tokens of each text in lower case, with spaces between.

    The tokenizer reads its standard input, so that nothing is written into the folder of the package. It looks at the
    next line before it splits off a period, so that the order of the texts is a part of the result.

    Args:
        texts: Texts.

    Raises:
        MetricUnavailable: If Java or the package is missing, or if the tokenizer fails.
    """
    command = [java(), *LANGUAGE, "-cp", str(jar(TOKENIZER_JAR)), "edu.stanford.nlp.process.PTBTokenizer"]
    with running("the PTB tokenizer"):
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase"],
            input="\n".join(map(one_line, texts)).encode(errors="replace"),
            capture_output=True,
            check=False,
        )
        found = done.stdout.decode().split("\n")
    if done.returncode or len(found) != len(texts):
        msg = f"the PTB tokenizer gave {len(found)} lines for {len(texts)} texts: {_end(done.stderr)}"
        raise MetricUnavailable(msg)
    return found


class Meteor:
    """METEOR 1.5 in a process that answers a line with a line.

    Args:
        process: Process with pipes.
        errors: File of its standard error.
    """

    def __init__(self, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        self._process = process
        self._errors = errors

    def ask(self, line: str) -> str:
        """Answer to a line.

        Args:
            line: Line without its end.

        Raises:
            MetricUnavailable: If the process ended, or answered with an error.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode(errors="replace"))
            self._process.stdin.flush()
        return self.read()

    def read(self) -> str:
        """Next line of the process.

        Raises:
            MetricUnavailable: If the process ended, or answered with an error.
        """
        assert self._process.stdout
        answer = self._process.stdout.readline().decode().strip()
        if not answer or answer.startswith("Error"):
            self._errors.seek(0)
            msg = f"METEOR stopped: {answer or _end(self._errors.read())}"
            raise MetricUnavailable(msg)
        return answer


def meteor_command(*arguments: str) -> list[str]:
    """Command that runs METEOR 1.5 for English with normalization, as all of the scripts do.

    Args:
        arguments: Files of texts and references, and further options.

    Raises:
        MetricUnavailable: If Java or the package is missing.
    """
    path = jar(METEOR_JAR)
    # METEOR itself finds its table of paraphrases only in a folder without spaces.
    table = path.parent / "data" / "paraphrase-en.gz"
    options = ["-l", "en", "-norm", "-a", str(table)]
    return [java(), *LANGUAGE, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(path), *arguments, *options]


@contextlib.contextmanager
def meteor() -> Iterator[Meteor]:
    """Context manager of METEOR in a process that answers lines; the process ends with it.

    Raises:
        MetricUnavailable: If Java or the package is missing.
    """
    command = meteor_command("-", "-", "-stdio")
    with tempfile.TemporaryFile() as errors:
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors)
        try:
            yield Meteor(process, errors)
        finally:
            process.kill()
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


def _end(output: bytes) -> str:
    """Last lines of what a program said."""
    return output.decode(errors="replace").strip()[-300:] or "no message"
