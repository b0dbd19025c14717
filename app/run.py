"""One run, from its settings to its directory: the same code over every Grid."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from logging import WARNING
from typing import Any

import torch
from flwr.app import ConfigRecord
from flwr.common.logger import log
from flwr.serverapp import Grid

from app import checkpoint, network_plots
from app.best import prune
from app.by_class import label_counts
from app.callbacks import Callback, stops
from app.config import load
from app.driver import keeps_files, strategy
from app.errors import UserError
from app.exchange import exchange
from app.host import Setting, objective, setting, trainer
from app.joining import wait_for_clients
from app.network_check import check_kept
from app.outer import outer
from app.records import read_rounds
from app.resume import describe, find_unfinished, new_directory, stand
from app.rounds import Rounds
from app.rundir import RunDir, claim
from app.summary import chosen, clients_block, line, summarize, training_block
from strategies import individual
from strategies.engine import unfit
from strategies.objective import Objective
from strategies.pushsum import Unbalanced
from strategies.relay import Relay
from strategies.wire import pack

Say = Callable[[str], None]


class Run:
    """A run under way.

    Parameters
    ----------
    overrides : sequence of str
        Its settings, as Hydra overrides.
    callbacks : sequence of Callback
        Called after each round with its record, besides those of ``stop``.
    say : callable
        Where the lines for a person go.

    Attributes
    ----------
    federation : Federation
        The strategy; its vectors are the run's state.
    directory : RunDir
        Where everything is written.

    Raises
    ------
    UserError
        If the settings, the data or the directory to resume do not do.
    """

    def __init__(
        self,
        overrides: Sequence[str],
        callbacks: Sequence[Callback] = (),
        say: Say = print,
    ) -> None:
        self.overrides = tuple(overrides)
        self.config = load(self.overrides)
        self.say = say
        torch.set_num_threads(self.config.threads)
        self.setting: Setting = setting(self.overrides)
        self.test = self.setting.test()
        check_kept(self.config, len(self.setting.dataset.test), say)
        self.objective: Objective = objective(self.config, self.setting.dataset)
        if self.config.engine == "vmap" and (why := unfit(self.objective)):
            raise UserError(f"engine=vmap: {why}; use engine=auto")
        local = trainer(self.config, self.objective)
        if why := local.optimizer.unfit(self.objective):
            raise UserError(f"optimizer={self.config.optimizer.name}: {why}")
        if why := individual.unfit(local):
            raise UserError(f"strategy={self.config.strategy.name}: {why}")
        self.federation = strategy(self.config, local)
        self.rounds = Rounds(self.federation, self.config, say)
        self.outer = outer(self.federation, self.config, say)
        theta = self.federation.server["theta"]
        self.remembers = bool(local.fresh(theta)) or self.outer is not None
        judged, classes = len(self.test.y), self.setting.dataset.classes
        self.callbacks = [*stops(self.config.stop, judged, classes), *callbacks]
        self.records: list[dict[str, Any]] = []
        self.first, self.stopped = 1, ""
        self.directory = self._resume() if self.config.resume else self._create()

    # Where it is written.

    def _create(self) -> RunDir:
        config = self.config
        dataset = self.setting.dataset
        names = config.strategy.name, config.data.name
        directory = new_directory(config, *names, data=dataset.digest())
        if dataset.classes and self.setting.parts:
            labels = dataset.train.y.cpu().numpy()
            counts = label_counts(labels, self.setting.parts, dataset.classes)
            directory.labels(counts, dataset.labels)
        return directory

    def _resume(self) -> RunDir:
        path = find_unfinished(self.config, self.setting.dataset.digest())
        lock = claim(
            path
        )  # before the checkpoint is read: nobody may write a later one
        try:
            round_ = stand(path, self.federation, self.rounds, self.outer, self.config)
            directory = RunDir.reopen(path, round_, lock, describe(self.config))
        except BaseException:
            lock.close()
            raise
        self.first, self.records = round_ + 1, read_rounds(path)
        # No callback sees the model before the first round.
        for record in self.records[1:]:
            self.stopped = self._ask_callbacks(record)
        return directory

    # The rounds.

    def __call__(self, grid: Grid) -> dict[str, Any]:
        """Run all rounds over a grid.

        Returns
        -------
        dict
            The summary that is also in the directory.

        Raises
        ------
        UserError
            If the clients do not join in time.
        """
        # Also of a run that fails, TensorBoard's log is written out.
        with contextlib.closing(self.directory):
            return self._all(grid)

    def _all(self, grid: Grid) -> dict[str, Any]:
        config, began = self.config, time.perf_counter()
        if keeps_files(config, grid, self.remembers):
            self.federation.state_dir = str(self.directory.path / "clients")
        self.say(f"run directory: {self.directory.path}")
        wait_for_clients(grid, self.federation.roster, config, self.say)
        if self.first == 1:
            self._write({"round": 0, **self._evaluate()})
        elif self.outer and not self.stopped:
            path, last = self.directory.path, self.records[-1]
            if self.outer.catch_up(grid, last, path):
                self.directory.replace(last)
        for round_ in range(self.first, config.rounds + 1):
            if self.stopped:
                break
            try:
                record, rows = self._round(grid, round_)
            except Unbalanced as error:
                raise UserError(f"round {round_}: {error}") from error
            self.stopped = self._ask_callbacks(record)
            if self.stopped and self.outer and "personal" not in record:
                place = self.directory.path
                self.outer.after(grid, round_, record, place, stopped=True)
            self._write(record)
            self.directory.clients(rows)
            self._checkpoint(round_)
            self.say(line(record, config.rounds, self._pace(began, round_)))
        self._evaluate_clients(grid)
        summary = {
            "status": self.stopped or "finished",
            "name": self.directory.path.name,
            **summarize(config, self.records),
            "clients": self._clients(),
            "seconds": time.perf_counter() - began,
        }
        if self.outer:
            self.outer.settle(grid, summary)
        self.say(self.directory.finish(summary, self._tensors()))
        if isinstance(self.federation, Relay):
            place = self.directory.path
            network_plots.draw(
                self.federation.network, self.records, place / "network.png", place.name
            )
        self.say(f"run directory: {self.directory.path}")
        return summary

    def _round(
        self, grid: Grid, round_: int
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Take one round and return its record and its clients' rows."""
        began = time.perf_counter()
        federation = self.federation
        record: dict[str, Any] = {"round": round_}
        if self.outer:
            self.outer.before_round(round_)
        taken = self.rounds.take(grid, round_)
        if taken.anew:
            record["reset"] = taken.anew
        if taken.attempts > 1:
            record["attempts"] = taken.attempts
        told = federation.round
        rows = [told.rows[k] for k in sorted(told.rows)]
        every = self.config.evaluate_every
        if (every and round_ % every == 0) or round_ == self.config.rounds:
            record |= self._evaluate()
        told_by = clients_block(rows)
        if best := chosen(self.records, round_, told_by):
            told_by["chosen"] = best
        record["clients"] = told_by | {
            "cohort": told.accepted,
            "failed": {str(k): why for k, why in told.failed.items()},
        }
        record["bytes"] = {"down": dict(taken.down), "up": dict(taken.up)}
        total, wire = time.perf_counter() - began, taken.wire
        busy = min(told.busy, wire)
        record["seconds"] = {
            "round": total,
            "client": busy,
            "wire": wire - busy,
            "server": total - wire,
        }
        if training := training_block(rows):
            record["training"] = training
        record["gradients"] = taken.gradients
        record["engine"] = "+".join(sorted(told.engines))
        record["strategy"] = federation.norms()
        record["checks"] = {} if told.gap is None else {"memory_gap": told.gap}
        if told.gap is not None and told.gap > 1e-2:
            log(
                WARNING,
                "round %s: server and clients' memories differ (%.1e)",
                round_,
                told.gap,
            )
        if self.outer:
            self.outer.after(grid, round_, record, self.directory.path)
        return record, rows

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate every model worth a name on the test set; the first is reported."""
        test = self.test
        if not len(test.y):
            return {}
        models = {}
        for name, theta in self.federation.algorithm.models(
            self.federation.server
        ).items():
            place = theta.to(test.x.device), self.federation.buffers.to(test.x.device)
            models[name] = self.objective.evaluate(*place, test.x, test.y)
        reported = next(iter(models))
        return {**models[reported], "reported_model": reported, "models": models}

    def _evaluate_clients(self, grid: Grid) -> None:
        """Let the clients evaluate the final model; the rows carry the round after the last."""
        if self.config.evaluate_clients == "none":
            return
        federation = self.federation
        last = self.records[-1]["round"] + 1
        arrays = pack({"theta": federation.server["theta"]})
        messages = federation.configure_evaluate(last, arrays, ConfigRecord(), grid)
        replies = exchange(grid, messages, self.config.deadline)
        federation.aggregate_evaluate(last, replies)
        rows = federation.round.rows
        self.directory.clients([rows[k] for k in sorted(rows)])

    def _clients(self) -> dict[str, Any]:
        """Return what the clients measured in the end, and in the round that validation chose."""
        found = clients_block(list(self.federation.round.rows.values()))
        best = chosen(self.records, self.records[-1]["round"] + 1, found)
        if found and isinstance(self.federation, Relay):
            found["judge"] = self.federation.algorithm.judge
        return {**found, "chosen": best} if best else found

    def _ask_callbacks(self, record: dict[str, Any]) -> str:
        """Show the record to the callbacks, add their metrics, and return why to stop."""
        why = ""
        for callback in self.callbacks:
            stop, metrics = callback(record)
            record.setdefault("callbacks", {}).update(metrics)
            if stop:
                why = why or getattr(callback, "reason", "stopped")
        return why

    def _pace(self, began: float, round_: int) -> float:
        """Return the seconds that a round has taken so far, all included."""
        return (time.perf_counter() - began) / (round_ - self.first + 1)

    def _write(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.directory.round(record)

    def _checkpoint(self, round_: int) -> None:
        every = self.config.checkpoint_every
        if every and round_ % every == 0:
            vectors, rest = self.federation.state()
            rest |= {"outer": self.outer.state()} if self.outer else {}
            rest |= {"to_begin_anew": sorted(self.rounds.lost)}
            folder = self.directory.path / "checkpoints"
            keep = self.config.checkpoint_keep
            self.directory.sync()
            oldest = checkpoint.save(folder, round_, vectors, rest, keep)
            self.federation.keep = oldest
            if self.outer:
                best = self.outer.best.get("round", 0)
                prune(self.directory.path, oldest, best)
        elif not every:
            self.federation.keep = round_

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return the server's model by the module's names."""
        theta, buffers = self.federation.server["theta"], self.federation.buffers
        named = self.objective.layout.named(theta)
        named |= self.objective.buffer_layout.unflatten(buffers)
        return {n: t.clone() for n, t in named.items()}
