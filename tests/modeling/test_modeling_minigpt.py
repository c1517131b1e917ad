"""Laws of the model: it computes what GPT-2 computes, and it follows the conventions of transformers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    StaticCache,
)

from configuration_minigpt import MiniGPTConfig
from modeling_minigpt import (
    AUTO_MAP,
    MiniGPTForCausalLM,
    MiniGPTForQuestionAnswering,
    MiniGPTForSequenceClassification,
    MiniGPTForTokenClassification,
    MiniGPTModel,
)

VOCABULARY, POSITIONS = 60, 32
TINY = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "embd_pdrop": 0,
    "attn_pdrop": 0,
    "resid_pdrop": 0,
}
SAME = {"atol": 1e-5, "rtol": 0}  # the same float32 operations in another order
HEADS = [
    MiniGPTModel,
    MiniGPTForCausalLM,
    MiniGPTForSequenceClassification,
    MiniGPTForTokenClassification,
    MiniGPTForQuestionAnswering,
]


def perturb(model: torch.nn.Module) -> None:
    """Change all parameters: with biases of 0 and norms of 1, exchanged parameters would not be noticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def tiny(model_class: type = MiniGPTForCausalLM, **options: object):
    torch.manual_seed(0)
    model = model_class(MiniGPTConfig(**(TINY | options)))
    perturb(model)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> MiniGPTForCausalLM:
    return tiny()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


def gpt2(folder: Path, **options: object) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": 24, "n_layer": 2, "n_head": 3}
    stock = GPT2LMHeadModel(GPT2Config(**(shape | {"bos_token_id": 0, "eos_token_id": 0} | options)))
    perturb(stock)
    stock.eval().save_pretrained(folder)
    return stock


# --- GPT-2 ---


@pytest.mark.parametrize(
    ("layers", "heads", "width"),
    [(12, 12, 48), (24, 16, 64), (36, 20, 80), (48, 25, 100)],
    ids=["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"],
)
def test_logits_equal_those_of_gpt2_in_each_of_its_four_shapes(
    tmp_path: Path, ids: torch.Tensor, layers: int, heads: int, width: int
) -> None:
    torch.manual_seed(0)
    stock = GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=POSITIONS, n_layer=layers, n_head=heads, n_embd=width)
    ).eval()
    with torch.no_grad():  # by less than `perturb`: otherwise the rounding of larger activations would exceed 1e-5
        for parameter in stock.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    stock.save_pretrained(tmp_path)
    minigpt = MiniGPTForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(minigpt(ids).logits, stock(ids).logits, **SAME)


def test_greedy_text_and_loss_equal_those_of_gpt2(tmp_path: Path, ids: torch.Tensor) -> None:
    stock = gpt2(tmp_path)
    minigpt = MiniGPTForCausalLM.from_pretrained(tmp_path).eval()
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(minigpt.generate(ids, **options), stock.generate(ids, **options))
    torch.testing.assert_close(minigpt(ids, labels=ids).loss, stock(ids, labels=ids).loss, **SAME)


