"""Say how people voted in a run, how steadily, and how often a scorer agrees; or write their votes as a preference data set.

python -m fdfo.votes runs/00000-human-cfg_1p0
python -m fdfo.votes runs/00000-human-cfg_1p0 --scorer pickscore
python -m fdfo.votes runs/00000-human-cfg_1p0 --export my_preferences
"""

import sys

from fdfo.config.command_line import parse_votes_config
from fdfo.config.errors import UserError
from fdfo.config.tool_options import VotesConfig
from fdfo.distributed.launch import run_command_line, start_job


def main() -> None:
    config = parse_votes_config(sys.argv[1:])
    from fdfo.vote_page.desk import VOTES
    from fdfo.vote_page.votes_file import read_votes, standing
    from fdfo.votes.agreement import between_people, everybodys_habits, table, warnings
    from fdfo.votes.dataset import write_dataset

    if not (config.run / VOTES).is_file():
        raise UserError(f"{config.run} has no {VOTES}: name the folder of a run that people judged.")
    votes = read_votes(config.run / VOTES)
    valid = standing(votes)
    if not valid:
        raise UserError(f"{config.run / VOTES} has no vote yet: judge some pairs first.")
    rows = everybodys_habits(votes, scores_of(config, valid))
    pairs, epochs = {(vote.epoch, vote.pair) for vote in valid}, {vote.epoch for vote in valid}
    print(f"{len(valid)} votes on {len(pairs)} pairs of {len(epochs)} epochs in {config.run}\n{table(rows, config.scorer)}")
    print("left: of the votes for one image, those for the one on the left; again: the same choice on a pair shown twice")
    if (people := between_people(votes)).count:
        print(f"two people on the same pair choose alike in {people} of {people.count} pairs")
    for line in warnings(rows):
        print(f"warning: {line}")
    if config.export is not None:
        write_dataset(config.run, valid, config.export)
        print(f"data set: {config.export}")


def scores_of(config: VotesConfig, votes: list) -> dict[tuple[int, int], float]:
    """Return the differences of --scorer on all judged pairs; nothing without one."""
    if config.scorer is None:
        return {}
    from fdfo.votes.dataset import pair_scores
    from rewards.presets import SET_SCORERS
    from rewards.registry import VlmSettings, build_scorers, check_metric_name
    from rewards.scorer import check_prompts

    check_metric_name(config.scorer)
    if config.scorer in SET_SCORERS:
        raise UserError(f"{config.scorer} compares many images of one prompt, and no pair: give another --scorer.")
    with start_job() as job:
        scorers = build_scorers([config.scorer], job, VlmSettings())
        check_prompts(scorers, [vote.prompt for vote in votes])
        return pair_scores(config.run, votes, config.scorer, scorers[config.scorer])


if __name__ == "__main__":
    run_command_line(main)
