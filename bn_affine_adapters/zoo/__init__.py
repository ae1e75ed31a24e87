"""The paper's CIFAR networks; importing this package registers them in timm.

- ``cifar_resnet.py``: residual networks of any depth and width.
- ``cifar_vgg.py``: VGG networks.
- ``cifar_classifier.py``: what the two share: pooling, head, and the registration in timm.
"""

from . import cifar_resnet, cifar_vgg

__all__ = ["cifar_resnet", "cifar_vgg"]
