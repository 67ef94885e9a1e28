"""Flags and records: every flag is checked, written to a file and read again without a change."""

import dataclasses
import pathlib
import subprocess
import sys

import pytest

from robust_tf.config.attack import AttackConfig
from robust_tf.config.job import JobConfig, read_flag_file
from robust_tf.config.study import parse_study
from robust_tf.errors import UserError
from robust_tf.flags import flag, flat_fields, flat_values, parse_flags, parse_number, record, to_flag_file, to_text

CACHED = ["--task=transfer", "--source=x.keras", "--features=cached"]
CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.cfg"))


def config_of(tmp_path: pathlib.Path, *flags: str) -> JobConfig:
    path = tmp_path / "job.cfg"
    path.write_text("\n".join(flags))
    return read_flag_file(path)


def test_the_documented_configs_exist():
    assert {"quickstart", "fashion_mnist_l2", "pets", "imagenet_resnet50_l2_eps3"} <= {path.stem for path in CONFIGS}


def _has_grid(study: pathlib.Path, name: str) -> bool:
    """Whether a study has the grid of another flag file."""
    return any(name in line for line in study.read_text().splitlines() if line.startswith("--also="))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_parses_and_is_documented(path, tmp_path):
    lines = path.read_text().splitlines()
    if any(line.startswith(("--vary", "--also")) for line in lines):
        grid = parse_study(["study", f"--flagfile={path}"]).grids[0]
        assert grid.axes
    else:
        config = read_flag_file(path)
        written = tmp_path / "flags.cfg"
        written.write_text(to_flag_file(config))
        assert read_flag_file(written) == config
    header = "\n".join(line for line in lines if line.startswith("#"))
    # The exact command. A grid that is part of another study shows the command of that study.
    names = [path.name, *(other.name for other in CONFIGS if _has_grid(other, path.name))]
    assert any(f"--flagfile=configs/{name}" in header for name in names)
    assert "not yet run" in header.lower() or "%" in header  # the figures of a run, or a statement that there are none
    assert len(lines) <= 40


def test_all_kinds_of_values_survive_a_flag_file(tmp_path):
    config = JobConfig.from_flags(
        task="transfer",
        source="resnet50_l2_eps3",
        classes=(5, 6, 7),
        epsilon=8 / 255,
        norm="linf",
        examples_per_class=10,
        deterministic=True,
        learning_rate_multipliers=("stem=0.1", "head=10"),
        lr_milestones=(30, 60),
    )
    (tmp_path / "flags.cfg").write_text(to_flag_file(config))
    assert read_flag_file(tmp_path / "flags.cfg") == config
    assert config.optimization.multipliers == {"stem": 0.1, "head": 10.0}


PRESETS = {
    "fgsm": {
        "attack_steps": 1,
        "attack_step_size": 1.25 * 0.5,
        "random_start": True,
        "use_best": False,
        "attack_mode": "training",
    },
    "free": {
        "attack_mode": "inference",
        "attack_steps": 1,
        "attack_step_size": 0.5,
        "random_start": False,
        "use_best": False,
        "free_replays": 4,
    },
    "epsilon_warmup": {"attack_mode": "inference", "attack_steps": 7, "use_best": True, "epsilon_warmup_epochs": 6.0},
    "none": {
        "attack_mode": "inference",
        "attack_steps": 7,
        "attack_step_size": None,
        "random_start": False,
        "use_best": True,
    },
}
GIVEN = {
    "fgsm": {"attack_step_size": 0.25, "random_start": False, "use_best": True, "alarm_every_epochs": 3},
    "free": {"attack_step_size": 0.25, "free_replays": 2},
    "epsilon_warmup": {"attack_steps": 2, "epsilon_warmup_epochs": 0.5},
    "none": {"attack_steps": 2, "random_start": True, "use_best": False},
}


@pytest.mark.parametrize("fast", PRESETS)
def test_recipes_decide_the_flags_that_are_left_out(tmp_path, fast):
    common = {"epsilon": 0.5, "epochs": 12, "fast": fast}
    for given in ({}, GIVEN[fast]):
        config = JobConfig.from_flags(**common, **given)
        expected = {**PRESETS[fast], **given}
        resolved = config.resolved()
        assert expected.items() <= flat_values(resolved).items()
        path = tmp_path / "flags.cfg"
        path.write_text(to_flag_file(resolved))
        assert read_flag_file(path) == resolved == resolved.resolved()
        assert not config.differences(resolved)
        lines = path.read_text().splitlines()
        assert all(f"--{name}={to_text(value)}" in lines for name, value in expected.items() if value is not None)
    typed = config_of(tmp_path, "--epsilon=0.5", "--epochs=12", f"--fast={fast}")
    assert typed == JobConfig.from_flags(**common)


