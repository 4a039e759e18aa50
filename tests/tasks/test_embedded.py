import importlib.util
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ext.tasks import CHAIN_SUM_CONFIG, POLICY_PATH, arithmetic, exact_match
from trl_ext.tasks.build_tiny_policy import SPECIAL_TOKENS, accuracy, build_model, build_tokenizer


PRINTABLE = "".join(map(chr, range(32, 127)))
TRAIN_START = ["45+55=", "57+51=", "61+3="]
TEST_START = ["59+56=", "52+80=", "31+97="]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(POLICY_PATH)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(POLICY_PATH).eval()


class TestTokenizer:
    @pytest.mark.parametrize(
        "text", [PRINTABLE, PRINTABLE[::-1], " two  spaces ", "a\nb\t c\n\n", "don 't , stop .", string.ascii_letters]
    )
    def test_round_trip_with_one_token_per_character(self, tokenizer, text):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.batch_decode([ids], skip_special_tokens=True) == [text]

    def test_no_text_is_unknown(self, tokenizer):
        text = "é € 加"
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text

    def test_special_tokens(self, tokenizer):
        assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == ("<|pad|>", "<|eos|>", "<|unk|>")
        assert tokenizer.bos_token is None
        assert [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS] == [[i] for i in range(len(SPECIAL_TOKENS))]
        ids = tokenizer("<|user|>7<|eos|><|pad|>")["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == "7"

    def test_pads_left(self, tokenizer):
        batch = tokenizer(["1", "234"], padding=True)
        assert batch["input_ids"][0][:2] == [tokenizer.pad_token_id] * 2
        assert batch["attention_mask"][0] == [0, 0, 1]

    def test_shipped_one_is_the_built_one(self, tokenizer):
        built = build_tokenizer()
        assert built.get_vocab() == tokenizer.get_vocab()
        assert built(PRINTABLE + "\n<|user|>")["input_ids"] == tokenizer(PRINTABLE + "\n<|user|>")["input_ids"]
        assert built.chat_template == tokenizer.chat_template


class TestChatTemplate:
    MESSAGES = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": "1+2="},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4+5="},
    ]

    def test_renders_all_roles(self, tokenizer):
        text = tokenizer.apply_chat_template(self.MESSAGES, tokenize=False)
        assert text == "<|system|>Add.<|user|>1+2=<|assistant|>3<|eos|><|user|>4+5="

    def test_generation_prompt(self, tokenizer):
        without = tokenizer.apply_chat_template(self.MESSAGES, tokenize=False)
        prompt = tokenizer.apply_chat_template(self.MESSAGES, tokenize=False, add_generation_prompt=True)
        assert prompt == without + "<|assistant|>"

    def test_costs_one_token_per_role(self, tokenizer):
        ids = tokenizer.apply_chat_template(self.MESSAGES[1:2], add_generation_prompt=True, return_dict=True)
        assert len(ids["input_ids"]) == len("1+2=") + 2

    def test_marks_what_the_assistant_said(self, tokenizer):
        output = tokenizer.apply_chat_template(self.MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
        said = [i for i, mask in zip(output["input_ids"], output["assistant_masks"], strict=True) if mask]
        assert tokenizer.decode(said) == "3<|eos|>"

    def test_unknown_role(self, tokenizer):
        with pytest.raises(Exception, match="roles system, user and assistant, not tool"):
            tokenizer.apply_chat_template([{"role": "tool", "content": "1"}], tokenize=False)


class TestPolicy:
    def test_size(self, model):
        assert model.num_parameters() < 1_000_000
        assert sum(path.stat().st_size for path in Path(POLICY_PATH).iterdir()) < 5_000_000
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_ships_what_hugging_face_reads(self):
        names = {path.name for path in Path(POLICY_PATH).iterdir()}
        wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
        assert wanted | {"tokenizer_config.json", "chat_template.jinja"} <= names

    def test_shipped_one_has_the_built_ones_architecture(self, model, tokenizer):
        built = build_model(build_tokenizer(), seed=0)
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        assert shapes == {name: weight.shape for name, weight in built.state_dict().items()}
        assert model.config.tie_word_embeddings
        assert model.lm_head.weight is model.model.embed_tokens.weight

    def test_token_ids_agree(self, model, tokenizer):
        for config in (model.config, model.generation_config):
            assert config.eos_token_id == tokenizer.eos_token_id
            assert config.pad_token_id == tokenizer.pad_token_id
            assert config.bos_token_id is None
        assert model.config.vocab_size == len(tokenizer)

    @pytest.mark.parametrize("conversational", [False, True])
    def test_solves_some_sums(self, model, tokenizer, conversational):
        torch.manual_seed(0)
        data = arithmetic("test", conversational=conversational)
        prompts = data["prompt"]
        if conversational:
            prompts = tokenizer.apply_chat_template(list(prompts), tokenize=False, add_generation_prompt=True)
        right, ended = accuracy(model, tokenizer, list(zip(prompts, data["answer"], strict=True)))
        assert 0.25 < right < 0.47
        assert ended > 0.98

    @pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is None, reason="needs reasoning_gym")
    @pytest.mark.parametrize("chat", [False, True])
    def test_solves_some_chain_sums(self, model, tokenizer, chat):
        import reasoning_gym

        torch.manual_seed(0)
        entries = list(reasoning_gym.create_dataset("chain_sum", seed=5, size=300, **CHAIN_SUM_CONFIG))
        start, end = ("<|user|>", "<|assistant|>") if chat else ("", "")
        texts = [(start + entry["question"] + end, entry["answer"]) for entry in entries]
        right, ended = accuracy(model, tokenizer, texts)
        assert 0.17 < right < 0.43
        assert ended > 0.98

    def test_sums_differ_in_difficulty(self, model, tokenizer):
        torch.manual_seed(0)
        data = arithmetic("test").select(range(60))
        texts = list(zip(data["prompt"], data["answer"], strict=True))
        rate = torch.tensor([accuracy(model, tokenizer, [text] * 16)[0] for text in texts])
        assert (rate < 0.2).sum() >= 5
        assert (rate > 0.5).sum() >= 5
        assert ((rate > 0) & (rate < 1)).float().mean() > 0.5  # groups of 16 that tell GRPO something


