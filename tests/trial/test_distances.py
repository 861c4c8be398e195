"""How far a patched model's output is from the unpatched model's."""

import pytest
import torch
from families import images, make
from torch import nn

from token_merge_plugin import ConfigError, DataError, apply, remove
from token_merge_plugin.trial.distances import Unpatched, paired_difference


def relative(mine, unpatched):
    return (mine - unpatched).flatten(1).norm(dim=1) / unpatched.flatten(1).norm(dim=1)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def patched(kind="ViT", head=None, batches=(2, 1), **changes):
    """Return what was measured unpatched, the model, patched, and three images."""
    model, x = make(kind, **changes), images(kind, batch=3)
    unpatched = Unpatched(model, x.split(list(batches)), head)
    return unpatched, apply(model, 0.5), x


def test_predictions_are_compared_by_the_root_of_the_kl_divergence():
    unpatched, model, x = patched()
    mine, before = model(x).softmax(1), remove(model)(x).softmax(1)
    apply(model, 0.5)
    assert unpatched.measure == "root of the KL divergence"
    torch.testing.assert_close(
        unpatched.distances() ** 2, (before * (before / mine).log()).sum(1), atol=1e-6, rtol=1e-3
    )


def test_features_of_a_model_without_classes_are_compared_patch_by_patch_without_its_prefix_tokens():
    unpatched, model, x = patched("ViT, registers", num_classes=0)
    mine, before = model.forward_features(x), remove(model).forward_features(x)
    apply(model, 0.5)
    assert unpatched.measure == "relative error of the patch tokens"
    torch.testing.assert_close(unpatched.distances(), relative(mine[:, 5:], before[:, 5:]))


def test_a_head_makes_of_the_features_what_counts():
    head = nn.Linear(32, 3)
    unpatched, model, x = patched(head=head)
    mine, before = head(model.forward_features(x)), head(remove(model).forward_features(x))
    apply(model, 0.5)
    assert unpatched.measure == "relative error of the head's output"
    torch.testing.assert_close(unpatched.distances(), relative(mine, before))


@pytest.mark.parametrize("changes", [{"global_pool": "", "num_classes": 3}, {"num_classes": 1}])
def test_outputs_that_are_no_classes_are_compared_as_they_are(changes):
    unpatched, model, x = patched(**changes)
    mine, before = model(x), remove(model)(x)
    apply(model, 0.5)
    assert unpatched.measure == "relative error of the output"
    torch.testing.assert_close(unpatched.distances(), relative(mine, before))


@pytest.mark.parametrize("kind", ["Swin", "CrossViT", "PiT", "NaFlexViT", "MaxViT"])
def test_features_of_every_form_are_compared(kind):
    unpatched, model, _ = patched(kind, batches=(3,), num_classes=0)
    assert unpatched.distances().shape == (3,)
    assert (unpatched.distances() > 0).all()
    remove(model)
    assert unpatched.distances().max() < 1e-5


def test_what_cannot_be_compared_is_refused():
    x = torch.zeros(1, 3, 32, 32)
    with pytest.raises(ConfigError, match="head=3 cannot be called"):
        Unpatched(make(), [x], 3)
    with pytest.raises(ConfigError, match="Flatten has no forward_features"):
        Unpatched(nn.Flatten(), [x], nn.Identity())
    with pytest.raises(ConfigError, match="gives a dict to compare, without a float tensor"):
        Unpatched(make(), [x], lambda features: {"argmax": features.argmax(1)})
    with pytest.raises(DataError, match="not finite"):
        Unpatched(make(), [x / 0])


def test_a_difference_of_paired_distances_has_the_error_of_its_mean():
    mean, error = paired_difference(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2.0, 2.0, 2.0]))
    assert mean == pytest.approx(1.0)
    assert error == pytest.approx((7 / 3) ** 0.5)
    assert paired_difference(torch.tensor([1.0]), torch.tensor([2.0])) == (-1.0, float("inf"))