@pytest.mark.parametrize("fast", PRESETS)
def test_a_workdir_of_an_older_version_belongs_to_the_same_flag_file(tmp_path, fast):
    """Its flags.cfg holds every value, including those that the recipe decided, and a former spelling."""
    flags = ["--epsilon=0.5", "--epochs=12", f"--fast={fast}"]
    job = config_of(tmp_path, *flags)
    decided = [f"--{name}={to_text(value)}" for name, value in PRESETS[fast].items() if value is not None]
    older = config_of(tmp_path, *flags, *decided, "--plan_utilisation=0.35")
    assert older.differences(job) == job.differences(older) == []
    assert older.resolved() == job.resolved()
    assert older.differences(job.with_flags(use_best=not job.adversarial.training_attack.use_best, fast="none"))


def test_flags_written_by_a_program_are_not_announced_as_renamed(tmp_path, capsys):
    config_of(tmp_path, "--dry_run", "--plan_devices=A100", "--plan_utilisation=0.5")
    assert capsys.readouterr().err == ""
    job, _ = parse_flags(JobConfig, ["train", "--dry_run", "--plan_devices=A100", "--plan_utilisation=0.5"])
    assert job.plan.plan_utilization == 0.5
    assert "--plan_utilisation is now called --plan_utilization" in capsys.readouterr().err


def test_the_standard_twin_of_an_older_workdir_is_the_same_job():
    """The twin keeps the attack flags that the recipe of its robust job decided."""
    twin = JobConfig.from_flags(epsilon=0.5, epochs=12, fast="fgsm").standard_twin()
    older = JobConfig.from_flags(
        epochs=12,
        eval_epsilon=0.5,
        attack_steps=1,
        attack_step_size=0.625,
        random_start=True,
        use_best=False,
        attack_mode="inference",
    )
    assert older.differences(twin) == []


def test_trades_uses_the_last_iterate_by_default():
    assert not JobConfig.from_flags(epsilon=1.0, objective="trades").adversarial.training_attack.use_best
    assert JobConfig.from_flags(epsilon=1.0, objective="trades_awp", use_best=True).adversarial.training_attack.use_best
    assert JobConfig.from_flags(epsilon=1.0, objective="awp").adversarial.training_attack.use_best


@pytest.mark.parametrize(
    ("settings", "gradients"),
    [
        ({"epsilon": 0.0}, 1),
        ({}, 8),
        ({"fast": "fgsm"}, 2),
        ({"fast": "fgsm", "objective": "awp"}, 3),
        ({"fast": "free"}, 4),
        ({"fast": "free", "free_replays": 8}, 8),
        ({"fast": "epsilon_warmup"}, 8),
        ({"objective": "trades"}, 9),
        ({"objective": "awp"}, 9),
        ({"objective": "trades_awp"}, 11),
        ({"objective": "awp", "awp_warmup_epochs": 5.0}, 8.5),  # in half of the epochs
    ],
)
def test_each_recipe_counts_its_gradients(settings, gradients):
    assert JobConfig.from_flags(**{"epsilon": 1.0, "epochs": 10, **settings}).gradients_per_image == gradients


def test_validation_uses_several_steps_and_the_whole_epsilon():
    """A network that has overfitted to a single-step attack looks best under that attack."""
    for fast in ("fgsm", "free"):
        attack = JobConfig.from_flags(epsilon=0.3, fast=fast).adversarial.validation_attack
        assert attack == AttackConfig(norm="l2", epsilon=0.3, step_size=2.5 * 0.3 / 3, steps=3)
    for settings in ({"fast": "epsilon_warmup"}, {"objective": "trades"}, {"random_start": True}):
        adversarial = JobConfig.from_flags(epsilon=0.3, **settings).adversarial
        attack = adversarial.training_attack
        assert adversarial.validation_attack == attack and attack.epsilon == 0.3


