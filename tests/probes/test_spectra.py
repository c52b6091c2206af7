"""Spectra of what is not finite are NaN, and do not take the others with them."""

import torch

from dynascope.probes.attention import attention_summary
from dynascope.probes.residual import effective_rank
from dynascope.probes.spectra import eigenvalues
from dynascope.probes.views import AttentionCall
from dynascope.probes.weights import spectral_norms


def test_eigenvalues_are_those_of_linalg_and_nan_where_a_matrix_is_not_finite() -> None:
    matrices = torch.randn(3, 4, 4)
    matrices = matrices + matrices.transpose(1, 2)
    expected = torch.linalg.eigvalsh(matrices)
    matrices[1, 2, 2] = torch.inf
    found = eigenvalues(matrices)
    torch.testing.assert_close(found[[0, 2]], expected[[0, 2]])
    assert found[1].isnan().all()


def test_a_matrix_that_diverged_leaves_the_others_their_norms() -> None:
    matrices = torch.randn(2, 6, 5)
    matrices[0, 3, 3] = torch.nan
    norms, _ = spectral_norms(matrices, torch.randn(2, 5, 5), iterations=1)
    assert norms[0].isnan()
    torch.testing.assert_close(norms[1], torch.linalg.matrix_norm(matrices[1], ord=2))
    assert effective_rank(torch.full((4, 3), torch.inf)).isnan()


def test_a_head_that_diverged_leaves_the_others_their_logits() -> None:
    query, key = torch.randn(2, 2, 3, 8, 4)
    healthy = attention_summary(AttentionCall("", query, key, key, 0.5, is_causal=True))
    for broken in (torch.nan, torch.inf):
        sick = query.clone()
        sick[:, 1, 2] = broken
        found = attention_summary(AttentionCall("", sick, key, key, 0.5, is_causal=True))[
            "attention/logit_spectral_norm"
        ]
        assert found[1].isnan()
        torch.testing.assert_close(found[[0, 2]], healthy["attention/logit_spectral_norm"][[0, 2]])
