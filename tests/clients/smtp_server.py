"""A mail server: it speaks first. Each mail's size goes to stdout. python smtp_server.py [HOST PORT...]"""

import asyncio
import sys

from aiosmtpd.smtp import SMTP


class Handler:
    async def handle_DATA(self, server, session, envelope):
        print(f"mail {len(envelope.content)}", flush=True)
        return "250 taken"


async def main():
    loop = asyncio.get_running_loop()
    where, *ports = sys.argv[1:] or ["127.0.0.1", "0"]
    servers = [
        await loop.create_server(lambda: SMTP(Handler(), hostname="mail.test"), where, int(port)) for port in ports
    ]
    for server in servers:
        host, port = server.sockets[0].getsockname()[:2]
        print(f"listening smtp {f'[{host}]' if ':' in host else host}:{port}", flush=True)
    print("ready", flush=True)
    await asyncio.gather(*(server.serve_forever() for server in servers))


asyncio.run(main())
