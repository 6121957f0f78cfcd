"""The BAGEL architecture against models that transformers and diffusers build from the same weights."""

import pytest
import tiny_bagel
import torch


@pytest.fixture(scope="module")
def model():
    return tiny_bagel.random_model()


def tokens(model, batch=2, length=9):
    return torch.randint(model.config.text.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_logits_equal_those_of_qwen3_with_the_same_weights(model):
    ids = tokens(model)
    torch.testing.assert_close(model(ids), tiny_bagel.qwen3(model)(ids).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_latent_tokens_go_through_the_generation_expert_alone(model):
    embedded = model.language_model.model.embed_tokens(tokens(model))
    everywhere = torch.ones(embedded.shape[:2], dtype=torch.bool)
    found = model.language_model.model(embedded, latent=everywhere)
    expected = tiny_bagel.qwen3(model, expert="_moe_gen").model(inputs_embeds=embedded).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tokens_of_both_experts_attend_to_each_other(model):
    decoder = model.language_model.model
    embedded = decoder.embed_tokens(tokens(model))
    latent = torch.zeros(embedded.shape[:2], dtype=torch.bool)
    latent[:, 4:7] = True
    mixed, text_only = decoder(embedded, latent=latent), decoder(embedded)
    torch.testing.assert_close(mixed[:, :4], text_only[:, :4])
    assert not torch.isclose(mixed[:, 7:], text_only[:, 7:], atol=1e-3).all(-1).any()
    assert not torch.isclose(mixed[:, 4:7], decoder(embedded, latent=~latent)[:, 4:7], atol=1e-3).all(-1).any()


@torch.no_grad()
def test_an_attention_mask_replaces_the_causal_one(model):
    decoder = model.language_model.model
    embedded = decoder.embed_tokens(tokens(model))
    causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    torch.testing.assert_close(decoder(embedded, attention_mask=causal), decoder(embedded))
    assert not torch.allclose(
        decoder(embedded, attention_mask=torch.ones_like(causal)), decoder(embedded), atol=1e-3
    )


@torch.no_grad()
def test_image_features_equal_those_of_siglip_before_its_last_layer(model):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    vision = model.config.vision
    config = SiglipVisionConfig(**{key: getattr(vision, key) for key in vision.__dataclass_fields__})
    config.num_hidden_layers -= 1
    config.vision_use_head = False
    other = SiglipVisionModel(config).eval()
    ours = model.vit_model["vision_model"]
    state = ours.state_dict()
    patch = state["embeddings.patch_embedding.weight"]
    # BAGEL flattens a patch with its channels last.
    state["embeddings.patch_embedding.weight"] = patch.view(-1, 14, 14, 3).permute(0, 3, 1, 2)
    other.load_state_dict(state)
    image = torch.rand(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    patches = image.view(2, 3, 4, 14, 4, 14).permute(0, 2, 4, 3, 5, 1).reshape(2, 16, -1)
    found = ours(patches, torch.arange(16).expand(2, -1))
    torch.testing.assert_close(found, other(image).last_hidden_state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_timesteps_are_embedded_as_in_diffusion_transformers(model):
    from diffusers.models.embeddings import get_timestep_embedding

    times = torch.tensor([0.0, 0.25, 1.0])
    waves = get_timestep_embedding(times, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(model.time_embedder(times), model.time_embedder.mlp(waves))


def test_tensors_are_named_and_shaped_as_in_the_published_checkpoint(model):
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    attention = {
        f"self_attn.{part}{expert}": shape
        for expert in ("", "_moe_gen")
        for part, shape in {
            "q_proj": (128, 128),
            "k_proj": (64, 128),
            "v_proj": (64, 128),
            "o_proj": (128, 128),
        }.items()
    }
    expected = {}
    for number in range(2):
        prefix = f"language_model.model.layers.{number}"
        for name, shape in attention.items():
            expected[f"{prefix}.{name}.weight"] = shape
            if "o_proj" not in name:
                expected[f"{prefix}.{name}.bias"] = shape[:1]
        for expert in ("", "_moe_gen"):
            expected[f"{prefix}.self_attn.q_norm{expert}.weight"] = (32,)
            expected[f"{prefix}.self_attn.k_norm{expert}.weight"] = (32,)
            expected[f"{prefix}.mlp{expert}.gate_proj.weight"] = (256, 128)
            expected[f"{prefix}.mlp{expert}.up_proj.weight"] = (256, 128)
            expected[f"{prefix}.mlp{expert}.down_proj.weight"] = (128, 256)
            expected[f"{prefix}.input_layernorm{expert}.weight"] = (128,)
            expected[f"{prefix}.post_attention_layernorm{expert}.weight"] = (128,)
        prefix = f"vit_model.vision_model.encoder.layers.{number}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            expected |= {f"{prefix}.self_attn.{part}.weight": (32, 32), f"{prefix}.self_attn.{part}.bias": (32,)}
        for part in ("layer_norm1", "layer_norm2"):
            expected |= {f"{prefix}.{part}.weight": (32,), f"{prefix}.{part}.bias": (32,)}
        expected |= {f"{prefix}.mlp.fc1.weight": (64, 32), f"{prefix}.mlp.fc1.bias": (64,)}
        expected |= {f"{prefix}.mlp.fc2.weight": (32, 64), f"{prefix}.mlp.fc2.bias": (32,)}
    expected |= {
        "language_model.model.embed_tokens.weight": (32, 128),
        "language_model.model.norm.weight": (128,),
        "language_model.model.norm_moe_gen.weight": (128,),
        "language_model.lm_head.weight": (32, 128),
        "vit_model.vision_model.embeddings.patch_embedding.weight": (32, 588),
        "vit_model.vision_model.embeddings.patch_embedding.bias": (32,),
        "vit_model.vision_model.embeddings.position_embedding.weight": (16, 32),
        "vit_model.vision_model.post_layernorm.weight": (32,),
        "vit_model.vision_model.post_layernorm.bias": (32,),
        "connector.fc1.weight": (128, 32),
        "connector.fc1.bias": (128,),
        "connector.fc2.weight": (128, 128),
        "connector.fc2.bias": (128,),
        "vit_pos_embed.pos_embed": (16, 128),
        "latent_pos_embed.pos_embed": (16, 128),
        "time_embedder.mlp.0.weight": (128, 256),
        "time_embedder.mlp.0.bias": (128,),
        "time_embedder.mlp.2.weight": (128, 128),
        "time_embedder.mlp.2.bias": (128,),
        "vae2llm.weight": (128, 64),
        "vae2llm.bias": (128,),
        "llm2vae.weight": (64, 128),
        "llm2vae.bias": (64,),
    }
    assert found == expected
