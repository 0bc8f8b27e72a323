"""Asks a resolver with dnspython, which reads every answer to its last byte. Called by tests/tests/dns_answers.rs.

ADDRESS PORT, then it expects: catalog has 10.96.0.10 and fd96::10, many has more than UDP carries without EDNS,
www.example.org does not exist, a zone is not given away."""

import sys

import dns.edns
import dns.flags
import dns.message
import dns.query
import dns.rcode
import dns.resolver

where, port = sys.argv[1], int(sys.argv[2])


def ask(name, kind, tcp=False, **options):
    query = dns.message.make_query(name, kind, **options)
    send = dns.query.tcp if tcp else dns.query.udp
    answer = send(query, where, timeout=20, port=port)
    assert answer.question == query.question and answer.id == query.id
    assert answer.edns == query.edns, (answer.edns, query.edns)
    return answer


for edns in ({}, {"use_edns": 0, "payload": 1232}, {"want_dnssec": True}):
    for tcp in (False, True):
        answer = ask("CaTalog.shop.svc.cluster.local", "A", tcp, **edns)
        assert [str(item) for item in answer.answer[0]] == ["10.96.0.10"], answer
        assert answer.answer[0].ttl <= 30 and not answer.authority
        answer = ask("catalog.", "AAAA", tcp, **edns)
        assert [str(item) for item in answer.answer[0]] == ["fd96::10"], answer
        answer = ask("catalog.shop", "MX", tcp, **edns)
        assert answer.rcode() == dns.rcode.NOERROR and not answer.answer
        assert answer.authority[0][0].minimum == 5, answer
        answer = ask("www.example.org", "A", tcp, **edns) if not edns else None
        assert answer is None or answer.rcode() == dns.rcode.NXDOMAIN

# A client that may not ask by TCP sees that something is missing; one that may gets all of it.
answer = ask("many.shop", "A")
assert answer.flags & dns.flags.TC and 20 < len(answer.answer[0]) < 60, answer
answer, by_tcp = dns.query.udp_with_fallback(dns.message.make_query("many.shop", "A"), where, timeout=20, port=port)
assert by_tcp and len(answer.answer[0]) == 60 and answer.answer[0].ttl == 5

query = dns.message.make_query("catalog.shop", "A", use_edns=1)
answer = dns.query.udp(query, where, timeout=20, port=port)
assert answer.rcode() == dns.rcode.BADVERS and answer.edns == 0, answer
answer = ask("shop", "AXFR", tcp=True)
assert answer.rcode() == dns.rcode.REFUSED, answer

# As an application has it.
resolver = dns.resolver.Resolver(configure=False)
resolver.nameservers, resolver.port = [where], port
assert [str(item) for item in resolver.resolve("catalog.shop.")] == ["10.96.0.10"]
try:
    resolver.resolve("four.shop.", "AAAA")
    raise AssertionError("four has no AAAA")
except dns.resolver.NoAnswer:
    pass
print("ok")
