"""What a patched model does, in a few lines."""

import pytest
from families import images, make

from token_merge_plugin import DataError, MergeConfig, PatchStateError, apply, config_of, is_patched, remove, summary
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


@pytest.mark.parametrize("kind", ["ViT", "Swin", "BEiT", "DINOv3"])
def test_it_is_of_an_image_of_the_size_that_the_model_was_created_for(kind):
    model = apply(make(kind), 0.6)
    assert summary(model).macs == count_macs(model, images(kind))


def test_a_size_that_the_model_does_not_take_is_refused():
    model = apply(make(), 0.6)
    with pytest.raises(DataError, match=r"does not take images \[3, 50, 40\]"):
        summary(model, (50, 40))
    assert is_patched(model)


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
