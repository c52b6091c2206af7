"""The commands: watch, show, report, live, export, studies, study, compare.

Everything heavy is imported inside the command that needs it, so that `dynascope --help` answers at once.
"""

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, UseAppendAction, arg

Run = Annotated[Path, arg(metavar="RUN")]


@dataclass
class Watch:
    """Run a training script under watch, without changing it: dynascope watch train.py --its --own --args

    Every optimizer that takes a step is found, and with it the model. What the probes see goes to a run directory, and
    at the end the findings are told. Training is bit-identical to training without the watch.

    Dynascope's flags may stand before or after the script; to give the script a flag of the same name, put `--`
    before the script's arguments. With `-m` as the first word, a module is run as `python -m` would.
    """

    script: Annotated[Positional[str], arg(metavar="SCRIPT")]
    """The Python script; what follows it is its own arguments."""
    run: Annotated[Path | None, arg(metavar="DIR")] = None
    """Directory for the record (default: runs/<script>-<date>-<time>)."""
    budget: Annotated[float | None, arg(metavar="SHARE")] = None
    """Share of wall time that probes may take (default: 0.02)."""
    every: Annotated[int | None, arg(metavar="N")] = None
    """Look at every N-th step instead (default under torchrun: 50)."""
    probes: Annotated[str | None, arg(metavar="A,B")] = None
    """Probes to run, with commas; "default", "all" and "none" stand for sets."""
    live: bool = False
    """Follow the run in the browser while it trains."""


def watch(options: Watch, script_args: Sequence[str], is_module: bool) -> int:
    """Run the script and tell how it went."""
    from dynascope.watching.launcher import launch

    page: subprocess.Popen[bytes] | None = None
    if options.live:
        if options.run is None:
            raise ValueError("--live needs to know where the record will be: add --run DIR")
        page = subprocess.Popen([sys.executable, "-m", "dynascope", "live", str(options.run.parent)])
    try:
        outcome = launch(
            options.script,
            script_args,
            is_module=is_module,
            run=options.run,
            budget=options.budget,
            every=options.every,
            probes=None if options.probes is None else [name.strip() for name in options.probes.split(",")],
        )
    finally:
        if page is not None:
            page.terminate()
    if _is_first_process():
        _tell(outcome.run, outcome.num_steps)
    if outcome.num_steps == 0 and outcome.exit_status == 0:
        raise ValueError(
            f"{options.script} ended without an optimizer step, so there was nothing to watch; "
            "is training behind a flag, or in another process?"
        )
    return outcome.exit_status


def _tell(run: Path, num_steps: int) -> None:
    """The findings of a run that has just ended, on stderr: stdout is the script's own."""
    from rich.console import Console

    from dynascope.record import open_record
    from dynascope.report import print_findings

    if num_steps == 0:
        return
    console = Console(stderr=True)
    with open_record(run) as record:
        print_findings(record, console)
        for event in record.events:
            if event.kind in ("probe-off", "watch-off"):
                console.print(event.message, style="yellow", markup=False)
    console.print(
        f"record: {run}   look: dynascope show {run}   page: dynascope report {run}", style="dim", markup=False
    )


@dataclass
class Show:
    """Show a run in the terminal: its series with sparklines, and its findings."""

    run: Positional[Run]
    """The run's directory."""
    json: bool = False
    """Print one JSON object instead."""


def show(options: Show) -> int:
    """Print a run."""
    from rich.console import Console

    from dynascope.record import open_record
    from dynascope.report import show, show_json

    with open_record(options.run) as record:
        if options.json:
            print(json.dumps(show_json(record)))
        else:
            show(record, Console())
    return 0


@dataclass
class Report:
    """Write a self-contained page of one run, several runs, a study with its figures, or a comparison; it works offline."""

    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN [RUN…]")]]
    """The runs' directories, or the folder of a study or comparison that was run."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")] = None
    """out.html, out.pdf, or a folder for one PNG and SVG a chart (default: report.html in the first run)."""


def report(options: Report) -> int:
    """Write the report and say where it is."""
    from dynascope.report import report

    if not options.runs:
        raise ValueError("name at least one run directory: dynascope report RUN")
    output = options.output or options.runs[0] / "report.html"
    if len(options.runs) == 1 and (options.runs[0] / "verdict.json").is_file():
        from dynascope.studies.harness.report import report_study

        print(report_study(options.runs[0], output))
    elif len(options.runs) == 1 and (options.runs[0] / "comparison.json").is_file():
        from dynascope.studies.comparison.measures import Comparison
        from dynascope.studies.comparison.page import write_comparison

        print(write_comparison(Comparison.load(options.runs[0]), output))
    else:
        print(report(options.runs, output))
    return 0


@dataclass
class Live:
    """Follow running trainings in the browser, on 127.0.0.1 only."""

    folder: Positional[Annotated[Path, arg(metavar="DIR")]]
    """A run's directory, or a folder of runs."""
    port: Annotated[int, arg(metavar="N")] = 8787
    """Port to listen on; 0 takes a free one."""


