"""
Rewards that work on what a model wrote run in a process of their own, which is ended when a text takes too long: a
power tower or a number of a billion digits keeps a verifier busy for ever, and no signal ends a computation inside C.
"""

import ast
import atexit
import contextlib
import functools
import importlib
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

from .embedded import completion_text


SECONDS = 5.0
START_SECONDS = 120.0
MEMORY = 8 << 30  # bytes of address space; a number that needs more is no answer
SERVE = "from trl_ext.tasks.bounded import serve; serve()"


class OutOfTimeError(BaseException):
    """The time for a text is over. No `Exception`, which some verifiers catch while they go on."""


class Worker:
    """A process that scores texts. It starts when it is first needed, and again after it was ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process, self._owner, self._loaded = None, None, set()

    def score(self, factory: str, arguments: list, texts: list, references: list, seconds: float = SECONDS) -> list:
        """
        Score texts.

        Args:
            factory (`str`):
                `"package.module:function"` that makes the scorer, which gets a text and its reference.
            arguments (`list`):
                Arguments of the factory, as JSON has them.
            texts (`list[str | None]`), references (`list[str]`):
                What the model wrote, and what each is compared with.
            seconds (`float`, *optional*, defaults to `5.0`):
                Computing time for each. What cannot be interrupted is ended after twice as long.

        Returns:
            `list`: for each text what the scorer returned, as JSON has it; None if time or memory were used up, or the
            scorer failed.

        Raises:
            RuntimeError: if the process cannot be started, or the scorer cannot be made there.
        """
        pairs, values = [*zip(texts, references, strict=True)], []
        with self._lock:
            scorer = json.dumps([factory, arguments], default=vars)
            while len(values) < len(pairs):
                if self._owner != os.getpid() or self._process.poll() is not None:
                    self._start()
                if scorer not in self._loaded:
                    (answer,) = self._ask([scorer, [None], 0], 1, START_SECONDS) or [{}]
                    if answer != {"value": True}:
                        self._stop()
                        reason = answer.get("error", f"no answer in {START_SECONDS:.0f} s")
                        raise RuntimeError(
                            f"the process that scores completions could not load {factory} {arguments} ({reason}): "
                            "check that it can be imported in a new Python process, and that there is memory for one."
                        )
                    self._loaded.add(scorer)
                left = pairs[len(values) :]
                answers = self._ask([scorer, left, seconds], len(left), 2 * seconds + 1)
                values += [answer.get("value") for answer in answers]
                if len(answers) < len(left):  # the text that it ended at
                    values.append(None)
        return values

    def _start(self) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            text=True,
            encoding="ascii",  # JSON escapes the rest, lone surrogates included
        )
        if self._owner is None:
            atexit.register(self._stop)
        self._owner, self._loaded = os.getpid(), set()

    def _stop(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()

    def _ask(self, questions: list, count: int, seconds: float) -> list[dict]:
        """Answers to a line of questions; fewer if the process ended, as it does where one takes too long."""
        process, answers, over = self._process, [], threading.Event()
        deadline = time.monotonic() + seconds

        def watch():
            while not over.wait(deadline - time.monotonic()):
                if time.monotonic() >= deadline:  # no answer has put it off
                    process.kill()

        threading.Thread(target=watch, daemon=True).start()
        try:
            process.stdin.write(json.dumps(questions) + "\n")
            process.stdin.flush()
            while len(answers) < count and (line := process.stdout.readline()).endswith("\n"):
                answers.append(json.loads(line))
                deadline = time.monotonic() + seconds
        except OSError:  # it ended before it was asked
            pass
        finally:
            over.set()
            if len(answers) < count:  # also where an interrupt leaves answers that nobody waits for
                self._stop()
        return answers


WORKER = Worker()


def serve() -> None:
    """What the process does: a line of JSON with questions in, a line for each answer out, until its input ends."""
    channel, sys.stdout = sys.stdout, sys.stderr  # what a verifier prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to the training, too
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    timer = getattr(signal, "ITIMER_VIRTUAL", None)  # not SIGALRM, which math_verify uses
    if timer is not None:
        signal.signal(signal.SIGVTALRM, _out_of_time)
    scorers = {}
    for line in sys.stdin:
        scorer, pairs, seconds = json.loads(line)
        for pair in pairs:
            try:
                if pair is None:
                    (path, arguments), answer = json.loads(scorer), {"value": True}
                    module, _, name = path.partition(":")
                    scorers[scorer] = getattr(importlib.import_module(module), name)(*arguments)
                else:
                    if timer is not None:
                        signal.setitimer(timer, seconds)
                    answer = {"value": scorers[scorer](*pair)}
            except (Exception, OutOfTimeError) as error:
                answer = {"error": f"{type(error).__name__}: {error}"[:500]}
            finally:
                if timer is not None:
                    signal.setitimer(timer, 0)
            print(json.dumps(answer), file=channel, flush=True)


def _out_of_time(signum, frame):
    raise OutOfTimeError


class MathReward:
    """
    A math reward of TRL in bounded time, in any thread: TRL's own limit works in the main thread only, and not inside
    a long computation of C code.

    Takes plain completions too. A completion that uses up its time or memory scores 0.0, as one that TRL's own limit
    ends; where the solution cannot be read, it is None.

    Args:
        name (`str`):
            `"accuracy_reward"` or `"reasoning_accuracy_reward"`.
        seconds (`float`, *optional*, defaults to `5.0`):
            Computing time per completion.
    """

    def __init__(self, name: str, seconds: float = SECONDS):
        self.__name__ = name
        self.seconds = seconds
        self.__wrapped__ = getattr(importlib.import_module("trl.rewards"), name)

    def __call__(self, completions: list, solution: list[str] | None = None, log_extra=None, **kwargs) -> list:
        """
        Args:
            completions (`list[str]` or `list[list[dict]]`):
                Completions, plain or conversational.
            solution (`list[str]`):
                Column `solution` of the data set, one per completion.
            log_extra (`Callable`, *optional*):
                Given by the trainer.
            kwargs:
                Further columns; ignored.

        Returns:
            `list[float | None]`: 1.0 where completion and solution agree, else 0.0.

        Raises:
            ValueError: if there is no column `solution`, or not text in it.
        """
        bad = next((i for i, text in enumerate(solution or [None]) if not isinstance(text, str)), None)
        if bad is not None:
            found = "the data set has no such column" if solution is None else f"row {bad} has {solution[bad]!r}"
            raise ValueError(
                f"{self.__name__} compares with the column `solution`, which must hold text, but {found}."
            )
        texts = [completion_text(completion) or "" for completion in completions]
        scored = WORKER.score(f"{__name__}:math_scorer", [self.__name__], texts, solution, self.seconds)
        scored = [found or (0.0, ["[not scored]"] * 2) for found in scored]
        if log_extra is not None:
            log_extra("solution", list(solution))
            log_extra("gold_parsed", [gold for _, (gold, _) in scored])
            log_extra("answer_parsed", [parsed for _, (_, parsed) in scored])
        return [reward for reward, _ in scored]


def math_scorer(name: str):
    reward = getattr(importlib.import_module("trl.rewards"), name)
    reward(completions=[[{"content": "1"}]], solution=["1"])  # so that what is not installed is missed here

    def score(text, solution):
        extra = {}
        (value,) = reward([[{"role": "assistant", "content": text}]], [solution], log_extra=extra.__setitem__)
        return value, [extra["gold_parsed"][0], extra["answer_parsed"][0]]

    return score


# Names that an answer may use where a verifier evaluates it, beside single letters and those of the right answer.
FUNCTIONS = [
    "abs",
    "Abs",
    "acos",
    "asin",
    "atan",
    "cos",
    "cosh",
    "cot",
    "csc",
    "erf",
    "exp",
    "ln",
    "log",
    "pi",
    "sec",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
]
LITERAL = (ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Load, ast.UnaryOp, ast.USub)


@functools.cache
def evaluated_by(verifier) -> str | None:
    """
    What a verifier may do with an answer, by its source: `"literal"` if it calls Python's `eval`, `"formula"` if it
    calls sympy's `parse_expr`, which calls `eval` too; None if neither.
    """
    found = set(re.findall(r"\b(eval|exec|parse_expr|sympify)\s*\(", inspect.getsource(verifier)))
    return None if not found else "literal" if found <= {"eval", "exec"} else "formula"


def harmless(text: str, kind: str | None, right: str = "") -> bool:
    """
    Whether a text can be evaluated: it calls nothing but functions of mathematics and reads no variable and no
    attribute.

    Args:
        text (`str`):
            What a model wrote.
        kind (`str` or `None`):
            From [`evaluated_by`].
        right (`str`, *optional*):
            The right answer, which is harmless itself, and whose names a formula may use.

    Returns:
        `bool`: also true for a text that is no Python, and so cannot be evaluated as a literal.
    """
    if kind is None or text == right:
        return True
    if kind == "literal":
        try:
            return all(isinstance(node, LITERAL) for node in ast.walk(ast.parse(text, mode="eval")))
        except (SyntaxError, ValueError):
            return True
        except (MemoryError, RecursionError):  # it may be Python all the same
            return False
    name = r"[^\W\d]\w*"
    known = {*FUNCTIONS, *re.findall(name, right)}
    return (
        re.fullmatch(r"[\w\s.,+*/^()!-]*", text, re.ASCII) is not None
        and re.search(r"__|\.\s*[A-Za-z_]", text) is None
        and all(len(found) == 1 or found in known for found in re.findall(name, text))
    )
