"""Whether the losses of a run are as they should be: numbers, and near those of the steps before.

What is decided follows from the losses alone, which are the same on all processes of a job, and
what it depends on is in each checkpoint: a run that was killed decides as one that was not.
"""

import dataclasses
import enum
import math
import statistics
from typing import Any

from lm_jax.config import FaultsConfig

_LEAST = 16  # losses that tell how far from their mean others may be


class Verdict(enum.Enum):
    FINE = "fine"
    SKIPPED = "skipped"  # loss or gradient was no number: the step changed nothing
    TOO_MANY_SKIPPED = "too many skipped"
    SPIKE = "spike"  # the loss is far above those before


@dataclasses.dataclass
class Health:
    """What is known of the losses up to a step.

    Attributes:
      skipped: steps whose loss or gradient was no number, in all.
      in_a_row: those of them that were the last steps.
      rewinds: times that the run went back because of a spike.
      losses: of the last steps, without those skipped, the newest last.
    """

    config: FaultsConfig
    skipped: int = 0
    in_a_row: int = 0
    rewinds: int = 0
    losses: list[float] = dataclasses.field(default_factory=list)

    def judge(self, loss: float, gradient_norm: float) -> Verdict:
        """What is to be thought of the next step."""
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            self.skipped += 1
            self.in_a_row += 1
            enough = self.in_a_row >= self.config.skips
            return Verdict.TOO_MANY_SKIPPED if enough else Verdict.SKIPPED
        self.in_a_row = 0
        if self.config.spike and len(self.losses) >= min(_LEAST, self.config.spike_window):
            bound = statistics.fmean(self.losses) + self.config.spike * self._deviation()
            if loss > bound:
                return Verdict.SPIKE
        self.losses = [*self.losses, loss][-self.config.spike_window :] if self.config.spike else []
        return Verdict.FINE

    def _deviation(self) -> float:
        """The standard deviation of the losses; of equal ones a little, as rounding is no spike."""
        return max(statistics.pstdev(self.losses), 1e-3 * abs(statistics.fmean(self.losses)))

    def noted(self) -> dict[str, Any]:
        """What `recalled` needs; fit for JSON."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "config"}

    def recalled(self, noted: dict[str, Any]) -> "Health":
        """What was noted, under this config. Of an older run there is nothing: {}."""
        return Health(self.config, **noted)
