"""Other libraries' errors, put into our sentences."""


def first_line(error: Exception) -> str:
    """What an error says in its first line; its type's name if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
