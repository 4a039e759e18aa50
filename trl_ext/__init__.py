"""New methods of RL for language models as plugins for Hugging Face TRL."""

from importlib import import_module
from importlib.metadata import version as _version


__version__ = "0.1.0"

SUPPORTED_TRL = ("1.15", "1.17")  # from the first up to, not including, the second; also in pyproject.toml


def _check_trl(installed: str) -> None:
    def key(release):
        return tuple(int(part) for part in release.split(".")[:2])

    if not key(SUPPORTED_TRL[0]) <= key(installed) < key(SUPPORTED_TRL[1]):
        raise ImportError(
            f"trl_ext {__version__} works with trl>={SUPPORTED_TRL[0]},<{SUPPORTED_TRL[1]}, but trl {installed} is "
            f'installed. Run: pip install "trl>={SUPPORTED_TRL[0]},<{SUPPORTED_TRL[1]}"'
        )


_check_trl(_version("trl"))

# Public names and where they live. They are imported on first use, so that `import trl_ext` stays cheap.
_PUBLIC = {
    "callbacks.difficulty": ("DifficultyCallback",),
    "callbacks.entropy_law": ("EntropyLawCallback", "EntropyLawConfig"),
    "callbacks.evaluation": ("EvalStatsCallback", "EvalStatsConfig"),
    "callbacks.token_entropy": ("TokenEntropyCallback",),
    "callbacks.update_sparsity": ("SubnetworkMaskCallback", "UpdateSparsityCallback", "UpdateSparsityConfig"),
    "core": ("MethodConfig", "MethodTrainer", "MixingError", "Requests", "Rollouts", "Scored", "TokenBatch", "mix"),
    "methods.bapo": ("BAPOConfig", "BAPOTrainer"),
    "methods.bnpo": ("BNPOConfig", "BNPOTrainer"),
    "methods.capo": ("CAPOConfig", "CAPOTrainer"),
    "methods.clip_cov": ("ClipCovConfig", "ClipCovTrainer"),
    "methods.d3s": ("D3SConfig", "D3STrainer"),
    "methods.dcpo": ("DCPOConfig", "DCPOTrainer"),
    "methods.deficit_sampler": ("DeficitSamplerConfig", "DeficitSamplerTrainer"),
    "methods.disco": ("DisCOConfig", "DisCOTrainer"),
    "methods.duration_aware": ("DurationAwareConfig", "DurationAwareTrainer"),
    "methods.dynamic_sampling": ("DynamicSamplingConfig", "DynamicSamplingTrainer"),
    "methods.empg": ("EMPGConfig", "EMPGTrainer"),
    "methods.epo": ("EPOConfig", "EPOTrainer"),
    "methods.gdpo_nvidia": ("GDPONvidiaConfig", "GDPONvidiaTrainer"),
    "methods.gppo": ("GPPOConfig", "GPPOTrainer"),
    "methods.grpo_d": ("GRPODConfig", "GRPODTrainer"),
    "methods.grpo_lambda": ("GRPOLambdaConfig", "GRPOLambdaTrainer"),
    "methods.gtpo": ("GTPOConfig", "GTPOTrainer"),
    "methods.high_entropy_tokens": ("HighEntropyTokensConfig", "HighEntropyTokensTrainer"),
    "methods.gvm": ("GVMConfig", "GVMTrainer"),
    "methods.kdrl": ("KDRLConfig", "KDRLTrainer"),
    "methods.kl_cov": ("KLCovConfig", "KLCovTrainer"),
    "methods.knapsack_rl": ("KnapsackRLConfig", "KnapsackRLTrainer"),
    "methods.llds": ("LLDSConfig", "LLDSTrainer"),
    "methods.ngrpo": ("NGRPOConfig", "NGRPOTrainer"),
    "methods.one_shot_rlvr": ("OneShotRLVRConfig", "OneShotRLVRTrainer"),
    "methods.puct": ("PUCTConfig", "PUCTTrainer"),
    "methods.rest_grpo": ("ReSTGRPOConfig", "ReSTGRPOTrainer"),
    "methods.riskpo": ("RiskPOConfig", "RiskPOTrainer"),
    "methods.scaf_grpo": ("ScafGRPOConfig", "ScafGRPOTrainer"),
    "methods.spo": ("SPOConfig", "SPOTrainer"),
    "methods.stratified_grpo": ("StratifiedGRPOConfig", "StratifiedGRPOTrainer"),
    "methods.ttt_discover": ("TTTDiscoverConfig", "TTTDiscoverTrainer"),
    "methods.tw_grpo": ("TWGRPOConfig", "TWGRPOTrainer"),
    "methods.vade": ("VADEConfig", "VADETrainer"),
    "methods.vas": ("VASConfig", "VASTrainer"),
    "report": ("RunReportCallback", "write_report"),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
