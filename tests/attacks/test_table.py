"""The table of attacks: what each entry says is true of its attack."""

import pytest

from robust_tf.attacks.autoattack import VERSIONS
from robust_tf.attacks.losses import LOSSES
from robust_tf.attacks.table import ATTACKS, check_attacks, title_of
from robust_tf.attacks.threat_models import NORMS
from robust_tf.errors import UserError


@pytest.mark.parametrize("norm", [*NORMS, "l3"])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_table_names_the_norms_that_each_attack_takes(name, norm):
    """An attack checks its norm before its radius, and both before anything else."""
    with pytest.raises(UserError) as raised:
        ATTACKS[name](None, None, None, norm=norm, epsilon=-1.0, seed=0)
    assert ("epsilon=-1" in str(raised.value)) == (norm in ATTACKS[name].norms)
    if norm in NORMS and norm not in ATTACKS[name].norms:
        with pytest.raises(UserError, match=f"attack {name} supports the norms linf and l2. Received: norm='{norm}'"):
            check_attacks([name], norm)
    else:
        check_attacks([name], norm)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_entry_names_a_known_loss_and_a_cost(name):
    assert ATTACKS[name].loss is None or ATTACKS[name].loss in LOSSES
    assert ATTACKS[name].forward_passes > 0


def test_the_versions_of_autoattack_run_attacks_of_the_table():
    assert {name for names in VERSIONS.values() for name in names} <= set(ATTACKS)


def test_a_cascade_is_called_by_the_titles_of_its_attacks():
    assert title_of("pgd+square") == "PGD-20 (any wrong iterate)+square"
