"""States of prompts that were read, for prompts that begin alike.

So the same photo asked twenty questions, the same system prompt, and the earlier turns of a conversation that comes
whole each time are read once.
"""

from collections import OrderedDict
from itertools import count

import numpy as np

from mlx_vlm_mini.decoder.state import State
from mlx_vlm_mini.inputs import Inputs
from mlx_vlm_mini.model import VLM

from .cache import identify, shared_length


class Prefixes:
    """Keeps states within a limit of memory; the one that was used longest ago goes first.

    What is found is exact: positions are compared by token ids and by the SHA-256 of images, and nothing is used where
    keys depend on what comes later.

    Attributes:
        limit: bytes.
        nbytes: bytes that are kept now.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        self._kept: OrderedDict[int, tuple[np.ndarray, State, int]] = OrderedDict()
        self._numbers = count()

    def find(self, model: VLM, inputs: Inputs) -> tuple[State, int]:
        """A state that holds as much of a prompt as any that is kept, and how many tokens that is."""
        wanted = identify(inputs)
        best, most = None, 0
        for number, (held, state, _) in self._kept.items():
            length = shared_length(model.decoder, state, held, wanted)
            if length > most:
                best, most = number, length
        if best is None:
            return model.make_state(), 0
        self._kept.move_to_end(best)
        state = self._kept[best][1].fork()
        return state, state.rewind(most)

    def add(self, inputs: Inputs, state: State) -> None:
        """Keep the state of a prompt that was read whole; one of its beginning alone is given up for it."""
        held = identify(inputs)
        for number, (other, _, nbytes) in [*self._kept.items()]:
            if len(other) <= len(held) and (other == held[: len(other)]).all():
                del self._kept[number]
                self.nbytes -= nbytes
        nbytes = state.nbytes
        if nbytes > self.limit:
            return
        self._kept[next(self._numbers)] = held, state.fork(), nbytes
        self.nbytes += nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self._kept.popitem(last=False)[1][2]
