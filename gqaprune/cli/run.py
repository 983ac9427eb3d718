"""One run of the command: signals, streams, its log, and errors in one sentence."""

import signal
import sys

from lightning.fabric.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

from gqaprune.cli.arguments import TOOLS, run_tool, spell_out
from gqaprune.cli.lightning_cli import PruningCLI
from gqaprune.cli.named_classes import find_named_classes
from gqaprune.cli.wording import explain_error
from gqaprune.common.console import keep_streams_safe, logger
from gqaprune.common.cpu import avoid_illegal_instructions
from gqaprune.common.ranks import RankEndedError
from gqaprune.common.run_log import RunLog
from gqaprune.common.safe_text import for_log
from gqaprune.common.stop_signals import Stopped, stop_signals
from gqaprune.training.launch import end_with_launcher


def run_command() -> int:
    """Run what `sys.argv` says. Returns the exit code: 1 after an error that the user can mend, said in a sentence."""
    sys.argv[1:] = spell_out(sys.argv[1:])
    avoid_illegal_instructions()
    stop_signals.install()
    end_with_launcher()
    try:
        with keep_streams_safe() as output, RunLog() as log:
            code = _run(log)
            output.flush()
            if output.error is None:
                return code
            _say(f"gqaprune: standard output is not whole: {output.error.strerror or output.error}")
            return code or int(set(sys.argv[1:2]) <= TOOLS.keys())  # what they print is their work
    finally:
        stop_signals.restore()


def _run(log: RunLog) -> int:
    try:
        if sys.argv[1:2] and sys.argv[1] in TOOLS:
            run_tool(sys.argv[1], sys.argv[2:])
        else:
            PruningCLI(log, find_named_classes(sys.argv[2:]))
    except (ValueError, OSError, SafetensorError, MisconfigurationException) as error:  # the third: a full disk, too
        _say(f"gqaprune: error: {explain_error(error)}")
        return 1
    except RuntimeError as error:
        cause = error if isinstance(error, RankEndedError) else error.__cause__
        if isinstance(cause, Stopped):
            return _say_stopped(128 + cause.number)
        if not isinstance(cause, RankEndedError):
            raise
        _say(f"gqaprune: error: {cause}{_describe_restart()}")
        return cause.code
    except (KeyboardInterrupt, SystemExit) as stop:
        is_interrupt = isinstance(stop.__context__ or stop, KeyboardInterrupt)  # Lightning makes it an exit
        if not is_interrupt and getattr(stop, "code", None) in (None, 0):
            return 0
        return _say_stopped(128 + signal.SIGINT if is_interrupt else int(getattr(stop, "code", 1)))
    return 0


def _say_stopped(code: int) -> int:
    _say(f"gqaprune: stopped{_describe_restart()}")
    return code


def _describe_restart() -> str:
    return "; the same command goes on from here" if {"fit", "prune"} & set(sys.argv[1:]) else ""


def _say(sentence: str) -> None:
    """Say what ended the command, on the console and in the run's log."""
    sentence = for_log(" ".join(sentence.split()))
    print(sentence, file=sys.stderr)
    logger.error("%s", sentence)