def live(options: Live) -> int:
    """Serve the live page until Ctrl-C."""
    from dynascope.report import serve

    serve(options.folder, options.port)
    return 0


@dataclass
class Export:
    """Write a run's record in another format, for other tools."""

    run: Positional[Run]
    """The run's directory."""
    to: Literal["parquet", "netcdf", "tensorboard", "wandb", "mlflow"]
    """The format."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")] = None
    """Where to write (default: beside the record, named after the format)."""


def export(options: Export) -> int:
    """Export and say where it is."""
    from dynascope.record.export import export

    print(export(options.run, options.to, options.output))
    return 0


@dataclass
class Studies:
    """List every study: its paper, its last verdict, and what was measured against the paper's own figure."""

    json: bool = False
    """Print one JSON object instead."""


def studies(options: Studies) -> int:
    """Print the table of studies."""
    from rich.console import Console

    from dynascope.studies import list_studies, print_studies

    if options.json:
        print(json.dumps({"studies": list_studies()}))
    else:
        print_studies(Console())
    return 0


@dataclass
class Study:
    """Run a paper's experiment again and say which of its claims hold here. A killed study resumes."""

    name: Positional[Annotated[str, arg(metavar="NAME")]]
    """The study's name; `dynascope studies` lists them."""
    preset: str = "small"
    """smoke (seconds), small (minutes on a laptop) or paper (the paper's own setting)."""
    seeds: Annotated[int, arg(metavar="N")] = 3
    """Seeds of each arm."""
    jobs: Annotated[int | None, arg(metavar="N")] = None
    """Processes side by side (default: one a core)."""
    engine: Literal["local", "ray"] = "local"
    """Where the arms run."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Change a setting of the preset; may be given several times."""
    json: bool = False
    """Print one JSON object instead."""
    strict: bool = False
    """Exit with status 3 when a claim does not hold."""


def study(options: Study) -> int:
    """Run a study and print its verdict."""
    _load_beside(options.name)
    from rich.console import Console

    from dynascope.studies import load_study, parse_overrides, print_verdict, run_study, verdict_as_json

    chosen = load_study(options.name)
    verdict = run_study(
        chosen,
        preset=options.preset,
        seeds=options.seeds,
        jobs=options.jobs,
        engine=options.engine,
        overrides=parse_overrides(chosen, options.preset, options.set),
    )
    if options.json:
        print(json.dumps(verdict_as_json(verdict)))
    else:
        print_verdict(verdict, Console())
    return verdict.exit_status(strict=options.strict)


@dataclass
class Compare:
    """Train objectives on equal terms (start models, problems, samples, steps, seeds) and write one page of them.

    Tasks: `arithmetic` and `gsm8k` take presets of reinforcement learning (grpo, dr_grpo, dapo, gspo, rloo, …; relift and luffy
    learn from demonstrations too), `arithmetic-pairs` preference losses (dpo, ipo, simpo, …); "all" takes every one. Sums need
    nothing but this program; gsm8k wants a folder of problems and one of a model of yours. What was trained before with the
    same settings is kept, so another objective is added at its own cost, and a killed comparison resumes.
    """

    objectives: Positional[Annotated[str, arg(metavar="A,B…")]]
    """Objectives with commas; leads are told over the first."""
    task: str = "arithmetic"
    """arithmetic, arithmetic-pairs or gsm8k."""
    data: Annotated[Path | None, arg(metavar="DIR")] = None
    """Of gsm8k: a folder with train.jsonl and test.jsonl."""
    model: Annotated[Path | None, arg(metavar="DIR")] = None
    """Of gsm8k: a folder with a model and its tokenizer, as `save_pretrained` leaves them."""
    preset: str = "small"
    """smoke (seconds), small (a minute an objective on a laptop) or large."""
    seeds: Annotated[int, arg(metavar="N")] = 3
    """Seeds of each objective."""
    jobs: Annotated[int | None, arg(metavar="N")] = None
    """Processes side by side (default: one a core)."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="KEY=VALUE")] = ()
    """Change a setting of the preset, such as lr=3e-4 or digits=2,3; may be given several times."""
    output: Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")] = None
    """out.html, out.pdf, or a folder for one PNG and SVG a chart (default: comparison.html beside the records)."""
    json: bool = False
    """Print one JSON object instead of the table."""


def compare(options: Compare) -> int:
    """Compare, write the page, and print the table."""
    _load_beside("comparison")
    from rich.console import Console

    from dynascope.report.page import check_output
    from dynascope.studies.comparison import compare, experiment
    from dynascope.studies.comparison.method import TASKS
    from dynascope.studies.comparison.page import print_comparison, write_comparison
    from dynascope.studies.harness import parse_overrides

    if options.output is not None:
        check_output(options.output)
    names = [name.strip() for name in options.objectives.split(",")]
    if names == ["all"] and options.task in TASKS:
        names = list(TASKS[options.task].objectives)
    overrides = parse_overrides(experiment(names, options.task), options.preset, options.set)
    folders = {"data": options.data, "model": options.model}
    overrides |= {name: str(folder.resolve()) for name, folder in folders.items() if folder is not None}
    done = compare(
        names, options.task, preset=options.preset, seeds=options.seeds, jobs=options.jobs, overrides=overrides
    )
    page = write_comparison(done, options.output or done.folder / "comparison.html")
    if options.json:
        print(json.dumps({**done.as_json(), "page": str(page)}))
    else:
        print_comparison(done, Console(width=None if sys.stdout.isatty() else 140))
        print(f"\npage: {page}")
    return 1 if done.failures else 0


def _load_beside(study: str) -> None:
    """Let the server that workers will be forked from load torch and the study while this process does the same."""
    from multiprocessing import forkserver, get_all_start_methods

    if "forkserver" in get_all_start_methods():
        module = "harness" if study.endswith(".py") else study.replace("-", "_")
        # Optimizers load torch._dynamo at their first step; the server does it once for all workers.
        forkserver.set_forkserver_preload([f"dynascope.studies.{module}", "torch._dynamo"])
        forkserver.ensure_running()


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "show": (Show, show),
    "report": (Report, report),
    "live": (Live, live),
    "export": (Export, export),
    "studies": (Studies, studies),
    "study": (Study, study),
    "compare": (Compare, compare),
}

_HELP = """\
dynascope: see, explain and steer how a neural network trains

  dynascope watch SCRIPT [ARGS…]     run a training script under watch, without changing it
  dynascope show RUN                 a run in the terminal: series, sparklines, findings
  dynascope report RUN [RUN…]        a self-contained page; several runs are compared
  dynascope live DIR                 follow running trainings in the browser, on 127.0.0.1
  dynascope export RUN --to FORMAT   parquet, netcdf, tensorboard, wandb or mlflow
  dynascope studies                  every study: paper, last verdict, figures
  dynascope study NAME               run a paper's experiment again and judge its claims
  dynascope compare A,B              train objectives of post-training on equal terms: one page

