"""An echo service on grpcio, without generated code: messages are bytes. python grpc_server.py [ADDRESS:PORT]"""

import sys
import threading
from concurrent import futures

import grpc

cancelled = threading.Event()


def unary(message, context):
    context.set_trailing_metadata((("x-length", str(len(message))),))
    return message


def collect(messages, context):
    return b"%d" % sum(len(message) for message in messages)


def repeat(message, context):
    for number in range(100):
        yield message + b"%d" % number


def bidi(messages, context):
    yield from messages


def fail(message, context):
    context.abort(grpc.StatusCode.NOT_FOUND, "no such thing")


def wait(message, context):
    """Runs until the client has left."""
    left = threading.Event()
    if not context.add_callback(left.set) or left.wait(20):
        cancelled.set()
    return b"too late"


def was_cancelled(message, context):
    return b"yes" if cancelled.wait(10) else b"no"


def caller(message, context):
    return dict(context.invocation_metadata()).get("x-outrigger-identity", "").encode()


handlers = {
    "Unary": grpc.unary_unary_rpc_method_handler(unary),
    "Collect": grpc.stream_unary_rpc_method_handler(collect),
    "Repeat": grpc.unary_stream_rpc_method_handler(repeat),
    "Bidi": grpc.stream_stream_rpc_method_handler(bidi),
    "Fail": grpc.unary_unary_rpc_method_handler(fail),
    "Wait": grpc.unary_unary_rpc_method_handler(wait),
    "WasCancelled": grpc.unary_unary_rpc_method_handler(was_cancelled),
    "Caller": grpc.unary_unary_rpc_method_handler(caller),
}
server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.max_receive_message_length", -1)])
server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("echo.Echo", handlers),))
host = (sys.argv[1:] + ["127.0.0.1:0"])[0]
port = server.add_insecure_port(host)
server.start()
print(f"listening grpc {host.rpartition(':')[0]}:{port}", flush=True)
print("ready", flush=True)
server.wait_for_termination()