class TestArithmetic:
    def test_rows(self):
        for split, rows in (("train", 4500), ("test", 500)):
            data = arithmetic(split)
            assert data.column_names == ["prompt", "answer"]
            assert len(data) == rows
            for prompt, answer in zip(data["prompt"], data["answer"], strict=True):
                a, b = prompt.removesuffix("=").split("+")
                assert prompt == f"{a}+{b}="
                assert answer == str(int(a) + int(b))

    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_splits_are_disjoint_in_either_order(self, seed):
        def pairs(split):
            return [frozenset(prompt[:-1].split("+")) for prompt in arithmetic(split, seed=seed)["prompt"]]

        train, test = pairs("train"), pairs("test")
        assert len(set(train)) == 4500
        assert len(set(test)) == 500
        assert not set(train) & set(test)

    def test_deterministic(self):
        assert arithmetic(seed=3).to_dict() == arithmetic(seed=3).to_dict()
        assert arithmetic(seed=3).to_dict() != arithmetic(seed=4).to_dict()
        assert arithmetic("test", seed=3).to_dict() == arithmetic("test", seed=4).to_dict()
        # Written down, so that another release or Python version cannot change them unnoticed.
        assert arithmetic()["prompt"][:3] == TRAIN_START
        assert arithmetic("test")["prompt"][:3] == TEST_START

    def test_numbers_of_both_lengths_in_both_places(self):
        prompts = arithmetic()["prompt"]
        lengths = {tuple(map(len, prompt[:-1].split("+"))) for prompt in prompts}
        assert lengths == {(1, 1), (1, 2), (2, 1), (2, 2)}

    def test_conversational(self):
        plain, chat = arithmetic("test"), arithmetic("test", conversational=True)
        assert chat["prompt"] == [[{"role": "user", "content": prompt}] for prompt in plain["prompt"]]
        assert chat["answer"] == plain["answer"]

    def test_unknown_split(self):
        with pytest.raises(ValueError, match=r"split='valid'.*'train' or 'test'"):
            arithmetic("valid")


class TestExactMatch:
    @pytest.mark.parametrize(
        "completion, answer, reward",
        [
            ("46", "46", 1.0),
            (" 46\n", "46", 1.0),
            ("46.", "46", 0.0),
            ("046", "46", 0.0),
            ("4 6", "46", 0.0),
            ("", "46", 0.0),
            (None, "46", 0.0),
            ("46", None, 0.0),
            ("46", 46, 1.0),
            ([{"role": "assistant", "content": "46 "}], "46", 1.0),
            ([{"role": "assistant", "content": "47"}], "46", 0.0),
            ([{"role": "assistant", "content": "46"}, {"role": "assistant", "content": "no"}], "46", 0.0),
            ([{"role": "assistant", "content": None}], "46", 0.0),
            ([{"role": "assistant", "content": [{"type": "text", "text": "46"}]}], "46", 1.0),
            ([], "46", 0.0),
        ],
    )
    def test_cases(self, completion, answer, reward):
        got = exact_match(completions=[completion], answer=[answer], prompts=["x"], trainer_state=None)
        assert got == [reward]
        assert isinstance(got[0], float)

    def test_one_reward_per_completion(self):
        assert exact_match(["1", "2", "3"], ["1", "1", "3"]) == [1.0, 0.0, 1.0]
        with pytest.raises(ValueError):
            exact_match(["1", "2"], ["1"])


def test_import_is_cheap():
    code = (
        "import sys, trl_ext.tasks; "
        "print([m for m in ('torch', 'datasets', 'transformers', 'reasoning_gym') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
