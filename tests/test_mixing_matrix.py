"""Every pair of methods trains and resumes, or is refused with a reason; so do the mixes of three that people want."""

import itertools
import shutil
from pathlib import Path

import pytest
from harness import difference, parameters, train_mix

from trl_ext import MixingError, mix
from trl_ext.core.mixing import list_methods


METHODS = list_methods()
PAIRS = list(itertools.combinations(METHODS, 2))
README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def alone(teacher):
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = train_mix([name], teacher)
        return cache[name]

    return get


@pytest.mark.filterwarnings("ignore::UserWarning")
def check(names, teacher, alone, folder):
    """Whether the mix trains; if not, the refusal must name the methods and the reason."""
    try:
        classes = mix(*names)
    except MixingError as error:
        involved = [name for name in names if mix(name).Trainer.__name__ in str(error)]
        assert len(involved) >= 2, str(error)
        return False
    assert mix(*reversed(names)) == classes
    whole = train_mix(names, teacher, out=folder, save_strategy="steps", save_steps=3)
    assert all(p.isfinite().all() for p in parameters(whole).values())
    for name in names:
        assert difference(whole, alone(name)) > 0, f"{names} trains as {name} alone does"
    resumed = train_mix(names, teacher, out=folder, resume=str(folder / "checkpoint-3"))
    assert difference(whole, resumed) == 0.0
    return True


# One pair at least for every method, and for every pair of joints that interact.
REPRESENTATIVE = [
    ("clip_cov", "spo"),
    ("clip_cov", "kl_cov"),
    ("clip_cov", "ngrpo"),
    ("bnpo", "empg"),
    ("d3s", "disco"),
    ("d3s", "empg"),
    ("dynamic_sampling", "grpo_lambda"),
    ("dynamic_sampling", "spo"),
    ("empg", "knapsack_rl"),
    ("kdrl", "scaf_grpo"),
    ("kl_cov", "llds"),
]


@pytest.mark.parametrize("names", REPRESENTATIVE, ids="+".join)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_representative_pairs(names, teacher, alone, tmp_path):
    assert check(names, teacher, alone, tmp_path) == (names not in REFUSED)


REFUSED = {("clip_cov", "kl_cov"), ("dynamic_sampling", "spo")}


@pytest.mark.parametrize(
    "names",
    [("spo", "clip_cov", "kdrl"), ("knapsack_rl", "empg", "llds"), ("dynamic_sampling", "d3s", "clip_cov")],
    ids="+".join,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mixes_of_three(names, teacher, alone, tmp_path):
    assert check(names, teacher, alone, tmp_path)


@pytest.mark.parametrize("names", [("bnpo", "spo"), ("bnpo", "clip_cov", "spo")], ids="+".join)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_blends_train_and_resume(names, teacher, alone, tmp_path):
    blend = {"spo": 0.5, "bnpo": 0.5}
    whole = train_mix(names, teacher, blend=blend, out=tmp_path, save_strategy="steps", save_steps=3)
    assert all(difference(whole, alone(name)) > 0 for name in names)
    resumed = train_mix(names, teacher, blend=blend, out=tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert difference(whole, resumed) == 0.0


def accepted(names):
    try:
        return bool(mix(*names))
    except MixingError as error:
        assert sum(mix(name).Trainer.__name__ in str(error) for name in names) == 2, str(error)
        return False


def test_the_readme_says_how_many_pairs_train():
    """Those that `mix` accepts; that these train and resume is tested pair by pair below."""
    count = sum(map(accepted, PAIRS))
    assert f"Of the {len(PAIRS)} pairs of methods\n{count} train." in README.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("first", METHODS[:-1])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_pair(first, teacher, alone, tmp_path):
    failures = []
    for names in PAIRS:
        if names[0] == first and accepted(names):
            try:
                assert check(names, teacher, alone, tmp_path / "+".join(names))
            except Exception as error:
                failures.append(f"{'+'.join(names)}: {type(error).__name__}: {error}"[:300])
            shutil.rmtree(tmp_path / "+".join(names), ignore_errors=True)
    assert not failures, "\n".join(failures)
