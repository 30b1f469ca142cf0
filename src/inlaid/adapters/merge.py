"""Functions that merge an adapter into the weights of a network, or attach it to the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inlaid.adapters.adapter import Adapter
from inlaid.adapters.layers import base_layer, check_fit, layer_shapes, low_rank_product, row_norms, some_of
from inlaid.networks.half_tokens import NOT_MERGEABLE


def effective_delta(adapter: Adapter, module: str, base_weight: Tensor) -> Tensor:
    """Return the change of a layer's weight when the adapter is merged, in float32.

    The change is s B A for LoRA, and W' - W for DoRA. s is the scale, W is the weight of the base model, and
    W' is the merged weight.
    """
    if not adapter.dora:
        return layer_delta(adapter, module).to(base_weight.device).reshape(base_weight.shape)
    return _merged(adapter, module, base_weight) - base_weight.float()


@torch.no_grad()
def merge_adapter(denoiser: nn.Module, adapter: Adapter) -> None:
    """Merge an adapter into the weights of a network, in place.

    Merged weights are computed in float32 and cast to the dtype of the network's weights.

    Raises:
        ValueError: if the adapter does not fit the network, or applies to alpha tokens only. Also if the
            network is quantized, or already has an adapter attached.
    """
    if adapter.joint:
        raise ValueError(NOT_MERGEABLE)
    if any(".lora_" in n for n, _ in denoiser.named_parameters()):
        raise ValueError("the network has an adapter attached: merge into a network without adapters")
    check_fit(adapter, layer_shapes(denoiser))
    layers = {module: base_layer(denoiser, module) for module in adapter.modules}
    biases = {m: adapter.tensors.get(f"{m}.lora_B.bias") for m in layers}
    own = dict(denoiser.named_parameters())
    unknown = [n for n in adapter.differences if n not in own]
    if unknown:
        raise ValueError(f"the network lacks parameters that the adapter changes: {some_of(unknown)}")
    for module, layer in layers.items():
        if not layer.weight.is_floating_point():
            raise ValueError(f"{module} is quantized: merge into a bfloat16 or float32 network")
        if layer.bias is None and (added := biases[module]) is not None and added.any():
            raise ValueError(f"{module} has no bias in the network, but the adapter has one")
    for module, layer in layers.items():
        layer.weight.copy_(_merged(adapter, module, layer.weight))
        added = biases[module]
        if added is not None and layer.bias is not None:
            layer.bias.copy_(layer.bias.float() + adapter.scale(module) * added.to(layer.bias.device).float())
    for name, difference in adapter.differences.items():
        own[name].copy_(own[name].float() + difference.to(own[name].device).float())


def attach_adapter(network: nn.Module, adapter: Adapter, name: str = "inlaid") -> None:
    """Load an adapter into a diffusers or transformers network, and check that every tensor was loaded.

    Raises:
        ValueError: if the adapter does not fit the network.
    """
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict

    if adapter.differences:
        raise ValueError("full differences of parameters can only be merged: use merge_adapter")
    check_fit(adapter, layer_shapes(network))
    load: Any = getattr(network, "load_lora_adapter", None)
    if load:
        load(dict(adapter.tensors), prefix=None, adapter_name=name, metadata=adapter.peft_config())
    else:
        inject_adapter_in_model(LoraConfig(**adapter.peft_config()), network, name)
        set_peft_model_state_dict(network, dict(adapter.tensors), name)
        network.eval().requires_grad_(False)
    arrived = get_peft_model_state_dict(network, adapter_name=name)
    assert arrived.keys() == adapter.tensors.keys(), "the stock loader ignored tensors"
    for key, tensor in adapter.tensors.items():
        assert torch.equal(arrived[key].cpu(), tensor.to(arrived[key].dtype).cpu()), f"{key} was not loaded"


def layer_delta(adapter: Adapter, module: str) -> Tensor:
    """Return the low-rank update of a layer, scale * B A, as a float32 matrix (out, in).

    For a convolution, `in` is the number of input channels times the number of kernel elements.
    """
    a, b = (adapter.tensors[f"{module}.lora_{x}.weight"] for x in "AB")
    return low_rank_product(a, b, adapter.scale(module))


def _merged(adapter: Adapter, module: str, base_weight: Tensor) -> Tensor:
    weight = base_weight.detach().float()
    weight = weight + layer_delta(adapter, module).to(weight.device).reshape(weight.shape)
    magnitude = adapter.tensors.get(f"{module}.lora_magnitude_vector")
    if magnitude is None:
        return weight
    ratio = magnitude.to(weight.device).float().reshape(-1) / row_norms(weight)
    return weight * ratio.reshape(-1, *[1] * (weight.ndim - 1))
