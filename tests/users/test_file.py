"""The file of users: what a line means, what is refused and why, and what a password is checked with."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.users.file import (
    MAX_MEMORY,
    DummyHashes,
    Hash,
    Limits,
    User,
    UserFileError,
    parse,
    size,
    size_text,
)

#: Cheap to check; `password`'s.
CHEAP = Hash(
    4, 1, 1, b"0123456789abcdef", hashlib.scrypt(b"password", salt=b"0123456789abcdef", n=16, r=1, p=1)
)

#: Of passlib's documentation (passlib.hash.scrypt): `password`.
PASSLIB = "$scrypt$ln=16,r=8,p=1$aM15713r3Xsvxbi31lqr1Q$nFNh2CVHVjNldFVKDHDlm4CbdRSCdEBsjjJxD+iCs5E"


# --- hashes


def test_a_new_hash_is_its_passwords_and_no_others() -> None:
    made = Hash.of("pässword")
    assert made.matches("pässword")
    assert not made.matches("password")
    assert made.salt != Hash.of("pässword").salt
    assert str(made).startswith("$scrypt$ln=14,r=8,p=5$")
    assert Hash.parse(str(made)) == made
    assert "digest" not in repr(User("ada", made))


def test_hashes_of_passlib_are_understood() -> None:
    assert Hash.parse(PASSLIB).matches("password")
    assert not Hash.parse(PASSLIB).matches("Password")
    assert str(Hash.parse(PASSLIB)) == PASSLIB


@pytest.mark.parametrize(
    "text",
    [
        *("", "password", "$2b$12$abc", "$scrypt$ln=14,r=8$c2FsdHNhbHQ$ZGlnZXN0"),
        "$scrypt$ln=0,r=8,p=1$MDEyMzQ1Njc4OWFiY2RlZg$MDEyMzQ1Njc4OWFiY2RlZg",
        "$scrypt$ln=22,r=8,p=1$MDEyMzQ1Njc4OWFiY2RlZg$MDEyMzQ1Njc4OWFiY2RlZg",  # 4 GiB
        "$scrypt$ln=14,r=8,p=999$MDEyMzQ1Njc4OWFiY2RlZg$MDEyMzQ1Njc4OWFiY2RlZg",  # a minute
        "$scrypt$ln=14,r=8,p=5$c2Fs$MDEyMzQ1Njc4OWFiY2RlZg",
        "$scrypt$ln=14,r=8,p=5$MDEyMzQ1Njc4OWFiY2RlZg$c2hvcnQ",
        "$scrypt$ln=14,r=8,p=5$MDEyMzQ1Njc4OWFiY2RlZ$MDEyMzQ1Njc4OWFiY2RlZg",
    ],
)
def test_what_is_no_hash_or_would_take_too_much_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        Hash.parse(text)


def test_the_dearest_hash_that_is_taken_can_be_checked() -> None:
    dear = Hash.parse("$scrypt$ln=17,r=8,p=1$MDEyMzQ1Njc4OWFiY2RlZg$MDEyMzQ1Njc4OWFiY2RlZg")
    assert MAX_MEMORY / 2 <= dear.memory() <= MAX_MEMORY
    assert not dear.matches("password")


def test_a_decoy_costs_what_a_user_costs_and_stays_the_same() -> None:
    other = Hash(5, 2, 1, CHEAP.salt, CHEAP.digest)
    users = {"ada": User("ada", CHEAP), "bob": User("bob", other), "eve": User("eve", None)}
    costs = {DummyHashes(users).hash_for(f"nobody {number}").work() for number in range(64)}
    assert costs == {CHEAP.work(), other.work()}
    first, again = (DummyHashes(dict(users)).hash_for("nobody") for _ in range(2))
    assert (first.ln, first.r, first.p, first.salt) == (again.ln, again.r, again.p, again.salt)
    assert not first.matches("password")


def test_without_users_a_decoy_costs_what_a_new_hash_does() -> None:
    assert DummyHashes({}).hash_for("nobody").work() == Hash(14, 8, 5, b"", b"").work()


# --- lines


def test_a_line_has_all_that_a_user_has() -> None:
    line = f"ada:{CHEAP}:ada/files:write:sessions=2,up=500K,down=2M,quota=10G"
    user = User.parse(line)
    assert user == User("ada", CHEAP, "ada/files", "write", Limits(2, 500 << 10, 2 << 20, 10 << 30))
    assert str(user) == line
    assert user.home_in("/srv") == "/srv/ada/files"
    assert user.permissions() == "elradfmwMT"


def test_what_is_left_out_has_defaults() -> None:
    user = User.parse("ada:*")
    assert user == User("ada", None, "", "", Limits())
    assert user.home_in("/srv") == "/srv"
    assert user.permissions() == "elr"
    assert user.permissions("elw") == "elw"
    assert User.parse("ada:*::el").permissions("elw") == "el"


def test_colons_and_backslashes_are_written_with_a_backslash() -> None:
    user = User("a:b", None, "C:\\d", "read", Limits())
    assert str(user) == "a\\:b:*:C\\:\\\\d:read:"
    assert User.parse(str(user)) == user


names = st.text(
    st.characters(codec="utf-8", categories=("L", "N", "P", "S"), include_characters=" :\\#="), min_size=1
).filter(lambda text: text == text.strip() and not text.startswith("#") and text != "anonymous")


@given(
    names, names, st.sampled_from(["", "read", "write", "elr"]), st.integers(0, 99), st.integers(0, 1 << 44)
)
def test_every_user_survives_the_file(name: str, home: str, perm: str, sessions: int, quota: int) -> None:
    if home.split("/")[0] == "..":
        return
    user = User(name, CHEAP, home, perm, Limits(sessions=sessions, quota=quota))
    try:
        assert parse(f"# {name}\n\n{user}\n") == {name: user}
    except UserFileError:  # a home that leads out: a/../..
        assert ".." in home


def test_a_file_has_comments_empty_lines_and_other_line_ends() -> None:
    text = "# our users\r\n\r\nada:*::read:\r\n   # indented\n\nbob:*:bob:write:"
    assert list(parse(text)) == ["ada", "bob"]
    assert parse("") == {}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("ada", "1 fields"),
        ("ada:*:::sessions=1:more", "6 fields"),
        (":*", "no name"),
        (" :*", "no name"),
        ("a\tb:*", "no name"),
        ("anonymous:*", "--anonymous"),
        ("ada:secret", "no hash"),
        ("ada:*:../bob", "leads out"),
        ("ada:*:x/../../bob", "leads out"),
        ("ada:*:a\x00b", "do not print"),
        ("ada:*::rwx", "permissions 'rwx'"),
        ("ada:*:::speed=5", "no limit 'speed=5'"),
        ("ada:*:::sessions", "no limit 'sessions'"),
        ("ada:*:::sessions=two", "'two' is no number"),
        ("ada:*:::sessions=-1", "'-1' is no number"),
        ("ada:*:::quota=1,quota=2", "twice"),
        ("ada:*:::up=5", "1K at least"),
        ("a\\da:*", "means nothing"),
        ("ada:*:\\", "backslash at the end"),
        ("bob:*", "twice"),
    ],
)
def test_a_line_that_is_wrong_is_named_with_the_reason(line: str, reason: str) -> None:
    with pytest.raises(UserFileError, match=reason) as caught:
        parse(f"# comment\nbob:*\n{line}\neve:nonsense\n")
    assert caught.value.line == 3
    assert str(caught.value).startswith("line 3: ")
    assert "\n" not in str(caught.value)


def test_an_absolute_home_may_be_anywhere() -> None:
    assert User.parse("ada:*:/home/ada").home_in("/srv") == "/home/ada"


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("5", 5), ("500K", 512000), ("2m", 2 << 20), ("10GB", 10 << 30), ("1T", 1 << 40)],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value
    assert size(size_text(value)) == value


@pytest.mark.parametrize("text", ["", "K", "1.5M", "-1", "1 M", "1X", "²"])
def test_what_is_no_size(text: Any) -> None:
    with pytest.raises(ValueError, match="no number"):
        size(text)
