"""What chat templates may use: everything that real ones do, and no more steps than their messages can need."""

import threading

import pytest

from mlx_vlm_mini.errors import CheckpointError, PromptError
from mlx_vlm_mini.text.template import ChatTemplate


def render(source, content="Hi", times=1):
    (text,) = ChatTemplate(source, {"bos_token": "<s>"}, "<image>").render(
        [{"role": "user", "content": content}] * times
    )
    return text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% set ns = namespace(a=1) %}{% if ns is defined and ns.a == 1 %}{% set ns.a = 2 %}{% endif %}{{ ns.a }}", "2"),
        ("{% macro f(x, n) %}{{ x }}{% if n %}{{ f(x, n - 1) }}{% endif %}{% endmacro %}{{ f('a', 3) }}", "aaaa"),
        ("{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}{{ x }}{% endif %}{% endfor %}", "123"),
        ("{% for i in range(5) if i is odd %}{{ loop.index }}{{ loop.last }}{% endfor %}", "1False2True"),
        ("{{ messages|map(attribute='role')|list }}{{ messages[0:1]|length }}", "['user']1"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|list|last|tojson(indent=2) }}", '{\n  "role": "user",\n  "content": "Hi"\n}'),
        ("{{ {'b': 1, 'a': [1, 2]}|dictsort }}{{ 'x'.join(['a', 'b']) }}", "[('a', [1, 2]), ('b', 1)]axb"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{{ 'a-b'.split('-')[-1] ~ 3 }}{{ '%s-%02d' % ('x', 7) }}{{ '{}:{:>4}'.format('a', 5) }}", "b3x-07a:   5"),
        ("{{ 2 ** 10 }}{{ 'ab' * 3 }}{{ [1] * 2 + [3] }}{{ 7 // 2 }}", "1024ababab[1, 1, 3]3"),
        ("{% generation %}{{ 'a'|upper|trim|replace('A', 'bb')|indent }}{% endgeneration %}", "bb"),
        ("{{ messages|selectattr('role', 'equalto', 'x')|list|length }}{% if messages|map('upper') %}yes{% endif %}", "0yes"),
        ("{% filter upper %}a{% endfilter %}{% set x %}b{% endset %}{{ x }}{{ strftime_now('%Y')|length }}", "Ab4"),
        ("{% for m in messages %}{% set ns = namespace(a=1) %}{{ m.role.upper() ~ m.get('role') ~ ns.a }}{% endfor %}", "USERuser1"),
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
    ],
)  # fmt: skip
def test_what_templates_do(source, expected):
    assert render(source) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% set a = 'a' * 99999 %}{{ a.replace('a', a) }}", "steps"),
        ("{% set a = 'a' * 99999 %}{{ a|replace('a', a) }}", "steps"),
        ("{% set a = 'a' * 99999 %}{{ a.join(a) }}", "steps"),
        ("{% set a = 'a' * 99999 %}{{ a|join(a) }}", "steps"),
        ("{{ [1] * 10**9 }}", "steps"),
        ("{{ 9 ** (9 ** 9) }}", "4096 bits"),
        ("{% for i in range(9999) if i < 0 %}{% endfor %}" * 99, "steps"),
        ("{% for i in range(99999) %}" + "x" * 9999 + "{% endfor %}", "steps"),
        ("{% for x in ['a'] if x == 'a' recursive %}{{ loop(range(99999)) }}" * 1 + "{% endfor %}" + "{% for i in range(99999) %}{% if 'x' in range(99999) %}{% endif %}{% endfor %}", "steps"),
        ("{% set n = namespace() %}{% set n.x = [n] %}{{ n }}", "namespace"),
        ("{% set n = namespace(x=(1,)) %}{% for i in range(99) %}{% set n.x = (n.x, n.x) %}{% endfor %}", "parts|lists"),
        ("{{ 'a'|center(10**9) }}", "1,000,000,000"),
        ("{{ 'a'.ljust(10**9) }}", "1,000,000,000"),
        ("{{ '{:>{}}'.format(1, 10**9) }}", "1,000,000,000|width"),
        ("{{ '{:>99999}'.format(1) }}", "width"),
        ("{{ '%*d' % (10**9, 1) }}", "width"),
        ("{{ [1]|batch(10**9, 1)|list }}", "1,000,000,000"),
        ("{{ 1|round(10**9) }}", "1,000,000,000"),
        ("{{ [1]|tojson(indent=10**9) }}", "1,000,000,000"),
        ("{{ (1).to_bytes(10**9, 'big') }}", "int.to_bytes"),
        ("{{ '\t'.expandtabs(10**9) }}", "str.expandtabs"),
        ("{{ [[1]]|sum(start=[]) }}", "no numbers"),
        ("{{ strftime_now('%999999999Y') }}", "long date"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "steps"),
    ],
)  # fmt: skip
def test_what_is_stopped(source, message):
    with pytest.raises(CheckpointError, match=f"the chat template was stopped: .*({message})"):
        render(source)


@pytest.mark.parametrize(
    "source",
    ["{{ lipsum(n=9**9) }}", "{{ messages.append(1) }}{{ 1 / 0 }}", "{{ ''|attr('__class__')|attr('mro')() }}"],
)
def test_what_does_not_exist(source):
    with pytest.raises(PromptError, match="refuses these messages"):
        render(source)


def test_long_conversations_may_take_more_steps():
    """Each message looks at all: 300 of them take 90,000 rounds and more, which one message may not."""
    source = "{% for m in messages %}{% for n in messages %}{% if m.content == n.content %}{{ '' }}{% endif %}{% endfor %}{% endfor %}"
    assert render(source, "a" * 500, times=300) == ""
    with pytest.raises(CheckpointError, match="steps"):
        render(source.replace("in messages", "in range(300)").replace(".content", "").replace("300", "600"))


def test_threads_do_not_count_for_one_another():
    found, source = [], "{% for i in range(9000) %}{{ i }}{% endfor %}"
    template = ChatTemplate(source, {}, "<image>")
    messages = [{"role": "user", "content": "Hi"}]
    threads = [threading.Thread(target=lambda: found.append(template.render(messages))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({text for (text,) in found}) == 1
