"""Prepares a training run: checks everything, loads everything, and only then makes or opens the run folder."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fdfo.config.errors import UserError
from fdfo.config.plan import BatchPlan, plan_batches
from fdfo.config.presets import judged_by_people
from fdfo.config.train_options import TrainConfig
from fdfo.distributed.job import Job
from fdfo.distributed.launch import check_device
from fdfo.distributed.sharding import needs_sharding
from fdfo.evaluation.health import Health
from fdfo.evaluation.heldout import HeldOut, PromptSplit, prepare_held_out, split_prompts
from fdfo.evaluation.statistics import REWARD
from fdfo.method.learner import Learner, Progress
from fdfo.model.flow_model import FlowModel
from fdfo.model.memory import expected_memory
from fdfo.run_folder.find_checkpoint import Checkpoint, guidance_warning
from fdfo.run_folder.folder import check_log, check_writable, open_folder
from fdfo.run_folder.log import RunLog
from fdfo.run_folder.save_checkpoint import TrainingState, changed_settings, damaged, load_checkpoint
from fdfo.run_folder.start import AUTO, Start
from fdfo.storage.prompts import prompts_hash
from fdfo.vote_page.server import listen
from rewards.human import HumanJudge, read_recorded, set_aside_votes
from rewards.presets import HUMAN, VLM_SCORERS, VLM_TRAINING_SCORERS
from rewards.registry import VlmSettings, build_scorers, check_metric_name, is_pair_judge, reward_weights
from rewards.scorer import Judges, WeightedReward, check_prompts


@dataclass
class Run:
    """Everything that a training run holds between epochs."""

    job: Job
    config: TrainConfig
    folder: Path
    log: RunLog
    plan: BatchPlan
    prompts: list[str]  # to train on
    learner: Learner
    judges: Judges
    held_out: HeldOut | None
    health: Health
    changed: dict[str, tuple[object, object]]  # settings that a resume has changed: before and now, by dotted name
    first_epoch: int  # index of the first epoch that this process does from its start
    compile_seconds: float | None  # None if nothing is compiled

    @property
    def model(self) -> FlowModel:
        return self.learner.model

    @property
    def progress(self) -> Progress:
        return self.learner.progress

    @property
    def people(self) -> HumanJudge | None:
        """The people who judge the pairs, if any do."""
        scorer = self.judges.reward.scorers.get(HUMAN)
        return None if scorer is None else scorer.judge


def prepare(job: Job, config: TrainConfig, start: Start) -> Run:
    """Prepare a run. Raises UserError."""
    check_device(config.precision, job.device)
    plan = plan_batches(config, job.world_size)
    weights = reward_weights(config.reward_preset, config.reward_specs)
    split = job.on_main(lambda: split_prompts(config))
    for metric in config.eval_metrics if split.held_out else ():
        check_metric_name(metric)
    check_writable(start.run or config.runs_dir)
    if judged_by_people(config) and config.votes is None:
        job.on_main(lambda: listen(config.human_host, config.human_port).close())  # long before the page is served
    state, changed, evaluated, recorded = None, {}, set(), None
    if start.resumed:
        state = load_checkpoint(start.checkpoint)
        changed = changed_settings(config, start.run, state)
    if start.run is not None:
        names = evaluated_names(weights, config)
        evaluated = job.on_main(lambda: check_log(start.run, config, state, split.held_out, names))
    if state is not None:
        check_remaining(config, start, state, split, evaluated)
    if config.votes is not None:
        recorded = job.on_main(lambda: read_recorded(config.votes, config, split.training, state.epochs if state else 0))
    model = load_model(job, config, start.checkpoint)
    compile_seconds = accelerate(job, config, plan, model)
    learner = Learner.start(model, config)
    if state is not None:
        restore(learner, start, state)
    judges = build_judges(job, config, weights, split)
    held_out = prepare_held_out(job, config, model, split.held_out, judges)
    progress = learner.progress
    reached = (progress.epochs, len(progress.steps))
    folder = open_folder(job, config, start, reached, changed)
    log = RunLog(folder, config, reached, job.is_main)
    health = Health(config.precision, log.gradient_norms)
    first_epoch = progress.epochs + (1 if progress.steps else 0)
    run = Run(
        job, config, folder, log, plan, split.training, learner, judges, held_out, health, changed, first_epoch, compile_seconds,
    )  # fmt: skip
    if run.people is not None:
        if changed:
            job.on_main(lambda: set_aside_votes(folder, progress.epochs))
        run.people.start(config, folder, recorded)
    return run


def evaluated_names(weights: dict[str, float], config: TrainConfig) -> set[str]:
    """Return the names of an evaluation's scores. Judges of pairs score no single image, so they are not among them."""
    of_images = {name for name in weights if not is_pair_judge(name)}
    return {*config.eval_metrics, *of_images} | ({REWARD} if of_images else set())


def check_remaining(config: TrainConfig, start: Start, state: TrainingState, split: PromptSplit, evaluated: set[int]) -> None:
    """Raise UserError if a run to resume was trained on other prompts, or if nothing is left to do. evaluated: epochs."""
    if state.prompts != prompts_hash(split.training):  # the order of prompts depends on their place in the set
        raise UserError(
            f"The prompts to train on are not those of {start.checkpoint.folder}: restore the prompt file, or start a new run."
        )
    done = state.epochs == config.num_epochs and (not split.held_out or state.epochs in evaluated)
    if state.epochs > config.num_epochs or (done and config.resume_from != AUTO):
        raise UserError(f"{start.run} has {state.epochs} epochs already: give a larger --num-epochs to continue.")


