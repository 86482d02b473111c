"""The command recipes: every row with its source, and as JSON all that makes a recipe of it again."""

import json
from dataclasses import replace

import pytest

from isthmus import records
from isthmus.cli.work import rate_for_batch
from isthmus.errors import RecipeError
from isthmus.train.recipe import Recipe
from isthmus.train.recipes import RECIPES, recipe


def test_table(isthmus):
    result = isthmus("recipes")
    assert (result.status, result.err) == (0, "")
    rows = {
        line.split()[0]: line for line in result.out.splitlines() if line.split()[:1] and line.split()[0] in RECIPES
    }
    assert list(rows) == list(RECIPES)
    assert rows["rsb-a1"].split()[:5] == ["rsb-a1", "600", "2048", "resnet50", "80.4"]
    assert "Goyal et al. 2017" in rows["he-90"]
    assert rows["probe"].split()[1] == "–"


def test_json_gives_the_recipes_again(isthmus):
    found = json.loads(isthmus("recipes", "--json").out)
    assert [row["name"] for row in found] == list(RECIPES)
    for row in found:
        values = {"name": row["name"], "data": "pictures", "weights": "demo"} | row["settings"]
        assert records.from_dict(Recipe, values, RecipeError) == recipe(row["name"], data="pictures", weights="demo")
        assert row["source"]
    cifar = next(row for row in found if row["name"] == "cifar")
    assert {"network": "resnet110_cifar", "data": "CIFAR-10", "accuracy": 93.57} in cifar["reported"]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("tv-v2", {"batch_size": 16}, "lr 0.5 is meant for a batch of 1024; for 16 in proportion"),
        ("he-90", {"batch_size": 512}, "take --lr 0.2"),
        ("he-90", {"batch_size": 512, "lr": 0.2}, ""),
        ("he-90", {"batch_size": 256}, ""),
        (
            "scratch",
            {"batch_size": 8},
            "lr 0.1 is meant for a batch of 32; for 8 in proportion (Goyal et al. 2017) take --lr 0.025",
        ),
        ("scratch", {"batch_size": 32}, ""),
        ("probe", {"batch_size": 8}, ""),  # no steps of that size: its head is fitted on features
        ("rsb-a2", {"batch_size": 64}, ""),  # LAMB: no rule
        ("finetune", {"batch_size": 8}, ""),
    ],
)
def test_a_rate_for_another_batch_is_told(name, settings, told):
    made = recipe(name, data="pictures", weights="demo", **settings)
    assert rate_for_batch(replace(made, lr=0.123), set()) == ""  # as in a file of one's own
    found = rate_for_batch(made, set(settings))
    assert told in found
    assert bool(told) is bool(found)
