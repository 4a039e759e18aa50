"""Started by torchrun: one process of a training with a server. Writes what it asked for."""

import json
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from scripted_server import without_gpu
from test_server import CASES, SERVER
from watched import Watched


def main(folder, *urls):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        without_gpu(patch)
        for name, url in zip(CASES, urls, strict=True):
            watched = Watched()
            trainer = watched.run(
                *CASES[name], **SERVER, vllm_server_base_url=url, per_device_train_batch_size=8, out=f"{folder}/unused"
            )
            assert trainer.accelerator.num_processes == 2
            watched.check(trainer)
            asked = [call.prompts for call in watched.calls]
            Path(folder, f"{name}_{trainer.accelerator.process_index}.json").write_text(json.dumps(asked))


if __name__ == "__main__":
    main(*sys.argv[1:])
