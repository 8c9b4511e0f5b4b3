"""What an optimisation did and how far its result can be trusted, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .errors import PackageError
from .passes import Application, Refusal
from .runner import PassRecord

__all__ = ["PassRecord", "Receipt", "Report"]


class Receipt(Protocol):
    """What verification measured; see ``fxpass.verify``."""

    @property
    def budget(self) -> float | None: ...

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Report:
    """The record of one optimisation.

    Attributes:
        model: class of the original model.
        frontend: name of the frontend that captured it.
        pipeline: the passes as pipeline text, presets expanded.
        target: name of the target it was lowered to.
        versions: package and version of what took part, e.g. ``("torch", "2.13.0")``.
        records: one for each pass, in order.
        timings: stage and seconds, in the order in which they ran.
        receipt: what verification measured, ``None`` where the user turned it off.
        warnings: sentences that a user should read.
    """

    model: str
    frontend: str
    pipeline: str
    target: str
    versions: tuple[tuple[str, str], ...] = ()
    records: tuple[PassRecord, ...] = ()
    timings: tuple[tuple[str, float], ...] = ()
    receipt: Receipt | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as JSON has it: objects, lists, strings and numbers."""
        return {
            "model": self.model,
            "frontend": self.frontend,
            "pipeline": self.pipeline,
            "target": self.target,
            "versions": dict(self.versions),
            "passes": [_record_to_json(record) for record in self.records],
            "timings": [{"stage": stage, "seconds": seconds} for stage, seconds in self.timings],
            "receipt": None if self.receipt is None else self.receipt.to_json(),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, read_receipt: Callable[[dict[str, Any]], Receipt]) -> Report:
        """The report that ``to_json`` wrote.

        Args:
            data: what ``to_json`` returned, read back from JSON.
            read_receipt: makes the receipt again from what its ``to_json`` returned.

        Raises:
            PackageError: an entry is missing or is not what ``to_json`` writes.
        """
        try:
            return cls(
                model=data["model"],
                frontend=data["frontend"],
                pipeline=data["pipeline"],
                target=data["target"],
                versions=tuple(data["versions"].items()),
                records=tuple(_record_from_json(record) for record in data["passes"]),
                timings=tuple((timing["stage"], timing["seconds"]) for timing in data["timings"]),
                receipt=None if data["receipt"] is None else read_receipt(data["receipt"]),
                warnings=tuple(data["warnings"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PackageError(
                f"the report cannot be read: {type(error).__name__}: {error}",
                hint="make it again with this version of fxpass",
            ) from error


def _record_to_json(record: PassRecord) -> dict[str, Any]:
    return {
        **asdict(record),
        "applications": [asdict(application) for application in record.applications],
        "refusals": [{**asdict(refusal), "nodes": list(refusal.nodes)} for refusal in record.refusals],
    }


def _record_from_json(data: Mapping[str, Any]) -> PassRecord:
    applications = tuple(Application(**application) for application in data["applications"])
    refusals = tuple(Refusal(**{**refusal, "nodes": tuple(refusal["nodes"])}) for refusal in data["refusals"])
    return PassRecord(**{**data, "applications": applications, "refusals": refusals})
