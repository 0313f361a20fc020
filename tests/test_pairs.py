"""Judges of pairs: their contract, their place in the reward, runs that are judged by one, and what evaluations then hold."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import log_of, small

from fdfo.config.errors import UserError
from fdfo.distributed.job import Job
from fdfo.evaluation.health import check_first_scores
from fdfo.method.trainer import train
from fdfo.report.html import write_report
from fdfo.run_folder.start import find_start
from rewards.registry import build_scorers, is_pair_judge, reward_weights
from rewards.scorer import Offload, WeightedReward

JUDGE = "tests.pair_judges:SceneDifference"


def judge_of(name: str, job: Job) -> WeightedReward:
    weights = {f"tests.pair_judges:{name}": 2.0}
    return WeightedReward(weights, build_scorers(weights, job), filter(is_pair_judge, weights))


def test_half_of_a_value_is_each_images_score(job: Job):
    reward, images, prompts = judge_of("LeavesOut", job), torch.rand(8, 3, 64, 64), ["a red ring on a blue background"] * 8
    (scores,) = reward.score(prompts, images).values()
    scene = build_scorers(["scene"], job)["scene"].score(prompts, images).view(4, 2) / 100
    expected = (scene[:, 0] - scene[:, 1]).index_fill(0, torch.tensor([0, 3]), math.nan)
    pairs = scores.view(4, 2)
    torch.testing.assert_close(pairs[:, 0] - pairs[:, 1], expected, equal_nan=True)
    assert torch.equal(pairs[1:3, 0], -pairs[1:3, 1]) and reward.judges and not reward.of_images


@pytest.mark.parametrize(
    "name,says", [("TooSure", "gave a pair the value 1.5: return numbers from -1 to 1"), ("OneForAll", r"\(2, 4\) for 4 pairs")]
)
def test_a_judge_that_breaks_the_contract_is_named(job: Job, name: str, says: str):
    with pytest.raises(UserError, match=says):
        judge_of(name, job).score(["a red ring on a blue background"] * 8, torch.rand(8, 3, 64, 64))


def test_a_judge_that_knows_only_ties_is_told_at_once(job: Job, tmp_path: Path):
    with pytest.raises(UserError, match="AlwaysTie called all 6 pairs a tie: fix the judge"):
        train(job, small(tmp_path, reward_specs=("tests.pair_judges:AlwaysTie=1",)))
    check_first_scores({"human": [0.0, -0.0] * 3}, ["human"])  # people may


def test_a_judge_learns_what_a_scorer_with_these_differences_learns(job: Job, tmp_path: Path):
    """But for rounding: a scorer's two weighted scores are subtracted, a judge's value is halved twice."""
    scored = train(job, small(tmp_path, reward_specs=("scene=0.01",), num_epochs=2))
    judged = train(job, small(tmp_path, reward_specs=(f"{JUDGE}=1",), num_epochs=2))
    one, two = (load_file(run.folder / "checkpoints" / "epoch-0000002" / "adapter_model.safetensors") for run in (scored, judged))
    change = sum(tensor.square().sum() for name, tensor in one.items() if "lora_B" in name).sqrt()  # they start at 0
    difference = sum((one[name] - two[name]).square().sum() for name in one if "lora_B" in name).sqrt()
    print(f"the change of the adapter differs by {difference / change:.2e}")
    assert change > 0 and difference < 1e-3 * change
    for ours, theirs in zip(log_of(judged.folder, "epoch"), log_of(scored.folder, "epoch"), strict=True):
        assert ours["reward_difference"] == pytest.approx(theirs["reward_difference"], rel=1e-4)
        assert "reward_mean" not in ours and ours["scores"] == {} and ours["unjudged_pairs"] == 0
        assert "unjudged_pairs" not in theirs


def test_a_run_with_a_judge_is_evaluated_by_scorers_alone(job: Job, tmp_path: Path, capsys):
    """A judge beside a scorer, and alone; a resume finds the evaluations that it expects; the report and the console have no reward."""
    base = small(tmp_path, eval_prompts=4, eval_every=1, save_freq=1, eval_metrics=("scene_clip", "scene"))
    config = dataclasses.replace(base, reward_specs=("tests.pair_judges:LeavesOut=1",))
    run = train(job, config)
    (_, last), (epoch,) = log_of(run.folder, "eval"), log_of(run.folder, "epoch")
    assert set(last["scores"]) == {"scene_clip", "scene"} and epoch["unjudged_pairs"] == epoch["dropped_pairs"] == 2
    assert not [text for text in epoch["warnings"] if "dropped" in text]
    assert set(log_of(run.folder, "start")[0]["scorers"]) == {"tests.pair_judges:LeavesOut", "scene_clip", "scene"}
    out = capsys.readouterr().out
    assert "every 1 epochs: scene_clip, scene\n" in out and "reward 0" not in out and "after epoch 1: scene_clip" in out
    again = train(job, dataclasses.replace(config, num_epochs=2), find_start(str(run.folder)))
    assert [line["epoch"] for line in log_of(again.folder, "eval")] == [0, 1, 2]
    assert "Training reward" not in write_report(run.folder).read_text().split("<script")[0]
    assert "1 tests.pair_judges:LeavesOut" in (run.folder / "checkpoints" / "epoch-0000001" / "README.md").read_text()
    mixed = train(job, dataclasses.replace(base, reward_specs=("scene_clip=1", f"{JUDGE}=0.5"), eval_metrics=("scene",)))
    line = log_of(mixed.folder, "eval")[-1]
    assert set(line["scores"]) == {"reward", "scene_clip", "scene"} and line["means"]["reward"] == line["means"]["scene_clip"]
    assert log_of(mixed.folder, "epoch")[0]["scores"].keys() == {"scene_clip"} and log_of(mixed.folder, "epoch")[0]["reward_mean"]


def test_a_judge_is_no_metric(run_cli, tmp_path: Path):
    for name in ("human", "vlm_pair", JUDGE):
        code, _, err = run_cli("metrics", "--preset", "tiny", "--metrics", name)
        assert code == 2 and f"{name} compares the two images of a pair, so it is a reward and no metric: leave it out" in err
        code, _, err = run_cli("train", "--preset", "tiny", "--eval-metrics", name, "--runs-dir", tmp_path)
        assert code == 2 and "so it is a reward and no metric" in err
    assert reward_weights("vlm_pair", ()) == {"vlm_pair": 1.0}


def test_a_judges_model_waits_in_host_memory(job: Job):
    class Linear:
        model = torch.nn.Linear(3, 1)

        def compare(self, prompts: list[str], first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return self.model((first - second).mean((2, 3)))[:, 0].detach().tanh()

    from rewards.pairs import PairScores

    scorer, images = PairScores("mine", Linear()), torch.rand(4, 3, 8, 8)
    offloaded = Offload(job.device)(scorer)
    assert offloaded is not scorer and torch.equal(offloaded.score(["a"] * 4, images), scorer.score(["a"] * 4, images))
