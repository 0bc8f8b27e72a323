"""WebSocket: python websocket_client.py ws://HOST:PORT/ [PROXY]"""

import os
import sys

from websockets.sync.client import connect

proxy = sys.argv[2] if len(sys.argv) > 2 else None
with connect(sys.argv[1], proxy=proxy, max_size=None) as connection:
    for number in range(200):
        connection.send(f"message {number}")
        assert connection.recv(timeout=10) == f"message {number}"
    big = os.urandom(1_000_000)
    connection.send(big)
    assert connection.recv(timeout=10) == big
    assert connection.ping().wait(timeout=10)
    connection.close(1000, "done")
    assert connection.close_code == 1000
print("ok")
