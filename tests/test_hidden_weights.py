"""causal_weights_from_hidden: the weights of rows read in place."""

import pytest
import torch

from gcpo_kernels import causal_weights, causal_weights_from_hidden
from gcpo_kernels.testing import assert_gradient


def inputs():
    torch.manual_seed(0)
    hidden = torch.randn(6, 5, 21, requires_grad=True)
    context_z = torch.randn(2, 3, 2, 2, 21, requires_grad=True)
    return hidden, torch.tensor([4, 0, 2, 3, 1, 4]), context_z


@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_equals_gathered_rows(baseline):
    hidden, last, context_z = inputs()
    gathered = hidden[torch.arange(6), last].view(2, 3, 21)
    ours = causal_weights_from_hidden(hidden, last, context_z, baseline=baseline)
    theirs = causal_weights(gathered, context_z, baseline=baseline)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn_like(ours)
    grads = torch.autograd.grad((ours * upstream).sum(), (hidden, context_z))
    expected = torch.autograd.grad((theirs * upstream).sum(), (hidden, context_z))
    for ours, theirs in zip(grads, expected, strict=True):
        assert_gradient(ours, theirs.double())
    others = torch.ones(6, 5, dtype=torch.bool)
    others[torch.arange(6), last] = False
    assert (grads[0][others] == 0).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(5, 5, 21)}, "`hidden`"),
        ({"last_index": torch.zeros(5, dtype=torch.long)}, "`last_index`"),
        ({"last_index": torch.zeros(6)}, "`last_index`"),
        ({"context_z": torch.zeros(2, 3, 2, 2, 20)}, "`context_z`"),
    ],
)
def test_bad_input(changed, message):
    hidden, last, context_z = inputs()
    arguments = {"hidden": hidden, "last_index": last, "context_z": context_z, **changed}
    with pytest.raises((ValueError, TypeError), match=message):
        causal_weights_from_hidden(**arguments)


def test_no_prompts():
    hidden, last, context_z = inputs()
    out = causal_weights_from_hidden(hidden[:0], last[:0], context_z[:0])
    assert out.shape == (0, 3)
    grads = torch.autograd.grad(out.sum(), (hidden, context_z))
    assert not any(g.any() for g in grads)
