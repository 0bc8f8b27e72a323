"""A WebSocket echo server: python websocket_server.py [HOST PORT]"""

import sys

from websockets.sync.server import serve


def echo(connection):
    for message in connection:
        connection.send(message)


where, port = (sys.argv[1:] + ["127.0.0.1", "0"])[:2]
with serve(echo, where, int(port), max_size=None) as server:
    host, port = server.socket.getsockname()[:2]
    print(f"listening ws {f'[{host}]' if ':' in host else host}:{port}", flush=True)
    print("ready", flush=True)
    server.serve_forever()
