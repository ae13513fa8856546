"""A real HTTP server of OpenAI chat completions: the toolbox expert as teacher, with faults where a test
wants them."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer:
    """answer(body) -> the choice. faults: by number of the request (0, 1, ...), one of "429", "500", "slow",
    "malformed", "no choice", "hang up". delay: seconds before each answer."""

    def __init__(self, answer, faults=None, delay=0.0):
        self.answer, self.faults, self.delay = answer, dict(faults or {}), delay
        self.bodies, self.made = [], Counter()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with outer._lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                fault = outer.faults.get(number)
                assert self.path == "/v1/chat/completions"
                if fault is not None:
                    outer.made[fault] += 1
                time.sleep(30 if fault == "slow" else outer.delay)
                text = self.text(body, fault)
                status = int(fault) if fault in ("429", "500", "400") else 200
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if fault == "hang up":
                    self.wfile.write(text[: len(text) // 2])
                    self.close_connection = True
                    return
                self.wfile.write(text)

            def text(self, body, fault):
                if fault == "malformed":
                    return b'{"choices": [{"mess'
                if fault == "no choice":
                    return b'{"choices": []}'
                usage = {"prompt_tokens": 100, "completion_tokens": 10}
                return json.dumps({"choices": [outer.answer(body)], "usage": usage}).encode()

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request, client_address):
                pass  # a client that was killed

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def expert(records, edit=None):
    """Answers with the next turn of the expert's trace of the task that is asked about. edit(choice, body)
    may change the choice."""
    traces = {
        r.prompt[-1]["content"]: [m for m in r.expert_trace if m["role"] == "assistant"] for r in records
    }

    def answer(body):
        question = next(m["content"] for m in body["messages"] if m["role"] == "user")
        turn = traces[question][sum(m["role"] == "assistant" for m in body["messages"])]
        calls = [
            {
                "id": "x",
                "type": "function",
                "function": {"name": c["name"], "arguments": json.dumps(c["arguments"])},
            }
            for c in turn.get("tool_calls") or []
        ]
        message = {
            "role": "assistant",
            "content": turn["content"],
            "reasoning_content": turn["reasoning_content"],
        }
        choice = {"message": message | ({"tool_calls": calls} if calls else {}), "finish_reason": "stop"}
        return edit(choice, body) if edit else choice

    return answer


def in_text(choice, body):
    """The same turn as a server without a tool parser gives it: tags in the text."""
    message = choice["message"]
    blocks = []
    for call in message.pop("tool_calls", []):
        function = call["function"]
        text = json.dumps({"name": function["name"], "arguments": json.loads(function["arguments"])})
        blocks.append(f"<tool_call>\n{text}\n</tool_call>")
    thought = f"<think>\n{message.pop('reasoning_content')}\n</think>\n\n"
    message["content"] = thought + "\n".join([message["content"], *blocks]).strip()
    return choice
