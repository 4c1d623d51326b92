"""The numbers of tests/test_losses.py, from the code that they come from, beside ours.

    pip install -r experiments/requirements.txt    # in an environment of its own
    python experiments/golden.py

Calls the loss functions of verl and TRL, where they are installed, on the fixed batch of the tests,
in float64: loss, and sum of |d loss / d logp|. Ends with an error if one is not the stored number.
Nothing is installed or downloaded here. Repositories that are not on PyPI are named with their
stored numbers: their functions were run once, in the same way.
"""
import importlib
import importlib.metadata
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # some packages install a `tests` of their own

import test_losses as tests  # noqa: E402
from losses import OBJECTIVES  # noqa: E402

VERL_NAMES = {"dapo": "vanilla", "gmpo": "geo_mean"}  # where theirs is not ours
VERL_BANDS = {"dapo": (.2, .28), "gspo": (3e-4, 4e-4), "gmpo": (.4, .4),
              "cispo": (1.0, .3), "dppo_tv": (.15, .15), "dppo_kl": (.05, .05)}
VERL_CORRECTIONS = {"tis": ("token", 2.0), "icepop": ("token", "0.5_5.0"),
                    "seq_tis": ("sequence", 2.0)}


def verl_loss(name, logp, arguments):
    """verl's policy loss, configured as our defaults and `arguments` say."""
    algos = importlib.import_module("verl.trainer.ppo.core_algos")
    configs = importlib.import_module("verl.workers.config.actor")
    low, high = VERL_BANDS.get(name, (.2, .2))
    config = configs.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=arguments.get("eps_low", low),
        clip_ratio_high=arguments.get("eps_high", high),
        clip_ratio_c=arguments.get("dual_clip", 20.0 if name.startswith("dppo") else 10.0),
        policy_loss=configs.PolicyLossConfig(
            clip_cov_ratio=arguments.get("k", 2e-4), clip_cov_lb=arguments.get("cov_low", 1.0),
            kl_cov_ratio=arguments.get("k", .002), ppo_kl_coef=1.0, dro_beta=.1))
    adv = tests.ADV[:, None] * tests.MASK
    agg = arguments.get("agg", OBJECTIVES[name].agg)
    weights = None
    if "correction" in arguments:
        helper = importlib.import_module("verl.trainer.ppo.rollout_corr_helper")
        level, threshold = VERL_CORRECTIONS[arguments["correction"]]
        weights, _ = helper.compute_rollout_correction_weights(
            tests.P_OLD.log() - tests.SAMPLER_LOGP, tests.MASK, level, threshold)
    theirs = algos.get_policy_loss_fn(VERL_NAMES.get(name, name))
    return theirs(tests.P_OLD.log(), logp, adv, tests.MASK, agg, config, weights)[0]


def trl_loss(name, logp, arguments):
    """TRL's loss is a method of its trainer: called on an object that has what it reads."""
    trainer = importlib.import_module("trl.trainer.grpo_trainer").GRPOTrainer
    accelerator = SimpleNamespace(
        num_processes=1, gather=torch.clone, reduce=lambda t, reduction: t)
    args = SimpleNamespace(
        delta=arguments.get("delta"), steps_per_generation=1, use_bias_correction_kl=False,
        sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0)
    self = SimpleNamespace(
        loss_type=name, args=args, accelerator=accelerator, beta=0.0,
        _metrics={"train": defaultdict(list)}, model=SimpleNamespace(training=True),
        epsilon_low=.2, epsilon_high=.2,
        importance_sampling_level="sequence" if name == "luspo" else "token",
        top_entropy_quantile=1.0, aux_loss_enabled=False,
        off_policy_mask_threshold=arguments.get("correction_args", {}).get("delta"),
        use_vllm=False, current_gradient_accumulation_steps=1,
        max_completion_length=arguments.get("max_len"), _entropy_bonus_enabled=False,
        get_gamma_weights=trainer.get_gamma_weights,
        get_off_policy_mask=trainer.get_off_policy_mask,
        _get_per_token_logps_and_entropies=lambda *a, **kw: (logp, tests.ENTROPY, None))
    none = torch.zeros(4, 0)
    inputs = dict(
        prompt_ids=none, prompt_mask=none, completion_ids=tests.MASK, completion_mask=tests.MASK,
        advantages=tests.ADV, old_per_token_logps=tests.P_OLD.log(),
        sampling_per_token_logps=tests.SAMPLER_LOGP,
        num_items_in_batch=tests.MASK.sum())
    return trainer._compute_loss(self, None, inputs)


def installed(package):
    """The version, or the reason why there is none."""
    try:
        importlib.import_module({"verl": "verl.trainer.ppo.core_algos",
                                 "trl": "trl.trainer.grpo_trainer"}[package])
        return importlib.metadata.version(package), None
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


def main():
    official = {}  # the source as the tests name it -> the function that asks it
    for package, source, ask in (("verl", tests.VERL, verl_loss), ("trl", tests.TRL, trl_loss)):
        version, missing = installed(package)
        wanted = source.split(",")[0]
        print(f"{wanted}: {'installed ' + version if version else 'not asked, ' + missing}")
        if version:
            official[source] = ask

    wrong = 0
    print(f"\n{'':14s}{'':44s}{'stored':>30s}{'official, now':>30s}{'ours':>30s}")
    for source, name, arguments, loss, grad_sum in tests.GOLDEN:
        now = "not on PyPI" if source not in (tests.VERL, tests.TRL) else "not installed"
        if source in official:
            logp = (tests.P_OLD.log() + tests.RATIO.log()).requires_grad_()
            value = official[source](name, logp, arguments)
            grad = torch.autograd.grad(value, logp)[0].abs().sum()
            now = f"{value.item():.10f} {grad.item():.10f}"
            if abs(value.item() - loss) > 1e-7 or abs(grad.item() - grad_sum) > 1e-7:
                now += " !"
                wrong += 1
        ours, our_grad, _ = tests.golden_run(name, arguments)
        settings = " ".join(f"{key}={value}" for key, value in arguments.items())
        print(f"{name:14s}{settings:44s}{f'{loss:.10f} {grad_sum:.10f}':>30s}{now:>30s}"
              f"{f'{ours.item():.10f} {our_grad.abs().sum().item():.10f}':>30s}   {source}")
    if wrong:
        raise SystemExit(f"{wrong} official numbers are not the stored ones (marked !)")


if __name__ == "__main__":
    main()
