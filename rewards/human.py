"""`human`: people choose the better image of each pair on a page in the browser; or their recorded votes are used again."""

import json
import math
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch

from fdfo.config.errors import UserError
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.distributed.shutdown import LeaveStage, Stopped
from fdfo.distributed.stages import Stages
from fdfo.storage.atomic_files import write_text
from fdfo.storage.prompts import epoch_prompts
from fdfo.vote_page.desk import VOTES, DeskSettings, VoteDesk
from fdfo.vote_page.votes_file import pair_values, read_votes

LOOK_SECONDS = 0.2  # between two looks at the votes
SHOWN_IMAGES = 8  # of the held-out prompts, on the page
WORDS = {
    "encode": "encoding", "sample": "sampling", "votes": "waiting for votes", "reward": "scoring", "update": "training",
    "checkpoint": "saving", "evaluate": "evaluating",
}  # fmt: skip
Values = dict[int, float]  # R1 - R2 of the pairs of an epoch that have a vote, by their index in the epoch


class HumanJudge:
    """A judge of pairs whose values are votes. Each epoch the trainer opens it, offers pairs while it samples, and waits for votes.

    All ranks call all methods together, but compare() and tell(). Rank 0 alone has the page, and gets the other ranks' images.
    """

    description = "people who choose the better of two images"

    config: TrainConfig
    run: Path  # its folder

    def __init__(self, job: Job):
        self.job = job
        self.desk: VoteDesk | None = None  # on rank 0, if people vote now
        self.recorded: dict[int, Values] | None = None  # votes by epoch, if they do not
        self.epoch, self.pairs = 0, range(0)  # the open epoch, and this rank's pairs of it
        self.values: Values | None = None  # of the open epoch, of all ranks; None while it is judged

    def start(self, config: TrainConfig, run: Path, recorded: dict[int, Values] | None) -> None:
        """Serve the page of a run, or use recorded votes instead. Raises UserError."""
        self.config, self.run, self.recorded = config, run, recorded
        if recorded is None:
            self.job.on_main(self._serve)

    def _serve(self) -> None:
        config = self.config
        twice = config.human_shown_twice
        settings = DeskSettings(config.human_host, config.human_port, config.seed, config.num_epochs, twice)
        self.desk = VoteDesk(self.run, settings)

    @property
    def invitation(self) -> str:
        """A sentence for the console."""
        return f"votes: {self.config.votes}" if self.desk is None else f"judge the pairs at  {self.desk.url}"

    def open_epoch(self, epoch: int, pairs: range, under_way: bool) -> None:
        """Open an epoch, counted from 0; pairs: this rank's. under_way: its update has begun, so its votes are what they were then."""
        self.epoch, self.pairs, self.values = epoch, pairs, None
        if self.recorded is not None:
            self.values = self.recorded[epoch]
        elif under_way:
            self.values = self.job.on_main(lambda: pair_values(read_votes(self.run / VOTES), epoch))
        else:
            total = self.config.total_pairs_per_epoch
            self.job.on_main(lambda: self.desk.open_epoch(epoch, total))

    def offer(self, pairs: range, prompts: list[str], images: torch.Tensor, stages: Stages) -> None:
        """Show some pairs of this rank, none at a rank that has fewer batches: prompts [P], images [2P, 3, H, W] uint8 on the CPU.

        Raises LeaveStage on all ranks if one was asked to stop.
        """
        asked, offered = stages.asked(pairs.stop - self.pairs.start), []
        if self.values is None and pairs:
            offered = list(zip(pairs, prompts, images.unflatten(0, (-1, 2)), strict=True))
        ranks = self.job.gather_objects((asked, offered))
        if any(asked for asked, _ in ranks):
            raise LeaveStage
        if self.values is None:
            self.job.on_main(lambda: [self.desk.offer(*pair) for _, offered in ranks for pair in offered])

    def wait(self, stages: Stages) -> None:
        """Wait until the open epoch is judged. Raises LeaveStage on all ranks if one was asked to stop.

        Raises Stopped on all ranks if nobody has answered for --human-timeout and too few pairs have a vote.
        """
        while self.values is None:
            judged, left, late = self.job.on_main(self._look)
            if any(self.job.gather_objects(stages.asked(judged))):
                raise LeaveStage
            share = judged / self.config.total_pairs_per_epoch
            if late and left and share < self.config.human_enough:
                raise Stopped(
                    f"nobody has voted for {self.config.human_timeout:g} minutes, and {judged} pairs of epoch {self.epoch + 1} have "
                    f"votes, less than --human-enough {self.config.human_enough:g} of them: stopped"
                )
            if late or not left:
                self.values = self.job.on_main(lambda: self.desk.close_epoch())
            else:
                time.sleep(LOOK_SECONDS)

    def _look(self) -> tuple[int, int, bool]:
        """Return how many pairs have a vote, how many votes are missing, and whether people are late with them."""
        late = time.monotonic() - self.desk.last_answer() > 60 * self.config.human_timeout
        return len(self.desk.values()), self.desk.left(), late

    def compare(self, prompts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Return the votes on this rank's pairs of the open epoch, NaN for a pair without one: [P]."""
        assert len(prompts) == len(self.pairs), "people judge the pairs that were offered"
        return torch.tensor([self.values.get(pair, math.nan) for pair in self.pairs])

    def tell(self, stage: str, done: int, total: int, unit: str) -> None:
        """Show on the page what the trainer does now."""
        if self.desk is not None:
            self.desk.tell(WORDS[stage], done, total, unit)

    def tell_evaluation(self, epoch: int, means: dict[str, float], prompts: list[str], images: torch.Tensor) -> None:
        """Show on the page the mean held-out scores after so many epochs, and images [n, 3, H, W] uint8 of the first prompts."""
        if self.desk is not None:
            shown = min(SHOWN_IMAGES, len(images))
            known = {name: mean for name, mean in means.items() if mean is not None}  # null in the log: no image had a score
            self.desk.tell_evaluation(epoch, known, prompts[:shown], images[:shown])

    def close(self) -> None:
        """End the page."""
        if self.desk is not None:
            self.desk.close()


def read_recorded(path: Path, config: TrainConfig, prompts: list[str], done: int) -> dict[int, Values]:
    """Return the values of the epochs that are not done yet from a file of votes, by epoch counted from 0. prompts: to train on.

    Raises UserError unless they are votes on the pairs of this run, for all of its epochs.
    """
    votes = [vote for vote in read_votes(path) if vote.epoch < config.num_epochs]
    advice = "replay votes with the settings of the run in which they were given"
    if other := {vote.seed for vote in votes} - {config.seed}:
        raise UserError(f"{path} has votes for the seed {min(other)}, and --seed is {config.seed}: {advice}.")
    total, values = config.total_pairs_per_epoch, {}
    for epoch in range(config.num_epochs):
        own, shown = [vote for vote in votes if vote.epoch == epoch], epoch_prompts(prompts, epoch, total, config.seed)
        for vote in own:
            if vote.pair >= total or shown[vote.pair] != vote.prompt:
                raise UserError(f"{path} has a vote on another prompt for pair {vote.pair} of epoch {epoch + 1}: {advice}.")
        values[epoch] = pair_values(own, epoch)
    if missing := [epoch + 1 for epoch in range(done, config.num_epochs) if not values[epoch]]:
        raise UserError(
            f"{path} has no votes for epoch {missing[0]}: set --num-epochs to {missing[0] - 1}, or leave --votes out."
        )
    return values


def set_aside_votes(run: Path, done: int) -> None:
    """Keep in a run's votes.jsonl only those on the epochs done and the next one, whose images a changed setting leaves as they are.

    The whole file is kept under another name. Raises UserError.
    """
    path = run / VOTES
    if not path.exists():
        return
    votes = read_votes(path)
    kept = [vote for vote in votes if vote.epoch <= done]
    if len(kept) < len(votes):
        try:
            shutil.copyfile(path, run / f"abandoned-{time.strftime('%Y%m%d-%H%M%S')}-{VOTES}")
            write_text(path, "".join(json.dumps(asdict(vote), ensure_ascii=False) + "\n" for vote in kept))
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): make room, then resume.") from error
