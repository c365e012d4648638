"""A server with the interface of vLLM over PEFT's and transformers' arithmetic, for tests of the client; and its faults."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Change = Callable[[str, dict[str, Any]], Any]
"""Path of a request, reply -> another reply: JSON, text, or a number for an HTTP status."""


class Models:
    """A base and adapters in PEFT, by their names; the base is "base"."""

    def __init__(self, base: Path, adapters: Mapping[str, Path]) -> None:
        import peft
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        self.names = [*adapters, "base"]
        for name, folder in adapters.items():
            if isinstance(model, peft.PeftModel):
                model.load_adapter(str(folder), name)
            else:
                model = peft.PeftModel.from_pretrained(model, str(folder), name)
        self.model = model.eval()

    def scores(self, name: str, ids: Sequence[int]) -> Any:
        import torch

        with torch.no_grad():
            if name == "base":
                with self.model.disable_adapter():
                    logits = self.model(input_ids=torch.tensor([[*ids]])).logits
            else:
                self.model.set_adapter(name)
                logits = self.model(input_ids=torch.tensor([[*ids]])).logits
        return torch.log_softmax(logits[0], -1)

    def reply(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": name, "owned_by": "peft"} for name in self.names]}
        if path == "/version":
            return {"version": "1.2.3"}
        if path == "/tokenize":
            if "messages" in body:
                template = self.tokenizer.apply_chat_template
                ids = template(body["messages"], add_generation_prompt=True, tokenize=True, return_dict=True)[
                    "input_ids"
                ]
            else:
                ids = self.tokenizer(body["prompt"])["input_ids"]
            return {"tokens": list(ids), "count": len(ids)}
        assert path == "/v1/completions", path
        return self.complete(body)

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        name, ids, new = body["model"], body["prompt"], []
        while len(new) < body["max_tokens"] and self.tokenizer.eos_token_id not in new:
            new.append(int(self.scores(name, [*ids, *new])[-1].argmax()))
        choice: dict[str, Any] = {"index": 0, "text": self.tokenizer.decode(new), "logprobs": None}
        if body.get("return_token_ids"):
            choice["token_ids"] = new
        if body.get("echo"):
            given = [*ids, *new]
            scores = self.scores(name, given)
            found = [float(scores[at, given[at + 1]]) for at in range(len(given) - 1)]
            choice["logprobs"] = {"token_logprobs": [None, *found]}
        return {"object": "text_completion", "model": name, "choices": [choice], "usage": {"prompt_tokens": len(ids)}}


@contextmanager
def serving(models: Models, change: Change = lambda path, reply: reply) -> Iterator[str]:
    """Serve models on a free port, and yield the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({})

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: dict[str, Any]) -> None:
            found = change(self.path, models.reply(self.path, body))
            status = found if isinstance(found, int) else 200
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(status)
            if status in (301, 307):
                self.send_header("Location", "http://127.0.0.1:1/")
            self.send_header("Content-Length", str(len(content)))
            with suppress(ConnectionError):  # the client no longer waits
                self.end_headers()
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def late(seconds: float) -> Change:
    """Answer completions after some time."""

    def change(path: str, reply: dict[str, Any]) -> Any:
        time.sleep(seconds if path == "/v1/completions" else 0)
        return reply

    return change
