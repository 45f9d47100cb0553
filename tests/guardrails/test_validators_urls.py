import pytest

from guardrails.types import Context
from guardrails.validators import urls

ALLOW = ["acme.example", "*.acme.example", "github.com/acme", "bücher.de", "build.acme.test:8443", "docs.acme.test:*", "https://pay.acme.test", "10.0.0.7"]  # fmt: skip
LISTED = urls.Options(allow=ALLOW, deny=["old.acme.example"])
OPEN = urls.Options(deny=["evil.com", "*.evil.com"])
HITS = [
    ("See https://evil.com/login now", "host", "https://evil.com/login"),
    ("(https://evil.com).", "host", "https://evil.com"),
    ("HTTPS://EVIL.COM", "host", "HTTPS://EVIL.COM"),
    ("https://acme.example.evil.com/", "host", "https://acme.example.evil.com/"),
    ("https://evilacme.example/", "host", "https://evilacme.example/"),
    ("https://old.acme.example/x", "host", "https://old.acme.example/x"),
    ("https://github.com/acmecorp/x", "host", "https://github.com/acmecorp/x"),
    ("https://github.com/acme/../evil", "host", "https://github.com/acme/../evil"),
    ("https://github.com/acme/%2e%2e/evil", "host", "https://github.com/acme/%2e%2e/evil"),
    ("go to evil.com!", "host", "evil.com"),
    ("www.evil.it", "host", "www.evil.it"),
    ("login.evil.it", "host", "login.evil.it"),
    ("get evil.py/x", "host", "evil.py/x"),
    ("EVIL.COM/a", "host", "EVIL.COM/a"),
    ("evil。com", "host", "evil。com"),
    ("//evil.com/x.js", "host", "//evil.com/x.js"),
    ("http:evil.com", "host", "http:evil.com"),
    ("https:\\\\evil.com", "host", "https:\\\\evil.com"),
    ("https:/evil.com", "host", "https:/evil.com"),
    ("https://ｅｖｉｌ.com", "host", "https://ｅｖｉｌ.com"),
    ("https://%65vil.com", "host", "https://%65vil.com"),
    ("请看https://evil.com谢谢", "host", "https://evil.com"),
    ("https://acme.example@evil.com", "userinfo", "https://acme.example@evil.com"),
    ("https://acme.example\\@evil.com", "userinfo", "https://acme.example\\@evil.com"),
    ("https://acme.example)@evil.com", "userinfo", "https://acme.example)@evil.com"),
    ("https://anna:pw@acme.example/", "userinfo", "https://anna:pw@acme.example/"),
    ("https://аcme.example", "homograph", "https://аcme.example"),
    ("https://xn--cme-5cd.example", "homograph", "https://xn--cme-5cd.example"),
    ("https://www.аррӏе.com/", "homograph", "https://www.аррӏе.com/"),
    ("http://192.168.0.1/admin", "ip", "http://192.168.0.1/admin"),
    ("http://3232235521/", "ip", "http://3232235521/"),
    ("http://0x7f.1/", "ip", "http://0x7f.1/"),
    ("http://[::1]:80/", "ip", "http://[::1]:80/"),
    ("https://acme.example:8080/", "port", "https://acme.example:8080/"),
    ("http://pay.acme.test/", "host", "http://pay.acme.test/"),
    ("ftp://acme.example/x", "scheme", "ftp://acme.example/x"),
    ("[x](javascript:alert(1))", "scheme", "javascript:alert(1)"),
    ("data:text/html;base64,PHN2Zz4=", "scheme", "data:text/html;base64,PHN2Zz4="),
    ("[acme.example](https://docs.acme.test:1/x)", "text", "https://docs.acme.test:1/x"),
    ("[go to acme.example now](https://github.com/acme)", "text", "https://github.com/acme"),
    ("![](https://acme.example/p.png?q=secret)", "image", "https://acme.example/p.png?q=secret"),
    ("![a b](https://acme.example/p.png#x)", "image", "https://acme.example/p.png#x"),
    ('<img alt="" src="https://acme.example/p?d=1">', "image", "https://acme.example/p?d=1"),
    (f"![](https://acme.example/{'a' * 120}.png)", "image", f"https://acme.example/{'a' * 120}.png"),
    ("https://acme.example/?to=https://evil.com/", "host", "https://evil.com/"),
    ("[a](https://acme.example)[b](https://evil.com)", "host", "https://evil.com"),
    ("\ud800https://evil.com\udfff", "host", "https://evil.com\udfff"),
]
NEAR_MISSES = [
    "",
    "https://acme.example/a?b=c#d",
    "https://www.acme.example:443, and acme.example.",
    "HTTPS://ACME.EXAMPLE./x",
    "https://github.com/acme and https://github.com/acme/newel/issues",
    "https://bücher.de and https://xn--bcher-kva.de",
    "https://build.acme.test:8443/ and http://docs.acme.test:9000",
    "https://pay.acme.test/x",
    "http://10.0.0.7/",
    "mailto:anna@evil.com, anna.lee@evil.com, tel:+4930123456",
    "e.g. this, i.e. that, at 9 a.m. in the U.S. etc.",
    "main.py, README.md, run.sh, lib.rs and archive.zip",
    "ASP.NET, Socket.IO, Node.js and Vue.js",
    "It is finished.It was late.so we went",
    "version 1.2.3, 3.11.2 and 10.5 percent; v2.0.to",
    "note: this; data: that; JavaScript: a language; file: x",
    "A ratio of 3:2 at 12:30, see std::vector and a::b",
    "// a comment and // another.",
    "and/or, km/h, n/a",
    "[acme.example](https://www.acme.example/help)",
    "[the docs](https://docs.acme.test/x)",
    "[ASP.NET guide](https://docs.acme.test/x)",
    "![logo](https://acme.example/logo.png)",
    "see https://acme.example/wiki/Newel_(stairs).",
    "请看https://acme.example谢谢。",
    "'https://acme.example','https://acme.example'"[:22],
    "https://",
    "http: //",
    "\ud800",
]
TEXTS = [*(text for text, _, _ in HITS), *NEAR_MISSES]


