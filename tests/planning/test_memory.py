"""Memory by formulas: sizes are those of the model; needs grow and fall with what they depend on."""

from dataclasses import replace

import pytest

from gqaprune.models.losses import PIECE_LOGITS
from gqaprune.planning.costs.base import Text
from gqaprune.planning.costs.peaks import peak_repair
from gqaprune.planning.memory import ModelSizes, count_gram, count_repair, estimate_memory, read_sizes
from gqaprune.planning.selection import keep_everything
from gqaprune.surgery.gram import WORKSPACE
from gqaprune.surgery.repair_config import RepairConfig
from gqaprune.training.lora import add_adapters
from gqaprune.training.recovery import RecoveryConfig

from tiny import make_model

MODES = ("full", "lora", "distill")


def test_sizes_are_those_of_the_loaded_model(any_variant: str) -> None:
    model = make_model(any_variant)
    sizes, geometry = read_sizes(model.config), keep_everything(model).geometry
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert (sizes.decoder_parameters, sizes.layer_parameters) == (sum(layers), max(layers))
    assert (sizes.query_heads, sizes.kv_heads, sizes.channels) == (
        sum(geometry.query_heads),
        sum(geometry.kv_heads),
        sum(geometry.channels),
    )


def test_adapters_are_counted_as_recovery_adds_them() -> None:
    model = make_model("qwen2")
    adapted = add_adapters(model, RecoveryConfig(mode="lora"))
    added = sum(parameter.numel() for name, parameter in adapted.named_parameters() if ".lora_" in name)
    assert read_sizes(make_model("qwen2").config).adapter_parameters == added


def make_sizes() -> ModelSizes:
    return read_sizes(make_model(channels=200).config)


def test_memory_of_full_recovery_is_weights_gradients_moments_and_activations() -> None:
    sizes = make_sizes()
    needed, longer = (estimate_memory(sizes, 4, 2, tokens, 100)["recovery, full"] for tokens in (16, 32))
    assert needed["one device"] is not None and longer["one device"] is not None
    assert 2 * needed["one device"] - longer["one device"] == pytest.approx(16 * sizes.parameters)
    assert needed["ddp"] == needed["one device"] + 4 * sizes.parameters


def test_memory_of_repairs_distillation_is_weights_adapters_and_a_backward_pass() -> None:
    sizes = make_sizes()
    needed, longer = (estimate_memory(sizes, 4, 2, tokens, 100)["repair, distillation"] for tokens in (16, 32))
    assert needed["one device"] is not None and longer["one device"] is not None
    kept = 2 * needed["one device"] - longer["one device"]
    assert kept == pytest.approx(4 * sizes.parameters + 16 * 2 * sizes.adapter_parameters)  # of rank 16
    assert needed["fsdp"] == needed["ddp"] == needed["one device"] and needed["sharded"] is needed["offload"] is None


def test_fsdp_needs_less_on_more_devices_and_ddp_shares_calibration_out() -> None:
    few, many = (estimate_memory(make_sizes(), 2, devices, 16, 1024) for devices in (2, 8))
    for mode in MODES:
        row = f"recovery, {mode}"
        assert many[row]["fsdp"] < few[row]["fsdp"] and many[row]["ddp"] == few[row]["ddp"]  # type: ignore[operator]
    assert many["repair"]["ddp"] < few["repair"]["ddp"] < few["repair"]["one device"]  # type: ignore[operator]
    for work in ("scoring", "repair"):
        assert many[work]["sharded"] < few[work]["sharded"]  # type: ignore[operator]
    assert few["recovery, full"]["sharded"] == few["recovery, full"]["fsdp"]
    assert few["recovery, full"]["offload"] is None and few["scoring"]["offload"] < few["scoring"]["ddp"]  # type: ignore[operator]


def test_gram_matrices_of_wide_mlps_take_no_more_than_their_workspace() -> None:
    sizes = make_sizes()  # 200 channels, 24 wide
    narrow, wide, wider = (
        estimate_memory(replace(sizes, channel_range=(n, n)), 4, 2, 16, 100, True)["scoring"]
        for n in (200, 14336, 28672)
    )
    for place in ("one device", "ddp", "offload"):
        least, most = narrow[place] or 0, wide[place]
        assert most == wider[place] == least - 24 * 200**2 + WORKSPACE, place


