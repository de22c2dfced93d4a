"""Run by torchrun: what models say when their layers are split over the processes. Prints a line of JSON for each."""

import json
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import mikv
from mikv.weights.module import BCQModule


def answer(folder: str) -> dict[str, Any]:
    tokens: list[int] = []
    weights = 0
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=2))
        weights = sum(m.shape.out_features * m.shape.in_features for m in model.modules() if isinstance(m, BCQModule))
        tokens = model.generate(torch.arange(3, 20)[None], max_new_tokens=8, do_sample=False)[0].tolist()
        model.save_pretrained(f"{folder}-again")
    except mikv.MiKVError as error:
        return {"tokens": tokens, "weights": weights, "error": f"{type(error).__name__}: {error}"}
    return {"tokens": tokens, "weights": weights, "error": ""}


def main(folders: list[str]) -> None:
    for folder in folders:
        result = answer(folder)
        if torch.distributed.get_rank() == 0:
            print(json.dumps(result))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
