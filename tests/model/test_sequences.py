"""Random sequences of operations on a model: what is saved computes the same after loading, or saving refuses.

BNAA_SEQUENCES=1000 runs so many, BNAA_SEQUENCES_SEED=1 others.
"""

import os
import random
import warnings
from collections import Counter

import pytest
import timm
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.nn import functional as F

from bn_affine_adapters import BNAdapterError, BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.adapter import tuner
from bn_affine_adapters.errors import AdapterError
from bn_affine_adapters.norms.find import head_layers, is_norm

COUNT = int(os.environ.get("BNAA_SEQUENCES", "48"))
SEED = int(os.environ.get("BNAA_SEQUENCES_SEED", "0"))
LENGTH = 8
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TARGETS = torch.tensor([0, 1])


class Own(nn.Sequential):
    """A network that timm does not build: it loads only with ``model=``."""

    def __init__(self):
        convolution, pool = nn.Conv2d(3, 8, 3, stride=2), nn.AdaptiveAvgPool2d(1)
        second = [nn.Conv2d(8, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 3)]
        super().__init__(convolution, nn.BatchNorm2d(8), nn.ReLU(), *second)


def own():
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Own()


NETWORKS = {
    "test_resnet": lambda: timm.create_model("test_resnet", num_classes=3),
    "test_efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=3),
    "test_vit": lambda: timm.create_model("test_vit", num_classes=3, img_size=32),
    "own": own,
}


def refused(call):
    """Return our error that a call raises, or None."""
    try:
        call()
    except BNAdapterError as error:
        return error
    return None


class Session:
    """A model, what was done to it, and the last adapter that was saved."""

    def __init__(self, name, seed, folder):
        self.random = random.Random(seed)
        self.name, self.folder, self.log = name, folder, []
        self.outcomes = Counter()
        self.saved = None
        self.changed = False  # in a way that no adapter holds
        self.model = get_bn_only_model(NETWORKS[name](), self.config())

    def config(self):
        choices = [{}, {"train_gamma": False}, {"running_statistics": "frozen"}, {"norm_init": "ones_beta_one"}]
        if self.name != "own":
            norms = [name for name, module in NETWORKS[self.name]().named_modules() if is_norm(module)]
            choices += [{"train_head": True}, {"norm_layers": norms[:1]}]
        seed = 3 if self.log == [] else self.model.peft_config[self.names()[0]].seed
        return BNOnlyConfig(seed=seed, **self.random.choice(choices))

    def base(self):
        return self.model.get_base_model()

    def names(self):
        return list(self.model.peft_config)

    def logits(self, model=None):
        model = model or self.model
        training = model.training
        with torch.no_grad():
            answer = model.eval()(IMAGES)
        model.train(training)
        return answer

    def load(self, folder):
        return load_bn_only_model(folder, NETWORKS["own"]() if self.name == "own" else None)

    # -- operations: each leaves the model usable, or raises our error

    def add(self):
        self.model.add_adapter(f"a{len(self.log)}", self.config())

    def switch(self):
        self.model.set_adapter(self.random.choice(self.names()))

    def step(self):
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not trained:
            return
        optimizer = torch.optim.SGD(trained, lr=0.05)
        F.cross_entropy(self.model(IMAGES), TARGETS).backward()
        optimizer.step()

    def merge(self):
        self.model.merge_adapter()

    def unmerge(self):
        self.model.unmerge_adapter()

    def save(self):
        """Save the active adapter and load it: the same logits, or a refusal that has a reason."""
        folder, active = self.folder / f"{len(self.log)}", self.model.active_adapter
        before = self.logits()
        refusal = refused(lambda: self.model.save_pretrained(folder, selected_adapters=[active]))
        if refusal is not None:
            assert self.changed, f"an adapter that nothing is wrong with is refused: {refusal}"
            self.outcomes["save refused"] += 1
            return
        folder = folder if active == "default" else folder / active
        self.compare(before, self.logits(self.load(folder)))
        self.saved = folder
        self.outcomes["saved"] += 1

    def compare(self, before, after):
        assert before.shape == after.shape, f"{tuple(before.shape)} became {tuple(after.shape)}"
        assert torch.equal(before, after), f"logits differ by {float((before - after).abs().max()):.3g}"

    def load_saved(self):
        if self.saved is not None:
            self.model.load_adapter(self.saved, f"a{len(self.log)}")

    def disable(self):
        with self.model.disable_adapter():
            self.logits()

    def set_lean(self):
        self.model.set_lean(self.random.choice([None, "exact", "rounded", "smallest"]))

    def state_dict(self):
        """Put PEFT's state dict of the active adapter into a copy drawn anew: the same logits, or a refusal."""
        active = self.model.active_adapter
        before = self.logits()
        try:
            tensors = get_peft_model_state_dict(self.model, adapter_name=active)
        except BNAdapterError:
            assert self.changed
            self.outcomes["state dict refused"] += 1
            return
        other = get_bn_only_model(NETWORKS[self.name](), self.model.peft_config[active], "other")
        try:
            set_peft_model_state_dict(other, tensors, adapter_name="other")
        except BNAdapterError:
            assert self.changed
            return
        if not self.changed:
            self.compare(before, self.logits(other))
            self.outcomes["state dict"] += 1

    def mode(self):
        self.model.train(self.random.random() < 0.5)

    def base_mode(self):
        part = self.random.choice([self.base(), *self.base().children()])
        part.train(self.random.random() < 0.5)

    def delete(self):
        if len(self.names()) > 1:
            self.model.delete_adapter(self.random.choice(self.names()))

    def reset_classifier(self):
        if hasattr(self.base(), "reset_classifier"):
            self.changed = True
            self.base().reset_classifier(self.random.choice([3, 5]))

    def eps(self):
        self.changed = True
        for module in self.base().modules():
            if is_norm(module) and hasattr(module, "eps"):
                module.eps = 1e-2

    def unfreeze(self):
        self.changed = True
        names = [*head_layers(self.base()), *(n for n, m in self.base().named_modules() if isinstance(m, nn.Conv2d))]
        self.base().get_submodule(self.random.choice(names)).requires_grad_(True)
        self.step()


