"""vLLM's scores of given ids on a CPU, where its V2 model runner, which computes them, cannot run.

The engine is real, in this process: its front door, scheduler, prefix cache and model. What picks the rows of each
request is the V2 runner's own `PromptLogprobsWorker`; here the V1 runner calls it after its forward pass. Its
kernel of log-probabilities needs Triton: it gathers from a log-softmax of torch instead.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch


def on_cpu(settings):
    """Settings of scorers on vLLM, which a configuration has with a GPU only, for engines of these tests."""
    return replace(settings, scorer=settings.scorer.model_copy(update={"num_gpus": 0.0}))


def patch_v2_flag(monkeypatch):
    """Have vLLM's front door believe in the V2 runner. Call it once the engine is there."""
    from vllm.config import VllmConfig

    monkeypatch.setattr(VllmConfig, "use_v2_model_runner", True)


def patch_scores(monkeypatch):
    """Have the V1 runner of engines in this process score given ids. Call it before the engine starts."""
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu.sample.prompt_logprob import PromptLogprobsWorker
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    scores, known = {}, {}
    worker = PromptLogprobsWorker(256, torch.device("cpu"), "raw_logits")
    prompt_logprobs, sample_tokens = GPUModelRunner._get_prompt_logprobs_dict, GPUModelRunner.sample_tokens

    def with_scores(self, hidden_states, num_scheduled_tokens):
        names = self.input_batch.req_ids
        requests = [self.requests[name] for name in names]
        for index, (name, request) in enumerate(zip(names, requests, strict=True)):
            if known.get(name) is not request:  # names come again with the next teacher
                worker.add_request(name, index, request.sampling_params)
                known[name] = request
        lengths = np.array([len(r.prompt_token_ids) for r in requests])
        batch = SimpleNamespace(
            req_ids=names, idx_mapping_np=np.arange(len(names)), prefill_len_np=lengths,
            num_computed_prefill_tokens_np=np.array([r.num_computed_tokens for r in requests]),
            num_scheduled_tokens=np.array([num_scheduled_tokens[n] for n in names]),
            query_start_loc_np=self.query_start_loc.np,
        )  # fmt: skip
        scores.update(
            worker.compute_prompt_token_id_logprobs(
                lambda hidden: torch.log_softmax(self.model.compute_logits(hidden).float(), -1),
                hidden_states, batch, lengths,
            )
        )  # fmt: skip
        return prompt_logprobs(self, hidden_states, num_scheduled_tokens)

    def with_output(self, *arguments, **named):
        output = sample_tokens(self, *arguments, **named)
        assert isinstance(output, ModelRunnerOutput), type(output)
        output.prompt_token_id_logprobs_dict = dict(scores)
        scores.clear()
        return output

    monkeypatch.setattr(GPUModelRunner, "_get_prompt_logprobs_dict", with_scores)
    monkeypatch.setattr(GPUModelRunner, "sample_tokens", with_output)
