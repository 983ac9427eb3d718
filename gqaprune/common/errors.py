"""Quote errors of other libraries in our messages."""


def first_line(error: BaseException) -> str:
    """Return an error's first line, with the next if the first ends with a colon; its type's name if it is empty."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