def test_matrices_of_repair_take_the_room_they_have() -> None:
    sizes, matrix = make_sizes(), 24 * 4096
    grams = count_gram(4096)  # 96 MiB or less, in panels
    on_cpu, roomy, ample = (count_repair(sizes, 4, 0, 0.1, 4096, room) for room in (None, 2**40, 2**41))
    matrices = 3 * grams + 2 * 8 * matrix + 3 * 4 * matrix  # two moments and a factor, three weights
    assert roomy == ample and roomy - on_cpu == pytest.approx(matrices - WORKSPACE * 3 / 8)


def test_repair_on_one_device_is_weights_and_what_lies_beside_them_by_the_one_formula() -> None:
    sizes, text = make_sizes(), Text(windows=10, window=512)
    found = estimate_memory(sizes, 4, 1, 512, text.tokens)["repair"]["one device"]
    assert found == pytest.approx(peak_repair(sizes, 4, text, RepairConfig.holdout, 200))


def test_gram_matrices_of_all_layers_lie_beside_a_backward_pass_as_far_as_a_cpu_has_room() -> None:
    sizes = make_sizes()  # 3 layers
    none, narrow, wide = (
        estimate_memory(replace(sizes, channel_range=(n, n)), 4, 2, 4096, 100)["scoring"]["ddp"] or 0
        for n in (0, 200, 1700)
    )
    assert narrow - none == 3 * 8 * 200**2
    assert wide - none == 3 * 8 * 1700**2 < WORKSPACE * 3 // 8


def test_sharded_pruning_needs_a_share_of_the_layers_two_whole_ones_and_what_is_outside() -> None:
    sizes = read_sizes(make_model(channels=200, layers=40).config)
    whole, split = (estimate_memory(sizes, 4, devices, 16, 0)["repair"] for devices in (1, 8))
    assert whole["one device"] is not None and split["sharded"] is not None
    saved = 4 * (sizes.decoder_parameters * 7 / 8 - 2 * sizes.layer_parameters)
    assert whole["one device"] - split["sharded"] == pytest.approx(saved)


def test_recomputed_activations_are_one_layers_and_the_hidden_states_between_layers() -> None:
    sizes = replace(make_sizes(), channel_range=(0, 0))  # no Gram matrices, so that backward passes need most
    whole, recomputed = (estimate_memory(sizes, 4, 2, 16, 0, recomputes) for recomputes in (False, True))
    heads = sizes.head_dim * (sizes.query_heads + sizes.kv_heads)
    scored = 16 * (4 * (2 * heads + 4 * sizes.channels) + 8 * 24 * sizes.layers)
    trained = scored + 16 * 4 * 4 * 24 * sizes.layers
    for work, activations in (("scoring", scored), *((f"recovery, {mode}", trained) for mode in MODES)):
        saved = activations * (1 - 1 / sizes.layers) - 16 * 4 * 24 * sizes.layers
        for place in ("one device", "ddp", "fsdp"):
            assert (whole[work][place] or 0) - (recomputed[work][place] or 0) == pytest.approx(saved), (work, place)
    assert whole["scoring"]["sharded"] == recomputed["scoring"]["sharded"]
    assert whole["repair"] == recomputed["repair"]


def test_scoring_needs_no_more_logits_for_longer_windows_and_one_layers_activations_with_layers_on_disk() -> None:
    sizes = make_sizes()
    few = PIECE_LOGITS // sizes.vocabulary
    short, long, longer = (estimate_memory(sizes, 4, 2, few * n, 100)["scoring"] for n in (1, 2, 3))
    a, b, c = (each["one device"] or 0 for each in (short, long, longer))
    assert b - a == pytest.approx(c - b, rel=1e-4) and a - (b - a) > 0.99 * 8 * PIECE_LOGITS
    assert (long["offload"] or 0) - (short["offload"] or 0) == pytest.approx((b - a) / sizes.layers, rel=1e-4)
