"""aiohttp as a server: python aiohttp_server.py HOST PORT [CERTIFICATE KEY], with the last two it speaks TLS."""

import hashlib
import ssl
import sys

from aiohttp import WSMsgType, web

routes = web.RouteTableDef()


def caller(request):
    return request.headers.get("x-outrigger-identity", "")


@routes.get("/hello")
async def hello(request):
    version = f"{request.version.major}.{request.version.minor}"
    return web.json_response({"version": version, "host": request.host, "caller": caller(request)})


@routes.get("/bytes/{size}")
async def blob(request):
    """As many bytes, each block of 64 KiB another; their checksum is in /sum/{size}."""
    response = web.StreamResponse()
    response.content_length = int(request.match_info["size"])
    await response.prepare(request)
    for block in blocks(response.content_length):
        await response.write(block)
    return response


@routes.get("/sum/{size}")
async def blob_sum(request):
    digest = hashlib.sha256()
    for block in blocks(int(request.match_info["size"])):
        digest.update(block)
    return web.Response(text=digest.hexdigest())


def blocks(size):
    pattern = bytes(range(256)) * 256
    for at in range(0, size, len(pattern)):
        yield (at.to_bytes(8, "big") + pattern)[: min(len(pattern), size - at)]


@routes.put("/sum")
async def upload(request):
    digest = hashlib.sha256()
    size = 0
    async for block in request.content.iter_chunked(65536):
        digest.update(block)
        size += len(block)
    return web.json_response({"size": size, "sha256": digest.hexdigest()})


@routes.get("/events")
async def events(request):
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    for number in range(50):
        await response.write(b"data: %d\n\n" % number)
    return response


@routes.get("/echo")
async def echo(request):
    socket = web.WebSocketResponse(max_msg_size=0)
    await socket.prepare(request)
    async for message in socket:
        if message.type == WSMsgType.TEXT:
            await socket.send_str(message.data)
        elif message.type == WSMsgType.BINARY:
            await socket.send_bytes(message.data)
    return socket


@routes.get("/nothing")
async def nothing(request):
    raise web.HTTPNotFound(text="no such thing")


app = web.Application(client_max_size=1 << 30)
app.add_routes(routes)
host, port, *files = sys.argv[1:]
tls = None
if files:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*files)
shown = f"[{host}]" if ":" in host else host


def started(*_):
    print(f"listening http {shown}:{port}", flush=True)
    print("ready", flush=True)


web.run_app(app, host=host, port=int(port), ssl_context=tls, print=started, access_log=None)