RARE = 0.06  # the share of changes that no adapter holds
ORDINARY = ["add", "switch", "step", "step", "step", "merge", "unmerge", "save", "load_saved", "disable", "set_lean"]
ORDINARY += ["state_dict", "mode", "base_mode", "delete"]
UNUSUAL = ["reset_classifier", "eps", "unfreeze"]


def run(name, seed, folder):
    """Run one sequence, which ends with a save; return what became of the saves, or fail with the sequence."""
    session = Session(name, seed, folder)
    for _ in range(LENGTH):
        operations = UNUSUAL if session.random.random() < RARE else ORDINARY
        session.log.append(session.random.choice(operations))
        do(session, session.log[-1])
    session.log.append("save")
    do(session, "save")
    return session.outcomes


def do(session, operation):
    try:
        getattr(session, operation)()
    except BNAdapterError:
        session.outcomes[f"{operation} refused"] += 1  # the operation, never the save: that asserts
    except Exception as error:
        error.add_note(f"{session.name}: {' '.join(session.log)}")
        raise


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_saved_after_any_sequence_computes_the_same_or_saving_refuses(name, tmp_path, record_property):
    outcomes = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(COUNT // len(NETWORKS)):
            outcomes += run(name, f"{SEED}-{name}-{number}", tmp_path / str(number))
    print(f"\n{name}: {COUNT // len(NETWORKS)} sequences, {dict(outcomes)}")
    record_property("sequences", COUNT // len(NETWORKS))
    record_property("saves", outcomes["saved"])
    assert outcomes["saved"] > COUNT // len(NETWORKS) // 2


def planted(folder, *operations):
    """Run operations on the network of our own, without warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = Session("own", "planted", folder)
        for operation in operations:
            session.log.append(operation)
            do(session, operation)


def test_the_test_sees_an_adapter_that_is_not_what_was_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner, "check_unchanged", lambda *arguments: None)
    with pytest.raises(AssertionError, match="logits differ"):
        planted(tmp_path, "step", "eps", "save")


def test_the_test_sees_an_adapter_that_is_refused_without_a_reason(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AdapterError("The network has changed.", seen="nothing", do="nothing")

    monkeypatch.setattr(tuner, "check_unchanged", refuse)
    with pytest.raises(AssertionError, match="nothing is wrong with"):
        planted(tmp_path, "save")
