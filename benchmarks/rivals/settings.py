"""The methods that tune.py runs, and the settings of each."""

from typing import Literal

Method = Literal["fdfo", "flow_grpo", "diffusion_nft", "fdfo_variants"]
METHODS: tuple[Method, ...] = ("fdfo", "flow_grpo", "diffusion_nft")  # that rival_page.py compares, tuned alike
VARIANTS: Method = "fdfo_variants"
SCRIPTS = {
    "fdfo": ("train.py", "--preset", "tiny-published", "--save-freq", "1000", "--runs-dir"),
    "flow_grpo": ("benchmarks/rivals/flow_grpo.py", "--out"),
    "diffusion_nft": ("benchmarks/rivals/diffusion_nft.py", "--out"),
    VARIANTS: ("benchmarks/rivals/fdfo_variants.py", "--out"),
}
SETTINGS = {  # of METHODS eight each: the defaults, and one change at a time
    "fdfo": {
        "defaults": "",
        "rate-1e-4": "--train.learning-rate 1e-4",
        "rate-3e-4": "--train.learning-rate 3e-4",
        "rate-5e-4": "--train.learning-rate 5e-4",
        "churn-0.01": "--churn.weight 0.01",
        "churn-0.05": "--churn.weight 0.05",
        "clip-0.1": "--train.clip-range 0.1",
        "beta2-0.95": "--train.adam-beta2 0.95",
    },
    "flow_grpo": {
        "defaults": "",
        "rate-1e-4": "--learning-rate 1e-4",
        "rate-1e-3": "--learning-rate 1e-3",
        "noise-0.4": "--noise 0.4",
        "noise-1.0": "--noise 1.0",
        "clip-0.05": "--clip-range 0.05",
        "group-16": "--group 16",
        "steps-4": "--solver-steps 4",
    },
    "diffusion_nft": {
        "defaults": "",
        "rate-1e-4": "--learning-rate 1e-4",
        "rate-1e-3": "--learning-rate 1e-3",
        "beta-0.1": "--beta 0.1",
        "beta-0.3": "--beta 0.3",
        "group-16": "--group 16",
        "levels-2": "--noise-levels 2",
        "old-0.5": "--old-rise 0.5",
    },
    VARIANTS: {
        "defaults": "",
        "branches-4": "--group 4",
        "branches-8": "--group 8",
        "best-of-4": "--group 4 --baseline best-worst",
        "best-of-8": "--group 8 --baseline best-worst",
        "prompt-baseline": "--starts-per-prompt 4 --baseline prompt",
        "fewer-prompts-4": "--starts-per-prompt 4",
        "ema-0.5": "--ema 0.5",
        "ema-0.9": "--ema 0.9",
        "rate-5e-4-ema-0.9": "--learning-rate 5e-4 --ema 0.9",
        "rate-5e-4-falls": "--learning-rate 5e-4 --fall-to 0.1",
        "rate-1e-3-falls": "--learning-rate 1e-3 --fall-to 0.1",
        "rate-5e-4-beta2-0.95": "--learning-rate 5e-4 --adam-beta2 0.95",
        "steps-1": "--optimizer-steps 1",
        "steps-2": "--optimizer-steps 2",
        "steps-8": "--optimizer-steps 8",
        "high-noise": "--noise-weight 1",
        "gain-1": "--gain-power 1",
        "gain-2": "--gain-power 2",
        "clip-0.5-rate-5e-4": "--clip-range 0.5 --learning-rate 5e-4",
        "churn-0.05-clip-0.5": "--churn 0.05 --clip-range 0.5",
        # The gradient's norm is far above 1, so that each step counts alike, however many of its pairs differ in reward.
        "gradient-not-clipped": "--max-grad-norm 1e6",
        # Nothing but d holds v in place, so that what the noise of the gradient does to it adds up.
        "proximal-1000-rate-5e-4": "--proximal 1000 --learning-rate 5e-4",
        "proximal-1000-rate-1e-3": "--proximal 1000 --learning-rate 1e-3",
        "proximal-10000-rate-1e-3": "--proximal 10000 --learning-rate 1e-3",
        # Rewards differ more between starts than between the branches of one.
        "prompt-baseline-8": "--starts-per-prompt 8 --baseline prompt",
        # An average that lags by ten epochs needs a trust region that ten epochs of training do not leave.
        "ema-0.9-clip-1.0": "--ema 0.9 --clip-range 1.0 --ema-eval",
        # A better estimated direction bears longer steps; the falling rate takes their noise out at the end.
        "branches-8-clip-0.5-falls": "--group 8 --clip-range 0.5 --learning-rate 5e-4 --fall-to 0.1",
        "best-of-8-clip-0.5-falls": "--group 8 --baseline best-worst --clip-range 0.5 --learning-rate 5e-4 --fall-to 0.1",
        "low-noise": "--noise-weight -1",
        "steps-16": "--optimizer-steps 16",
        "clip-1.0": "--clip-range 1.0",
        "clip-0.5": "--clip-range 0.5",
        "beta2-0.9": "--adam-beta2 0.9",
        "beta2-0.95": "--adam-beta2 0.95",
        "proximal-1000-rate-5e-4-gain-1": "--proximal 1000 --learning-rate 5e-4 --gain-power 1",
        # From FDFO to DiffusionNFT in steps: the learning rate, the states, the direction, the independent images, the group.
        "rate-1e-3": "--learning-rate 1e-3",
        "fresh": "--states fresh",
        "fresh-rate-1e-3": "--states fresh --learning-rate 1e-3",
        "fresh-residual-twins-rate-1e-3": "--states fresh --twin 0 --residual 1 --learning-rate 1e-3",
        "fresh-residual-2-rate-1e-3": "--states fresh --twin 0 --residual 1 --schedule prior --churn 8 --learning-rate 1e-3",
        "fresh-residual-2-rate-3e-4": "--states fresh --twin 0 --residual 1 --schedule prior --churn 8 --learning-rate 3e-4",
        "fresh-residual-2-near-rate-1e-3": "--states fresh --twin 0 --residual 1 --schedule prior --churn 0.5 --learning-rate 1e-3",
        "fresh-residual-2-proximal-30-rate-1e-3": "--states fresh --twin 0 --residual 1 --schedule prior --churn 8 --proximal 30 "
        "--learning-rate 1e-3",
        "fresh-residual-twins-proximal-30-rate-1e-3": "--states fresh --twin 0 --residual 1 --proximal 30 --learning-rate 1e-3",
        "fresh-residual-2-relative-5-rate-1e-3": "--states fresh --twin 0 --residual 1 --schedule prior --churn 8 --relative-proximal 5 "
        "--learning-rate 1e-3",
        "fresh-residual-twins-relative-5-rate-1e-3": "--states fresh --twin 0 --residual 1 --relative-proximal 5 --learning-rate 1e-3",
        "residual-2-proximal-30-rate-1e-3": "--twin 0 --residual 1 --schedule prior --churn 8 --proximal 30 --learning-rate 1e-3",
        "fresh-residual-8-rate-1e-3": "--states fresh --twin 0 --residual 1 --group 8 --schedule prior --churn 8 --learning-rate 1e-3",
        "residual-8-rate-1e-3": "--twin 0 --residual 1 --group 8 --schedule prior --churn 8 --learning-rate 1e-3",
        # With much churn the final image is not fixed by the latent, so that the trajectory's own states may do.
        "residual-8-churn-0.5-rate-1e-3": "--twin 0 --residual 1 --group 8 --churn 0.5 --learning-rate 1e-3",
        "residual-8-churn-2-rate-1e-3": "--twin 0 --residual 1 --group 8 --churn 2 --learning-rate 1e-3",
        # What the twins say and what the prompt's other images say.
        "both-rate-5e-4": "--residual 3 --starts-per-prompt 4 --learning-rate 5e-4",
        "fresh-both-rate-1e-3": "--states fresh --residual 3 --starts-per-prompt 4 --learning-rate 1e-3",
    },
}