@pytest.mark.parametrize(
    "recipe",
    [
        {"objective": "trades_awp", "trades_beta": 2.0, "awp_gamma": 0.1, "awp_warmup_epochs": 2.0},
        {"fast": "free", "free_replays": 5},
        {"fast": "epsilon_warmup", "on_alarm": "stop", "select_by": "robust_accuracy"},
        {"fast": "fgsm"},
    ],
)
def test_the_standard_twin_of_any_recipe_is_a_valid_job(tmp_path, recipe):
    config = JobConfig.from_flags(epsilon=0.5, eval_epsilon=0.25, epochs=10, **recipe)
    twin = config.standard_twin()
    assert not twin.adversarial.training_attack.active
    assert twin.adversarial.evaluation_attack == config.adversarial.evaluation_attack
    assert (twin.adversarial.objective, twin.adversarial.fast, twin.data_epochs) == ("adversarial", "none", 10)
    (tmp_path / "flags.cfg").write_text(to_flag_file(twin))
    assert read_flag_file(tmp_path / "flags.cfg") == twin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inner:
    seed: int = flag(0, "A seed.")
    steps: int = flag(1, "Steps.", formerly="step_count")


def test_a_name_that_two_flags_share_is_an_error():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Twice:
        seed: int = flag(1, "Another seed.")
        step_count: int = flag(1, "Another number of steps.")
        inner: Inner = record(Inner, "Inner")

    with pytest.raises(TypeError, match="Twice repeats seed, step_count"):
        flat_fields(Twice)


def test_records_are_flattened_and_put_together_again():
    names = [field.name for field in flat_fields(JobConfig)]
    assert names[0] == "task" and len(names) > 80
    job = JobConfig.from_flags(epsilon=0.5, dataset="pets", seed=3)
    assert (job.adversarial.epsilon, job.data.dataset, job.run.seed) == (0.5, "pets", 3)
    assert JobConfig.from_flags(**flat_values(job)) == job
    assert job.with_flags(seed=4, dataset="digits").run.seed == 4
    with pytest.raises(TypeError, match="JobConfig has no flag epsiln"):
        JobConfig.from_flags(epsiln=1.0)


