"""The training steps in PyTorch, tuned as one would write them today. `tests.bench.gpu_step` starts it as a process.

Images and weights are in channels_last. bfloat16 is autocast; float32 may use TF32 on a GPU. The attack freezes the
weights, so that its backward passes compute no gradients of weights. It needs torch and torchvision, not robust_tf.
"""

import contextlib
from typing import Any

import torch
import torchvision
from torch import nn
from torch.nn import functional

from tests.bench.step_process import StepSettings, serve


def _cifar_resnet18(num_classes: int) -> nn.Module:
    """Returns a ResNet-18 for small images: its first convolution is 3x3 with stride 1, and it has no max pooling."""
    network = torchvision.models.resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


NETWORKS = {
    "resnet18": lambda classes: torchvision.models.resnet18(num_classes=classes),
    "resnet50": lambda classes: torchvision.models.resnet50(num_classes=classes),
    "cifar_resnet18": _cifar_resnet18,
}


class TorchStep:
    """A training step with SGD, on random images that are already on the device. See `Step`."""

    def __init__(self, settings: StepSettings) -> None:
        torch.manual_seed(0)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        self._settings = settings
        self._device = "cuda" if settings.device == "GPU" else "cpu"
        normalize = torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        network = nn.Sequential(normalize, NETWORKS[settings.architecture](settings.num_classes))
        self._network = network.to(self._device, memory_format=torch.channels_last)
        self._forward = torch.compile(self._network, dynamic=False) if settings.compiled else self._network
        self._optimizer = torch.optim.SGD(self._network.parameters(), 1e-4, momentum=0.9, weight_decay=1e-4)
        size, batch = settings.image_size, settings.batch_size
        images = torch.rand(batch, 3, size, size, device=self._device)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._labels = torch.randint(0, settings.num_classes, (batch,), device=self._device)
        if self._device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def run(self) -> None:
        images = self._images
        if self._settings.steps:
            self._network.eval().requires_grad_(False)
            images = self._attacked()
        self._network.train().requires_grad_(True)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._losses(images).mean()
        loss.backward()
        self._optimizer.step()
        loss.item()  # waits for the device

    def peak_gib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**30 if self._device == "cuda" else None

    def _losses(self, images: torch.Tensor) -> torch.Tensor:
        half = self._settings.precision == "bfloat16"
        context: Any = torch.autocast(self._device, torch.bfloat16) if half else contextlib.nullcontext()
        with context:
            logits = self._forward(images)
        return functional.cross_entropy(logits.float(), self._labels, reduction="none")

    def _attacked(self) -> torch.Tensor:
        """Returns the images after PGD without a random start; with `use_best`, each image's worst iterate."""
        settings, images = self._settings, self._images
        images_adv = best = images
        best_losses = torch.full((len(images),), -torch.inf, device=self._device)
        for _ in range(settings.steps):
            images_adv = images_adv.detach().requires_grad_(True)
            losses = self._losses(images_adv)
            (gradient,) = torch.autograd.grad(losses.sum(), images_adv)
            with torch.no_grad():
                if settings.use_best:
                    best, best_losses = _better(images_adv, losses, best, best_losses)
                images_adv = self._moved(images_adv, gradient)
        if not settings.use_best:
            return images_adv.detach()
        with torch.no_grad():
            best, _ = _better(images_adv, self._losses(images_adv), best, best_losses)
        return best.detach()

    def _moved(self, images_adv: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        epsilon, step_size = self._settings.epsilon, self._settings.step_size
        if self._settings.norm == "linf":
            change = (images_adv + step_size * gradient.sign() - self._images).clamp(-epsilon, epsilon)
        else:
            change = images_adv + step_size * gradient / (_sizes(gradient) + 1e-10) - self._images
            change = change * (epsilon / _sizes(change).clamp(min=epsilon))
        return (self._images + change).clamp(0, 1)


def _sizes(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1).norm(dim=1)[:, None, None, None]


def _better(
    images: torch.Tensor, losses: torch.Tensor, best: torch.Tensor, best_losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    better = losses > best_losses
    return torch.where(better[:, None, None, None], images, best), torch.where(better, losses, best_losses)


if __name__ == "__main__":
    serve(TorchStep)
