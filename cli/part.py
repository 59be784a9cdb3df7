"""A part of the work, for several machines: `--part 2/8`, or what a launcher's environment says (`--part auto`).

No part asks another one anything: each takes every N-th question, and writes a file of its own beside the whole one.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

_RANKS = (  # of launchers: which process this is, counted from 0, and of how many
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),  # Open MPI
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),  # MVAPICH
    ("PMI_RANK", "PMI_SIZE"),  # MPICH, Intel MPI
)
_SIZES = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
_LISTS = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")  # files with an entry a process, of the backends ring and jaccl


@dataclass(frozen=True)
class Part:
    """Part `number`, from 1 on, of `count`."""

    number: int
    count: int

    def has(self, place: int) -> bool:
        """Whether what stands at this place of a list, from 0 on, is of this part."""
        return place % self.count == self.number - 1

    def share(self, total: int) -> int:
        """How many of so many are of this part."""
        return len(range(self.number - 1, total, self.count))

    def file(self, whole: Path) -> Path:
        """Where this part's answers are written, beside the file of all."""
        return whole.with_name(f"{whole.name}.part-{self.number}-of-{self.count}")


def part_files(whole: Path) -> list[tuple[Part, Path]]:
    """The files of parts that lie beside a file."""
    name = re.compile(re.escape(whole.name) + r"\.part-([1-9]\d*)-of-([1-9]\d*)")
    with os.scandir(whole.parent) as entries:
        found = [match for entry in entries if (match := name.fullmatch(entry.name))]
    parts = [(Part(int(match[1]), int(match[2])), whole.with_name(match[0])) for match in found]
    return sorted(parts, key=lambda each: (each[0].count, each[0].number))


class PartType(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions alone
    """`K/N`, or `auto`."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Part:
        """See `click.ParamType`."""
        if isinstance(value, Part):
            return value
        if value == "auto":
            try:
                return find_part(os.environ)
            except ValueError as error:
                self.fail(f"auto: {error}", param, ctx)
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{value!r} is no part: give K/N with K from 1 to N, or auto", param, ctx)
        return Part(int(match[1]), int(match[2]))


def find_part(environment: Mapping[str, str]) -> Part:
    """The part that a launcher gives this process: MLX's, MPI's or Slurm's (a job array, tasks of `srun`, or both).

    Raises:
        ValueError: there is no launcher, or what it says makes no sense.
    """

    def number(name: str, default: int | None = None) -> int:
        text = environment.get(name)
        if text is None and default is not None:
            return default
        if text is None or not re.fullmatch(r"\d{1,9}", text):
            raise ValueError(f"{name} is {text!r}, no number: give --part K/N")
        return int(text)

    if "MLX_RANK" in environment:
        rank, size = number("MLX_RANK"), _world_size(environment) or number("MLX_WORLD_SIZE")
    elif ours := [names for names in _RANKS if names[0] in environment]:
        rank, size = number(ours[0][0]), number(ours[0][1])
    elif "SLURM_PROCID" in environment or "SLURM_ARRAY_TASK_ID" in environment:
        rank, size = number("SLURM_PROCID", 0), number(next((name for name in _SIZES if name in environment), ""), 1)
        if "SLURM_ARRAY_TASK_ID" in environment:
            first, step = number("SLURM_ARRAY_TASK_MIN", 0), number("SLURM_ARRAY_TASK_STEP", 1)
            place, left = divmod(number("SLURM_ARRAY_TASK_ID") - first, max(step, 1))
            tasks = number("SLURM_ARRAY_TASK_COUNT")
            if left or not 0 <= place < tasks:
                raise ValueError("the array's numbers do not follow one another: give --part K/N")
            rank, size = place * size + rank, tasks * size
    else:
        raise ValueError("there is no MLX_RANK, no MPI's rank and no SLURM_PROCID: give --part K/N")
    if not 0 <= rank < size:
        raise ValueError(f"the launcher says process {rank} of {size}: give --part K/N")
    return Part(rank + 1, size)


def _world_size(environment: Mapping[str, str]) -> int | None:
    """How many processes `mlx.launch` started: entries of the file that it gives each."""
    for name in _LISTS:
        if name in environment:
            try:
                return len(json.loads(Path(environment[name]).read_text()))
            except (OSError, ValueError, TypeError):
                raise ValueError(f"{name} names no list of hosts: give --part K/N") from None
    return None
