"""Which studies there are, and how one is loaded and set."""

import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import io
import json
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dynascope.studies.harness.study import Experiment, Study

STUDIES = (
    "active-dormant-heads",
    "cot-pass-at-k",
    "data-diet",
    "exact-permutations",
    "gradient-entanglement",
    "grokking-lazy-rich",
    "hapo",
    "icl-linear-regression",
    "kdrl",
    "mamba-icl-outliers",
    "mesa-optimization",
    "neural-tangent-kernel",
    "prefix-grouper",
    "riskpo",
    "relift",
    "r1-reward",
    "scan-and-snap",
    "sigma-reparam",
    "simplerl-zoo",
    "token-hidden-reward",
)


def load_study(name: str) -> Study:
    """A study by its name, or from a `.py` file that holds a Study called `study`.

    Raises ValueError when there is none.

    >>> load_study("data-diet").paper.arxiv
    '2107.07075'
    """
    if name.endswith(".py"):
        return dataclasses.replace(_from_file(Path(name)), origin=str(Path(name).resolve()))
    if name not in STUDIES:
        raise ValueError(f"there is no study {name!r}; {_near(name, STUDIES, 'dynascope studies lists them')}")
    module = importlib.import_module(f"dynascope.studies.{name.replace('-', '_')}")
    study: Study = module.study
    return dataclasses.replace(study, origin=name)


def list_studies(root: str | Path = "runs/studies") -> list[dict[str, Any]]:
    """Every study with its paper, and its most recent verdict under `root` (None when it has not been run there)."""
    listed = []
    for study in map(load_study, STUDIES):
        verdicts = sorted((Path(root) / study.name).glob("*/verdict.json"), key=lambda path: path.stat().st_mtime)
        verdict = json.loads(verdicts[-1].read_text()) if verdicts else None
        listed.append({"study": study.name, **dataclasses.asdict(study.paper), "verdict": verdict})
    return listed


def configure(study: Experiment, preset: str, overrides: dict[str, Any] | None = None) -> Any:
    """The preset's configuration with some settings changed. Raises ValueError for an unknown preset or setting."""
    if preset not in study.presets:
        raise ValueError(f"study {study.name} has no preset {preset!r}; it has {', '.join(study.presets)}")
    config = study.presets[preset]
    _check_names(study, config, overrides or {})
    return dataclasses.replace(config, **(overrides or {}))


def _check_names(study: Experiment, config: Any, wanted: Iterable[str]) -> None:
    names = [one.name for one in dataclasses.fields(config)]
    for name in wanted:
        if name not in names:
            hint = _near(name, names, f"it has {', '.join(names)}")
            raise ValueError(f"study {study.name} has no setting {name!r}; {hint}")


def parse_overrides(study: Experiment, preset: str, settings: Sequence[str]) -> dict[str, Any]:
    """`key=value` texts as values of the settings' own types; several values are parted by commas.

    Raises ValueError for a text without `=`, an unknown setting, a value of another type, or values that the study refuses.

    >>> parse_overrides(study, "small", ["num_steps=100", "lrs=1e-3,1e-2"])
    {'num_steps': 100, 'lrs': (0.001, 0.01)}
    """
    pairs: dict[str, str] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set wants KEY=VALUE, not {text!r}")
        pairs[name.strip()] = value.strip()
    config = configure(study, preset)
    _check_names(study, config, pairs)
    typed = {name: _typed(config, name, value) for name, value in pairs.items()}
    try:
        configure(study, preset, typed)
    except ValueError as refused:
        shown = " ".join(f"{name}={value}" for name, value in pairs.items())
        raise ValueError(f"--set {shown}: {refused}") from None
    return typed


def _typed(config: Any, name: str, text: str) -> Any:
    """One setting read by the parser of the command line, so that it knows every type that a flag may have."""
    import tyro

    args = [f"--{name}", *([part.strip() for part in text.split(",")] if text else [])]
    kind = typing.get_type_hints(type(config))[name]
    # Read without the study's own checks, which want to see all settings together and whose reasons tyro would swallow.
    alone = dataclasses.make_dataclass("Alone", [(name, kind)])
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            parsed: Any = tyro.cli(alone, args=args, config=(tyro.conf.FlagConversionOff,))
    except SystemExit:
        shown = kind.__name__ if type(kind) is type else kind
        raise ValueError(f"--set {name}={text}: {text!r} is no {shown}") from None
    return getattr(parsed, name)


def _from_file(path: Path) -> Study:
    if not path.is_file():
        raise ValueError(f"there is no study file {path}")
    name = f"dynascope_study_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    study = getattr(module, "study", None)
    if not isinstance(study, Study):
        raise ValueError(f"{path} holds no Study called `study`")
    return study


def _near(name: str, names: Sequence[str], otherwise: str) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise
