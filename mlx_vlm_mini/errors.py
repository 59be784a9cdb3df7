"""What the library raises when its input is at fault: one line that says what is wrong, where, and what to do."""


class VLMError(Exception):
    """Base of every error that a caller's input can cause. The command line prints it as one line and exits with 1."""


class CheckpointError(VLMError):
    """A folder, a config or a tensor file that cannot be used."""


class ImageError(VLMError):
    """An image that cannot be opened or prepared."""


class PromptError(VLMError):
    """Messages that cannot become a prompt for this model."""
