"""A server on this machine that speaks what TRL asks a vLLM server, with scripted completions."""

import contextlib
import hashlib
import http.server
import json
import threading

from transformers import AutoTokenizer
from trl.generation import vllm_client, vllm_generation
from trl.generation.vllm_client import VLLMClient

from trl_ext.tasks import POLICY_PATH


TOKENIZER = AutoTokenizer.from_pretrained(POLICY_PATH)


def answer(prompt: list[int], repeat: int) -> list[int]:
    """Three digits that tell the prompt and one that counts the answers to it in a request."""
    digest = hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
    return TOKENIZER(f"{int(digest[:8], 16) % 1000:03}{repeat % 10}")["input_ids"]


def logprobs_of(completion: list[int]) -> list[float]:
    """Log-probabilities that tell the completion and the position."""
    number = int(TOKENIZER.decode(completion, skip_special_tokens=True))
    return [-(10 * number + position) / 1e5 for position in range(len(completion))]


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def _reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._reply(
            {
                "/health": {},
                "/v1/models": {"data": [{"id": "policy"}]},
                "/server_info": {"vllm_config": {"model_config": {"logprobs_mode": "processed_logprobs"}}},
            }[self.path.partition("?")[0]]
        )

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.server.requests.append((self.path, request))
        choices, repeats = [], {}
        for prompt in request.get("prompt", ()):
            for _ in range(request["n"]):
                repeats[str(prompt)] = repeats.get(str(prompt), -1) + 1
                ids = answer(prompt, repeats[str(prompt)])
                tokens, logprobs = [f"token_id:{i}" for i in ids], logprobs_of(ids)
                top = [{token: value} for token, value in zip(tokens, logprobs, strict=True)]
                entry = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": top}
                choices.append({"prompt_token_ids": prompt, "token_ids": ids, "logprobs": entry})
        self._reply({"choices": choices, "success": True})


@contextlib.contextmanager
def serve():
    """A running server: its `url`, and the `requests` that were posted to it, as paths and bodies."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.requests, server.url = [], f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def without_gpu(patch, requests=None):
    """Let TRL's client work without vLLM and without a GPU; where it would send weights is noted among `requests`."""

    def update(self, metadata, parameters):
        sent = [(name, str(p.dtype).removeprefix("torch."), list(p.shape)) for name, p in parameters]
        assert sent == metadata
        if requests is not None:
            requests.append(("weights", {}))

    for module in (vllm_client, vllm_generation):
        patch.setattr(module, "is_vllm_available", lambda *args, **kwargs: True)
    patch.setattr(VLLMClient, "init_communicator", lambda self, device: None)
    patch.setattr(VLLMClient, "update_named_params", update)