def test_help_lists_every_flag_below_the_heading_of_its_record(capsys):
    with pytest.raises(SystemExit):
        parse_flags(JobConfig, ["train", "--help"], "Usage")
    out = capsys.readouterr().out
    assert all(f"  --{field.name}: " in out for field in flat_fields(JobConfig))
    positions = [out.index(f"\n{heading}:\n") for heading in ("Job", "Data", "Optimization", "Plan")]
    assert positions == sorted(positions)
    assert out.index("\nData:\n") < out.index("  --cache_dir: ") < out.index("\nNetwork and transfer:\n")
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("arguments", [["--help"], ["--epslon=1"], ["--norm=linf", "--epsilon=8"]])
def test_help_and_wrong_flags_do_not_wait_for_tensorflow(arguments):
    code = (
        "import sys; from robust_tf import train\n"
        "try: train.main(['train', *sys.argv[1:]])\n"
        "except (SystemExit, ValueError): pass\n"
        "assert not {'tensorflow', 'keras', 'numpy', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_overrides_win_over_the_flag_file(tmp_path):
    (tmp_path / "job.cfg").write_text("--epsilon=1\n--epochs=3\n")
    config = read_flag_file(tmp_path / "job.cfg", ["--epsilon=0"])
    assert (config.adversarial.epsilon, config.optimization.epochs) == (0.0, 3)


@pytest.mark.parametrize(("text", "value"), [("8/255", 8 / 255), ("0.5", 0.5), ("1e-3", 1e-3), ("2", 2.0)])
def test_numbers_and_fractions_are_read(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text", ["1/0", "two", "__import__('os')", "8/255/2"])
def test_other_text_is_not_a_number(text):
    with pytest.raises(UserError, match="fraction such as 8/255"):
        parse_number(text)


def test_attacks_have_the_usual_step_sizes_by_default():
    config = JobConfig.from_flags(norm="linf", epsilon=8 / 255, attack_steps=10, eval_steps=50)
    assert config.adversarial.training_attack.step_size == pytest.approx(2.5 * 8 / 255 / 10)
    assert config.adversarial.evaluation_attack.epsilon == 8 / 255
    assert config.adversarial.evaluation_attack.step_size == pytest.approx(2.5 * 8 / 255 / 50)
    assert JobConfig.from_flags(epsilon=0.0, eval_epsilon=1.0).adversarial.evaluation_attack.epsilon == 1.0


def test_differences_have_both_values_and_skip_flags_that_do_not_change_the_job():
    first = JobConfig.from_flags(epsilon=1.0, workdir="a", export_dir="b")
    second = first.with_flags(epsilon=0.5, workdir="c", export_dir="d")
    assert first.differences(second) == ["--epsilon: 1.0 -> 0.5"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--norm=l3"], "Received: 'l3'. Did you mean 'l2'"),
        (["--norm=linf", "--epsilon=8"], "Did you mean 8/255"),
        (["--epsilon=-1"], "--epsilon=-1"),
        (["--epsilon=1", "--attack_step_size=0"], "--attack_step_size=0.0"),
        (["--epsilon=1", "--attack_steps=-1"], "--attack_steps must be 0 or more. Received: -1"),
        (["--eval_epsilon=-1"], "--eval_epsilon=-1"),
        (["--learning_rate_multipliers=stem=x"], "--learning_rate_multipliers: A number.*Received: 'x'"),
        (["--epsilon=x"], "Received: 'x'"),
        (["--epslon=1"], "Did you mean: epsilon"),
        (["--epochs=0"], "--epochs must be 1 or more. Received: 0"),
        (["--epochs=ten"], "epochs=ten"),
        (["--batch_size=-3"], "Received: -3"),
        (["--learning_rate=0"], "Received: 0.0"),
        (["--learning_rate=nan"], "Received: nan"),
        (["--seed=4294967296"], "--seed must be below 2**32. Received: 4294967296".replace("*", r"\*")),
        (["--weight_decay=nan"], "--weight_decay must be 0 or more. Received: nan"),
        (["--warmup_epochs=inf"], "Received: inf"),
        (["--momentum=1"], "--momentum must be below 1. Received: 1.0"),
        (["--lr_decay=-0.1"], "Received: -0.1"),
        (["--lr_schedule=piecewise", "--lr_milestones=3,0"], "Received: 3,0"),
        (["--optimizer=sdg"], "Did you mean 'sgd'"),
        (["--epsilon=1", "--attack_steps=0"], "Received: --attack_steps=0"),
        (["--flagfile=nowhere.cfg"], "job.cfg: Unable to open flagfile"),
        (["--validation_fraction=1"], "Received: 1.0"),
        (["--classes=a,b"], "Received: a,b"),
        (["--classes=5,,6"], "--classes takes integers with commas between them. Received: 5,,6"),
        (["--task=transfer"], "--source=none"),
        (["--source=resnet50_l2_eps3"], "--source=resnet50_l2_eps3"),
        (["--baseline"], "--task=pretrain"),
        (["--task=transfer", "--source=x.keras", "--transfer_mode=partial"], "--freeze_through=''"),
        (["--task=transfer", "--source=x.keras", "--freeze_through=stage1"], "'stage1'"),
        (["--task=transfer", "--source=x.keras", "--transfer_mode=fixed"], "Did you mean 'fixed_feature'"),
        (["--task=transfer", "--source=x.keras", "--unfreeze_at_epoch=10"], "Received: 10"),
        (["--lr_schedule=piecewise"], "--lr_milestones"),
        (["--lr_peak=1"], "Received: 1.0"),
        (["--select_by=robust_accuracy"], "--epsilon=0"),
        (["--objective=trade"], "Did you mean 'trades'"),
        (["--fast=fgsn"], "Did you mean 'fgsm'"),
        (["--objective=trades"], "--objective=trades --fast=none needs an attack in training. Received: --epsilon=0"),
        (["--fast=free"], "Received: --epsilon=0"),
        (["--fast=epsilon_warmup", "--epsilon=1", "--attack_steps=0"], "--attack_steps=0"),
        (["--epsilon=1", "--trades_beta=3"], "--trades_beta is for --objective=trades and trades_awp. Received: --tra"),
        (["--epsilon=1", "--objective=trades", "--awp_gamma=0.1"], "--awp_gamma is for --objective=awp"),
        (["--epsilon=1", "--objective=trades", "--trades_beta=-1"], "Received: -1.0"),
        (["--epsilon=1", "--objective=trades", "--trades_beta=nan"], "Received: nan"),
        (["--epsilon=1", "--objective=awp", "--awp_gamma=inf"], "Received: inf"),
        (["--epsilon=1", "--objective=awp", "--awp_warmup_epochs=10"], "less than the 10 epochs"),
        (["--epsilon=1", "--objective=trades", "--random_start"], "--random_start with --objective=trades"),
        (["--epsilon=1", "--free_replays=8"], "--free_replays is for --fast=free. Received: --free_replays=8"),
        (["--epsilon=1", "--fast=free", "--free_replays=0"], "--free_replays must be 1 or more. Received: 0"),
        (["--epsilon=1", "--fast=free", "--attack_steps=3"], "--attack_steps=3"),
        (["--epsilon=1", "--fast=free", "--random_start"], "--random_start with --fast=free"),
        (["--epsilon=1", "--fast=free", "--use_best"], "--use_best with --fast=free"),
        (["--epsilon=1", "--fast=free", "--objective=awp"], "--objective=awp --fast=free"),
        (["--epsilon=1", "--fast=fgsm", "--objective=trades"], "--objective=trades --fast=fgsm"),
        (["--epsilon=1", "--fast=fgsm", "--attack_steps=7"], "--attack_steps=7"),
        (["--epsilon=1", "--epsilon_warmup_epochs=3"], "--epsilon_warmup_epochs is for --fast=epsilon_warmup"),
        (["--epsilon=1", "--fast=epsilon_warmup", "--epsilon_warmup_epochs=11"], "at most the 10 epochs. Received: 11"),
        (["--epsilon=1", "--fast=epsilon_warmup", "--epsilon_warmup_epochs=0"], "Received: 0"),
        ([*CACHED, "--objective=awp"], "--epsilon=0"),
        (["--learning_rate_multipliers=stem"], "Received: 'stem'"),
        (["--patience=-1"], "--patience must be 0 or more. Received: -1"),
        (["--patience=3", "--select_by=last"], "--patience=3 --select_by=last"),
        (["--class_weight=balance"], "Did you mean 'balanced'"),
        (["--epsilon=1", "--objective=trades", "--class_weight=balanced"], "--class_weight=balanced with --objective"),
        ([*CACHED, "--head=lbfgs", "--patience=2"], "--head=lbfgs needs --patience=0. Received: 2"),
        ([*CACHED, "--head=ridge", "--class_weight=balanced"], "needs --class_weight=none. Received: balanced"),
        (["--epsilon=1", "--on_alarm=stop", "--alarm_every_epochs=11"], "within the 10 epochs.*alarm_every_epochs=11"),
        (["--unfreeze_at_epoch=3"], "--unfreeze_at_epoch=3 --task=pretrain"),
        (["--hidden_layers=1"], "--hidden_layers is for --task=transfer. Received: --hidden_layers=1"),
        (
            ["--task=transfer", "--source=x.keras", "--transfer_mode=full_network", "--unfreeze_at_epoch=3"],
            "--unfreeze_at_epoch=3 --transfer_mode=full_network",
        ),
        (["--precision=mixed_fp16"], "Did you mean 'mixed_float16'"),
        (["--rand_augment=1.5"], "Received: 1.5"),
        (["--mixing=mix"], "Did you mean 'mixup'"),
        (["--attack_mode=train", "--epsilon=1"], "Did you mean 'training'"),
        (["--attack_mode=training", "--objective=trades", "--epsilon=1"], "--attack_mode=training with"),
        (["--attack_mode=training"], "--epsilon=0"),
        (["--downscale=0"], "--downscale must be 1 or more. Received: 0"),
        (["--downscale=32", "--export_dir=e"], "--downscale=32 --export_dir=e"),
        (["--subset=10", "--examples_per_class=3"], "--subset=10 --examples_per_class=3"),
        (["--subset=10%"], "Received: '10%'"),
        (["--cache=ram"], "Received: 'ram'"),
        (["--views=2"], "--views is for --features=cached. Received: --views=2"),
        (["--head=ridge"], "--head is for --features=cached. Received: --head=ridge"),
        (["--features=cached"], "needs --task=transfer. Received: pretrain"),
        ([*CACHED, "--views=0"], "--views must be 1 or more. Received: 0"),
        ([*CACHED, "--views=3", "--augmentation=none"], "--views=3 --augmentation=none"),
        ([*CACHED, "--transfer_mode=full_network"], "needs --transfer_mode=fixed_feature. Received: full_network"),
        ([*CACHED, "--frozen_batchnorm=update"], "needs --frozen_batchnorm=frozen. Received: update"),
        ([*CACHED, "--head=lbfgs", "--hidden_layers=1"], "--head=lbfgs needs --hidden_layers=0. Received: 1"),
        ([*CACHED, "--epsilon=0.5"], "Received: --epsilon=0.5"),
        ([*CACHED, "--unfreeze_at_epoch=3"], "Received: 3"),
        ([*CACHED, "--features_cache_size_gb=0"], "Received: 0.0"),
    ],
)
def test_wrong_values_are_named_in_the_message(tmp_path, flags, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace("?", r"\?")):
        config_of(tmp_path, *flags)


def test_a_missing_flag_file_is_named():
    with pytest.raises(UserError, match="nowhere.cfg"):
        read_flag_file(pathlib.Path("nowhere.cfg"))
