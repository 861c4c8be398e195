"""What a patched model does, in a few lines."""

import pytest
from families import images, make

from token_merge_plugin import MergeConfig, PatchStateError, apply, config_of, is_patched, remove, summary
from token_merge_plugin.trial.counting import count_macs


@pytest.mark.parametrize("kind", ["ViT", "Swin", "PiT"])
def test_it_says_what_was_asked_for_and_what_is_left(kind, capsys):
    model, x = apply(make(kind), 0.6), images(kind)
    found = summary(model, tuple(x.shape[2:]))
    assert is_patched(model)
    assert found.config == config_of(model) == MergeConfig(0.6)
    assert found.macs == count_macs(model, x)
    assert list(found.stages) == list(found.tokens) or kind == "Swin"
    out = capsys.readouterr().out
    assert f"{found.macs / found.unpatched_macs:.1%}" in out
    assert all(f"block {block} keeps" in out for block in found.stages)
    assert found.unpatched_macs == count_macs(remove(model), x)


def test_a_model_that_is_not_patched_has_no_summary():
    model = make()
    assert not is_patched(model)
    assert config_of(model) is None
    with pytest.raises(PatchStateError, match="is not patched"):
        summary(model)


@pytest.mark.parametrize("kind", ["ViT", "Swin"])
def test_a_printed_model_shows_what_is_done_to_it(kind):
    model = make(kind)
    unpatched = repr(model)
    apply(model, {1: 0.75})
    assert "token merging: method='merge', keep_rate={1: 0.75}, stages=1" in repr(model)
    assert repr(model).count("token merging: keeps 75.0%") == 1
    assert repr(remove(model)) == unpatched
