"""Operations of a model, counted."""

import pytest
import torch

from d2proposals.engine.operation_count import count_operations


@pytest.mark.parametrize("training", [False, True])
def test_operations_worked_by_hand(training):
    """A convolution of 3x3 from 4 to 5 channels at 6 x 7 places, and a product (2, 3) x (3, 4)."""

    class Generator(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 4, bias=False)

        def forward(self, rows):
            return self.layer(self.layer(rows)[:, :3])

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.Conv2d(4, 5, 3, padding=1, bias=False)
            self.proposal_generator = Generator()

        def forward(self, inputs):
            maps = self.backbone(torch.stack(inputs))
            return {"loss": maps.sum() + self.proposal_generator(torch.ones(2, 3)).sum()}

    model = Model().train(training)
    counts = count_operations(model, [torch.ones(4, 6, 7)] * 3)
    convolution, products = 2 * 4 * 5 * 9 * 6 * 7, 2 * (2 * 2 * 3 * 4) / 3
    # Backwards: the weights' gradients, and that of the first product's result.
    backward = convolution + products + products / 2 if training else 0
    expected = {"total": convolution + products + backward,
                "backbone": convolution, "generator": products}  # fmt: skip
    assert counts == {part: pytest.approx(number / 1e9) for part, number in expected.items()}
    assert not model.backbone._forward_hooks
    assert all(x.grad is None for x in model.parameters())
