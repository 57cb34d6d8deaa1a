"""Chunked cross-entropy and distillation against PyTorch's own, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ln_removal.training import cross_entropy as linear
from ln_removal.training.cross_entropy import Head, LinearLoss, linear_cross_entropy, pad_vocabulary

WIDTH, TEACHER_WIDTH, VOCABULARY = 7, 5, 11


@pytest.fixture(params=[4, 1024], autouse=True)
def rows_of_a_chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(linear.POSITIONS_IN_A_CHUNK, "cpu", request.param)


def student(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states (rows, WIDTH), unembedding (VOCABULARY, WIDTH), logit bias (VOCABULARY,), targets (rows,)."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, WIDTH, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, requires_grad=True)
    bias = torch.randn(VOCABULARY, generator=generator, requires_grad=True)
    return hidden, weight, bias, torch.randint(0, VOCABULARY, (rows,), generator=generator)


def teacher(rows: int) -> tuple[Tensor, Head]:
    generator = torch.Generator().manual_seed(1000 + rows)
    hidden = torch.randn(rows, TEACHER_WIDTH, generator=generator)
    return hidden, Head(torch.randn(VOCABULARY, TEACHER_WIDTH, generator=generator))


def same_gradients(found: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    ours = torch.autograd.grad(3 * found, leaves)
    for gradient, reference in zip(ours, torch.autograd.grad(3 * expected, leaves), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 5, 12, 13])
def test_it_is_cross_entropy(rows: int, with_bias: bool) -> None:
    hidden, weight, bias, targets = student(rows)
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    expected = F.cross_entropy(F.linear(hidden, weight, bias if with_bias else None), targets)
    found = linear_cross_entropy(hidden, Head(weight, bias if with_bias else None), targets)
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.cross_entropy, found.total.detach()) and found.divergence == 0
    same_gradients(found.total, expected, leaves)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [4, 13])
def test_distillation_is_the_mixture_of_both_losses(rows: int, share: float) -> None:
    hidden, weight, bias, targets = student(rows)
    taught, its_head = teacher(rows)
    logits = F.linear(hidden, weight, bias)
    cross_entropy = F.cross_entropy(logits, targets)
    soft = F.linear(taught, its_head.weight).softmax(dim=1)
    divergence = F.kl_div(logits.log_softmax(dim=1), soft, reduction="batchmean")
    found = linear_cross_entropy(
        hidden, Head(weight, bias), targets, teacher_hidden=taught, teacher_head=its_head, share=share
    )
    expected = (1 - share) * cross_entropy + share * divergence
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.cross_entropy, cross_entropy.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.divergence, divergence.detach(), rtol=1e-5, atol=1e-6)
    assert not found.cross_entropy.requires_grad and not found.divergence.requires_grad
    same_gradients(found.total, expected, (hidden, weight, bias))


@pytest.mark.parametrize("some", [False, True])
def test_the_teacher_is_heeded_as_far_as_the_student_is_behind_it(some: bool) -> None:
    length, sequences, share, whole_lag = 4, 24, 0.7, 0.1  # a chunk holds whole sequences
    hidden, weight, bias, targets = student(length * sequences)
    # A teacher that differs little from the student, and more from sequence to sequence.
    noise = torch.randn(length * sequences, WIDTH, generator=torch.Generator().manual_seed(5))
    taught = hidden.detach() + noise * torch.linspace(0.02, 0.6, length * sequences).unsqueeze(1)
    its_head = Head(weight.detach(), bias.detach())
    kept = torch.ones(sequences, length, dtype=torch.bool)
    if some:
        kept[:, -1] = False
        kept[3] = False
    log_ours = F.linear(hidden, weight, bias).log_softmax(dim=1)
    log_theirs = F.linear(taught, *its_head).log_softmax(dim=1)
    ours, theirs = (
        F.nll_loss(log, targets, reduction="none").view(sequences, length) for log in (log_ours, log_theirs)
    )
    divergence = (log_theirs.exp() * (log_theirs - log_ours)).sum(dim=1).view(sequences, length)
    terms = []
    heeds = []
    for sequence in range(sequences):
        of = kept[sequence]
        if not of.any():
            continue
        lag = (ours[sequence][of] - theirs[sequence][of]).mean().item()
        heed = share * min(1.0, max(0.0, lag / whole_lag))
        heeds.append(heed)
        terms.append(((1 - heed) * ours[sequence] + heed * divergence[sequence])[of])
    assert 0.0 in heeds and share in heeds and any(0 < heed < share for heed in heeds)
    expected = torch.cat(terms).mean()
    found = linear_cross_entropy(
        hidden,
        Head(weight, bias),
        targets,
        teacher_hidden=taught,
        teacher_head=its_head,
        share=torch.tensor(share),
        trained=kept.flatten() if some else None,
        length=length,
        whole_lag=whole_lag,
    )
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=1e-6)
    same_gradients(found.total, expected, (hidden, weight, bias))


def test_a_model_taught_by_itself_has_nothing_to_learn() -> None:
    hidden, weight, bias, targets = student(9)
    head = Head(weight, bias)
    found = linear_cross_entropy(
        hidden,
        head,
        targets,
        teacher_hidden=hidden.detach(),
        teacher_head=Head(weight.detach(), bias.detach()),
        share=1.0,
    )
    assert abs(found.total.item()) < 1e-6
    for gradient in torch.autograd.grad(found.total, (hidden, weight, bias)):
        assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_padded_vocabulary_changes_nothing(share: float) -> None:
    hidden, weight, bias, targets = student(9)
    taught, its_head = teacher(9)

    def loss(pad: Callable[[Head], Head], given: Tensor | None) -> LinearLoss:
        return linear_cross_entropy(
            hidden,
            pad(Head(weight, given)),
            targets,
            teacher_hidden=taught if share else None,
            teacher_head=pad(its_head) if share else None,
            share=share,
        )

    for given in (bias, None):
        leaves = (hidden, weight) if given is None else (hidden, weight, bias)
        wider = pad_vocabulary(Head(weight, given), 8)
        assert wider.bias is not None and wider.weight.shape == (16, WIDTH) and wider.bias.shape == (16,)
        found, expected = loss(lambda head: pad_vocabulary(head, 8), given), loss(lambda head: head, given)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-6, atol=1e-6)
        same_gradients(found.total, expected.total, leaves)
    head = Head(weight, None)
    assert pad_vocabulary(head, VOCABULARY) is head


def test_logits_are_not_kept() -> None:
    rows, sizes = 40, [0]

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    hidden, weight, bias, targets = student(rows)
    taught, its_head = teacher(rows)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear_cross_entropy(
            hidden, Head(weight, bias), targets, teacher_hidden=taught, teacher_head=its_head, share=0.5
        ).total.backward()
    assert 0 < max(sizes) <= max(rows * WIDTH, WIDTH * VOCABULARY) < rows * VOCABULARY


def test_the_loss_is_float32_under_autocast() -> None:
    hidden, weight, bias, targets = student(9)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(hidden, Head(weight, bias), targets).total
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    leaves = (hidden, weight, bias)
    for gradient, reference in zip(
        torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, reference, rtol=0.05, atol=0.02)
