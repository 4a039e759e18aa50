"""One real vLLM engine on the CPU for all trainers of a process."""

import os


# Read when vLLM is imported.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or the whole process is tied to some cores
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from transformers import set_seed
from trl.generation import vllm_generation
from vllm.model_executor.layers import utils


COLOCATE = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 128}


def share_engine(patch, dtype="float32"):
    """
    In colocate mode TRL gets one engine, built once, because a process can have only one. It computes in float32,
    since the rounding of bfloat16 would hide small mistakes, and eagerly, since compiling takes a minute.
    """

    def keep_weights(layer, remove_weight):
        # vLLM's CPU backend repacks the weights of linear layers, and cannot load new ones afterwards.
        layer.cpu_linear = torch.nn.functional.linear

    original, built = vllm_generation.LLM, {}

    def build(**settings):
        if not built:
            built["llm"] = original(**settings | {"dtype": dtype, "enforce_eager": True})
            built["model"] = settings["model"]
        assert settings["model"] == built["model"]
        set_seed(settings["seed"])  # as vLLM does when it is built; processes that share an engine must draw alike
        return built["llm"]

    patch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep_weights)
    patch.setattr(vllm_generation, "LLM", build)