@pytest.mark.parametrize("kind", ["full", "base only", "sharded", "hub style", "bin", "untied", "float16"])
def test_every_kind_of_gpt2_checkpoint_loads_completely(tmp_path: Path, ids: torch.Tensor, kind: str) -> None:
    stock = gpt2(tmp_path / "full", tie_word_embeddings=kind != "untied")
    folder = tmp_path / kind
    if kind == "base only":
        stock.transformer.save_pretrained(folder)
    elif kind == "sharded":
        stock.save_pretrained(folder, max_shard_size="20kB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    elif kind == "float16":
        stock.half().save_pretrained(folder)
        stock.float()
    elif kind in ("hub style", "bin"):  # the oldest files on the Hub: names without prefix, masks among the weights
        state = {name.removeprefix("transformer."): value for name, value in stock.transformer.state_dict().items()}
        for layer in range(2):
            state[f"h.{layer}.attn.bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril()
            state[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        stock.config.save_pretrained(folder)
        if kind == "bin":
            torch.save(state, folder / "pytorch_model.bin")
        else:
            from safetensors.torch import save_file

            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        stock.save_pretrained(folder)
    minigpt, report = MiniGPTForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values()), report
    torch.testing.assert_close(minigpt.eval()(ids).logits, stock(ids).logits, **SAME)


def test_a_model_loaded_from_gpt2_is_saved_as_a_minigpt(tmp_path: Path, ids: torch.Tensor) -> None:
    gpt2(tmp_path / "gpt2")
    minigpt = MiniGPTForCausalLM.from_pretrained(tmp_path / "gpt2").eval()
    minigpt.save_pretrained(tmp_path / "minigpt")
    loaded, report = MiniGPTForCausalLM.from_pretrained(tmp_path / "minigpt", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(loaded.eval()(ids).logits, minigpt(ids).logits)
    assert json.loads((tmp_path / "minigpt" / "config.json").read_text(encoding="utf-8"))["model_type"] == "minigpt"


# --- initialization and options ---


def test_initial_weights_follow_gpt2() -> None:
    torch.manual_seed(0)
    layers = 8
    model = MiniGPTForCausalLM(MiniGPTConfig(hidden_size=256, num_hidden_layers=layers, num_attention_heads=4))
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.02 / (2 * layers) ** 0.5 if residual else 0.02
            # a sample of 65,536 numbers or more: its standard deviation is within 2 % of the true one
            assert parameter.std().item() == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize("tied", [True, False])
def test_head_shares_the_embedding_only_when_tied(tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.transformer.embed_tokens.weight) == tied


def test_qkv_bias_removes_only_the_biases_of_q_k_and_v() -> None:
    names = {name for name, _ in tiny(qkv_bias=False).named_parameters() if name.endswith("bias")}
    assert not any(re.search(r"[qkv]_proj", name) for name in names)
    assert "transformer.layers.0.self_attn.o_proj.bias" in names


def test_dropout_acts_only_in_training(ids: torch.Tensor) -> None:
    for option in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        model = tiny(**{option: 0.5})
        assert torch.equal(model(ids).logits, model(ids).logits)
        model.train()
        assert not torch.equal(model(ids).logits, model(ids).logits), option


def test_training_without_the_dropout_modules_computes_the_logits_of_evaluation(ids: torch.Tensor) -> None:
    model = tiny(embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    expected = model(ids).logits
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0  # as TRL does, whose reference model has no dropout
    assert torch.equal(model.train()(ids).logits, expected)


# --- forward ---


def test_no_token_attends_to_a_later_one(model: MiniGPTForCausalLM, ids: torch.Tensor) -> None:
    changed = ids.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % VOCABULARY
    torch.testing.assert_close(model(ids).logits[:, :7], model(changed).logits[:, :7], **SAME)
    assert not torch.allclose(model(ids).logits[:, 7:], model(changed).logits[:, 7:], **SAME)


@pytest.mark.parametrize(
    "kernel",
    ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)],  # flex attention is compiled
)
def test_all_attention_kernels_agree(ids: torch.Tensor, kernel: str) -> None:
    model = tiny(hidden_size=48)  # head size 16, the smallest that flex attention supports
    reference = model(ids).logits
    model.set_attn_implementation(kernel)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference, **SAME)


def test_shift_labels_score_every_position(model: MiniGPTForCausalLM, ids: torch.Tensor) -> None:
    targets = ids.roll(-1, dims=1)
    targets[0, 3:5] = -100
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(ids, shift_labels=targets).loss, expected, **SAME)
    summed = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    divided = model(ids, shift_labels=targets, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(divided, summed / 100, **SAME)


def test_labels_are_unshifted(model: MiniGPTForCausalLM, ids: torch.Tensor) -> None:
    expected = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
    torch.testing.assert_close(model(ids, labels=ids).loss, expected, **SAME)


def test_skip_logits_returns_only_the_loss(model: MiniGPTForCausalLM, ids: torch.Tensor) -> None:
    output = model(ids, labels=ids, skip_logits=True, use_cache=False)
    assert list(output.keys()) == ["loss"]
    assert torch.equal(output.loss, model(ids, labels=ids).loss)
    with pytest.raises(ValueError, match="without labels or shift_labels"):
        model(ids, skip_logits=True)


def test_logits_to_keep_selects_positions(model: MiniGPTForCausalLM, ids: torch.Tensor) -> None:
    full = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, full[:, -1:], **SAME)
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]], **SAME)


def test_hidden_states_and_attentions_of_every_layer_are_returned(ids: torch.Tensor) -> None:
    model = tiny()
    model.set_attn_implementation("eager")
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(2, 12, 24)] * 3
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 3, 12, 12)] * 2
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(2, 3, 12), **SAME)
    assert model(ids, return_dict=False)[0].shape == (2, 12, VOCABULARY)


def test_inputs_embeds_equal_input_ids(model: MiniGPTForCausalLM, ids: torch.Tensor) -> None:
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    with pytest.raises(ValueError, match="exactly one of"):
        model(ids, inputs_embeds=embeds)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
def test_one_token_at_a_time_with_a_cache_equals_one_pass(
    model: MiniGPTForCausalLM, ids: torch.Tensor, cache_class: type
) -> None:
    static = {"max_cache_len": POSITIONS} if cache_class is StaticCache else {}
    cache = cache_class(config=model.config, **static)
    logits = [model(token, past_key_values=cache, use_cache=True).logits for token in ids.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(logits, dim=1), model(ids).logits, **SAME)


