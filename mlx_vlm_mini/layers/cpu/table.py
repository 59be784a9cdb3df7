"""The table of kernels of CPUs that are not Apple's: the way into this folder (see layers/kernels.py).

MLX's own activations are compiled: on a CPU by the system's C++ compiler, half a second the first time, and no faster
for it. None of that is called here.
"""

from mlx_vlm_mini.layers.delta import gated_delta
from mlx_vlm_mini.layers.types import Kernels

from .activations import ACTIVATIONS
from .convolve import convolve
from .exponential import log_softmax
from .prepare import prepare
from .rope import rope
from .tiles import attend
from .unpack import unpack

CPU = Kernels(
    attend=attend,
    activations=ACTIVATIONS,
    rope=rope,
    log_softmax=log_softmax,
    convolve=convolve,
    delta=gated_delta,
    unpack=unpack,
    prepare=prepare,
)
