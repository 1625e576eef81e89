"""Programs of strangers in the place of a chat template: none reaches Python, the files, or all of the memory."""

import resource
import time

import pytest

from llama import template_sandbox
from llama.chat_template import ChatTemplate, ChatTemplateError

MESSAGES = [{"role": "user", "content": "hello {0.__class__}"}]


def _render(text: str) -> str:
    template = ChatTemplate(text, ["<|eos|>"])
    pieces = template.render(MESSAGES, add_generation_prompt=True, special_tokens={"bos_token": "<|bos|>"})
    return "".join(piece for piece, _ in pieces)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "''['__class__']['__mro__']",
        "''|attr('__class__')|attr('__base__')",
        "''|attr('\\x5f\\x5fclass\\x5f\\x5f')",
        "messages[0].content.format(messages)",
        "'{0.__class__.__init__.__globals__}'.format(raise_exception)",
        "'{0.__class__}'.format_map({'0': 1})",
        "raise_exception.__globals__",
        "raise_exception.__code__",
        "strftime_now.__self__.__class__",
        "cycler.__init__.__globals__.os.popen('id').read()",
        "joiner.__init__.__globals__['os']",
        "namespace.__init__.__globals__",
        "self.__init__.__globals__",
        "self._TemplateReference__context",
        "loop.__class__",
        "range.__class__.__base__",
        "(messages|map(attribute='__class__')|list)[0].__mro__",
        "(messages|map('attr', '__class__')|list)[0].__mro__",
        "(messages|groupby('__class__'))[0][0].__mro__",
        "messages.append(1)",
        "messages[0].update(role='system')",
        "messages.__class__",
        "bos_token.__add__.__self__.__class__",
        "(1).__class__",
        "lipsum()",
    ],
)
def test_nothing_of_python_is_reached(expression):
    try:
        text = _render("{{ " + expression + " }}")
    except ChatTemplateError:
        return
    # What the sandbox does not refuse is undefined: nothing.
    assert not any(word in text for word in ("class", "object", "globals", "builtin", "uid=")), text


@pytest.mark.parametrize(
    "tag", ["include '/etc/passwd'", "import 'os' as os", "extends '../base'", "from 'x' import y"]
)
def test_no_file_is_read(tag):
    with pytest.raises(ChatTemplateError):
        _render("{% " + tag + " %}")


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}"


@pytest.mark.parametrize(
    "text",
    [
        LOOP + "{% endfor %}{% endfor %}",
        LOOP + "{% if false %}x{% endif %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for i in [1] recursive %}{{ loop([1]) }}{{ loop([1]) }}{% endfor %}",
        "{% for i in range(99999) %}{% set x = range(99999)|sum %}{% endfor %}",
        "{% for i in range(99999) %}{% set x = range(99999)|map('string')|join|length %}{% endfor %}",
    ],
)
def test_one_that_would_never_end_is_stopped(text, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MOST_SECONDS", 0.2)
    started = time.monotonic()
    with pytest.raises(ChatTemplateError):
        _render(text)
    assert time.monotonic() - started < 60  # where nothing stopped it, it would take hours


@pytest.mark.parametrize(
    "text",
    [
        "{{ range(10**10) }}",
        "{% set t = 'a' * 10**6 %}{% for i in range(10**4) %}{{ t }}{% endfor %}",
        "{% set t = 'a' * 10**6 %}{% macro m() %}{% for i in range(10**4) %}{{ t }}{% endfor %}{% endmacro %}{{ m() }}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ [0] * 10**9 }}",
        "{{ 9**(9**9) }}",
        "{% set n = namespace(k=9) %}{% for i in range(99) %}{% set n.k = n.k * n.k %}{% endfor %}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (10**10, 1) }}",
        "{{ '{:9999999999}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**10) }}",
        "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
        "{{ 'a'.center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ 'a'.zfill(10**10) }}",
        "{{ '\\t'.expandtabs(10**10) }}",
        "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
        "{{ 'a'|center(10**10) }}",
        "{{ 'a'|indent(10**10, first=true) }}",
        "{{ '%9999999999d'|format(1) }}",
        "{{ [1]|slice(10**10)|list }}",
        "{{ [1]|batch(10**10, 0)|list }}",
        "{{ ('a' * 10**6).replace('', 'a' * 10**6) }}",
        "{{ ('a' * 10**6)|replace('a', 'a' * 10**6) }}",
        "{{ ('a' * 10**6).join(['b'] * 10**6) }}",
        "{{ (['a' * 10**6] * 10**5)|join('a' * 1000) }}",
        "{% set n = namespace(t='a') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}",
        "{% set n = namespace(t='a') %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
        "{% set n = namespace(t=['a']) %}{% for i in range(99) %}{% set n.t = n.t + n.t %}{% endfor %}",
    ],
)
def test_one_that_would_fill_the_memory_is_refused(text):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ChatTemplateError, match="it makes|width|[Rr]ange"):  # not that memory ran out
        _render(text)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: less than 1 GiB


def test_what_templates_do_still_works():
    text = (
        "{{ bos_token }}{% set n = namespace(k=0) %}{% macro turn(m) %}[{{ m.role|upper }}]{% endmacro %}"
        "{% for m in messages %}{{ turn(m) ~ ' ' ~ m['content'].replace('hello', 'bye').strip() }}"
        "{% set n.k = n.k + 1 %}{% endfor %}{{ '=' * 3 }}{{ n.k }}{{ [1, 2]|join(',') }}{{ '%02d' % 7 }}"
        "{{ messages|tojson|length }}{{ 'a\nb'|indent(2) }}{{ '{:>3}'.format('x') }}"
    )
    assert _render(text).startswith("<|bos|>[USER] bye {0.__class__}===11,207")
