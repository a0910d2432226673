"""One recipe: what the command line, the benchmarks and the docs say is what `fastshap_vision.recipe` holds."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import fastshap_vision as fv
from bench.fidelity import runs as fidelity_runs
from fastshap_vision import recipe
from fastshap_vision.cli import main as cli

ROOT = Path(__file__).parents[1]

VIT = {"model_name": "vit_tiny_patch16_224", "img_size": 16}
VIT["model_kwargs"] = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
CNN = {"model_name": "resnet18", "img_size": 64}


def calls(source):
    """(function, keywords) of the calls in a piece of Python: those keywords whose values are written out."""
    for call in ast.walk(ast.parse(source)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
            written = {word.arg: word.value for word in call.keywords if word.arg}
            values = {name: value.value for name, value in written.items() if isinstance(value, ast.Constant)}
            is_explainer = "ExplainerObjective" in ast.unparse(call)
            yield call.func.attr, values, is_explainer


def differing(source, shown=()):
    """Where the calls of a snippet are not the recipe's, but for what it shows otherwise."""
    expected = {"convert": recipe.MODEL, "record_coalitions": {"coalitions": recipe.COALITIONS}, "fit": recipe.TRAINING}
    found = []
    for function, values, is_explainer in calls(source):
        if function in expected and (function != "fit" or is_explainer):
            own = expected[function]
            found += [(name, values[name]) for name in own.keys() & values if values[name] != own[name]]
            missing = own.keys() - values.keys() if function == "convert" else ()
            found += [(name, None) for name in missing]
    return [difference for difference in found if difference[0] not in shown]


def test_the_docs_show_the_recipe():
    text = (ROOT / "docs" / "fidelity.md").read_text()
    (section,) = re.findall(r"## The recipe\n(.*?)\n\| choice", text, re.DOTALL)
    snippet = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    assert differing(snippet) == []
    (training,) = (values for function, values, is_explainer in calls(snippet) if function == "fit" and is_explainer)
    assert training == recipe.TRAINING
    (cells,) = re.findall(r"# of a CNN: (.*)", snippet)
    assert dict(next(calls(f"fv.fit({cells})"))[1]) == recipe.CONVOLUTIONAL
    assert f"take {2 * recipe.TRAINING['epochs']} epochs" in section
    assert re.findall(r"\| coalitions \| (\d+) of each image", text) == [str(recipe.COALITIONS)]
    assert re.findall(r"\| blocks before the shares \| (\d), on", text) == [str(recipe.MODEL["head_depth"])]


def test_the_readme_shows_the_recipe():
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert sum("train_explainer(" in block for block in blocks) == 1
    assert all(differing(block) == [] for block in blocks)
    assert re.findall(r"(\d+) coalitions of each image", text) == [str(recipe.COALITIONS)]
    assert re.findall(r"for the recipe's (\d+) epochs", text) == [str(2 * recipe.TRAINING["epochs"])]


@pytest.mark.parametrize(("network", "options"), [("vit", VIT), ("cnn", CNN)])
def test_the_benchmark_measures_the_recipe(network, options):
    run = fidelity_runs.Run(network, "recipe", 0)
    budget = fidelity_runs.BUDGETS["medium"]
    model = fv.SelfExplainingClassifier(num_classes=2, **options)
    expected = recipe.training(model)
    measured = fidelity_runs.training_of(run, budget) | {"epochs": fidelity_runs.epochs_of(run, budget)}
    assert {name: measured[name] for name in expected} == expected
    assert fidelity_runs.SETTINGS["recipe"].mirrored
    unmirrored = fidelity_runs.epochs_of(fidelity_runs.Run(network, "unmirrored", 0), budget)
    assert recipe.training(model, mirrored=False) == expected | {"epochs": unmirrored}
    assert {name: fidelity_runs.SETTINGS["recipe"].model[name] for name in recipe.MODEL} == recipe.MODEL
    assert fidelity_runs.objective_of(run) == {"coalitions": recipe.COALITIONS}


def test_the_command_line_follows_the_recipe():
    options = vars(cli._parser().parse_args(["train-explainer", "--checkpoint", "a", "--output", "b"]))
    by_model = {"epochs", *recipe.CONVOLUTIONAL}
    fixed = {name: value for name, value in (recipe.TRAINING | recipe.MODEL).items() if name not in by_model}
    assert {name: options[name] for name in fixed} == fixed
    assert all(options[name] is None for name in by_model)  # chosen once the model is known
    assert options["coalitions"] == recipe.COALITIONS


def test_play_follows_the_recipe():
    assert inspect.signature(fv.record_coalitions).parameters["coalitions"].default == recipe.COALITIONS


def test_the_comparison_sees_a_difference():
    assert differing('fv.fit(m, g, objective=fv.ExplainerObjective(), epochs=7, opt="muon")') == [("epochs", 7)]
    assert differing("fv.convert(backbone, head_depth=1)") == [("head_depth", 1), ("intermediates", None)]
