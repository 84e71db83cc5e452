"""Command lines in tests."""


def instead(arguments: list[object], change: list[object]) -> list[str]:
    """The arguments with those options changed that ``change`` has, each with its value."""
    words, names = list(map(str, arguments)), {str(word) for word in change if str(word).startswith("--")}
    left = [word for i, word in enumerate(words) if word not in names and (i == 0 or words[i - 1] not in names)]
    return [*left, *map(str, change)]
