"""web: asks catalog over HTTP with requests and over gRPC with grpcio. Both find the way through the mesh by themselves
when `http_proxy` names the sidecar: requests sends it the whole URL, grpcio opens a CONNECT tunnel.

    http_proxy=http://127.0.0.1:9081 python web.py PORT
"""
import sys

import grpc
import requests
from flask import Flask, jsonify

CATALOG = "http://catalog"
CATALOG_GRPC = "catalog:50051"

app = Flask(__name__)
session = requests.Session()
channel = grpc.insecure_channel(CATALOG_GRPC)
price_of = channel.unary_unary("/shop.Catalog/Price")
items = channel.unary_stream("/shop.Catalog/Items")


@app.get("/shop/<name>")
def shop(name):
    answer = session.get(f"{CATALOG}/items/{name}", timeout=5)
    if answer.status_code != 200:
        return jsonify(answer.json()), answer.status_code
    price, call = price_of.with_call(name.encode(), timeout=5)
    return jsonify(
        http=answer.json(),
        grpc={"price": int(price), "caller": dict(call.initial_metadata())["caller"]},
        items=[item.decode() for item in items(b"", timeout=5)],
    )


@app.get("/grpc-error/<name>")
def grpc_error(name):
    try:
        price_of(name.encode(), timeout=5)
        return jsonify(code="OK")
    except grpc.RpcError as error:
        return jsonify(code=error.code().name, details=error.details())


if __name__ == "__main__":
    app.run("127.0.0.1", int(sys.argv[1]), threaded=True)
