"""What a verification found. Enters: checks. Leaves: a verdict, and a dictionary for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

# "tie": differs, but only where the two best candidates are as good as equal in this precision.
# "info": reported, not judged. "skipped": could not be tried.
Outcome = Literal["pass", "tie", "fail", "info", "skipped"]


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison. figure: what was found; limit: what was allowed; detail: where it differs, why it was skipped."""

    name: str
    outcome: Outcome
    figure: str
    limit: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """All checks of one model. facts: model, dtype, device, versions and the like."""

    facts: Mapping[str, Any]
    checks: Sequence[Check]

    @property
    def passed(self) -> bool:
        """No check failed; ties and skipped checks are named, but are no failures."""
        return all(check.outcome != "fail" for check in self.checks)

    @property
    def verdict(self) -> str:
        """One sentence."""
        model, counts = self.facts["model"], Counter(check.outcome for check in self.checks)
        if self.passed:
            notes = [f"{counts[outcome]} {words}" for outcome, words in _NOTES.items() if counts[outcome]]
            return f"PASS: {model} agrees with transformers" + (f" ({', '.join(notes)})." if notes else ".")
        # What the layers say is nearest to the cause; wrong tokens are its effect.
        first = next(check for check in self.checks if check.outcome == "fail")
        where = first.detail or f"{first.figure}, limit {first.limit}"
        return f"FAIL: {model} differs from transformers, in {counts['fail']} checks. {first.name}: {where}"

    def to_dict(self) -> dict[str, Any]:
        """Facts, checks and verdict in plain values."""
        return {
            **self.facts,
            "passed": self.passed,
            "verdict": self.verdict,
            "checks": [asdict(check) for check in self.checks],
        }


_NOTES: Mapping[Outcome, str] = {"tie": "with ties", "info": "not judged", "skipped": "skipped"}
