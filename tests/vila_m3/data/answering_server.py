"""A local server that answers like an OpenAI-compatible one."""

import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

ANSWERS = {
    "Lungs clear.": "The lungs are clear.",
    "Small bilateral pleural effusions.": "No pleural effusions.",
    "Heart normal.": "The heart is normal in size.",
}


class Server:
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.failures: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if outer.failures:
                    self.send_response(outer.failures.pop(0))
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                sentence = body["messages"][0]["content"].rsplit("Sentence: ", 1)[1]
                outer.asked.append(sentence)
                text = json.dumps({"choices": [{"message": {"content": ANSWERS.get(sentence, sentence)}}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
