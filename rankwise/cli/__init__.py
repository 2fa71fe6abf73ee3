"""The command line: parse, call, print. What the commands do lives in the rooms that they call.

options.py    the application, shared options
plans.py      doctor, data, plan, inspect, export, shrink
studies.py    train, study run|status|validate|schema
evidence.py   report, recommend, auto, track
writing.py    memory, init, paper
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from typing import Any

import typer

from rankwise.cli import evidence, plans, studies, writing  # each adds its commands
from rankwise.cli.options import app
from rankwise.errors import RankwiseError, visible

__all__ = ["app", "evidence", "main", "plans", "studies", "writing"]

STOPPED = 130
USAGE_ERROR: Any = typer.BadParameter.__base__  # typer does not name its copy of Click's class


def main() -> None:
    """Run the command line; a person's mistakes end in one message and exit code 2."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")  # theirs to mend
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; it tells of kernels it lacks
    try:
        code = app(standalone_mode=False)
        if code == STOPPED:  # the interrupt itself ends inside of typer
            raise KeyboardInterrupt
        sys.exit(code)
    except RankwiseError as error:
        _fail(str(error))
    except USAGE_ERROR as error:
        if text := error.format_message().rstrip("."):  # without one, the help has been printed
            _fail(f"{text}. See `{error.ctx.command_path} --help`." if error.ctx else f"{text}.")
        sys.exit(2)
    except KeyboardInterrupt:
        _fail("stopped. Nothing finished is lost; the same command resumes.", code=STOPPED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away; end in silence
        sys.exit(1)
    except Exception as error:
        message = _system_fault(error)
        if message is None:
            raise
        _fail(message)


def _system_fault(error: Exception) -> str | None:
    """Return the sentence for a fault of the disk, or None where the error is a bug of ours."""
    # safetensors, tokenizers and shutil.copytree raise errors of their own, with the system's in the text
    said = re.search(r"(?:\(os error |\[Errno )(\d+)", str(error))
    number = getattr(error, "errno", None) or (int(said[1]) if said else None)
    faults: dict[Any, str] = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file would be larger than is allowed",
        errno.EROFS: "the folder is read-only",
        errno.EACCES: "permission is denied",
        errno.EPERM: "permission is denied",
        errno.ENOTDIR: "a file stands where a folder is needed",
        errno.EEXIST: "a file stands where a folder is needed",
        errno.EISDIR: "a folder stands where a file is needed",
        errno.ENAMETOOLONG: "the path is too long",
        errno.EIO: "the disk reports an error",
    }
    if number not in faults:
        return None
    notes = getattr(error, "__notes__", None)
    where = getattr(error, "filename", None) or (notes[-1] if notes else "the results or cache folder")
    return (
        f"cannot write {where}: {faults[number]}. Finished runs are safe; mend that, or choose another "
        "folder with --results or RANKWISE_CACHE, and the same command goes on."
    )


def _fail(message: str, code: int = 2) -> None:
    print("rankwise: " + "\n".join(map(visible, message.split("\n"))), file=sys.stderr)
    sys.exit(code)
