import errno
import pickle

import pytest

from qlora_core import errors
from qlora_core.errors import (
    ConfigError,
    LaunchError,
    QLoraError,
    StoreAwayError,
    StoreError,
    UserError,
    from_json,
)


@pytest.mark.parametrize("cls", errors._tree(QLoraError), ids=lambda cls: cls.__name__)
def test_every_error_survives_pickle_and_json_with_its_type_and_words(cls):
    error = cls("what", why="why", fix="fix")

    for rebuilt in (pickle.loads(pickle.dumps(error)), from_json(error.to_json())):
        assert type(rebuilt) is cls
        assert (rebuilt.what, rebuilt.why, rebuilt.fix) == ("what", "why", "fix")


def test_an_error_of_a_newer_version_is_still_understood():
    fields = {"type": "SomethingNew", "what": "w", "why": "", "fix": ""}

    assert type(from_json(fields)) is QLoraError


def test_what_a_person_can_mend_exits_with_2_and_is_never_worth_a_retry():
    for cls in errors._tree(QLoraError):
        assert cls.exit_code == (2 if issubclass(cls, UserError) else 1)
        assert not (issubclass(cls, UserError) and cls.is_transient)
    assert LaunchError.is_transient


def test_a_config_error_lists_all_its_problems():
    error = ConfigError.of(["a: wrong", "b: wrong too"], "recipe.yaml")

    assert "2 problems" in str(error)
    assert "a: wrong" in str(error)
    assert "b: wrong too" in str(error)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("ENOSPC", StoreAwayError),
        ("EDQUOT", StoreAwayError),
        ("EROFS", StoreAwayError),
        ("EIO", StoreAwayError),
        ("ESTALE", StoreAwayError),
        ("ETIMEDOUT", StoreAwayError),
        ("ENOTCONN", StoreAwayError),
        ("ENOENT", StoreAwayError),
        ("EACCES", StoreError),
        ("EPERM", StoreError),
        ("ENOTDIR", StoreError),
        ("EEXIST", StoreError),
        ("EISDIR", StoreError),
    ],
)
def test_a_store_that_may_come_back_is_told_from_one_that_a_person_must_change(name, kind):
    error = errors.storage_error(OSError(getattr(errno, name), name), "/store")

    assert type(error) is kind
    assert type(from_json(error.to_json())) is kind, "over a process border, too"


def test_a_full_disk_is_named_as_such():
    error = errors.storage_error(OSError(28, "No space left on device"), "/store")

    assert "disk is full" in str(error)
    assert "/store" in str(error)
    assert "Free some space" in error.fix
