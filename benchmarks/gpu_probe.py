"""Asks the GPU what is not documented, before anything depends on it (probe_questions.py).

Each question runs in its own process, forked from one that has imported torch but not started CUDA.
A process that does not answer in time is killed, which is an answer as well: the call blocks. Each
answer is written at once, for gpu_report.py.
"""

from __future__ import annotations

import json as json_format
import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import JsonOption
from probe_questions import QUESTIONS, Question

Answer = dict[str, str]


def answers(question: Question, start_limit_s: float = 30.0) -> Iterator[Answer]:
    """Asks in a separate process; yields answers case by case, and why it ended early, if so."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_ask, args=(question, theirs))  # may have children
    process.start()
    theirs.close()
    try:
        for case, answer in _read(ours, start_limit_s, question.limit_s):
            yield {"question": question.name, "case": case, "answer": answer}
    finally:
        process.kill()
        process.join(start_limit_s)


def _read(pipe: Connection, start_limit_s: float, limit_s: float) -> Iterator[tuple[str, str]]:
    case = "the start of CUDA"
    deadline = time.monotonic() + start_limit_s
    while pipe.poll(max(0.0, deadline - time.monotonic())):
        try:
            kind, text = pipe.recv()
        except EOFError:
            yield case, "unknown: the process has died"
            return
        if kind == "end":
            return
        if kind == "answer":
            yield case, text
        else:
            case = text
        if kind == "started":
            deadline = time.monotonic() + limit_s
    yield case, "blocks: the process was ended"


def _ask(question: Question, pipe: Connection) -> None:
    os.environ.update(question.environment)
    try:
        if question.starts_cuda:
            torch.cuda.synchronize()
        pipe.send(("started", "what comes first"))
        for case, find in question.cases():
            pipe.send(("case", case))
            pipe.send(("answer", _found(find)))
    except Exception as error:  # noqa: BLE001 - that it cannot be asked is what is found
        pipe.send(("answer", _unknown(error)))
    pipe.send(("end", ""))
    os._exit(0)  # without any cleanup, which might wait


def _found(find: Callable[[], str]) -> str:
    try:
        return find()
    except Exception as error:  # noqa: BLE001 - the next case may have an answer
        return _unknown(error)


def _unknown(error: Exception) -> str:
    return f"unknown: {error}".partition("\n")[0]


def ask_all(questions: Sequence[Question], path: Path | None) -> None:
    """Asks one question after the other; prints each answer, and writes all answers so far."""
    found: list[Answer] = []
    for question in questions:
        for answer in answers(question):
            print(f"{answer['question']}; {answer['case']}: {answer['answer']}", flush=True)
            found.append(answer)
            if path is not None:
                path.write_text(json_format.dumps(found, indent=2) + "\n")


def main(
    only: Annotated[str, typer.Option(help="A regular expression: only such questions.")] = "",
    json: JsonOption = None,
) -> None:
    """Ask everything; whatever the answers are, the exit status is 0."""
    ask_all([question for question in QUESTIONS if re.search(only, question.name)], json)


if __name__ == "__main__":
    typer.run(main)
