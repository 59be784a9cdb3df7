"""What the library raises when its input is at fault: one line that says what is wrong, where, and what to do."""

_LONGEST = 1000  # characters of a message: names in a hostile file may have millions


def _one_line(text: str) -> str:
    """A message without line ends, control characters and what turns writing round; of a long one the middle is left
    out."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 300]} ... {text[-295:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)


class VLMError(Exception):
    """Base of every error that a caller's input can cause. The command line prints it as one line and exits with 1."""

    def __init__(self, message: object = "") -> None:
        super().__init__(_one_line(str(message)))


class CheckpointError(VLMError):
    """A folder, a config or a tensor file that cannot be used."""


class ImageError(VLMError):
    """An image that cannot be opened or prepared."""


class PromptError(VLMError):
    """Messages that cannot become a prompt for this model."""


class ContextError(PromptError):
    """A prompt that leaves no room for an answer in the model's context."""


class MemoryShortError(CheckpointError):
    """A model that could be loaded if more memory were free."""


def check_whole(name: str, value: object, least: int) -> None:
    """Raises PromptError where an option is no whole number, or a smaller one; None is one that nobody gave."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
        raise PromptError(f"{name} must be a whole number of {least} or more, not {value!r}")
