"""Cost: what a result took to compute."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The cost of a result.

    Args:
        forwards: forward passes of a batch.
        backwards: backward passes of a batch.
        positions: rows × token positions that went through the model.
        seconds: wall time.
        predicted_bytes: the memory that was predicted before the run, where it was.
        cuda_peak_bytes: the most memory allocated on the CUDA device, where there is one.
    """

    forwards: int
    backwards: int
    positions: int
    seconds: float
    predicted_bytes: int | None = None
    cuda_peak_bytes: int | None = None

    def __str__(self) -> str:
        parts = [_counted(self.forwards, "forward"), _counted(self.backwards, "backward"), f"{self.seconds:.1f} s"]
        return ", ".join(parts)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