def test_left_padding_changes_nothing(model: MiniGPTForCausalLM, ids: torch.Tensor) -> None:
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(padded, attention_mask=mask, position_ids=positions).logits[:, 5:]
    torch.testing.assert_close(output, model(ids).logits, **SAME)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    generated = model.generate(padded, attention_mask=mask, **options)[:, 5:]
    assert torch.equal(generated, model.generate(ids, attention_mask=torch.ones_like(ids), **options))


def test_packed_documents_do_not_attend_to_each_other(model: MiniGPTForCausalLM, ids: torch.Tensor) -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    packed = model(ids[:1], position_ids=positions, use_cache=False).logits
    separate = torch.cat([model(ids[:1, :5]).logits, model(ids[:1, 5:]).logits], dim=1)
    torch.testing.assert_close(packed, separate, **SAME)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(ids: torch.Tensor, reentrant: bool) -> None:
    plain, checkpointed = tiny().train(), tiny().train()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(checkpointed.get_parameter(name).grad, parameter.grad, msg=name, **SAME)


@pytest.mark.parametrize("tied", [True, False])
def test_vocabulary_can_be_resized(ids: torch.Tensor, tied: bool) -> None:
    model = tiny(tie_word_embeddings=tied)
    before = model(ids).logits
    model.resize_token_embeddings(VOCABULARY + 4)
    after = model(ids).logits
    assert after.shape[-1] == model.config.vocab_size == VOCABULARY + 4
    torch.testing.assert_close(after[..., :VOCABULARY], before, **SAME)
    assert (model.lm_head.weight is model.transformer.embed_tokens.weight) == tied


# --- limits are reported ---


def test_ids_outside_the_vocabulary_are_named(model: MiniGPTForCausalLM) -> None:
    for bad in (VOCABULARY, -1):
        message = re.escape(f"token id {bad} is outside 0 .. 59 (vocab_size=60)")
        with pytest.raises(ValueError, match=message):
            model(torch.tensor([[1, bad, 2]]))
        with pytest.raises(ValueError, match=message):
            model.generate(torch.tensor([[1, bad, 2]]), max_new_tokens=1)


def test_positions_beyond_the_table_are_named(model: MiniGPTForCausalLM) -> None:
    with pytest.raises(ValueError, match=r"0 cached \+ 33 new tokens exceed max_position_embeddings=32"):
        model(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match=r"position 40 is outside 0 \.\. 31"):
        model(torch.zeros(1, 1, dtype=torch.long), position_ids=torch.tensor([[40]]))
    cache = model(torch.zeros(1, 30, dtype=torch.long), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"30 cached \+ 3 new tokens"):
        model(torch.zeros(1, 3, dtype=torch.long), past_key_values=cache)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generating_past_the_position_table_names_the_limit(model: MiniGPTForCausalLM, cache: str) -> None:
    prompt = torch.ones(1, 28, dtype=torch.long)
    options = {"do_sample": False, "cache_implementation": cache, "disable_compile": True}
    # the last token is only returned, so it needs no position
    assert model.generate(prompt, max_new_tokens=5, **options).shape == (1, 33)
    with pytest.raises(ValueError, match="max_position_embeddings=32"):
        model.generate(prompt, max_new_tokens=9, **options)


def test_left_padding_takes_no_positions(model: MiniGPTForCausalLM) -> None:
    padded = torch.ones(1, POSITIONS - 2, dtype=torch.long)
    mask = torch.cat([torch.zeros(1, 20, dtype=torch.long), torch.ones(1, 10, dtype=torch.long)], dim=1)
    assert model.generate(padded, attention_mask=mask, max_new_tokens=20, do_sample=False).shape == (1, 50)


# --- generation ---


def greedy_text(model: MiniGPTForCausalLM, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """The most likely next token, again and again, from whole forward passes."""
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"cache_implementation": "offloaded"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["dynamic", "static", "offloaded", "no cache", "prompt lookup"],
)
def test_greedy_text_does_not_depend_on_the_decoding_method(
    model: MiniGPTForCausalLM, ids: torch.Tensor, options: dict
) -> None:
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("transformers' offloaded cache needs an accelerator")
    generated = model.generate(ids[:1], max_new_tokens=12, do_sample=False, pad_token_id=0, **options)
    assert torch.equal(generated, greedy_text(model, ids[:1], 12))


