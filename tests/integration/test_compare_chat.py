"""Comparing tiny causal language models: what both predict along the reference's answer, and what both write."""

import pytest
import torch
from tiny.chat import FAMILY, build_chat, round_chat
from tiny.perturb import perturb

from quantkit.compare.request import Request
from quantkit.compare.result import read_result
from quantkit.compare.run import compare
from quantkit.errors import CheckpointError, RecipeError
from quantkit.recipe.prompts import Prompt
from quantkit.recipe.schema import Sampling, Threshold

PROMPTS = ("a red circle on the left", "the blue square", "white on black")
SHORT = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("chat")


@pytest.fixture(scope="module")
def reference(folder):
    return build_chat(folder / "reference")


@pytest.fixture
def run(reference, folder, monkeypatch):
    """Compare a candidate with the reference, which no family of quantkit's own knows."""
    monkeypatch.setattr("quantkit.compare.run.detect", lambda _model: FAMILY)

    def call(candidate, name, **changes):
        settings = {"task": "chat", "sampling": (SHORT,), "device": "cpu", "seeds": (0, 1)} | changes
        return compare(Request(reference, candidate, PROMPTS, **settings), folder / name, overwrite=True)

    return call


def test_a_model_compared_with_itself_is_exactly_equal(run, reference):
    result = run(reference, "same")
    assert result.verdict.outcome == "PASS"
    assert {value for item in result.items for curve in item.curves.values() for value in curve} == {0.0}
    for name in ("token_agreement", "same_prefix", "same_answer"):
        assert result.metrics[name].value == 1, name
    assert all(item.output.reference == item.output.candidate for item in result.items)
    assert result.noise_floor.metrics["token_kl"] == 0


def test_fewer_bits_agree_less(run, reference, folder):
    results = [run(round_chat(reference, folder / f"w{bits}", bits=bits), f"r{bits}") for bits in (8, 4, 2)]
    kl = [result.metrics["token_kl"].value for result in results]
    agreement = [result.metrics["token_agreement"].value for result in results]
    assert 0 < kl[0] < kl[1] < kl[2]
    assert agreement[0] > agreement[1] > agreement[2]
    assert [result.verdict.outcome for result in results] == ["PASS", "FAIL", "FAIL"]
    assert results[1].candidate.quantization == {"model": "W4A16, group 64, symmetric"}
    assert results[1].candidate.step_ms.count == sum(len(item.output.candidate) - 1 for item in results[1].items)


def test_what_is_measured_is_what_transformers_computes(run, reference, folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    candidate = perturb(reference, folder / "perturbed", 0.1, "*.safetensors")
    item = run(candidate, "checked", dtype="float32").items[1]
    tokenizer = AutoTokenizer.from_pretrained(reference)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (reference, candidate)]
    prompt = tokenizer(f"<|user|>{PROMPTS[1]}<|assistant|>", return_tensors="pt").input_ids
    answers = []
    for model in models:
        tokens = prompt
        for _ in range(SHORT.max_new_tokens):
            with torch.no_grad():
                following = model(tokens).logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, following], dim=1)
            if following.item() == tokenizer.eos_token_id:
                break
        answers.append(tokens[0, prompt.shape[1] :])
    assert "".join(item.output.reference) == tokenizer.decode(answers[0])
    assert "".join(item.output.candidate) == tokenizer.decode(answers[1])
    with torch.no_grad():
        ours, theirs = (
            model(torch.cat([prompt[0], answers[0]])[None]).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
            for model in models
        )
    kl = torch.nn.functional.kl_div(theirs, ours, reduction="none", log_target=True).sum(-1)
    assert item.curves["token_kl"] == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
    assert item.output.agreement == tuple((ours.argmax(-1) == theirs.argmax(-1)).tolist())
    given = theirs.exp().gather(1, answers[0][:, None])[:, 0]
    assert item.output.probability == pytest.approx(given.tolist(), rel=1e-3)


def test_greedy_answers_are_made_once_whatever_the_seeds(run, reference):
    result = run(reference, "seeds", seeds=(5, 6, 7))
    assert result.seeds == (5,)
    assert len(result.items) == len(PROMPTS)


def test_the_report_shows_both_answers_and_where_they_part(run, reference, folder):
    result = run(round_chat(reference, folder / "shown", bits=2), "report")
    text = (folder / "report" / "report.html").read_text()
    assert text.count('<p class="text">') == 2 * len(PROMPTS)
    assert "from the first other token on" in text
    assert "Along the answers" in text
    assert "denoising path" not in text
    assert "greedy, at most 24 tokens" in text
    assert read_result(folder / "report") == result
    assert {path.name for path in (folder / "report").iterdir()} == {"report.html", "result.json"}


def test_a_model_without_a_chat_template_gets_the_text_as_it_is(reference, folder):
    plain = build_chat(folder / "plain", template=False)
    templated, bare = (FAMILY.load_processor(path) for path in (reference, plain))
    prompt = Prompt("a red circle")
    assert templated.decode(FAMILY.ask(templated, prompt)["input_ids"][0]).startswith("<|user|>")
    assert bare.decode(FAMILY.ask(bare, prompt)["input_ids"][0]) == "a red circle"


def test_logits_that_are_not_finite_fail_and_are_never_scored(run, reference, folder):
    broken = perturb(reference, folder / "broken", float("nan"), "*.safetensors")
    result = run(broken, "failed")
    assert result.verdict.outcome == "FAIL"
    assert "its logits are not finite from token 1 of" in result.verdict.reason
    assert all(item.metrics == {} for item in result.items)
    assert "No answer of the candidate could be scored" in (folder / "failed" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"thresholds": {"psnr": Threshold(min=1)}}, RecipeError, "psnr: unknown metric"),
        ({"sampling": (Sampling(height=64),)}, RecipeError, "tiny-chat takes no height"),
    ],
)
def test_bad_requests_end_in_one_clear_error(run, reference, folder, changes, error, message):
    with pytest.raises(error, match=message):
        run(reference, "bad", **changes)
    assert not (folder / "bad").exists()


def test_a_folder_without_a_tokenizer_is_one_clear_error(run, reference, folder):
    bare = perturb(reference, folder / "bare", 0.0, "*.safetensors")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    with pytest.raises(CheckpointError, match="bare: holds no tokenizer that can be loaded"):
        run(bare, "bad")
