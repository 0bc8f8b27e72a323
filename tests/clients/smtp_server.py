"""A mail server: it speaks first. Each mail's size goes to stdout."""

import asyncio

from aiosmtpd.smtp import SMTP


class Handler:
    async def handle_DATA(self, server, session, envelope):
        print(f"mail {len(envelope.content)}", flush=True)
        return "250 taken"


async def main():
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(Handler(), hostname="mail.test"), "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()[:2]
    print(f"listening smtp {host}:{port}", flush=True)
    print("ready", flush=True)
    await server.serve_forever()


asyncio.run(main())
