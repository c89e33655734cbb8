"""What every section of a run or cluster file is made of: refusal of unknown keys, and the types of numbers."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
# A year: far beyond any wait that is meant, far below the 292 years at which Python's locks overflow.
Seconds = Annotated[float, Field(gt=0, le=31_536_000)]
# Of engines. vLLM raises lower temperatures to 0.01 without a word, and takes the lowest for greedy.
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 100
Threads = Annotated[int, Field(ge=1, le=4096)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def named_place(path: str) -> str:
    """The path of data; raises ValueError for an empty one, which would be the current folder and all below it."""
    if not path.strip():
        raise ValueError(f"{path!r} is empty; expected a file, a folder or a hub name (`.` is the current folder)")
    return path


DataPath = Annotated[str, AfterValidator(named_place)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """A part of the run file: unknown keys are errors, values never change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
