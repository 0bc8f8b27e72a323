"""aiohttp as a client: python aiohttp_client.py http://catalog.shop, where aiohttp_server.py listens."""

import asyncio
import hashlib
import os
import sys

import aiohttp


async def main(base):
    async with aiohttp.ClientSession(base, timeout=aiohttp.ClientTimeout(30)) as session:

        async def hello(number):
            async with session.get("/hello", params={"n": number}) as answer:
                assert answer.status == 200, await answer.text()
                seen = await answer.json()
                assert seen["version"] == "1.1" and seen["host"] == base.removeprefix("http://"), seen
                assert seen["caller"] == "spiffe://outrigger.local/ns/shop/sa/cart", seen

        for _ in range(4):
            await asyncio.gather(*(hello(number) for number in range(25)))

        body = os.urandom(3_000_000)
        digest = hashlib.sha256(body).hexdigest()

        async def pieces():
            for at in range(0, len(body), 50_000):
                yield body[at : at + 50_000]

        for data in (body, pieces()):
            async with session.put("/sum", data=data) as answer:
                assert await answer.json() == {"size": len(body), "sha256": digest}

        async with session.get("/events") as answer:
            lines = [line async for line in answer.content if line.strip()]
        assert lines == [b"data: %d\n" % number for number in range(50)], lines

        async with session.get("/nothing") as answer:
            assert (answer.status, await answer.text()) == (404, "no such thing")

        async with session.ws_connect("/echo", max_msg_size=0) as socket:
            for number in range(100):
                await socket.send_str(f"message {number}")
                assert await socket.receive_str(timeout=10) == f"message {number}"
            await socket.send_bytes(body)
            assert await socket.receive_bytes(timeout=20) == body


asyncio.run(main(sys.argv[1]))
print("ok")
