"""grpcio in every kind of call: python grpc_client.py TARGET. A proxy comes from the environment."""

import os
import queue
import sys
import time

import grpc

channel = grpc.insecure_channel(sys.argv[1], options=[("grpc.max_receive_message_length", -1)])
path = "/echo.Echo/"
unary = channel.unary_unary(path + "Unary")
call = lambda name, message=b"", **more: channel.unary_unary(path + name)(message, timeout=10, **more)

assert call("Caller") == b"spiffe://outrigger.local/ns/shop/sa/cart", call("Caller")
for size in (0, 1, 100, 70_000, 4 * 1024 * 1024):
    message = os.urandom(size)
    answer, details = unary.with_call(message, timeout=10)
    assert answer == message, size
    assert dict(details.trailing_metadata())["x-length"] == str(size)

many = [unary.future(b"%d" % number, timeout=10) for number in range(100)]
assert [one.result() for one in many] == [b"%d" % number for number in range(100)]

assert channel.stream_unary(path + "Collect")(iter([b"x" * 10_000] * 300), timeout=10) == b"3000000"
assert len(list(channel.unary_stream(path + "Repeat")(b"n", timeout=10))) == 100

# Each message waits for the answer to the one before.
sent = queue.Queue()
answers = channel.stream_stream(path + "Bidi")(iter(sent.get, None), timeout=10)
for number in range(100):
    sent.put(b"message %d" % number)
    assert next(answers) == b"message %d" % number
sent.put(None)
assert list(answers) == []

try:
    call("Fail")
    raise SystemExit("an answer to Fail")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.NOT_FOUND, error
    assert error.details() == "no such thing", error

begun = time.monotonic()
try:
    channel.unary_unary(path + "Wait")(b"", timeout=0.3)
    raise SystemExit("an answer behind the deadline")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED, error
assert time.monotonic() - begun < 3

waiting = channel.unary_unary(path + "Wait").future(b"", timeout=20)
time.sleep(0.1)
waiting.cancel()
assert waiting.code() == grpc.StatusCode.CANCELLED
assert call("WasCancelled") == b"yes", "the server learns that the client has left"
print("ok")
