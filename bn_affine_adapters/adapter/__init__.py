"""The PEFT method.

- ``method.py``: `BNOnlyConfig`, the settings (``settings.py`` of the package) as a PEFT configuration.
- ``tuner.py``: `BNOnlyTuner`, which puts an adapter into a network and takes it out.
- ``layer.py``: `BNOnlyLayer`, which holds a copy of one module for each adapter.
- ``mixed.py``: a batch whose images have different adapters.
- ``blend.py``: a new adapter from the weighted mean of others.
- ``control.py``: the paper's controls, which train other parameters per channel.
- ``checks.py``: which layers an adapter owns, and whether it fits the network and the other adapters.
- ``tensors.py``: whether the tensors of an adapter fit the network.
- ``fold.py``: statistics folded into gamma and beta, as compact files hold them.
- ``traits.py``: classes and settings of a network's modules, and their digest.
- ``unchanged.py``: whether a wrapped network is still the one that loading an adapter gives.
- ``zoos.py``: networks of timm, Transformers and torchvision by name and arguments.
- ``rebuild.py``: build the frozen network again, write its fingerprints, verify it.
- ``limits.py``: bounds on the network that a stranger's configuration asks for.
"""

# Before any module of this part: when PEFT has been imported, the method is registered (see the package), which imports
# these modules, and none of them must be half done then.
import peft as peft
