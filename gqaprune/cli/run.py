"""Run the command once: signals, streams, its log, and errors in one sentence."""

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
    """Run the command in `sys.argv` and return the exit code; errors that users can fix are one sentence, and 1."""
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
            _say(f"gqaprune: standard output is incomplete: {output.error.strerror or output.error}")
            return code or int(set(sys.argv[1:2]) <= TOOLS.keys())  # the output of these commands is their result
    finally:
        stop_signals.restore()


def _run(log: RunLog) -> int:
    try:
        if sys.argv[1:2] and sys.argv[1] in TOOLS:
            run_tool(sys.argv[1], sys.argv[2:])
        else:
            PruningCLI(log, find_named_classes(sys.argv[2:]))
    except (ValueError, OSError, SafetensorError, MisconfigurationException) as error:  # a full disk is the third kind
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
        is_interrupt = isinstance(stop.__context__ or stop, KeyboardInterrupt)  # Lightning turns it into an exit
        if not is_interrupt and getattr(stop, "code", None) in (None, 0):
            return 0
        return _say_stopped(128 + signal.SIGINT if is_interrupt else int(getattr(stop, "code", 1)))
    return 0


def _say_stopped(code: int) -> int:
    _say(f"gqaprune: stopped{_describe_restart()}")
    return code


def _describe_restart() -> str:
    return "; run the same command again to resume" if {"fit", "prune"} & set(sys.argv[1:]) else ""


def _say(sentence: str) -> None:
    """Print why the command ended, on the console and in the run's log."""
    sentence = for_log(" ".join(sentence.split()))
    print(sentence, file=sys.stderr)
    logger.error("%s", sentence)
