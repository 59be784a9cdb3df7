"""All golden checkpoints with the conversations that the reference answered."""

from blip_cases import SPECS as BLIPS
from janus_cases import SPECS as JANUS
from llava_original import SPECS as ORIGINALS
from qllama_cases import SPECS as QUERIES
from qwen_vl_oracle import SPECS as QWEN
from reference import SPECS as OTHERS

SPECS = {**OTHERS, **ORIGINALS, **QUERIES, **BLIPS, **QWEN, **JANUS}
CASES_OF_GOLDENS = [(name, case) for name in sorted(SPECS) for case in sorted(SPECS[name].cases)]
one_case = {name: (name, case) for name, case in CASES_OF_GOLDENS}  # of each the last
