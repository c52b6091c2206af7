"""Judges: reading verdicts, joining them, asking no more than needed, and the three kinds of judge."""

import itertools
import json
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from dynascope.rl.reasoning.judge_ensemble import JudgeEnsemble, decide
from dynascope.rl.reasoning.judges import (
    HFJudge,
    JudgeServerError,
    ServerJudge,
    Solution,
    StepChecker,
    TextJudge,
    Verdict,
    judge_prompt,
    parse_verdict,
)


class Scripted:
    """Gives each solution the verdicts that are written in its reasoning, one a call: y, n, or ? for none."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, solutions: Sequence[Solution]) -> list[Verdict]:
        verdicts = [
            {"y": True, "n": False, "?": None}[one.reasoning[self.asked.count(one.reasoning)]] for one in solutions
        ]
        self.asked += [one.reasoning for one in solutions]
        return verdicts


def solutions(*scripts: str) -> list[Solution]:
    return [Solution("a problem", script) for script in scripts]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (r"so \boxed{yes}", True),
        (r"\boxed{No}", False),
        (r"at first \boxed{no}, but then \boxed{ YES. }", True),
        (r"$\boxed{\text{no}}$", False),
        (r"\boxed {\mathrm{Yes}}", True),
        (r"\boxed{14}", None),
        (r"yes", None),
        ("", None),
        (r"\boxed{yes} and the answer is \boxed{14}", None),
    ],
)
def test_verdicts_are_read_from_the_last_box(text: str, verdict: Verdict) -> None:
    assert parse_verdict(text) is verdict


def test_the_prompt_asks_for_what_the_paper_asks() -> None:
    prompt = judge_prompt(Solution("Why {x}?", "because {y}", "42"))
    for part in ("Why {x}?", "because {y}", "42", "calculation", "logic", "concept", "omission", r"\boxed{yes}"):
        assert part in prompt
    assert "Known right answer" not in judge_prompt(Solution("q", "r"))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_rules_are_nested_and_early_stop_changes_no_outcome(n: int) -> None:
    scripts = ["".join(one) for one in itertools.product("yn?", repeat=n)]
    right = torch.ones(len(scripts), dtype=torch.bool)
    whole = JudgeEnsemble(Scripted(), n, early_stop=False)(solutions(*scripts), right)
    assert whole.num_calls == n * len(scripts)
    says = {rule: whole.by_rule(rule) for rule in ("any", "majority", "all")}
    assert bool((says["any"] >= says["majority"]).all())
    assert bool((says["majority"] >= says["all"]).all())
    for script, yes in zip(scripts, says["majority"].tolist(), strict=True):
        assert yes == (script.count("y") > script.count("n"))
    assert says["all"].tolist() == [script == "y" * n for script in scripts]
    for rule in ("any", "majority", "all"):
        short = JudgeEnsemble(Scripted(), n, rule)(solutions(*scripts), right)  # type: ignore[arg-type]
        assert torch.equal(short.is_correct, says[rule])
        assert short.num_calls <= whole.num_calls


def test_majority_stops_after_two_equal_votes() -> None:
    judge = Scripted()
    judged = JudgeEnsemble(judge, 3)(solutions("yyn", "nny", "yny"), torch.ones(3, dtype=torch.bool))
    assert judged.is_correct.tolist() == [True, False, True]
    assert [judge.asked.count(one) for one in ("yyn", "nny", "yny")] == [2, 2, 3]
    assert judged.num_calls == 7
    with pytest.raises(ValueError, match="early_stop=False"):
        judged.by_rule("all")


def test_only_right_answers_are_judged_unless_told() -> None:
    judge, right = Scripted(), torch.tensor([True, False])
    judged = JudgeEnsemble(judge, 1)(solutions("y", "yy"), right)
    assert judge.asked == ["y"]
    assert judged.is_correct.tolist() == [True, False]
    assert judged.is_judged.tolist() == [True, False]
    assert judged.by_rule("all").tolist() == [True, False]
    judged = JudgeEnsemble(Scripted(), 1, only_if_answer_correct=False)(solutions("y", "yy"), right)
    assert judged.is_correct.tolist() == [True, True]


def test_identical_chains_are_judged_once_and_the_cache_remembers() -> None:
    judge, cache = Scripted(), dict[str, str]()
    right = torch.tensor([True, True, False])
    first = JudgeEnsemble(judge, 3, early_stop=False, cache=cache)(solutions("yny", "yny", "yny"), right)
    assert first.num_calls == len(judge.asked) == 3
    assert first.is_correct.tolist() == [True, True, False]
    again = JudgeEnsemble(judge, 3, cache=cache)(solutions("yny"), right[:1])
    assert again.num_calls == 0
    assert again.is_correct.tolist() == [True]
    other = JudgeEnsemble(judge, 3, cache=cache)([Solution("another problem", "nnnnnn")], right[:1])
    assert other.num_calls == 2


def test_two_judges_on_one_store_keep_apart() -> None:
    def strict(solutions: Sequence[Solution]) -> list[Verdict]:
        return [False] * len(solutions)

    def lenient(solutions: Sequence[Solution]) -> list[Verdict]:
        return [True] * len(solutions)

    cache, right = dict[str, str](), torch.ones(1, dtype=torch.bool)
    for _ in range(2):
        for judge, verdict in ((strict, False), (lenient, True), (TextJudge(lambda _: [r"\boxed{no}"]), False)):
            assert JudgeEnsemble(judge, 1, cache=cache)(solutions("y"), right).is_correct.tolist() == [verdict]
    assert len(cache) == 3
    named = [JudgeEnsemble(lenient, 1, cache=cache, name=name) for name in ("first", "second", "first")]
    assert [one(solutions("y"), right).num_calls for one in named] == [1, 1, 0]
    servers = [ServerJudge("http://127.0.0.1:1/v1", model) for model in ("small", "large")]
    assert servers[0].name != servers[1].name == ServerJudge("http://127.0.0.1:2/v1", "large").name


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        JudgeEnsemble(Scripted(), 0)
    with pytest.raises(ValueError, match="one answer a solution"):
        JudgeEnsemble(Scripted())(solutions("y"), torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="one each"):
        JudgeEnsemble(lambda solutions: [])(solutions("y"), torch.ones(1, dtype=torch.bool))
    for odd in (["no"], None, [[True]]):  # a text would be a yes, whatever it says
        judge: Any = lambda solutions, odd=odd: odd  # noqa: E731
        with pytest.raises(ValueError, match="where True, False or None is wanted"):
            JudgeEnsemble(judge)(solutions("y"), torch.ones(1, dtype=torch.bool))
    one = torch.ones(1, dtype=torch.long)
    with pytest.raises(ValueError, match="not 'most'"):
        decide(one, one, one, 3, "most")


@pytest.mark.parametrize(
    ("reasoning", "reference", "verdict"),
    [
        ("3 * 4 = 12\n2 + 12 = 14", "14", True),
        ("First the product.\n3 * 4 = 12\n2 + 12 = 14", None, True),
        ("3 * 4 = 11\n2 + 12 = 14", "14", False),  # a wrong step before a right answer
        ("3 * 4 = 12", "14", False),  # stops short
        ("2 + 3 * 4 = 2 + 12 = 14", "14", True),
        ("2 + 3 * 4 = 2 + 13 = 14", "14", False),
        ("(7 + 8) % 5 = 15 % 5 = 0", "0", True),
        ("-3 + 1 = -2", "-2", True),
        ("it is 14", "14", None),
        ("x = 14", "14", None),
        ("2 ** 9 = 512", "512", None),
        ("1 // 0 = 0", "0", None),
        ("-" * 100_000 + "1 = 1", "1", None),  # deeper than a parser goes
        ("(" * 1000 + "1", "1", None),
        (f"{'9' * 5000} = 1", "1", None),
        (f"{'9' * 4000} * {'9' * 4000} = 0", "0", False),  # longer than Python writes out
    ],
)
def test_step_checker(reasoning: str, reference: str | None, verdict: Verdict) -> None:
    assert StepChecker()([Solution("?", reasoning, reference)]) == [verdict]


def test_verdicts_may_be_a_tensor() -> None:
    judge: Any = lambda solutions: torch.tensor([True, False])  # noqa: E731
    told = JudgeEnsemble(judge, n=1)(solutions("y", "n"), torch.ones(2, dtype=torch.bool))
    assert told.is_correct.tolist() == [True, False]


def test_text_judge() -> None:
    judge = TextJudge(lambda prompts: [r"\boxed{yes}" if "sound" in one.split("##")[2] else "hm" for one in prompts])
    assert judge(solutions("sound", "strange")) == [True, None]


def test_hugging_face_judge_reads_what_the_model_wrote() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=300, n_positions=4096, n_embd=8, n_layer=1, n_head=1)
    config.eos_token_id = config.bos_token_id = None
    model = transformers.GPT2LMHeadModel(config)

    class Tokenizer:
        chat_template, pad_token_id, eos_token_id = None, None, 0

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": list(text.encode())}

        def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
            assert rows.shape == (2, 4) or rows.shape == (1, 4)
            return [r"\boxed{yes}"] * len(rows)

    judge = HFJudge(model, Tokenizer(), max_new_tokens=4, batch_size=2)
    assert judge(solutions("short", "rather longer", "x")) == [True, True, True]


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, object]]]]:
    asked: list[dict[str, object]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**request, "path": self.path, "key": self.headers["Authorization"]})
            prompt = request["messages"][0]["content"]
            status = 500 if "crash" in prompt else 200
            verdict = "yes" if "sound" in prompt.split("##")[2] else "no"
            message = {"message": {"content": rf"\boxed{{{verdict}}}"}}
            body = json.dumps({"error": "odd"} if "odd" in prompt else {"choices": [message]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/v1/", asked
        running.shutdown()
        thread.join()


def test_server_judge(server: tuple[str, list[dict[str, object]]]) -> None:
    url, asked = server
    judge = ServerJudge(url, "a-judge", api_key="key", at_once=4)
    assert judge(solutions("sound", "bad", "sound too")) == [True, False, True]
    assert {one["path"] for one in asked} == {"/v1/chat/completions"}
    assert {one["key"] for one in asked} == {"Bearer key"}
    assert {one["model"] for one in asked} == {"a-judge"}
    with pytest.raises(JudgeServerError, match="500"):
        judge(solutions("crash"))
    with pytest.raises(JudgeServerError, match="no chat completion"):
        judge(solutions("odd"))


def test_one_request_that_fails_loses_no_other_verdict(server: tuple[str, list[dict[str, object]]]) -> None:
    url, asked = server
    cache, right = dict[str, str](), torch.ones(3, dtype=torch.bool)
    ensemble = JudgeEnsemble(ServerJudge(url, "a-judge", at_once=1), 1, cache=cache)
    with pytest.raises(JudgeServerError, match="1 of 3 requests failed"):
        ensemble(solutions("bad", "crash", "sound"), right)
    assert len(cache) == 2
    num_asked = len(asked)
    assert ensemble(solutions("sound", "bad", "sound"), right).is_correct.tolist() == [True, False, True]
    assert len(asked) == num_asked


def test_server_judge_says_when_nobody_answers() -> None:
    with pytest.raises(JudgeServerError, match="is the server running"):
        ServerJudge("http://127.0.0.1:9/v1", "a-judge", timeout=2.0)(solutions("y"))
    with pytest.raises(ValueError, match="no address"):
        ServerJudge("127.0.0.1:8000", "a-judge")
