"""What the program is doing right now: one line on stderr that goes away, only where a person is looking."""

import sys
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_vlm_mini.generation.answering import Stats


class Status:
    """A line on stderr that each `show` replaces and `clear` removes. Says nothing when stderr is not a terminal, or
    when `plain` forbids to move the cursor."""

    def __init__(self, *, plain: bool = False) -> None:
        self._on = sys.stderr.isatty() and not plain
        self._shown = False

    def show(self, text: str) -> None:
        if self._on:
            sys.stderr.write(f"\r\x1b[2K{text}")
            sys.stderr.flush()
            self._shown = True

    def clear(self) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._shown = False

    def prefill(self, done: int, total: int) -> None:
        """For `stream.Options.progress`."""
        self.show(f"reading the prompt: {done} of {total} tokens")

    def __enter__(self) -> "Status":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.clear()


def cost_of(stats: "Stats") -> str:
    """What an answer cost, for people: `12 tokens, 45.2 tokens/s, first after 0.12 s, 87 % cached, ...`."""
    rate = (stats.generated_tokens - 1) / stats.decode_s if stats.decode_s else 0.0
    cached = f"{100 * stats.cached_tokens // max(stats.prompt_tokens, 1)} % cached"
    used = stats.prompt_tokens + stats.generated_tokens
    context = f"context {used:,}" + (f" of {stats.context_limit:,}" if stats.context_limit else "")
    memory = stats.peak_memory_bytes
    return (
        f"{stats.generated_tokens} tokens, {rate:.1f} tokens/s, first after {stats.first_token_s:.2f} s, {cached}, "
        f"{context}, " + (f"{memory / 1e9:.1f} GB" if memory >= 1e8 else f"{memory / 1e6:.1f} MB")
    )
