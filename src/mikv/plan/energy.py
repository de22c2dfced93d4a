"""Watts of a device while it decodes, and joules per token. Idle devices and the rest of the server are not counted."""

from mikv.plan.deployment import Deployment
from mikv.plan.memory import cache_bytes, read_bytes


def watts(deployment: Deployment, devices: int) -> float | None:
    """Power of one device: a share of its design power that grows with the cache's share of what is read.

    None if the design power is not known. Source: vllm-sr-sim; batch 1 is the low end, a full batch the high end.
    """
    device, constants = deployment.hardware, deployment.constants
    if device.watts is None:
        return None
    cache, matrices = cache_bytes(deployment, devices), read_bytes(deployment, deployment.batch) / devices
    low, high = constants["power_low"], constants["power_high"]
    share = low + (high - low) * cache / (cache + matrices)
    if deployment.weights.is_lut:
        share *= constants["lut_power"]
    return device.watts * min(1.0, share)


def joules_per_token(deployment: Deployment, devices: int, step_seconds: float) -> float | None:
    """Of all devices, divided by the tokens of a step."""
    power = watts(deployment, devices)
    return None if power is None else devices * power * step_seconds / deployment.batch
