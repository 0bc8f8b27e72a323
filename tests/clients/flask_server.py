"""A Flask application as people write them: it knows nothing of the mesh but the header that names the caller.
python flask_server.py [HOST PORT]"""

import hashlib
import sys

from flask import Flask, Response, jsonify, request
from werkzeug.serving import make_server, WSGIRequestHandler

app = Flask("catalog")


@app.get("/items")
def items():
    return jsonify(query=request.args, caller=request.headers.get("X-Outrigger-Identity"))


@app.post("/sum")
def checksum():
    digest = hashlib.sha256()
    size = 0
    while chunk := request.stream.read(65536):
        digest.update(chunk)
        size += len(chunk)
    return jsonify(size=size, sha256=digest.hexdigest())


@app.get("/stream")
def stream():
    return Response((b"%06d\n" % number for number in range(20_000)), mimetype="text/plain")


@app.get("/missing")
def missing():
    return jsonify(error="no such thing"), 404


class Handler(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"


host, port = (sys.argv[1:] + ["127.0.0.1", "0"])[:2]
server = make_server(host, int(port), app, threaded=True, request_handler=Handler)
print(f"listening http {f'[{host}]' if ':' in host else host}:{server.port}", flush=True)
print("ready", flush=True)
server.serve_forever()
