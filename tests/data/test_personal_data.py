"""Masks replace what is somebody's and nothing else, twice is as good as once, and code stays code."""

from __future__ import annotations

import ast
import base64
import hashlib
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.personal_data import EMAIL, IPV4, IPV6, KEY, MASKS, PHONE, entropy, looks_random, mask

ALL = ("email", "ip", "key", "phone")
RANDOM = base64.b64encode(hashlib.sha256(b"a secret").digest()).decode().rstrip("=").replace("/", "x").replace("+", "y")
HEX = hashlib.sha256(b"another").hexdigest()


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jane.doe+x@firma.co.uk.", f"write to {EMAIL}."),
        ("<a@b.de>, 'C_D@E-F.ORG'", f"<{EMAIL}>, '{EMAIL}'"),
        ("mailto:x@y.museum?subject=z", f"mailto:{EMAIL}?subject=z"),
        ("a@b.de c@d.fr", f"{EMAIL} {EMAIL}"),
        ("x" * 64 + "@b.de", EMAIL),
    ],
)
def test_emails(text, masked):
    assert mask(text, "prose", ["email"]) == (masked, {"email": masked.count(EMAIL)})


@pytest.mark.parametrize(
    "text",
    [
        "me@example.com, you@mail.example.org, root@localhost, a@b.test",
        "git@github.com:x/y.git and noreply@firma.de",
        "y = weights@hidden.mean, a@b.T, x@w.to(device), self@other.data, x@w.is[0]",
        "@decorator.org without a name, name@ without a host, a @ b.de, user@host.de.txt",
        "https://user:pass%x@b.de" + "z" * 70,
        "y" * 65 + "@b.de is longer than an address may be",
        "1@2, @@@, @, a@.de",
        "me@example.com+1-555-0100x@y.org",
    ],
)
def test_no_emails(text):
    assert mask(text, "code", ["email"]) == (text, {})


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("from 8.8.4.4 to 93.184.216.34:80", f"from {IPV4} to {IPV4}:80"),
        ("93.184.216.34 - - [10/Oct]", f"{IPV4} - - [10/Oct]"),
        ("8.8.8.8.", f"{IPV4}."),
        ("at [2a00:1450:4001:81b::200e]:443", f"at [{IPV6}]:443"),
        ("2001:4860:4860:0:0:0:0:8888/64", f"{IPV6}/64"),
        ("2607::a:1", IPV6),
    ],
)
def test_addresses(text, masked):
    assert mask(text, "prose", ["ip"]) == (masked, {"ip": masked.count(IPV4) + masked.count(IPV6)})


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1 0.0.0.0 10.1.2.3 192.168.0.1 172.16.9.9 169.254.1.1 255.255.255.255 192.0.2.77 224.0.0.1",
        "v8.8.4.4, version 8.8.4.4, Version: 8.8.4.4, __version__ = '8.8.4.4', pip install x==8.8.4.4, >=8.8.4.4",
        "8.8.4.4.5, 1.8.8.4.4, x8.8.4.4, 8.8.4.4-1, 8.8.4.4rc1, 300.8.4.4, 8.8.4.256, 008.8.4.4, 8-8.8.4.4",
        "1.2.3.4 A heading\n  2.2.3.4 Another",
        "Section 1.2.3.4, §8.8.4.4, OID 1.3.6.1, Linux 5.15.0.91, Mozilla/5.0 Chrome/114.0.0.0 Safari/8.8.4.4",
        "12:30:45, 00:1a:2b:3c:4d:5e, fe80::1:2:3, ::1, 2001:db8::5:6, std::a::b, x[2000::2], 3000:1:2",
        "3fff:1:2:3:4:5:6:7:8:9, 2a00:1450::1::2",
    ],
)
def test_no_addresses(text):
    assert mask(text, "prose", ["ip"]) == (text, {})


# Put together here, so that nothing in this file looks like a secret.
TOKENS = [
    "AKIA" + "Q7R2" * 4, "gh" + "p_" + RANDOM[:36], "github" + "_pat_" + RANDOM[:30], "gl" + "pat-" + RANDOM[:20],
    "sk" + "-proj-" + RANDOM[:40], "sk" + "-" + RANDOM[:32], "hf" + "_" + RANDOM[:34], "AI" + "za" + (RANDOM * 2)[:35],
    "xox" + "b-1234567890-" + RANDOM[:12], "sk" + "_live_" + RANDOM[:24], "npm" + "_" + RANDOM[:36],
    "SG" + "." + RANDOM[:22] + "." + RANDOM[:43], "dop" + "_v1_" + HEX, "ya" + "29." + RANDOM[:40],
    "pypi" + "-AgE" + (RANDOM * 2)[:60], "AGE-SECRET-KEY-" + "1" + "Q7" * 29,
    "ey" + "J" + RANDOM[:20] + ".ey" + "J" + RANDOM[:20] + "." + RANDOM[:30],
]  # fmt: skip


@pytest.mark.parametrize("token", TOKENS)
def test_tokens(token):
    assert mask(f'x = "{token}"  # {token}', "code", ["key"]) == (f'x = "{KEY}"  # {KEY}', {"key": 2})
    assert mask(token[:12], "code", ["key"])[1] == {}


def test_slack_hook_keeps_its_host():
    hook = "https://hooks.slack.com/services/" + "T01AB23CD/B45EF67GH/" + RANDOM[:24]
    assert mask(hook, "prose", ["key"]) == (f"https://hooks.slack.com/services/{KEY}", {"key": 1})


