"""Batch normalisation whose statistics leave out the padding, in one process and in two."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from d2proposals.backbones.masked_norm import MaskedBatchNorm, build_norm

# Sizes of the images of two processes; each process pads its own to its largest one.
SIZES = [[(3, 5), (6, 2)], [(4, 4)]]


def make_batch(sizes, seed):
    """A padded batch (whatever stands on the padding), and its valid cells."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(side) for side in zip(*sizes, strict=True))
    x = torch.randn(len(sizes), 3, height, width, generator=generator) * 4 + 7
    valid = torch.zeros(len(sizes), 1, height, width)
    for valid_i, (height_i, width_i) in zip(valid, sizes, strict=True):
        valid_i[:, :height_i, :width_i] = 1
    return x, valid


def make_norm(**arguments):
    norm = MaskedBatchNorm(3, **arguments)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        norm.bias.copy_(torch.tensor([0.1, -0.3, 2.0]))
    return norm


def cells(x, valid):
    """(N, C, H, W) -> (cells, C) of the valid cells, image by image."""
    return x.permute(0, 2, 3, 1)[valid[:, 0] > 0]


def test_statistics_by_hand():
    norm = MaskedBatchNorm(1)
    x = torch.tensor([[[[1.0, 3.0, 100.0]]]])
    y = norm(x, torch.tensor([[[[1.0, 1.0, 0.0]]]]))
    # Mean 2, variance 1.
    torch.testing.assert_close(y[0, 0, 0, :2], torch.tensor([-1.0, 1.0]), rtol=1e-4, atol=0)
    # A tenth of the mean 2; .9 of 1 and a tenth of the unbiased variance 2.
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.2]))
    torch.testing.assert_close(norm.running_var, torch.tensor([1.1]))
    assert norm.num_batches_tracked == 1


def test_it_is_the_batch_normalisation_of_the_valid_cells():
    """Outputs, running statistics and gradients, against PyTorch's over a list of cells."""
    x, valid = make_batch([(3, 5), (6, 2), (1, 1)], 0)
    norm, twin = make_norm(), nn.BatchNorm1d(3)
    twin.load_state_dict(norm.state_dict())
    x.requires_grad_()
    weights = torch.randn(3 * 5 + 6 * 2 + 1, 3)
    y, expected = cells(norm(x, valid), valid), twin(cells(x, valid))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    (twin_gradient,) = torch.autograd.grad((expected * weights).sum(), x)
    torch.testing.assert_close(gradient, twin_gradient, rtol=1e-4, atol=1e-5)
    assert (gradient * (1 - valid) == 0).all()


def test_an_image_without_cells_and_a_single_cell_are_finite():
    x, _ = make_batch([(2, 2)], 0)
    for number in (0, 1):
        valid = torch.zeros(1, 1, 2, 2)
        valid.flatten()[:number] = 1
        norm = make_norm()
        assert norm(x, valid).isfinite().all()
        assert norm.running_var.isfinite().all()


@pytest.mark.parametrize("is_synchronised", [False, True])
def test_without_a_mask_and_in_evaluation_it_is_pytorch_s(is_synchronised):
    x, valid = make_batch([(3, 5)], 0)
    norm, twin = make_norm(is_synchronised=is_synchronised), nn.BatchNorm2d(3)
    twin.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), twin(x))
    norm.eval(), twin.eval()
    torch.testing.assert_close(norm(x, valid), twin(x))
    torch.testing.assert_close(norm.running_var, twin.running_var)


def test_names_of_detectron2_build_it():
    assert not build_norm("BN", 8).is_synchronised
    assert build_norm("SyncBN", 8).is_synchronised


def normalise_in_process(rank, folder):
    """Normalise this process's images, weight the outputs, and save everything."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for is_masked in (True, False):
        norm = make_norm(is_synchronised=True)
        x, valid = make_batch(SIZES[rank], rank)
        x.requires_grad_()
        y = norm(x, valid if is_masked else None)
        (y.square() * valid).sum().backward()
        results[is_masked] = (y.detach(), x.grad, norm.weight.grad, norm.state_dict())
    torch.save(results, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def test_two_processes_normalise_as_one_over_the_joint_batch(tmp_path):
    torch.multiprocessing.spawn(normalise_in_process, (str(tmp_path),), nprocs=2)
    saved = [torch.load(tmp_path / f"{rank}.pth") for rank in (0, 1)]
    batches = [make_batch(sizes, rank) for rank, sizes in enumerate(SIZES)]
    for is_masked in (True, False):
        # All cells that count, of both processes, as one list of pixels.
        counted = [valid if is_masked else torch.ones_like(valid) for _, valid in batches]
        joint = torch.cat([cells(x, c) for (x, _), c in zip(batches, counted, strict=True)])
        joint = joint[..., None, None].requires_grad_()
        in_loss = torch.cat([cells(v, c) for (_, v), c in zip(batches, counted, strict=True)])
        norm = make_norm()
        expected = norm(joint)
        (expected.square() * in_loss[..., None, None]).sum().backward()
        outputs, gradients, weight_gradients, states = zip(
            *(results[is_masked] for results in saved), strict=True
        )
        for values, twin in ((outputs, expected), (gradients, joint.grad)):
            values = [cells(x, c) for x, c in zip(values, counted, strict=True)]
            torch.testing.assert_close(torch.cat(values), twin[..., 0, 0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sum(weight_gradients), norm.weight.grad, rtol=1e-4, atol=1e-4)
        for state in states:
            for name, value in norm.state_dict().items():
                torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)
