"""Other libraries' errors, put into our sentences."""


def first_line(error: BaseException) -> str:
    """What an error says in its first line, and in the next where that only announces it; else its type's name."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
