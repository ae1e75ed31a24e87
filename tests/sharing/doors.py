"""Every door by which the folder of an adapter comes in; each raises what it raises."""

from pathlib import Path

import peft

from bn_affine_adapters import BNOnlyConfig, get_bn_only_model, load_bn_only_model
from bn_affine_adapters.cli import main
from bn_affine_adapters.sharing.hub import push_folder

REPO = "alice/x"


def load(folder, network, token):
    return load_bn_only_model(folder)


def given(folder, network, token):
    return load_bn_only_model(folder, network())


def by_peft(folder, network, token):
    return peft.PeftModel.from_pretrained(network(), folder)


def beside(folder, network, token):
    model = get_bn_only_model(network(), BNOnlyConfig(seed=0))
    model.load_adapter(folder, "two")
    return model


def command(*arguments):
    """Run a command of the command line; its error is raised, not printed."""
    return main.commands[arguments[0]].main([*map(str, arguments[1:])], standalone_mode=False)


def inspect(folder, network, token):
    return command("inspect", folder, "--json")


def verify(folder, network, token):
    return command("verify", folder, "--json")


def diff(folder, network, token):
    return command("diff", folder, folder)


def card(folder, network, token):
    return command("card", folder, REPO)


def push(folder, network, token):
    # To another repository in each test: the client's cache remembers one that is gone.
    return push_folder(folder, f"alice/{Path(folder).parent.name}", token=token)


DOORS = {"load": load, "given": given, "peft": by_peft, "beside": beside}
DOORS |= {"inspect": inspect, "verify": verify, "diff": diff, "card": card, "push": push}
WRITING = {"card", "push"}  # these read README.md, results.json and gamma.png too
