"""What is wrong with how a command ended."""

import re

from isolated import Outcome

_SENTENCE = re.compile(r"^gqaprune: error: .{20,800}$", re.MULTILINE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


def judge(outcome: Outcome) -> str | None:
    """What is wrong with how a case ended, or null."""
    if outcome.code is None:
        return f"still running after {outcome.seconds:.0f} s"
    if outcome.code < 0:
        return f"killed by signal {-outcome.code}"
    if "Traceback (most recent call last)" in outcome.output:
        return "a traceback: " + outcome.output.strip().splitlines()[-1][:200]
    if _CONTROL.search(outcome.output):
        return "control characters in what it prints"
    if outcome.code == 0:
        return None
    sentences = _SENTENCE.findall(outcome.output)
    if outcome.code != 1 or len(sentences) != 1:
        return f"exit code {outcome.code} with {len(sentences)} sentences: {outcome.output[-200:]!r}"
    return None
