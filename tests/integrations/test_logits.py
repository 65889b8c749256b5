"""`LogitTransform.from_config` against the models of transformers, built small from their configs."""

from types import SimpleNamespace

import pytest
import torch

from kdkernels import LogitTransform

transformers = pytest.importorskip("transformers")

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
SMALL |= dict(
    num_key_value_heads=1, head_dim=16, vocab_size=97, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_expand=2)
LATENT = dict(kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)

# (class of the model, what its config has besides SMALL, its transform)
MODELS = [
    ("Llama", {}, LogitTransform()),
    ("Qwen3", {}, LogitTransform()),
    ("Gemma", {}, LogitTransform()),
    ("Gemma2", dict(final_logit_softcapping=5.0), LogitTransform(softcap=5.0)),
    ("Gemma2", dict(final_logit_softcapping=None), LogitTransform()),
    ("Gemma3", dict(final_logit_softcapping=5.0), LogitTransform(softcap=5.0)),
    ("Gemma3", {}, LogitTransform()),
    ("VaultGemma", dict(final_logit_softcapping=7.0), LogitTransform(softcap=7.0)),
    ("RecurrentGemma", dict(logits_soft_cap=6.0, lru_width=32), LogitTransform(softcap=6.0)),
    ("NanoChat", dict(final_logit_softcapping=5.0), LogitTransform(softcap=5.0)),
    ("xLSTM", dict(num_heads=2, output_logit_soft_cap=5.0, qk_dim_factor=1.0), LogitTransform(softcap=5.0)),
    ("Cohere", dict(logit_scale=0.3), LogitTransform(0.3)),
    ("Cohere2", dict(logit_scale=0.3), LogitTransform(0.3)),
    ("Granite", dict(logits_scaling=8.0), LogitTransform(1 / 8)),
    ("GraniteMoe", dict(logits_scaling=5.0, **EXPERTS), LogitTransform(1 / 5)),
    ("GraniteMoeShared", dict(logits_scaling=5.0, **EXPERTS), LogitTransform(1 / 5)),
    ("GraniteMoeHybrid", dict(logits_scaling=5.0, **EXPERTS, **MAMBA), LogitTransform(1 / 5)),
    ("HyperCLOVAX", dict(logits_scaling=0.25), LogitTransform(0.25)),
    ("FalconH1", dict(lm_head_multiplier=0.04, **MAMBA, mamba_d_ssm=64), LogitTransform(0.04)),
    ("MiniCPM3", dict(**LATENT), LogitTransform()),
    ("Phi", {}, LogitTransform()),
    ("OPT", dict(ffn_dim=48, word_embed_proj_dim=16), LogitTransform()),
    ("Mpt", dict(d_model=32, n_heads=2, n_layers=2, logit_scale=0.5), LogitTransform()),
]


def built(name: str, options: dict):
    """The model, small and with weights that make large logits; skipped where transformers has no such."""
    config_class, model_class = (
        getattr(transformers, name + end, None) for end in ("TextConfig", "ForCausalLM")
    )
    config_class = config_class or getattr(transformers, f"{name}Config", None)
    if config_class is None or model_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(config_class(**SMALL | options)).eval()
    with torch.no_grad():
        for x in model.parameters():
            if x.dim() > 1:
                x.normal_(0, 0.5)
    return model


@pytest.mark.parametrize(("name", "options", "expected"), MODELS, ids=[f"{x[0]}-{x[2]}" for x in MODELS])
def test_logits_are_the_transform_of_what_the_head_gives(name, options, expected):
    model = built(name, options)
    found = LogitTransform.from_config(model.config)
    assert found.scale == pytest.approx(expected.scale) and found.softcap == expected.softcap
    given = []
    model.get_output_embeddings().register_forward_hook(
        lambda head, inputs, output: given.append(output.clone())
    )
    with torch.no_grad():
        logits = model(input_ids=torch.randint(3, 97, (2, 6)), use_cache=False).logits
    (head_logits,) = given
    torch.testing.assert_close(found(head_logits), logits, rtol=1e-5, atol=1e-6)
    if found != LogitTransform():
        # large enough for the transform to matter
        assert (logits - head_logits).abs().max() > 0.1 * head_logits.abs().max()


def test_every_default_config_is_known():
    """None of the fields that are known to scale logits stands in a config whose model is not known."""
    for name, config_class in transformers.CONFIG_MAPPING.items():
        try:
            config = config_class()
        except Exception:  # cannot be built without arguments
            continue
        if name in ("chameleon", "dory"):
            with pytest.raises(ValueError, match=f"{name}.*take the model's logits"):
                LogitTransform.from_config(config)
        else:
            LogitTransform.from_config(config)


def test_a_scale_of_an_unknown_model_is_an_error():
    with pytest.raises(ValueError, match=r"logits_scaling is 4.0, and what mystery does with it"):
        LogitTransform.from_config(SimpleNamespace(model_type="mystery", logits_scaling=4.0))
    assert LogitTransform.from_config(SimpleNamespace(model_type="mystery", logits_scaling=1.0)).scale == 1
    softcapped = SimpleNamespace(model_type="mystery", final_logit_softcapping=20)
    assert LogitTransform.from_config(softcapped) == LogitTransform(softcap=20)


def test_the_text_part_of_a_config_counts():
    config = transformers.AutoConfig.for_model("aya_vision")
    assert LogitTransform.from_config(config).scale == config.get_text_config().logit_scale != 1
