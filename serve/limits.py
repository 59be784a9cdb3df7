"""What one request, and all of them together, may cost."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of the server. Pictures have further ones of their own, see images/decode.py.

    Attributes:
        body: bytes of a request's body.
        bodies: bytes of all bodies that are held at a time.
        depth: lists and objects inside one another in a request's JSON.
        images: pictures of a request, pages of PDFs included.
        choices: answers to one request (`n`).
        stops: texts that end an answer.
        connections: that are open, and requests that are answered, at a time.
        queue: requests that wait beyond those that are answered.
        seconds: from a request's arrival to the end of its answer.
        silence: seconds without a byte after which a client that sends its body, or reads its answer, is given up.
        ping: seconds without a token after which a stream carries a sign of life.
        linger: seconds for which the rest of a body that is too large is read and thrown away.
        drain: seconds that answers have to end when the server is told to stop.
        max_tokens: of an answer whose request does not say.
    """

    body: int = 100 * 2**20
    bodies: int = 256 * 2**20
    depth: int = 64
    images: int = 64
    choices: int = 8
    stops: int = 16
    connections: int = 1000
    queue: int = 64
    seconds: float = 1800.0
    silence: float = 60.0
    ping: float = 10.0
    linger: float = 5.0
    drain: float = 30.0
    max_tokens: int = 4096
