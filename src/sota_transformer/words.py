"""What several commands say in the same words."""


def counted(number: int, noun: str) -> str:
    """A number of things: `1 step`, `2,000 steps`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
