"""What a vLLM server says of a model, in its shapes, by plain passes of transformers: for tests without an engine.

Its shapes are those of a real one (tests/cluster/test_vllm_server.py).
"""

import torch
from aiohttp import web

NO_MASS = -9999.0


class VllmLike:
    """`asked` are the bodies of its requests for completions."""

    def __init__(self, model, max_length=128, max_logprobs=20):
        self.model, self.max_length, self.max_logprobs, self.asked = model, max_length, max_logprobs, []

    def app(self):
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        return app

    async def _models(self, _):
        return web.json_response({"data": [{"id": "teacher", "max_model_len": self.max_length}]})

    async def _completions(self, request):
        body = await request.json()
        self.asked.append(body)
        prompt, top = body["prompt"], body.get("prompt_logprobs")
        if (top or 0) > self.max_logprobs:
            words = f"Requested prompt logprobs of {top}, which is greater than max allowed: {self.max_logprobs}"
            return web.json_response({"error": {"message": words}}, status=400)
        with torch.no_grad():
            rows = torch.log_softmax(self.model(torch.tensor([prompt])).logits[0].float(), dim=-1)
        choice = {"logprobs": None, "prompt_logprobs": None}
        if top is not None:
            choice["prompt_logprobs"] = [
                None, *(self._row(row, token, top) for row, token in zip(rows, prompt[1:], strict=False))
            ]  # fmt: skip
        if ids := body.get("logprob_token_ids"):
            given = {f"token_id:{i}": max(rows[-1, i].item(), NO_MASS) for i in ids}
            choice["logprobs"] = {"top_logprobs": [given]}
        return web.json_response({"choices": [choice], "usage": {"prompt_tokens": len(prompt)}})

    @staticmethod
    def _row(row, token, top):
        """The text's own token first, then the most likely ones."""
        ids = [token, *row.topk(top).indices.tolist()]
        return {str(i): {"logprob": row[i].item(), "rank": int((row > row[i]).sum()) + 1} for i in ids}
