import pytest

from guardrails.types import Context
from guardrails.validators import urls

ALLOW = [
    "acme.com",
    "*.acme.com",
    "github.com/acme",
    "bücher.de",
    "build.acme.org:8443",
    "docs.acme.org:*",
    "https://pay.acme.org",
    "10.0.0.7",
]
LISTED = urls.Options(allow=ALLOW, deny=["old.acme.com"])
OPEN = urls.Options(deny=["evil.com", "*.evil.com"])
HITS = [
    ("See https://evil.com/login now", "host", "https://evil.com/login"),
    ("(https://evil.com).", "host", "https://evil.com"),
    ("HTTPS://EVIL.COM", "host", "HTTPS://EVIL.COM"),
    ("https://acme.com.evil.com/", "host", "https://acme.com.evil.com/"),
    ("https://evilacme.com/", "host", "https://evilacme.com/"),
    ("https://old.acme.com/x", "host", "https://old.acme.com/x"),
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
    ("https://acme.com@evil.com", "userinfo", "https://acme.com@evil.com"),
    ("https://acme.com\\@evil.com", "userinfo", "https://acme.com\\@evil.com"),
    ("https://acme.com)@evil.com", "userinfo", "https://acme.com)@evil.com"),
    ("https://anna:pw@acme.com/", "userinfo", "https://anna:pw@acme.com/"),
    ("https://аcme.com", "homograph", "https://аcme.com"),
    ("https://xn--cme-5cd.com", "homograph", "https://xn--cme-5cd.com"),
    ("https://www.аррӏе.com/", "homograph", "https://www.аррӏе.com/"),
    ("http://192.168.0.1/admin", "ip", "http://192.168.0.1/admin"),
    ("http://3232235521/", "ip", "http://3232235521/"),
    ("http://0x7f.1/", "ip", "http://0x7f.1/"),
    ("http://[::1]:80/", "ip", "http://[::1]:80/"),
    ("https://acme.com:8080/", "port", "https://acme.com:8080/"),
    ("http://pay.acme.org/", "host", "http://pay.acme.org/"),
    ("ftp://acme.com/x", "scheme", "ftp://acme.com/x"),
    ("[x](javascript:alert(1))", "scheme", "javascript:alert(1)"),
    ("data:text/html;base64,PHN2Zz4=", "scheme", "data:text/html;base64,PHN2Zz4="),
    ("[acme.com](https://docs.acme.org:1/x)", "text", "https://docs.acme.org:1/x"),
    ("[go to acme.com now](https://github.com/acme)", "text", "https://github.com/acme"),
    ("![](https://acme.com/p.png?q=secret)", "image", "https://acme.com/p.png?q=secret"),
    ("![a b](https://acme.com/p.png#x)", "image", "https://acme.com/p.png#x"),
    ('<img alt="" src="https://acme.com/p?d=1">', "image", "https://acme.com/p?d=1"),
    (f"![](https://acme.com/{'a' * 120}.png)", "image", f"https://acme.com/{'a' * 120}.png"),
    ("https://acme.com/?to=https://evil.com/", "host", "https://evil.com/"),
    ("[a](https://acme.com)[b](https://evil.com)", "host", "https://evil.com"),
    ("\ud800https://evil.com\udfff", "host", "https://evil.com"),
]
NEAR_MISSES = [
    "",
    "https://acme.com/a?b=c#d",
    "https://www.acme.com:443, and acme.com.",
    "HTTPS://ACME.COM./x",
    "https://github.com/acme and https://github.com/acme/newel/issues",
    "https://bücher.de and https://xn--bcher-kva.de",
    "https://build.acme.org:8443/ and http://docs.acme.org:9000",
    "https://pay.acme.org/x",
    "http://10.0.0.7/",
    "mailto:anna@evil.com, anna.lee@evil.com, tel:+4930123456",
    "e.g. this, i.e. that, at 9 a.m. in the U.S. etc.",
    "main.py, README.md, run.sh, lib.rs and archive.zip",
    "ASP.NET, Socket.IO, Node.js and Vue.js",
    "It is finished.It was late.so we went",
    "version 1.2.3, 3.11.2 and 10.5 percent",
    "note: this; data: that; JavaScript: a language; file: x",
    "A ratio of 3:2 at 12:30, see std::vector and a::b",
    "// a comment and // another.",
    "and/or, km/h, n/a",
    "[acme.com](https://www.acme.com/help)",
    "[the docs](https://docs.acme.org/x)",
    "[ASP.NET guide](https://docs.acme.org/x)",
    "![logo](https://acme.com/logo.png)",
    "see https://acme.com/wiki/Newel_(stairs).",
    "请看https://acme.com谢谢。",
    "'https://acme.com','https://acme.com'",
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
    image = "![](https://acme.com/p.png?q=1) ![](https://acme.com/p.png)"
    assert await found(urls.Options(images="any"), image) == []
    assert [label for label, _ in await found(urls.Options(images="none"), image)] == ["image", "image"]
    assert await found(urls.Options(allow=["acme.com"], bare=False), "evil.com") == []
    assert await found(urls.Options(schemes=["ftp", "https"]), "ftp://a.org http://a.org") == [
        ("scheme", "http://a.org")
    ]


@pytest.mark.parametrize(("key", "entry"), [("allow", "https://"), ("deny", "a b"), ("allow", "*"), ("allow", "a@b.c")])
def test_an_entry_that_is_no_host_is_refused_with_its_place(key, entry):
    with pytest.raises(ValueError, match=f"{key}: number 2, .* is no host; write example.com"):
        urls.build(urls.Options(**{key: ["fine.com", entry]}))
