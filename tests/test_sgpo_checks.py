"""What SGPO refuses before any stage is begun, from the launcher and from Python."""

import pytest

from helpers import tiny_llama
from sgpo_rows import command, write_inputs
from test_sgpo_trainer import config, dpo_trainer
from trainers import SGPOTrainer
from trainers.cli import train


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


REFUSED = [
    ({"eval_strategy": "steps", "eval_steps": 1}, "eval_strategy='steps' would evaluate nothing.* in quotes"),
    ({"eval_on_start": True}, "eval_on_start=True would evaluate nothing"),
    ({"do_eval": True}, "do_eval=True would evaluate nothing"),
    ({"save_strategy": "best"}, "save_strategy='best' would evaluate nothing"),
    ({"save_only_model": True}, "save_only_model=True leaves out what a killed stage needs"),
    ({"precompute_ref_logps": True}, "precompute_ref_logps=True does not work with the stages"),
    ({"resume_from_checkpoint": "runs/old"}, "resume_from_checkpoint='runs/old' has no effect"),
    ({"hub_model_id": "me/policy"}, "hub_model_id='me/policy' has no effect: upload output_dir"),
    ({"improver": {"optim": "no_such"}}, "improver: .*no_such"),
    ({"scorer": "sgpo_rows.consonants"}, "scorer: .*consonants"),
    ({"scorer": "no_lab.score"}, "scorer: .*no_lab"),
    ({"scorer": "./no-folder"}, "scorer='./no-folder' cannot be read: name a folder with a model"),
    ({"reviser": "local", "reviser_model": "./no-folder"}, "reviser_model='./no-folder' cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize("changes, message", REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_what_would_do_nothing_or_fail_later_is_refused_at_once(inputs, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train.main(command(inputs, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_a_dry_run_refuses_the_same_options(inputs, tmp_path):
    with pytest.raises(ValueError, match="eval_strategy='steps' would evaluate nothing"):
        train.main(command(inputs, tmp_path, eval_strategy="steps", eval_steps=1, dry_run=True))


def test_options_of_the_stages_are_refused_from_python(tmp_path):
    options = {"rounds": 2, "sampling": {"max_new_tokens": 5}, "policy_weight": 0.5, "preference_split": "train"}
    for name, value in options.items():
        with pytest.raises(ValueError, match=f"^{name} would have no effect: SGPOTrainer is the DPO stage alone"):
            dpo_trainer(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="^ref='initial' has no effect without ref_model"):
        dpo_trainer(tmp_path, ref="initial")
    args = config(tmp_path, **options, max_length=600)
    with pytest.raises(ValueError, match="^rounds, sampling, policy_weight, preference_split would have"):
        SGPOTrainer(tiny_llama(50), args=args)
    own = args.of_dpo(tmp_path / "dpo", 7)
    assert own.of_other_stages() == [] and args.rounds == 2
    assert (own.output_dir, own.seed, own.improver["max_length"]) == (str(tmp_path / "dpo"), 7, 1200)
    assert args.of_dpo().seed == args.seed and args.of_dpo().output_dir == args.output_dir
