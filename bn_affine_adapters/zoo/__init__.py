"""The paper's CIFAR networks; importing this package registers them in timm."""

from . import cifar_resnet, cifar_vgg

__all__ = ["cifar_resnet", "cifar_vgg"]
