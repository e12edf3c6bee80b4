"""One rank of a training run from start to end, and the same run unsplit."""

import json
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm  # type: ignore[import-untyped]

from gpt import checkpoint
from gpt.data import Corpus, load_corpus
from gpt.models import PipelinedGPT, UnsplitGPT
from gpt.options import Options
from gpt.sample import sample
from gpt.training import StepRecord, Training

FINAL_BATCHES = 4  # held-out batches behind the first and the last figure of a run


def train_rank(rank: int, _num_ranks: int, options: Options) -> list[StepRecord]:
    """Run one rank of the pipeline; return what each step gave."""
    torch.set_num_threads(1)
    corpus = load_corpus(options.data)
    check_same_text(corpus)
    model = PipelinedGPT(options, rank)
    training = Training(options, model, corpus)
    if options.resume:
        checkpoint.restore(training, options.checkpoint)
    records = Session(training, model, is_speaker=rank == 0).run()
    whole = checkpoint.gather(training)
    if whole is not None:
        checkpoint.save(whole, options.checkpoint)
        print(f"saved step {training.step_count} to {options.checkpoint}")
        if options.sample_bytes:
            text = sample(whole["model"], options.model, "def ", options.sample_bytes)
            print(f"a sample:\n\n{text}\n")
    return records


def train_unsplit(options: Options, steps: int) -> list[StepRecord]:
    """Train the same model on the same batches in this process, without a pipeline."""
    torch.set_num_threads(1)
    training = Training(options, UnsplitGPT(options), load_corpus(options.data))
    return [training.step() for _ in tqdm(range(steps), desc="unsplit", unit="step")]


def check_same_text(corpus: Corpus) -> None:
    """Raise a ``ValueError`` on every rank unless all of them read the same bytes."""
    prints: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(prints, corpus.fingerprint())
    odd = [rank for rank, value in enumerate(prints) if value != prints[0]]
    if odd:
        raise ValueError(
            f"rank {odd[0]} read other text than rank 0: their machines differ in Python version; "
            f"give all of them the same --data folder"
        )


class Session:
    """The part of a run that happens now, and what the speaker, rank 0, shows of it."""

    def __init__(self, training: Training, model: PipelinedGPT, *, is_speaker: bool) -> None:
        self.training = training
        self.model = model
        self.options = training.options
        self.is_speaker = is_speaker

    def run(self) -> list[StepRecord]:
        """Train to the end of the session; evaluate, log and save on the way."""
        options, training = self.options, self.training
        stop = min(options.steps, options.stop_after or options.steps)
        with ExitStack() as stack:
            bar = stack.enter_context(self._progress_bar(stop))
            log = None
            if options.losses is not None and self.is_speaker:
                options.losses.parent.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(options.losses.open("a" if options.resume else "w"))
            self._say_held_out(bar, FINAL_BATCHES)
            records = []
            while training.step_count < stop:
                record, facts = self._timed_step()
                records.append(record)
                self._show(bar, record, facts)
                if log is not None:
                    print(json.dumps(asdict(record) | facts), file=log, flush=True)
                if record.step < stop:
                    self._between_steps(bar, record.step)
            self._say_held_out(bar, FINAL_BATCHES)
        return records

    def _timed_step(self) -> tuple[StepRecord, dict[str, float]]:
        start = time.perf_counter()
        record = self.training.step()
        seconds = time.perf_counter() - start
        planned, measured = self.model.bubbles()
        return record, {
            "tokens_per_second": self.options.batch_tokens / seconds,
            "planned_bubble": planned,
            "measured_bubble": measured,
        }

    def _between_steps(self, bar: tqdm, step: int) -> None:
        if step % self.options.evaluate_every == 0:
            self._say_held_out(bar)
        if step % self.options.save_every == 0:
            whole = checkpoint.gather(self.training)
            if whole is not None:
                checkpoint.save(whole, self.options.checkpoint)

    def _progress_bar(self, stop: int) -> tqdm:
        return tqdm(
            total=stop,
            initial=self.training.step_count,
            disable=not self.is_speaker,
            unit="step",
            dynamic_ncols=True,
        )

    def _show(self, bar: tqdm, record: StepRecord, facts: dict[str, float]) -> None:
        bar.set_postfix_str(
            f"loss {record.loss:.3f}, {facts['tokens_per_second']:.0f} tokens/s, bubble "
            f"{facts['planned_bubble']:.0%} planned {facts['measured_bubble']:.0%} measured",
            refresh=False,
        )
        bar.update()

    def _say_held_out(self, bar: tqdm, batches: int = 1) -> None:
        loss = self.training.evaluate(batches)
        if self.is_speaker:
            bar.write(f"step {self.training.step_count}: held-out loss {loss:.3f} nats/byte")
