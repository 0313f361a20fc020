"""--gradient-checkpointing, --offload-scorers, --offload-trajectories and the preset for 24 GB: less memory, the same numbers."""

import contextlib
import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU, moved
from test_training import comparable, small
from tiny_qwen import save_tiny_qwen

import fdfo.model.acceleration
import fdfo.model.flow_model
from fdfo.config.command_line import parse_train_config
from fdfo.config.errors import UserError
from fdfo.config.plan import plan_batches
from fdfo.config.presets import PRESETS
from fdfo.config.train_options import SampleConfig, TrainConfig
from fdfo.distributed.job import Job
from fdfo.method.rollout import PairShare, sample_share
from fdfo.method.trainer import train
from fdfo.model.flow_model import FlowModel
from fdfo.model.memory import expected_memory, fits, trajectory_bytes, trajectory_storage
from fdfo.run_folder.find_checkpoint import find_checkpoint
from fdfo.run_folder.start import find_auto_start
from rewards.registry import build_scorer
from rewards.scorer import Offload
from rewards.vlm.judge import Vlm, VlmScorer

FLAGS = dict(gradient_checkpointing=True, offload_scorers=True, offload_trajectories=True)


def forward_and_backward(model: FlowModel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Velocity as sampling has it, as training has it, its gradient, and the numbers that the graph kept outside of blocks."""
    generator, kept = torch.Generator().manual_seed(0), []
    x = torch.randn(5, *model.latent_shape(64), generator=generator)
    sigma, text = torch.rand(5, generator=generator), model.encode(["a red ring on a blue background"] * 5)
    with torch.no_grad():
        sampled = model.velocity(x, sigma, text, None, 1.0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        trained = model.velocity(x, sigma, text, None, 1.0)
    trained.float().square().sum().backward()
    return sampled, trained.detach(), torch.cat([p.grad.flatten() for p in model.trainable()]), sum(kept)


@pytest.mark.parametrize(
    "precision,backend", [("fp32", None), ("bf16", None), ("fp32", "aot_eager")], ids=["fp32", "autocast", "compiled"]
)
def test_checkpointing_changes_no_bit_and_keeps_little(precision: str, backend: str | None):
    results = []
    for checkpointed in (False, True):
        model = moved("tiny", precision, rank=8)
        if checkpointed:
            model.checkpoint_gradients()
        if backend is not None:
            model.compiled_rows = 2
            model.pipe.transformer.transformer_blocks[0].compile(dynamic=False, backend=backend)
        results.append(forward_and_backward(model))
    (_, plain, gradient, kept), (sampled, trained, checkpointed_gradient, kept_less) = results
    assert torch.equal(trained, plain) and torch.equal(checkpointed_gradient, gradient) and gradient.abs().max() > 0
    assert torch.equal(sampled, trained)  # so that the ratio at unchanged weights is 1
    assert kept_less < kept / 20


def test_blocks_are_computed_again_as_they_were_computed(monkeypatch: pytest.MonkeyPatch):
    """The backward finds the same choice of attention kernels and the same autocast as the forward."""
    inside, seen = [False], []

    @contextlib.contextmanager
    def fast_attention(device: torch.device):
        before, inside[0] = inside[0], True
        yield
        inside[0] = before

    for module in (fdfo.model.acceleration, fdfo.model.flow_model):
        monkeypatch.setattr(module, "fast_attention", fast_attention)
    model = moved("tiny", "bf16", rank=8)
    model.checkpoint_gradients()
    attention = model.pipe.transformer.transformer_blocks[1].attn
    attention.register_forward_pre_hook(lambda *unused: seen.append((inside[0], torch.is_autocast_enabled("cpu"))))
    forward_and_backward(model)
    assert seen == [(True, True)] * 3  # sampling; training; training's backward


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(
            sample=SampleConfig(num_solver_steps=4, resolution=64, guidance_scale=2.0),
            train=dataclasses.replace(PRESETS["tiny-published"].train, kl_weight=0.5),
            reward_specs=("scene=1.0", "scene_clip=0.5"),
        ),
    ],
    ids=["plain", "guidance and KL"],
)
def test_epochs_with_all_flags_are_the_same_to_the_bit(job: Job, tmp_path: Path, changes: dict):
    plain = train(job, small(tmp_path / "plain", num_epochs=2, **changes))
    little = train(job, small(tmp_path / "little", num_epochs=2, **changes, **FLAGS))
    assert comparable(little.folder) == comparable(plain.folder)
    for one, two in zip(plain.model.trainable(), little.model.trainable(), strict=True):
        assert torch.equal(one, two)
    first = next(line for line in comparable(little.folder) if line["kind"] == "step")
    assert first["ratio_first"] == 1.0


def test_a_run_goes_on_with_other_flags(job: Job, tmp_path: Path):
    config = small(tmp_path / "straight", num_epochs=2, save_freq=1)
    straight = train(job, config)
    parts = dataclasses.replace(config, runs_dir=tmp_path / "parts")
    first = train(job, dataclasses.replace(parts, num_epochs=1)).folder
    start = find_auto_start(dataclasses.replace(parts, **FLAGS))
    assert start.checkpoint == find_checkpoint(str(first))
    resumed = train(job, dataclasses.replace(parts, **FLAGS), start)
    assert comparable(resumed.folder) == comparable(straight.folder)


def test_trajectories_lie_where_the_trial_before_the_first_epoch_puts_them(job: Job, tmp_path: Path, tiny: FlowModel):
    gpu = torch.device("cuda", 0)
    assert trajectory_storage(TrainConfig(), gpu) == gpu
    assert trajectory_storage(TrainConfig(offload_trajectories=True), gpu) == CPU
    tiny.add_lora(8, 16, 0)
    config = small(tmp_path, **FLAGS)
    assert fits(job, config, tiny, plan_batches(config, 1)) and all(p.grad is None for p in tiny.trainable())


def test_an_offloaded_scorer_scores_alike(job: Job):
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    prompts = ["a red ring on a blue background"] * 4
    scorer = build_scorer("scene_clip", job)
    plain = scorer.score(prompts, images)
    offloaded = Offload(CPU)(scorer)
    assert offloaded is not scorer and offloaded.description == scorer.description
    assert torch.equal(offloaded.score(prompts, images), plain)
    assert not hasattr(offloaded, "check_prompts")


def test_what_has_no_model_on_the_device_stays_where_it_is(job: Job):
    """The scene scorer has none; a text is none; a model that its owner keeps elsewhere is not moved."""
    scene, remote, elsewhere = build_scorer("scene", job), SimpleNamespace(model="gpt-4o"), build_scorer("scene_clip", job)
    offload = Offload(torch.device("meta"))
    assert offload(scene) is scene and offload(remote) is remote and offload(elsewhere) is elsewhere


def test_scorers_of_one_judge_share_its_place(job: Job, tmp_path: Path):
    vlm = Vlm(str(save_tiny_qwen(tmp_path)), job)
    offload = Offload(CPU)
    one, two = (offload(VlmScorer(vlm, question, "training")) for question in ("Is it red?", "Is it blue?"))
    assert one.weights is two.weights and one.vlm is vlm


def test_a_sharded_judge_cannot_be_offloaded(tmp_path: Path):
    with pytest.raises(UserError, match="add --no-vlm-use-fsdp"):
        Vlm(str(save_tiny_qwen(tmp_path)), Job(0, 2, CPU), shard=True, whole=True)


def test_the_preset_learns_as_the_fast_one_does():
    """It differs from that preset in memory alone, but for the smaller judge."""
    config = parse_train_config(["--preset", "sd35-medium-24gb"])
    different = {
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(PRESETS["sd35-medium-fast"], field.name)
    }
    assert different == {*FLAGS, "preset", "max_batch_size", "vlm_model_name", "vlm_use_fsdp"}
    plan = plan_batches(config, 1)
    assert plan.samples == 2160 and plan.gradient_steps == 4 and "432 pairs per epoch" in plan.describe()
    assert plan.sample_batch == plan.train_batch == 4


def test_the_preset_says_that_it_needs_a_gpu(run_cli):
    code, _, err = run_cli("train", "--preset", "sd35-medium-24gb", "--prompt-set", "showcase")
    assert code == 2 and "There is no GPU here" in err


def test_the_summary_tells_what_the_trajectories_take(job: Job, tmp_path: Path, tiny: FlowModel):
    config = small(tmp_path)
    plan, prompts = plan_batches(config, 1), ["a red ring on a blue background"] * 6
    share = PairShare(0, range(6), prompts, *tiny.encode_prompts(prompts, config.sample.guidance_scale))
    rollout = sample_share(tiny, config, plan, share)
    held = rollout.xs.nbytes + rollout.velocities.nbytes
    assert trajectory_bytes(config, tiny, plan) == held
    text = expected_memory(job, config, tiny, plan)
    assert text == f"memory: {held / 2**20:.1f} MiB per process for an epoch's trajectories, beside the models"