def test_assisted_decoding_equals_greedy_decoding(model: MiniGPTForCausalLM, ids: torch.Tensor) -> None:
    assistant = tiny(num_hidden_layers=1)
    generated = model.generate(ids[:1], assistant_model=assistant, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(generated, greedy_text(model, ids[:1], 12))


def test_beam_search_with_a_beam_per_token_finds_the_most_likely_text(
    model: MiniGPTForCausalLM, ids: torch.Tensor
) -> None:
    generated = model.generate(
        ids[:1], num_beams=VOCABULARY, max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None
    )
    first = torch.arange(VOCABULARY)
    log_likelihoods = model(ids[:1]).logits[0, -1].log_softmax(-1)[:, None]  # of the first token, then of both
    continued = torch.cat([ids[:1].expand(VOCABULARY, -1), first[:, None]], dim=1)
    log_likelihoods = log_likelihoods + model(continued).logits[:, -1].log_softmax(-1)
    assert generated[0, -2:].tolist() == list(divmod(int(log_likelihoods.argmax()), VOCABULARY))


# --- saving and loading ---


def test_saved_folder_names_every_head_and_contains_the_code(tmp_path: Path) -> None:
    for model_class in (MiniGPTForCausalLM, MiniGPTModel):
        folder = tmp_path / model_class.__name__
        tiny(model_class).save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"] == AUTO_MAP
        assert {path.name for path in folder.glob("*.py")} == {"configuration_minigpt.py", "modeling_minigpt.py"}


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "10kB"}], ids=["one file", "shards"])
def test_save_and_load_changes_no_bit(
    model: MiniGPTForCausalLM, ids: torch.Tensor, tmp_path: Path, options: dict
) -> None:
    model.save_pretrained(tmp_path, **options)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)  # registered, so trust_remote_code is not needed
    assert type(loaded) is MiniGPTForCausalLM
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_dtype_and_device_map_take_effect(model: MiniGPTForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, device_map="meta")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert {parameter.device.type for parameter in loaded.parameters()} == {"meta"}


@pytest.mark.parametrize("model_class", HEADS)
def test_every_head_loads_from_a_language_model(
    model: MiniGPTForCausalLM, tmp_path: Path, ids: torch.Tensor, model_class: type
) -> None:
    model.save_pretrained(tmp_path)
    auto_class = {
        MiniGPTModel: AutoModel,
        MiniGPTForCausalLM: AutoModelForCausalLM,
        MiniGPTForSequenceClassification: AutoModelForSequenceClassification,
        MiniGPTForTokenClassification: AutoModelForTokenClassification,
        MiniGPTForQuestionAnswering: AutoModelForQuestionAnswering,
    }[model_class]
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is model_class
    base = loaded if model_class is MiniGPTModel else loaded.transformer
    assert torch.equal(base.layers[1].mlp.up_proj.weight, model.transformer.layers[1].mlp.up_proj.weight)


def test_task_heads_learn(ids: torch.Tensor) -> None:
    cases = [
        (MiniGPTForSequenceClassification, {"labels": torch.tensor([0, 2])}),
        (MiniGPTForTokenClassification, {"labels": ids % 3}),
        (
            MiniGPTForQuestionAnswering,
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])},
        ),
    ]
    for model_class, targets in cases:
        model = tiny(model_class, num_labels=3, pad_token_id=0).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            loss = model(ids, **targets).loss
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < 0.5 * losses[0], model_class.__name__


def test_sequence_label_comes_from_the_last_real_token(ids: torch.Tensor) -> None:
    model = tiny(MiniGPTForSequenceClassification, pad_token_id=0)
    text = ids.clamp(min=1)
    padded = torch.cat([text, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded).logits, model(text).logits, **SAME)


FRESH_PROCESS = """
import importlib.util, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
sys.path = [path for path in sys.path if "editable" not in path]
assert not importlib.util.find_spec("minigpt") and not importlib.util.find_spec("modeling_minigpt"), sys.path
import transformers
folder, again = sys.argv[1:]
generator = transformers.pipeline("text-generation", folder, trust_remote_code=True)
text = generator("a b c", max_new_tokens=4, do_sample=False)[0]["generated_text"]
for head in ("", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForCausalLM"):
    model = getattr(transformers, "AutoModel" + head).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
model.save_pretrained(again)  # a model loaded as remote code saves its code too
transformers.AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
print(text)
"""


def test_a_fresh_process_without_the_project_loads_every_head(tmp_path: Path) -> None:
    words = {chr(ord("A") + number): number for number in range(VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model, tokenizer = tiny(), PreTrainedTokenizerFast(tokenizer_object=core, unk_token="a")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    result = subprocess.run(
        # -P: nothing is imported from the working directory
        [sys.executable, "-P", "-c", FRESH_PROCESS, str(tmp_path / "saved"), str(tmp_path / "again")],
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    prompt = torch.tensor([[words["a"], words["b"], words["c"]]])
    expected = tokenizer.decode(model.generate(prompt, max_new_tokens=4, do_sample=False)[0])
    assert "".join(result.stdout.split()) == "".join(expected.split())
