"""`python -m esr_train`: distil a student from a teacher. With no arguments, the embedded demo.

`python -m esr_train align`: how two tokenizers cut one text.
"""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable

from esr_train.errors import UserError

# Errors of the file system that the user can mend; any other is ours.
USERS_OWN = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def distil(words: list[str]) -> None:
    """Train as the options say and print what it gained and what it cost."""
    from esr_train.config import parse

    config, resume = parse(words)
    # Imported late: --help and a wrong option need not wait for the rest.
    from esr_train.report import print_results
    from esr_train.train import train

    print_results(train(config, resume))


def align(words: list[str]) -> None:
    """Show how two tokenizers cut one text."""
    from esr_train.align.show import show

    show(words)


# By the first word of the command line; without one of them it trains.
COMMANDS: dict[str, Callable[[list[str]], None]] = {"align": align}


def guarded(command: Callable[[list[str]], None], words: list[str]) -> int:
    """Run a command. Exit code: 0; 2, one line says what the user can mend; 130, interrupted."""
    if "--debug" in words:
        command(words)
        return 0
    try:
        from transformers.utils import logging

        # Libraries' news for their developers, and their own bars under ours.
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        logging.disable_progress_bar()
        command(words)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in USERS_OWN:
            raise
        place = f" ({error.filename})" if error.filename else ""
        return _fail(f"{os.strerror(error.errno)}{place}: make room, or choose another output_dir")
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main() -> int:
    words = sys.argv[1:]
    if words and words[0] in COMMANDS:
        return guarded(COMMANDS[words[0]], words[1:])
    return guarded(distil, words)


if __name__ == "__main__":
    sys.exit(main())
