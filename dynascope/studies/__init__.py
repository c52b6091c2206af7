"""Papers as experiments that anyone can run again: one file a paper, on the harness that runs and judges them."""

from dynascope.studies.harness import (
    Claim,
    Paper,
    Runs,
    Study,
    StudyRecord,
    Verdict,
    judge,
    list_studies,
    load_study,
    parse_overrides,
    print_studies,
    print_verdict,
    run_study,
    verdict_as_json,
)

__all__ = [
    "Claim",
    "Paper",
    "Runs",
    "Study",
    "StudyRecord",
    "Verdict",
    "judge",
    "list_studies",
    "load_study",
    "parse_overrides",
    "print_studies",
    "print_verdict",
    "run_study",
    "verdict_as_json",
]