Begin with:  dynascope watch train.py      Help on one command:  dynascope COMMAND --help
"""


def run(argv: Sequence[str]) -> int:
    """One command line; returns its exit status. Wrong usage raises SystemExit(2) or an error that `main` shortens."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_HELP, end="")
        return 0
    if argv[0] == "--version":
        from dynascope import __version__

        print(__version__)
        return 0
    command, rest = argv[0], list(argv[1:])
    if command == "watch":
        return _run_watch(rest)
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, ["watch", *COMMANDS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else "dynascope --help lists the commands"
        raise ValueError(f"unknown command {command!r}; {hint}")
    options_type, function = COMMANDS[command]
    with _in_one_line(command):
        options: Any = tyro.cli(options_type, prog=f"dynascope {command}", args=rest)
    return function(options)


def _run_watch(rest: list[str]) -> int:
    """Dynascope's own flags are taken wherever they stand before `--`; all else is the script's."""
    is_module = rest[:1] == ["-m"]
    rest = rest[1:] if is_module else rest
    place = rest.index("--") if "--" in rest else len(rest)
    with _in_one_line("watch"):
        options, left_over = tyro.cli(Watch, prog="dynascope watch", args=rest[:place], return_unknown_args=True)
    return watch(options, [*left_over, *rest[place + 1 :]], is_module)


@contextlib.contextmanager
def _in_one_line(command: str) -> Iterator[None]:
    """The parser's framed message about wrong usage, shortened to one line."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            yield
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_one_line(told.getvalue())}; see dynascope {command} --help") from None


def _one_line(boxed: str) -> str:
    """What is wrong, out of the parser's framed message."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", boxed)
    lines = [line.strip("│╭╮╰╯─ \t") for line in plain.splitlines()]
    told = [line for line in lines if line and not line.startswith(("For full help", "Argument helptext"))]
    # The first line is the frame's title; the next says what is wrong, the rest repeats the help.
    return " ".join(told[1:3]).rstrip(".") or "the command line was not understood"


def _is_first_process() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def main() -> None:
    """Entry point of `dynascope`: exit status 0 done, 2 wrong usage in one line, 3 with --strict, else the script's."""
    from dynascope.record.model import RecordError

    try:
        status = run(sys.argv[1:])
    except (ValueError, FileNotFoundError, RecordError) as error:
        message = (
            str(error)
            if not isinstance(error, FileNotFoundError) or not error.filename
            else f"there is no {error.filename}"
        )
        print(f"dynascope: {' '.join(message.split())}", file=sys.stderr)
        status = 2
    except BrokenPipeError:
        # The reader of our output went away (`dynascope show … | head`); that is no failure.
        sys.stderr.close()
        status = 0
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
