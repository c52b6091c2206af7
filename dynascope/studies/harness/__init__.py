"""What every study stands on."""

from dynascope.studies.harness.catalogue import list_studies, load_study, parse_overrides
from dynascope.studies.harness.descent import descend, log_steps
from dynascope.studies.harness.runner import run_study
from dynascope.studies.harness.study import Claim, Paper, Runs, Study, StudyRecord
from dynascope.studies.harness.telling import print_studies, print_verdict
from dynascope.studies.harness.verdict import Judgement, Verdict, judge, verdict_as_json

__all__ = [
    "Claim",
    "Judgement",
    "Paper",
    "Runs",
    "Study",
    "StudyRecord",
    "Verdict",
    "descend",
    "judge",
    "list_studies",
    "load_study",
    "log_steps",
    "parse_overrides",
    "print_studies",
    "print_verdict",
    "run_study",
    "verdict_as_json",
]