async def found(options: urls.Options, text: str) -> list[tuple[str, str]]:
    return [(one.label, text[one.start : one.end]) for one in await urls.build(options).find(text, Context())]


@pytest.mark.parametrize(("text", "label", "address"), HITS)
async def test_an_address_that_is_not_welcome_is_found_whole(text, label, address):
    assert await found(LISTED, text) == [(label, address)]


@pytest.mark.parametrize("text", NEAR_MISSES)
async def test_welcome_addresses_and_what_only_looks_like_one_pass(text):
    assert await found(LISTED, text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://anywhere.org and http://127.0.0.1:8000/", []),
        ("evil.com", [("host", "evil.com")]),
        ("https://a.evil.com", [("host", "https://a.evil.com")]),
        ("https://notevil.com", []),
        ("http://2130706433/", [("ip", "http://2130706433/")]),
        ("http://0177.0.0.1/", [("ip", "http://0177.0.0.1/")]),
        ("https://münchen.de https://яндекс.рф https://例え.jp", []),
        ("https://pаypal.com", [("homograph", "https://pаypal.com")]),
        ("https://a.org@b.org", [("userinfo", "https://a.org@b.org")]),
        ("[a.org](https://b.org)", [("text", "https://b.org")]),
        ("![](https://b.org/?q=1)", [("image", "https://b.org/?q=1")]),
    ],
)
async def test_without_a_list_of_those_allowed_only_tricks_and_the_denied_are_found(text, expected):
    assert await found(OPEN, text) == expected


async def test_images_and_bare_domains_as_the_options_say():
    image = "![](https://acme.example/p.png?q=1) ![](https://acme.example/p.png)"
    assert await found(urls.Options(images="any"), image) == []
    assert [label for label, _ in await found(urls.Options(images="none"), image)] == ["image", "image"]
    assert await found(urls.Options(allow=["acme.example"], bare=False), "evil.com") == []
    assert await found(urls.Options(schemes=["ftp", "https"]), "ftp://a.org http://a.org") == [("scheme", "http://a.org")]


@pytest.mark.parametrize(("key", "entry"), [("allow", "https://"), ("deny", "a b"), ("allow", "*"), ("allow", "a@b.c")])
def test_an_entry_that_is_no_host_is_refused_with_its_place(key, entry):
    with pytest.raises(ValueError, match=f"{key}: number 2, .* is no host; write example.com"):
        urls.build(urls.Options(**{key: ["fine.com", entry]}))
