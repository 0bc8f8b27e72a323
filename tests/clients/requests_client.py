"""requests as people use it: python requests_client.py http://catalog.shop. A proxy comes from the environment."""

import hashlib
import os
import sys

import requests

base = sys.argv[1]
session = requests.Session()

for number in range(50):
    answer = session.get(f"{base}/items", params={"q": f"a b&{number}"}, timeout=10)
    assert answer.status_code == 200, answer.text
    seen = answer.json()
    assert seen["query"] == {"q": f"a b&{number}"}, seen
    assert seen["caller"] == "spiffe://outrigger.local/ns/shop/sa/cart", seen

body = os.urandom(3_000_000)
digest = hashlib.sha256(body).hexdigest()
answer = session.post(f"{base}/sum", data=body, timeout=10).json()
assert answer == {"size": len(body), "sha256": digest}, answer
# A generator is sent in chunks.
pieces = (body[at : at + 10_000] for at in range(0, len(body), 10_000))
answer = session.post(f"{base}/sum", data=pieces, timeout=10).json()
assert answer["size"] in (0, len(body)), answer

with session.get(f"{base}/stream", stream=True, timeout=10) as answer:
    lines = list(answer.iter_lines())
assert len(lines) == 20_000 and lines[-1] == b"019999", len(lines)

assert session.get(f"{base}/missing", timeout=10).status_code == 404
if "http_proxy" in os.environ:
    # A service that nobody has: an answer of the mesh, which says so.
    answer = session.get("http://nowhere.shop/", timeout=10)
    assert answer.status_code >= 500 and answer.headers["content-type"] == "application/problem+json", answer.text
print("ok")
