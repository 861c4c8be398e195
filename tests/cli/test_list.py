"""`token-merge list`, and the table that it wrote into examples/results."""

from checks import EXAMPLES

from token_merge_plugin import supported_models
from token_merge_plugin.adapters import missing
from token_merge_plugin.cli import main
from token_merge_plugin.patching import models_by_adapter


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_list_names_every_family_and_what_is_left_of_its_multiply_adds(capsys):
    assert main(["list", "--keep-rate", "0.6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert cells(lines[0])[-1] == "GMACs left at 0.6"
    rows = [cells(line) for line in lines[2:] if line.startswith("|")]
    assert [row[0] for row in rows] == [adapter.family for adapter in models_by_adapter()]
    assert sum(int(row[2]) for row in rows) == len(supported_models())
    assert all(all(row) for row in rows)
    methods = {row[0]: row[5] for row in rows}  # also those that the typical model does not take, as in the README
    assert methods["ViT with relative position"] == methods["NaFlexViT"] == "all"
    assert methods["CaiT"] == "merge, tome, late_tome, random"
    assert all(40 <= int(row[-1].rstrip("%")) <= 90 for row in rows)


def test_list_says_which_families_are_missing_and_why(capsys, monkeypatch):
    monkeypatch.setitem(missing, "timm.models.some_vit", "It needs timm 9.0.0 or newer, and this is 1.0.0.")
    assert main(["list"]) == 0
    line = "Missing: timm.models.some_vit. It needs timm 9.0.0 or newer, and this is 1.0.0."
    assert line in capsys.readouterr().out.splitlines()


def test_the_table_of_the_results_lists_the_families_that_are_served():
    page = (EXAMPLES / "results" / "families.md").read_text()
    table = [cells(line) for line in page.splitlines() if line.startswith("| ") and "GMACs" not in line]
    rows = {row[0]: row for row in table if len(row) == 7}
    for adapter, names in models_by_adapter().items():
        _, modules, models, reduces, restores, methods, _ = rows[adapter.family]
        assert modules == ", ".join(adapter.timm_modules)
        assert len(names) >= int(models)  # a newer timm may have more than the one that wrote the table
        assert (reduces, restores) == (adapter.reduces, adapter.restores)
        # The baselines are of sequences; what attends to a class token alone is left open here.
        assert methods in (("all", "merge, tome, late_tome, random") if not adapter.on_entry else ("merge",))
