"""What the library raises when its input is at fault: one line that says what is wrong, where, and what to do."""

_LONGEST = 2000  # characters of a message


class VLMError(Exception):
    """Base of every error that a caller's input can cause. The command line prints it as one line and exits with 1.

    Its text is one line whatever names from strangers' files stand in it: control characters are written as such, so
    that none reaches a terminal, and what is very long is cut.
    """

    def __str__(self) -> str:
        text = super().__str__()
        text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 300]} ... {text[-300:]}"
        return "".join(_shown(letter) for letter in text)


def _shown(letter: str) -> str:
    if letter.isprintable():
        return letter
    return " " if letter.isspace() else letter.encode("unicode_escape", "surrogatepass").decode()


class CheckpointError(VLMError):
    """A folder, a config or a tensor file that cannot be used."""


class ImageError(VLMError):
    """An image that cannot be opened or prepared."""


class PromptError(VLMError):
    """Messages that cannot become a prompt for this model."""
