"""Redis: python redis_client.py HOST PORT. Commands, a pipeline, a transaction, a blocked pop, publish and subscribe."""

import os
import sys
import threading
import time

import redis

where = dict(host=sys.argv[1], port=int(sys.argv[2]), socket_timeout=20, socket_connect_timeout=20)
client = redis.Redis(**where)

client.flushall()
value = os.urandom(5_000_000)
assert client.set("big", value) and client.get("big") == value

with client.pipeline(transaction=False) as pipeline:
    for number in range(5000):
        pipeline.set(f"key {number}", f"value {number}")
        pipeline.get(f"key {number}")
    answers = pipeline.execute()
assert answers[1::2] == [b"value %d" % number for number in range(5000)]

with client.pipeline(transaction=True) as pipeline:
    pipeline.incr("counter").incrby("counter", 41)
    assert pipeline.execute() == [1, 42]

# A pop that waits is answered when somebody else pushes.
popped = []
waiting = threading.Thread(target=lambda: popped.append(redis.Redis(**where).blpop("list", timeout=15)), daemon=True)
waiting.start()
ends = time.monotonic() + 15
while client.info("clients")["blocked_clients"] == 0:
    assert time.monotonic() < ends, "the pop waits"
    time.sleep(0.01)
client.rpush("list", "pushed")
waiting.join(20)
assert popped == [(b"list", b"pushed")], popped

with redis.Redis(**where).pubsub() as pubsub:
    pubsub.subscribe("news")
    assert pubsub.get_message(timeout=20)["type"] == "subscribe"
    for number in range(200):
        assert client.publish("news", f"item {number}") == 1
    for number in range(200):
        message = pubsub.get_message(timeout=20)
        assert message and message["data"] == b"item %d" % number, message
print("ok")
