"""Caches by name for tests of the lab: one that stores noise, and others that misbehave on purpose."""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from mikv.cache.config import MiKVConfig
from mikv.cache_names import NamedCache
from mikv.integrations.transformers import MiKVCache
from mikv.integrations.transformers.versions import as_argument
from mikv.lab.baselines.held_bytes import held_bytes


class NoiseLayer(DynamicLayer):
    """Attends exactly to new tokens, and stores noise of their size instead of them."""

    def update(self, key_states, value_states, *args, **kwargs):
        seen = super().update(key_states, value_states)
        for stored in (self.keys, self.values):
            new = stored[:, :, -key_states.shape[2] :]
            new.copy_(torch.randn(new.shape, generator=torch.Generator().manual_seed(new.shape[2])) * new.std())
        return seen[0].clone(), seen[1].clone()


class FailingLayer(DynamicLayer):
    """Gives back NaN."""

    def update(self, key_states, value_states, *args, **kwargs):
        return tuple(x * float("nan") for x in super().update(key_states, value_states))


class CrashingLayer(DynamicLayer):
    """Cannot store what it is given."""

    def update(self, key_states, value_states, *args, **kwargs):
        raise RuntimeError("sizes do not match")


def with_layers(name, layer_class):
    def make(model, num_tokens):
        cache = DynamicCache(config=model.config)
        cache.layers = [layer_class() for _ in cache.layers]
        return cache

    return NamedCache(name, make, held_bytes, lambda: None)


def prefilled(config: MiKVConfig):
    """mikv's cache, whose context the model reads by itself."""

    class Prefilled(MiKVCache):
        def __init__(self, model):
            super().__init__(model.config, config)
            self._model = model

        def read_prompt(self, tokens):
            self._model(tokens[None], **as_argument(self))

    return NamedCache("prefilled", lambda model, num_tokens: Prefilled(model), lambda c: c.memory().bytes, lambda: None)


def refusing(error):
    def make(model, num_tokens):
        raise error

    return NamedCache("refusing", make, held_bytes, lambda: None)
