"""Self-distillation in a plain PyTorch loop: USKD added to cross-entropy, no teacher."""

from __future__ import annotations

import torch
from torch import nn

from softlabels import Distiller, USKDLoss


def main() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    distiller = Distiller(student, USKDLoss(), example_shape=(1, 16, 16))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9)

    patterns = torch.randn(10, 1, 16, 16)  # one for each class
    for step in range(60):
        target = torch.randint(0, 10, (64,))
        images = patterns[target] + 0.3 * torch.randn(64, 1, 16, 16)
        output = distiller(images, target)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 19:
            parts = ", ".join(f"{name} {value.item():.3f}" for name, value in output.terms.items())
            print(f"step {step + 1}: loss {output.loss.item():.3f} ({parts})")

    plain = distiller.export()  # the student alone, without hooks
    print(f"exported: {sum(p.numel() for p in plain.parameters())} parameters")


if __name__ == "__main__":
    main()
