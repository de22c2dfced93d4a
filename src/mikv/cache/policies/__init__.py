"""Importance policies by name, one per file."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from mikv.cache.policies.base import ImportancePolicy
from mikv.cache.policies.far import Far
from mikv.cache.policies.h2o import H2O
from mikv.cache.policies.key_norm import KeyNorm
from mikv.cache.policies.normalized import Normalized
from mikv.cache.policies.random import Random
from mikv.cache.policies.recency import Recency
from mikv.cache.policies.snapkv import SnapKV
from mikv.cache.policies.window import Window
from mikv.choices import did_you_mean, shown
from mikv.errors import ConfigError

_POLICIES: dict[str, type[ImportancePolicy]] = {}


def register_policy(policy: type[ImportancePolicy]) -> type[ImportancePolicy]:
    """Make `policy` available as `MiKVConfig(policy=policy.name)`; usable as a class decorator.

    Raises ConfigError if another policy has the name already.
    """
    if _POLICIES.get(policy.name, policy) is not policy:
        raise ConfigError(f"a policy named {policy.name!r} exists already; give yours another name")
    _POLICIES[policy.name] = policy
    return policy


def policy_names() -> list[str]:
    """The names of all registered policies."""
    return sorted(_POLICIES)


def make_policy(name: str, options: Mapping[str, Any]) -> ImportancePolicy:
    """The policy `name` with its options. Raises ConfigError for an unknown name or option."""
    policy = _POLICIES.get(name) if isinstance(name, str) else None
    if policy is None:
        raise ConfigError(
            f"policy={shown(name)} is not one of {', '.join(policy_names())}{did_you_mean(name, _POLICIES)}; "
            "your own needs mikv.register_policy first"
        )
    try:
        return policy(**options)
    except TypeError as error:
        known = ", ".join(signature(policy).parameters) or "none"
        raise ConfigError(
            f"policy {name!r} does not take the options {shown(dict(options))}: {str(error)[:200]}; it takes {known}"
        ) from error


for _policy in (H2O, Normalized, Far, Window, Recency, KeyNorm, Random, SnapKV):
    register_policy(_policy)
