"""What a study is: arms that differ in one thing, presets, a training, and claims fixed before it is run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dynascope.record import Record, RecordWriter

if TYPE_CHECKING:
    from dynascope.report import Chart

Runs: TypeAlias = Mapping[str, Record]
"""The records of one seed, by arm."""


@dataclass(frozen=True)
class Paper:
    """The paper that a study runs again, by its arXiv id.

    >>> Paper("2303.06296", "Stabilizing Transformer Training by Preventing Attention Entropy Collapse", 2023)
    """

    arxiv: str
    title: str
    year: int


@dataclass(frozen=True)
class Claim:
    """One sentence of the paper as a rule over the records of a study.

    `measure` is called once a seed with that seed's records by arm, and gives one sample or several (a number, a
    sequence, or an array; NaN, None or an empty sequence where the seed says nothing). The claim holds when the whole
    95 % interval over all samples lies on the rule's side of the threshold, does not hold when the whole interval
    lies on the other side, and is undecided otherwise. The interval is Student's t for a mean, and Wilson's for the
    share of samples that are true.

    `quantity` names what a sample is, with its unit; `source` says where in the paper the sentence stands.

    >>> Claim(
    ...     id="C1",
    ...     statement="Half of the examples can be left out at no cost.",
    ...     source="Section 3",
    ...     paper_value="95.4 % either way",
    ...     quantity="accuracy lost (points)",
    ...     measure=lambda runs: 100 * float(runs["full"]["accuracy"][-1] - runs["pruned"]["accuracy"][-1]),
    ...     op="<=",
    ...     threshold=0.5,
    ... )
    """

    id: str
    statement: str
    source: str
    paper_value: str | float | None
    quantity: str
    measure: Callable[[Runs], Any]
    op: Literal["<", "<=", ">", ">="]
    threshold: float
    statistic: Literal["mean", "share"] = "mean"

    @property
    def rule(self) -> str:
        """The rule in words, made from what the verdict is computed with."""
        what = f"share of {self.quantity}" if self.statistic == "share" else f"mean {self.quantity}"
        return f"{what} {self.op} {self.threshold:g}, whole 95 % interval over seeds"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Arms that differ in one thing, each trained with several seeds.

    `train(config, arm, seed, record)` trains one arm with one seed and writes what it sees into `record`; it gets the
    arm's value, of whatever type the experiment uses. `presets` are frozen dataclasses of one type: `smoke` takes seconds,
    `small` minutes on two cores. `after` names, for an arm, the arms that must be finished before: of the same seed, so
    that each seed is a repetition of the whole experiment. Their records are in `record.earlier`.
    """

    name: str
    arms: Mapping[str, Any]
    presets: Mapping[str, Any]
    train: Callable[[Any, Any, int, "StudyRecord"], None]
    after: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    origin: str = ""
    """What loads it in another process: its name in the catalogue or its file; where it has none, it is pickled."""

    def __post_init__(self) -> None:
        unknown = {*self.after, *(arm for arms in self.after.values() for arm in arms)} - set(self.arms)
        if unknown:
            raise ValueError(f"study {self.name}: `after` names arms that do not exist: {', '.join(sorted(unknown))}")


@dataclass(frozen=True, kw_only=True)
class Study(Experiment):
    """A paper as an experiment that anyone can run again, with claims; its preset `paper` is the paper's own setting."""

    paper: Paper
    claims: list[Claim]
    figures: Callable[[Sequence[Runs]], list["Chart"]] | str = lambda runs: []
    """Draws the paper's figures again from the records of every seed, for `dynascope report`: a function, or the name of
    a module that has it as `figures` and is loaded only then."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = [claim.id for claim in self.claims]
        if len(set(ids)) < len(ids):
            raise ValueError(f"study {self.name}: two claims have the same id")

    def draw(self, runs: Sequence[Runs]) -> list["Chart"]:
        """The study's figures from the records of every seed."""
        figures = import_module(self.figures).figures if isinstance(self.figures, str) else self.figures
        drawn: list[Chart] = figures(runs)
        return drawn


class StudyRecord(RecordWriter):
    """The record that one arm of a study writes, which also knows the finished arms that it builds upon.

    >>> scores = record.earlier["score"]["el2n"]  # an arm that `Study.after` names
    """

    def __init__(self, folder: str | Path, *, earlier: Runs, config: Mapping[str, Any]) -> None:
        super().__init__(folder, config=config)
        self.earlier = earlier

    def __enter__(self) -> "StudyRecord":
        return self
