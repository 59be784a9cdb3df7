"""What a request is refused with: a status, and one line in the form that the client's library reads."""

from dataclasses import dataclass
from typing import Any

from mlx_vlm_mini.errors import ContextError, ImageError, PromptError, VLMError

_KINDS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
}  # fmt: skip


@dataclass(eq=False)
class Refusal(Exception):
    """A request that is not answered, or not to its end.

    Attributes:
        status: of HTTP.
        message: one line: what, where, what to do.
        param: the field that is at fault.
        code: a word for programs, where OpenAI has one: `model_not_found`, `context_length_exceeded`.
        headers: further ones of the response.
    """

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        self.message = str(VLMError(self.message))  # one printable line of bounded length

    def as_openai(self) -> dict[str, Any]:
        """`{"error": {...}}`, which openai-python and its kin read; they lose any other form."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def as_ollama(self) -> dict[str, Any]:
        """`{"error": "..."}`."""
        return {"error": self.message}

    def body(self, path: str) -> dict[str, Any]:
        """In the form of the interface that a path belongs to."""
        return self.as_ollama() if path.startswith("/api/") else self.as_openai()


def refuse(error: VLMError) -> Refusal:
    """What an error of the library is over HTTP: the request's fault (400), or the model's (500)."""
    if isinstance(error, ContextError):
        return Refusal(400, str(error), "messages", "context_length_exceeded")
    if isinstance(error, ImageError):
        return Refusal(400, str(error), "messages", "invalid_image")
    if isinstance(error, PromptError):
        return Refusal(400, str(error), "messages")
    return Refusal(500, str(error), headers=(("x-should-retry", "false"),))


def later(message: str, seconds: int, status: int = 429) -> Refusal:
    """A refusal that time cures."""
    return Refusal(
        status, message, code="queue_full" if status == 429 else None, headers=(("retry-after", str(seconds)),)
    )