def restore(learner: Learner, start: Start, state: TrainingState) -> None:
    """Restore the learner of a run to resume. Raises UserError if its state does not fit."""
    try:
        learner.restore(state)
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(start.checkpoint, error) from error


def build_judges(job: Job, config: TrainConfig, weights: dict[str, float], split: PromptSplit) -> Judges:
    """Build all scorers of the run, and check that they can judge its prompts. Raises UserError.

    The scorers of evaluations alone leave the GPU between two calls, and so do all with --offload-scorers. A VLM stays otherwise,
    since a sharded one cannot leave.
    """
    metrics = config.eval_metrics if split.held_out else ()
    alone = [name for name in metrics if name not in weights]
    offloaded = {*weights, *metrics} if config.offload_scorers else {*alone} - {*VLM_SCORERS, *VLM_TRAINING_SCORERS}
    vlm = VlmSettings(config.vlm_model_name, config.vlm_use_fsdp)
    scorers = build_scorers(dict.fromkeys((*weights, *metrics)), job, vlm, offloaded)
    reward = WeightedReward(weights, {name: scorers[name] for name in weights}, filter(is_pair_judge, weights))
    judges = Judges(reward, {name: scorers[name] for name in alone})
    check_prompts(reward.scorers, split.training)
    check_prompts(reward.of_images | judges.metrics, split.held_out)
    return judges


def load_model(job: Job, config: TrainConfig, checkpoint: Checkpoint | None) -> FlowModel:
    """Load the base model onto its device, with a fresh LoRA or the checkpoint's. Raises UserError if they do not fit."""
    model = FlowModel(config.pretrained_model, config.precision, job.device)
    model.latent_shape(config.sample.resolution)
    if model.family.distilled(model.name):
        job.print(
            f"warning: {model.name} is distilled to few steps; reinforcement blurs what such models draw: train the base model instead"
        )
    if checkpoint is None:
        model.add_lora(config.lora_rank, config.lora_alpha, config.seed)
    else:
        model.load_adapter(checkpoint.adapter, config.seed)
        lora = model.peft.peft_config["default"]
        if (lora.r, lora.lora_alpha) != (config.lora_rank, config.lora_alpha):
            raise UserError(
                f"The adapter in {checkpoint.adapter} has rank {lora.r} and alpha {lora.lora_alpha}: give --lora-rank {lora.r} "
                f"--lora-alpha {lora.lora_alpha}."
            )
        if warning := guidance_warning(checkpoint, config.sample.guidance_scale, "--sample.guidance-scale"):
            job.print(warning)
    if needs_sharding(job, [part for part in model.pipe.components.values() if isinstance(part, torch.nn.Module)]):
        model.shard(job)
        job.print(
            f"the transformer is spread over {job.world_size} processes, since one GPU cannot hold it; its blocks are recomputed"
        )
    model.to_device(text_encoders=not config.memory_efficient)
    if config.gradient_checkpointing:
        model.checkpoint_gradients()
    return model


def accelerate(job: Job, config: TrainConfig, plan: BatchPlan, model: FlowModel) -> float | None:
    """Make the model fast; return the seconds that compiling took. If compiling fails on a rank, warn and leave that rank eager.

    A transformer that is spread over the job stays eager.
    """
    compiled = config.compile and job.device.type == "cuda" and model.lockstep is None
    rows = plan.train_batch if compiled else None
    start = time.perf_counter()
    try:
        failure = model.accelerate(rows, config.sample.resolution)
    except torch.OutOfMemoryError:  # the trial before the first epoch finds the size that fits
        failure = None
    failures = {rank: reason for rank, reason in enumerate(job.gather_objects(failure)) if reason is not None}
    if failures:
        rank = min(failures)
        job.print(
            f"warning: compiling failed on {len(failures)} of {job.world_size} processes, which continue uncompiled and slower; on rank "
            f"{rank}: {failures[rank]}"
        )
    return None if rows is None or failures else round(time.perf_counter() - start, 1)


def announce(run: Run) -> None:
    """Print what the run trains, on what, and how."""
    job, config, held_out = run.job, run.config, run.held_out
    parameters = run.model.trainable()
    count = sum(p.numel() for p in parameters)
    rewards = " + ".join(f"{weight:g} {name}" for name, weight in run.judges.reward.weights.items())
    job.print(
        f"model: {config.pretrained_model} ({config.precision}) on {job.device.type}, LoRA of {len(parameters) // 2} modules, {count:,} parameters"
    )
    job.print(f"reward: {rewards}; {len(run.prompts)} prompts; churn {config.churn.schedule}")
    if held_out is None:
        job.print("evaluation: none, no prompts are held out (--eval-prompt-set or --eval-prompts gives some)")
    else:
        job.print(
            f"evaluation: {len(held_out.prompts)} held-out prompts, {held_out.repeats} image(s) each, every {config.eval_every} epochs: "
            f"{', '.join((*(['the reward'] if run.judges.reward.of_images else []), *held_out.metrics)) or 'images alone'}"
        )
    job.print(run.plan.describe())
    job.print(expected_memory(job, config, run.model, run.plan))
    job.print(f"run folder: {run.folder}")
    if run.people is not None:
        job.print(run.people.invitation)
