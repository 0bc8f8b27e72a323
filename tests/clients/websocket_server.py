"""A WebSocket echo server."""

from websockets.sync.server import serve


def echo(connection):
    for message in connection:
        connection.send(message)


with serve(echo, "127.0.0.1", 0, max_size=None) as server:
    host, port = server.socket.getsockname()[:2]
    print(f"listening ws {host}:{port}", flush=True)
    print("ready", flush=True)
    server.serve_forever()
