"""Distillation with a teacher of another family, on mixup labels: NKD added to cross-entropy."""

from __future__ import annotations

import torch
from timm.data.mixup import Mixup

from softlabels import Distiller, NKDLoss, Teacher
from softlabels.models import build_model


def main() -> None:
    torch.manual_seed(0)
    student = build_model("vit_mini_patch4_32", num_classes=10)
    teacher = Teacher(
        build_model("resnet8x4", num_classes=20),  # yours would be trained
        class_map=range(10),  # its first ten classes are the student's
        normalization=((0.5,), (0.25,)),
        student_normalization=((0.5,), (0.5,)),
    )
    distiller = Distiller(
        student, NKDLoss(mixed_target="all"), teacher=teacher, example_shape=(3, 32, 32)
    )
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=1e-3)
    mixup = Mixup(mixup_alpha=0.8, label_smoothing=0.0, num_classes=10)  # smoothing is a task loss
    for step in range(3):
        images, target = mixup(torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,)))
        output = distiller(images, target)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {output.loss.item():.3f}")


if __name__ == "__main__":
    main()
