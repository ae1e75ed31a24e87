"""What scripts have in common: the commit they record, and what they say where an extra is missing."""

import subprocess

import pytest

from bn_affine_adapters.errors import ConfigError
from bn_affine_adapters.training.scripts import commit, installed


def git(folder, *words):
    settings = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *settings, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path):
    """A package in a git repository with one commit, in which it is not tracked."""
    git(tmp_path, "init", "-q")
    (tmp_path / "own.txt").write_text("of the user")
    git(tmp_path, "add", "own.txt")
    git(tmp_path, "commit", "-qm", "the user's")
    folder = tmp_path / ".venv" / "site-packages" / "bn_affine_adapters"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    return folder


def test_the_commit_of_a_checkout_is_recorded_and_that_of_an_enclosing_repository_is_not(package):
    assert commit(package) is None
    git(package, "add", "__init__.py")
    git(package, "commit", "-qm", "the package")
    assert git(package, "rev-parse", "HEAD").startswith(commit(package))
    assert len(commit(package)) >= 7


def test_there_is_no_commit_without_a_repository_or_without_git(package, tmp_path, monkeypatch):
    git(package, "add", "__init__.py")
    git(package, "commit", "-qm", "the package")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(package) is None
    monkeypatch.undo()
    assert commit(package) is not None
    (package / ".git").mkdir()  # none of its own: what git finds there is not a repository
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(package.parent))
    assert commit(package) is None


def test_a_missing_package_is_named_with_the_extra_that_brings_it(refused):
    with (
        refused(ConfigError, "No module named 'no_such_package'", "pip install 'bn-affine-adapters[tune]'"),
        installed("tune"),
    ):
        import no_such_package  # noqa: F401