def test_private_keys_keep_their_marks():
    begin, end = "-----BEGIN RSA " + "PRIVATE KEY-----", "-----END RSA " + "PRIVATE KEY-----"
    body = "\n".join([RANDOM, RANDOM, RANDOM[:10]])
    assert mask(f"{begin}\n{body}\n{end}\n", "prose", ["key"]) == (f"{begin}\n{KEY}\n{end}\n", {"key": 1})
    code = f'k = "{begin}\\n{RANDOM}\\n{end}\\n"'
    assert mask(code, "code", ["key"])[0] == f'k = "{begin}\\n{KEY}\\n{end}\\n"'
    two = f"{begin}{RANDOM}{end} and {begin}{RANDOM}{end}"
    assert mask(two, "prose", ["key"]) == (f"{begin}{KEY}{end} and {begin}{KEY}{end}", {"key": 2})
    for unfinished in (f"{begin}\n...\n{end}", f"{begin}\n{RANDOM}", "the words PRIVATE KEY"):
        assert mask(unfinished, "prose", ["key"]) == (unfinished, {})


@pytest.mark.parametrize(
    "name", ["api_key = ", '"secret": ', "AUTH_TOKEN=", "password: ", "'db_pwd' => ", "ApiKeyProd := "]
)
def test_assigned_secrets(name):
    for value in (RANDOM, HEX[:32]):
        assert mask(f'{name}"{value}",', "code", ["key"]) == (f'{name}"{KEY}",', {"key": 1})


@pytest.mark.parametrize(
    "text",
    [
        'password = "correct-horse-battery-staple"', 'token = "your_token_goes_here"', 'secret = "xxxxxxxxxxxxxxxx1"',
        f'name = "{RANDOM}"', f'sha256 = "{HEX}"', f"api_key = {RANDOM}", 'api_key = "short1"',
        f"api_key = \"{RANDOM}'",
        'tokenizer = "Qwen/Qwen2.5-Coder-32B-Instruct"', "author: 'John.Smith.1978.Berlin'", "sk-internationalisation",
        'private_key = "/etc/ssl/private/server.key"', 'token = "1234567890123456"', "risk-free, task-" + RANDOM[:5],
    ],
)  # fmt: skip
def test_no_secrets(text):
    assert mask(text, "code", ["key"]) == (text, {})


def test_entropy_is_in_bits_a_character():
    assert entropy("aabb") == 1
    assert entropy("abcdefgh") == 3
    assert entropy("aaaa") == 0
    assert looks_random(HEX[:16]) or looks_random(HEX)
    assert not looks_random("12341234")


@pytest.mark.parametrize(
    "number", ["+49 30 901820", "+1 (415) 555 2671", "(415) 555-2671", "415-555-2671", "415.555.2671", "+442071838750",
               "+33 123 456 789", "+1.415.555.2671", "+47 22 22 22 22"]
)
def test_phones(number):
    assert mask(f"call {number}, please", "prose", ["phone"]) == (f"call {PHONE}, please", {"phone": 1})
    assert mask(f"call {number}, please", "code", ["phone"]) == (f"call {number}, please", {})


@pytest.mark.parametrize(
    "text",
    ["2024-11-21", "1-2-3", "100-200-3000", "3.14159.2653", "+5", "a+1 23", "(123) 45", "415-555-26712", "+1 2",
     "up +12.34% and (+250.00) EUR", "lat +48.8566, lon +2.3522", "+15 20 25 30", "+10 000 000, +100 000 000 people",
     "+1234567.89 and +123.456789", "@@ -12,34 +56,78 @@"],
)  # fmt: skip
def test_no_phones(text):
    assert mask(text, "prose", ["phone"]) == (text, {})


PIECES = st.sampled_from([
    "a", "b.de", "@", ".", "8.8.8.8", "2a00:1450:4001::1", ":", " ", "\n", "+49 30 901820", "(415) 555-2671", "-",
    "key = ", '"', RANDOM, "token: ", *TOKENS[:6], EMAIL, IPV4, IPV6, KEY, PHONE, "v", "1", "x@y.org",
])  # fmt: skip


@given(st.lists(PIECES, max_size=25).map("".join))
def test_a_second_masking_changes_nothing(text):
    once, _ = mask(text, "prose", ALL)
    assert mask(once, "prose", ALL) == (once, {})
    assert mask(text, "prose", []) == (text, {})


@given(st.text(max_size=200))
def test_any_text(text):
    masked, found = mask(text, "prose", ALL)
    assert (masked == text) == (not found)
    assert set(found) <= set(MASKS)


def test_code_stays_parseable():
    # Modules that are full of addresses, and what is made of them is still Python with as many statements.
    library, changed = Path(sysconfig.get_paths()["stdlib"]), 0
    for name in ("smtplib.py", "email/utils.py", "ipaddress.py", "ssl.py", "test/test_email/test_utils.py",
                 "secrets.py", "urllib/parse.py", "test/test_ipaddress.py", "json/decoder.py"):  # fmt: skip
        if (library / name).exists():  # some distributions leave the tests out
            code = (library / name).read_text(encoding="utf-8")
            masked, found = mask(code, "code", ALL)
            assert len(ast.parse(masked).body) == len(ast.parse(code).body)
            assert masked.count("\n") == code.count("\n")
            changed += bool(found)
    source = f'KEYS = ["{TOKENS[1]}", b"{TOKENS[0]}"]\nMAIL = f"{{name}} <jane@firma.de>"  # 8.8.8.8\n'
    masked, found = mask(source, "code", ALL)
    assert ast.unparse(ast.parse(masked)) == f"KEYS = ['{KEY}', b'{KEY}']\nMAIL = f'{{name}} <{EMAIL}>'"
    assert found == {"key": 2, "email": 1, "ip": 1}
    assert changed > 0
