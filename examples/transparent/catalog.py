"""The service. It listens on all addresses, has no idea of a mesh, and prints who its sidecar proved the caller to be."""
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Catalog(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one segment; in two, delayed acknowledgements cost 40 ms

    def do_GET(self):
        caller = self.headers.get("x-outrigger-identity", "nobody that proved it")
        body = f"tea, 4.50\ncalled by {caller}\n".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


ThreadingHTTPServer(("", int(sys.argv[1])), Catalog).serve_forever()
