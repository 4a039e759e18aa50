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

from .embedded import completion_text


SECONDS = 5.0
START_SECONDS = 120.0
MEMORY = 8 << 30  # bytes of address space; a number that needs more is no answer
SERVE = "from trl_ext.tasks.bounded import serve; serve()"


class OutOfTimeError(BaseException):
    """The time for a text is over. No `Exception`, which some verifiers catch while they go on."""


class Worker:
    """A process that scores texts, one at a time. It starts when it is first needed, and again after it was ended."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process, self._owner, self._loaded = None, None, set()

    def score(self, factory: str, arguments: list, text, reference, seconds: float = SECONDS):
        """
        Score one text.

        Args:
            factory (`str`):
                `"package.module:function"` that makes the scorer, which gets text and reference.
            arguments (`list`):
                Arguments of the factory, as JSON has them.
            text (`str` or `None`), reference (`str`):
                What the model wrote, and what it is compared with.
            seconds (`float`, *optional*, defaults to `5.0`):
                Computing time for it. What cannot be interrupted is ended after twice as long.

        Returns:
            What the scorer returned, as JSON has it; None if time or memory were used up, or the scorer failed.

        Raises:
            RuntimeError: if the process cannot be started, or the scorer cannot be made there.
        """
        with self._lock:
            scorer = json.dumps([factory, arguments], default=vars)
            if self._owner != os.getpid() or self._process.poll() is not None:
                self._start()
            if scorer not in self._loaded:
                answer = self._ask([scorer, None, None, 0], START_SECONDS)
                if answer != {"value": True}:
                    self._stop()
                    reason = (answer or {}).get("error", f"no answer in {START_SECONDS:.0f} s")
                    raise RuntimeError(
                        f"the process that scores completions could not load {factory} {arguments} ({reason}): check "
                        "that it can be imported in a new Python process, and that there is memory for one."
                    )
                self._loaded.add(scorer)
            answer = self._ask([scorer, text, reference, seconds], 2 * seconds + 1)
            return None if answer is None else answer.get("value")

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

    def _ask(self, question: list, seconds: float) -> dict | None:
        timer = threading.Timer(seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:  # it ended before it was asked
            line = ""
        finally:
            timer.cancel()
        if not line:
            self._stop()
        return json.loads(line) if line else None


WORKER = Worker()


def serve() -> None:
    """What the process does: a line of JSON in, a line of JSON out, until its input ends."""
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
        scorer, text, reference, seconds = json.loads(line)
        try:
            if scorer not in scorers:
                (path, arguments), answer = json.loads(scorer), {"value": True}
                module, _, name = path.partition(":")
                scorers[scorer] = getattr(importlib.import_module(module), name)(*arguments)
            else:
                if timer is not None:
                    signal.setitimer(timer, seconds)
                answer = {"value": scorers[scorer](text, reference)}
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
        rewards, extras = [], []
        for completion, right in zip(completions, solution, strict=True):
            text = completion_text(completion) or ""
            answer = WORKER.score(f"{__name__}:math_scorer", [self.__name__], text, right, self.seconds)
            reward, extra = (0.0, ["[not scored]"] * 2) if answer is None else answer
            rewards.append(reward)
            extras.append(extra)
        if log_extra is not None:
            log_extra("solution", list(solution))
            log_extra("gold_parsed", [gold for gold, _ in extras])
            log_extra("answer_parsed", [parsed for _, parsed in extras])
        return rewards


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
