"""The receipt: what was measured after a growth."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

Level = Literal["float64", "streamed", "native"]


class OutputError(BaseModel):
    """Difference of one output: the largest |new - old| of a slice over its largest |old|."""

    output: str
    shape: list[int]
    relative_error: float
    changed: bool = Field(False, description="an approximate growth was allowed to change this output")


class Receipt(BaseModel):
    """What was measured after a growth. None means not measured, and ``notes`` says why."""

    exactness: Literal["exact", "approximate", "lossy"]
    measured: Literal["float64", "streamed", "native", "nothing"] = Field(
        "nothing", description="float64 whole, float64 one op's weights at a time, own dtype alone, or nothing"
    )
    error_float64: float | None = Field(None, description="largest relative error of an output, float64, eval mode")
    error_float64_train: float | None = Field(None, description="the same in train mode with dropout off")
    error_native: float | None = Field(None, description="the same in the model's own dtype, eval mode")
    error_native_train: float | None = Field(None, description="the same in train mode, where nothing is random")
    error_state: float | None = Field(None, description="of what the forward writes into buffers, after several calls")
    outputs: list[OutputError] = Field(default_factory=list)
    gradient_error: float | None = Field(
        None, description="largest relative difference between the grown gradients and the plan's map of the old ones"
    )
    dead_parameters: list[str] = Field(
        default_factory=list, description="new entries that get no gradient within 2 steps"
    )
    inputs: list[str] = Field(default_factory=list, description="what the models were compared on, besides the example")
    unexercised: list[str] = Field(
        default_factory=list, description="branches and factors that no input reached: nothing is known about them"
    )
    constants: list[str] = Field(
        default_factory=list,
        description="numbers of the grown graph that the model's class, built larger, would not compute: without them "
        "the grown weights give something else there",
    )
    limits: dict[str, float] = Field(default_factory=dict, description="what each error may reach")
    amplification: float | None = Field(
        None,
        description="how much the model amplifies rounding: by how many units in the last place an output moves "
        "where every value moves by one; only where it was measured",
    )
    params_before: int = 0
    params_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    def summary(self) -> str:
        def show(x: float | None) -> str:
            return "not measured" if x is None else f"{x:.1e}"

        return (
            f"{self.params_before:,} -> {self.params_after:,} parameters ({self.exactness}); relative error "
            f"{show(self.error_float64)} in float64, {show(self.error_native)} native; "
            f"gradients {show(self.gradient_error)}; "
            + (f"{len(self.unexercised)} places not exercised; " if self.unexercised else "")
            + (f"{len(self.constants)} constants stay in the graph; " if self.constants else "")
            + f"{sum(self.seconds.values()):.1f} s"
        )

    def note(self, text: str) -> None:
        """Say it, once."""
        if text not in self.notes:
            self.notes.append(text)


def largest(*errors: float | None) -> float | None:
    """The largest of those that were measured; None where none was."""
    measured = [e for e in errors if e is not None]
    return max([0.0, *measured]) if measured else None
