import json
import pickle
import sys
import textwrap

import datasets
import pytest
from datasets import Dataset, DatasetDict

from trl_ext.tasks import CHAIN_SUM_CONFIG, ReasoningGymReward, arithmetic, exact_match, load_data, load_rewards
from trl_ext.tasks.data import decode_entry, encode_entry


ROWS = [{"prompt": f"question {i % 30}", "answer": str(i), "level": i} for i in range(60)]  # every prompt twice


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows):
    if path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        Dataset.from_list(rows).to_csv(str(path))
    else:
        Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


@pytest.fixture
def hub(monkeypatch):
    """Answers of the Hub: what `datasets.load_dataset` returns or raises for a name."""
    answers, calls = {}, []

    def load_dataset(*args):
        calls.append(args)
        answer = answers[args[0]]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    answers["calls"] = calls
    return answers


class TestArithmetic:
    def test_is_the_default(self):
        task = load_data()
        assert (task.name, len(task.train), len(task.test), task.rewards) == ("arithmetic", 4500, 500, [exact_match])
        assert task.train.to_dict() == arithmetic("train").to_dict()
        assert task.test.to_dict() == arithmetic("test").to_dict()

    def test_options(self):
        task = load_data("arithmetic", size=20, seed=7, conversational=True)
        assert task.train["prompt"] == arithmetic("train", conversational=True, seed=7)["prompt"][:20]
        assert task.test["prompt"] == arithmetic("test", conversational=True)["prompt"]

    def test_is_frozen(self):
        with pytest.raises(AttributeError):
            load_data(size=5).name = "other"


class TestReasoningGym:
    @pytest.fixture(autouse=True)
    def needed(self):
        pytest.importorskip("reasoning_gym")

    def load(self, name="chain_sum", **options):
        return load_data(f"reasoning_gym:{name}", **{"size": 40, **options})

    def test_chain_sum(self):
        task = self.load(size=400, task_config=CHAIN_SUM_CONFIG)
        assert task.train.column_names == task.test.column_names == ["prompt", "answer", "entry"]
        assert len(task.train) > 300
        assert 70 < len(task.test) <= 100
        for data in (task.train, task.test):
            assert len(set(data["prompt"])) == len(data)
            for row in data:
                entry = json.loads(row["entry"])
                assert entry["question"] == row["prompt"]
                assert entry["answer"] == row["answer"]
                assert 2 <= entry["metadata"]["num_terms"] <= 3
        assert not set(task.train["prompt"]) & set(task.test["prompt"])

    def test_seeds(self):
        one, same, other = self.load(seed=1), self.load(seed=1), self.load(seed=2)
        assert one.train.to_dict() == same.train.to_dict()
        assert one.test.to_dict() == same.test.to_dict()
        assert not set(one.train["prompt"]) & set(other.train["prompt"])

    def test_few_questions(self):
        # 200 questions in all, fewer than were asked for
        config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
        task = self.load(size=1000, task_config=config)
        assert not set(task.train["prompt"]) & set(task.test["prompt"])
        assert 30 <= len(task.test) <= 40
        assert 150 <= len(task.train) <= 170

    @pytest.mark.parametrize("name", ["chain_sum", "basic_arithmetic", "leg_counting", "countdown", "rearc"])
    def test_verifier_accepts_its_own_answers(self, name):
        task = self.load(name, size=4)
        (reward,) = task.rewards
        columns = {"entry": task.train["entry"], "answer": task.train["answer"]}
        assert reward.__name__ == name
        answers = list(task.train["answer"])
        assert reward(completions=answers, prompts=list(task.train["prompt"]), **columns) == [1.0] * len(answers)
        chats = [[{"role": "assistant", "content": f"I think <answer>\n{answer}</answer>"}] for answer in answers]
        assert reward(completions=chats, **columns) == [1.0] * len(answers)
        assert max(reward(completions=["no idea"] * len(answers), **columns)) < 1.0

    def test_mixed_tasks(self):
        parts = [{"name": "chain_sum", "weight": 1, "config": CHAIN_SUM_CONFIG}]
        parts += [{"name": "leg_counting", "weight": 2, "config": {}}]
        task = self.load("composite", task_config={"datasets": parts})
        sources = {json.loads(entry)["metadata"]["source_dataset"] for entry in task.train["entry"]}
        assert sources == {"chain_sum", "leg_counting"}
        assert not set(task.train["prompt"]) & set(task.test["prompt"])
        copy = pickle.loads(pickle.dumps(task.rewards[0]))
        answers, entries = list(task.train["answer"]), list(task.train["entry"])
        assert copy(completions=answers, entry=entries) == [1.0] * len(answers)

    def test_odd_answers(self):
        for name in ("chain_sum", "prime_factorization", "countdown"):
            task = self.load(name, size=4)
            odd = [None, "", "{][", [], [{"role": "assistant", "content": None}], "½", "9" * 5000, "<answer></answer>"]
            scores = task.rewards[0](completions=odd, entry=[task.train["entry"][0]] * len(odd))
            assert all(isinstance(score, float) and 0.0 <= score < 1.0 for score in scores)

    def test_verifier_pickles(self):
        task = self.load(task_config=CHAIN_SUM_CONFIG)
        answers, entries = list(task.test["answer"]), list(task.test["entry"])
        for used in (False, True):
            if used:
                task.rewards[0](completions=answers, entry=entries)
            copy = pickle.loads(pickle.dumps(task.rewards[0]))
            assert copy(completions=answers, entry=entries) == [1.0] * len(answers)
            assert (copy.__name__, copy.task_config) == ("chain_sum", CHAIN_SUM_CONFIG)

    def test_conversational(self):
        plain, chat = self.load(), self.load(conversational=True)
        assert chat.train["prompt"] == [[{"role": "user", "content": prompt}] for prompt in plain.train["prompt"]]
        assert chat.test["prompt"] == [[{"role": "user", "content": prompt}] for prompt in plain.test["prompt"]]

    def test_unknown_task(self):
        with pytest.raises(ValueError, match=r"name='reasoning_gym:chainsum'.*no task 'chainsum'.*'chain_sum'"):
            self.load("chainsum")
        with pytest.raises(ValueError, match=r"no task 'qqqqq'. Tasks: .*chain_sum"):
            self.load("qqqqq")
        with pytest.raises(ValueError, match=r"no task ''"):
            self.load("")

    @pytest.mark.parametrize(
        "task_config, message",
        [
            ({"terms": 2}, "has no setting 'terms'. Its settings are .*min_terms"),
            ({"seed": 2}, r"Give seed=\.\.\. to load_data"),
            ({"min_terms": 9}, "refuses these settings .*max_terms must be >= min_terms"),
            ([2], r"\[2\]: must be a dict"),
        ],
    )
    def test_bad_settings(self, task_config, message):
        with pytest.raises(ValueError, match=rf"task_config=.*{message}"):
            self.load(task_config=task_config)

    def test_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "reasoning_gym", None)
        with pytest.raises(ValueError, match=r'chain_sum.*not installed.*pip install "trl-ext\[reasoning\]"'):
            self.load()

    @pytest.mark.parametrize("split", ["train_split", "test_split"])
    def test_unknown_split(self, split):
        with pytest.raises(ValueError, match=f"{split}='valid'"):
            self.load(**{split: "valid"})


def test_entries_survive():
    entry = {
        "question": "q",
        "metadata": {"grid": ((1, 2), [3, (4,)]), "by": {1: "a", (2, 3): None}, "__tuple__": [0]},
    }
    assert decode_entry(encode_entry(entry)) == entry
    assert json.loads(encode_entry({"question": "q", "answer": None})) == {"question": "q", "answer": None}


class TestFiles:
    @pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "csv"])
    def test_every_ending(self, tmp_path, ending):
        task = load_data(write(tmp_path / f"data.{ending}", ROWS))
        assert task.rewards == []
        assert set(task.train.column_names) == {"prompt", "answer", "level"}
        train, test = set(task.train["prompt"]), set(task.test["prompt"])
        assert (len(train), len(test)) == (27, 3)
        assert not train & test
        assert sorted([*task.train["level"], *task.test["level"]]) == list(range(60))

    def test_held_out_prompts_depend_on_the_seed_only(self, tmp_path):
        path = write(tmp_path / "data.jsonl", ROWS)
        held_out = [tuple(load_data(path, seed=seed).test["prompt"]) for seed in (0, 0, 1, 2)]
        assert held_out[0] == held_out[1]
        assert len(set(held_out)) > 1

    def test_prompt_column(self, tmp_path):
        rows = [{"question": f"q{i}", "prompt": "old", "answer": "a"} for i in range(20)]
        task = load_data(write(tmp_path / "data.json", rows), prompt_column="question")
        assert sorted([*task.train["prompt"], *task.test["prompt"]]) == sorted(row["question"] for row in rows)
        assert set(task.train.column_names) == {"prompt", "answer"}

    def test_conversational(self, tmp_path):
        task = load_data(write(tmp_path / "data.csv", ROWS), conversational=True)
        for data in (task.train, task.test):
            for (message,) in data["prompt"]:
                assert message["role"] == "user"
                assert message["content"].startswith("question ")

    def test_messages_stay(self, tmp_path):
        rows = [
            {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{i}?"}]}
            for i in range(10)
        ]
        path = write(tmp_path / "data.jsonl", rows)
        for conversational in (False, True):
            task = load_data(path, conversational=conversational)
            prompts = [*task.train["prompt"], *task.test["prompt"]]
            assert sorted(prompts, key=str) == sorted((row["prompt"] for row in rows), key=str)

    def test_single_prompt_is_not_held_out(self, tmp_path):
        task = load_data(write(tmp_path / "data.jsonl", ROWS[:1]))
        assert len(task.train) == 1
        assert task.test is None

    def test_relative_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / "data.jsonl", ROWS)
        assert len(load_data("data.jsonl").train) == 54

    def test_missing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for name in ("data.jsonl", str(tmp_path / "data.csv"), "folder/data.parquet"):
            with pytest.raises(FileNotFoundError, match=r"no such file.*Correct the path") as error:
                load_data(name)
            assert f"name={name!r}" in str(error.value)

    def test_unsupported_ending(self, tmp_path):
        (tmp_path / "data.txt").write_text("1+1=")
        (tmp_path / "data.odd").write_text("1+1=")
        for name in (str(tmp_path / "data.txt"), str(tmp_path / "data.odd"), "data.tsv"):
            with pytest.raises(ValueError, match=r"name=.*cannot be read.*\.json, \.jsonl, \.parquet, \.csv"):
                load_data(name)

    @pytest.mark.parametrize("ending, text", [("json", ""), ("jsonl", ""), ("csv", ""), ("json", "[]")])
    def test_empty(self, tmp_path, ending, text):
        path = tmp_path / f"data.{ending}"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"name=.*at least one row"):
            load_data(str(path))

    def test_csv_with_nothing_but_the_header(self, tmp_path):
        path = tmp_path / "data.csv"
        path.write_text("prompt,answer\n")
        with pytest.raises(ValueError, match=r"name=.*at least one row"):
            load_data(str(path))

    def test_broken(self, tmp_path):
        path = tmp_path / "data.jsonl"
        path.write_text('{"prompt": "a"}\n{"prompt": ')
        with pytest.raises(ValueError, match=r"name=.*could not be read as \.jsonl.*Repair"):
            load_data(str(path))

    def test_missing_prompt_column(self, tmp_path):
        path = write(tmp_path / "data.jsonl", ROWS)
        with pytest.raises(ValueError, match=r"prompt_column='question'.*Use one of \['prompt', 'answer', 'level'\]"):
            load_data(path, prompt_column="question")

    @pytest.mark.parametrize("bad", [None, 3, [], ["a"], [{"role": "user"}]])
    def test_bad_prompts(self, tmp_path, bad):
        path = write(tmp_path / "data.parquet", [{"prompt": bad, "answer": "1"}, {"prompt": bad, "answer": "1"}])
        with pytest.raises(ValueError, match=r"prompt_column='prompt': row 0 .*must be text or a list of messages"):
            load_data(path)

    @pytest.mark.parametrize("split", ["train_split", "test_split"])
    def test_unknown_split(self, tmp_path, split):
        with pytest.raises(ValueError, match=rf"{split}='valid'.*Use one of \['train'\]"):
            load_data(write(tmp_path / "data.jsonl", ROWS), **{split: "valid"})


class TestHub:
    def test_splits(self, hub):
        hub["org/sums"] = DatasetDict(train=Dataset.from_list(ROWS[:20]), valid=Dataset.from_list(ROWS[20:25]))
        task = load_data("org/sums", config="easy", test_split="valid")
        assert hub["calls"] == [("org/sums", "easy")]
        assert (task.train["level"][:], task.test["level"][:]) == (list(range(20)), list(range(20, 25)))
        assert task.rewards == []

    def test_tenth_is_held_out(self, hub):
        hub["org/sums.v1"] = DatasetDict(train=Dataset.from_list(ROWS), valid=Dataset.from_list(ROWS))
        task = load_data("org/sums.v1")
        assert (len(task.train), len(task.test)) == (54, 6)
        assert not set(task.train["prompt"]) & set(task.test["prompt"])

    def test_prompts_in_both_splits(self, hub):
        hub["org/sums"] = DatasetDict(train=Dataset.from_list(ROWS), valid=Dataset.from_list(ROWS[:4]))
        with pytest.warns(UserWarning, match=r"test_split='valid': 4 of its prompts"):
            load_data("org/sums", test_split="valid")

    @pytest.mark.parametrize("split", ["train_split", "test_split"])
    def test_unknown_split(self, hub, split):
        hub["org/sums"] = DatasetDict(train=Dataset.from_list(ROWS), valid=Dataset.from_list(ROWS))
        with pytest.raises(ValueError, match=rf"{split}='no'.*Use one of \['train', 'valid'\]"):
            load_data("org/sums", **{split: "no"})

    def test_same_split_twice(self, hub):
        hub["org/sums"] = DatasetDict(train=Dataset.from_list(ROWS))
        with pytest.raises(ValueError, match=r"test_split='train'.*is the split to train on"):
            load_data("org/sums", test_split="train")

    def test_empty(self, hub):
        empty = Dataset.from_dict({"prompt": [], "answer": []})
        hub["org/sums"] = DatasetDict(train=empty, valid=Dataset.from_list(ROWS))
        with pytest.raises(ValueError, match=r"name='org/sums': split 'train' is empty"):
            load_data("org/sums")
        with pytest.raises(ValueError, match=r"test_split='train'.*is empty"):
            load_data("org/sums", train_split="valid", test_split="train")

    def test_unreachable(self, monkeypatch):
        # The real loader, cut off the way HF_HUB_OFFLINE=1 does it
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match=r"name='no-such/data'.*Hub could not be reached.*HF_HUB_OFFLINE"):
            load_data("no-such/data")

    def test_unknown_name(self, hub):
        hub["org/no"] = datasets.exceptions.DatasetNotFoundError("Dataset 'org/no' doesn't exist on the Hub")
        with pytest.raises(FileNotFoundError, match=r"name='org/no'.*Correct the name.*hf auth login"):
            load_data("org/no")

    def test_other_failures(self, hub):
        hub["org/sums"] = ValueError("BuilderConfig 'x' not found. Available: ['main']")
        with pytest.raises(ValueError, match=r"name='org/sums', config='x'.*Available: \['main'\].*Correct"):
            load_data("org/sums", config="x")

    def test_no_splits(self, hub):
        hub["org/sums"] = Dataset.from_list(ROWS)
        with pytest.raises(ValueError, match=r"name='org/sums'.*Dataset instead of splits"):
            load_data("org/sums")


class TestBadArguments:
    @pytest.mark.parametrize("name", ["", " ", None, 3])
    def test_name(self, name):
        with pytest.raises(ValueError, match=r"name=.*must be 'arithmetic', 'reasoning_gym:<task>'"):
            load_data(name)

    @pytest.mark.parametrize("size", [0, -1, 1.5, True, "9"])
    def test_size(self, size):
        with pytest.raises(ValueError, match=f"size={size!r}: must be a whole number"):
            load_data(size=size)

    def test_more_sums_than_there_are(self):
        with pytest.raises(ValueError, match=r"size=4501.*at most"):
            load_data(size=4501)

    @pytest.mark.parametrize("split", ["train_split", "test_split"])
    def test_split(self, split):
        with pytest.raises(ValueError, match=f"{split}='valid'.*name='arithmetic' has no such split"):
            load_data(**{split: "valid"})

    def test_config(self, tmp_path):
        for name in ("arithmetic", "reasoning_gym:chain_sum", write(tmp_path / "data.jsonl", ROWS)):
            with pytest.raises(ValueError, match=r"config='main': only Hub data sets"):
                load_data(name, config="main")

    def test_task_config(self):
        with pytest.raises(ValueError, match=r"task_config=\{\}: only names 'reasoning_gym:<task>'"):
            load_data("arithmetic", task_config={})

    def test_prompt_column(self):
        with pytest.raises(ValueError, match=r"prompt_column='q': name='arithmetic'.*\['prompt', 'answer'\]"):
            load_data(prompt_column="q")


class TestLoadRewards:
    def test_names(self):
        from trl.rewards import accuracy_reward, reasoning_accuracy_reward, think_format_reward

        names = ["exact_match", "accuracy_reward", "think_format_reward", "reasoning_accuracy_reward"]
        rewards = [getattr(reward, "__wrapped__", reward) for reward in load_rewards(names)]
        assert rewards == [exact_match, accuracy_reward, think_format_reward, reasoning_accuracy_reward]
        assert [reward.__name__ for reward in load_rewards(names)] == names
        assert load_rewards([]) == []
        assert load_rewards("exact_match") == [exact_match]

    def test_overlong_punishment(self):
        (reward,) = load_rewards(["get_soft_overlong_punishment"])
        lengths = [1024, 1152, 1280, 1281]
        assert reward(completion_ids=[[0] * length for length in lengths], completions=None) == [0.0, -0.5, -1.0, -1.0]

    def test_import_path(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
        folder = tmp_path / "someones_package"
        folder.mkdir()
        (folder / "rewards.py").write_text(
            textwrap.dedent(
                """
                limit = 3

                def brevity(completions, **kwargs):
                    return [-float(len(c)) for c in completions]
                """
            )
        )
        (folder / "broken.py").write_text("import no_such_module_at_all\n")
        brevity, match = load_rewards(["someones_package.rewards.brevity", "trl_ext.tasks.exact_match"])
        assert brevity(completions=["ab"]) == [-2.0]
        assert match is exact_match
        with pytest.raises(ValueError, match=r"rewards='someones_package.rewards.brief'.*It has \['brevity'\]"):
            load_rewards(["someones_package.rewards.brief"])
        with pytest.raises(ValueError, match=r"has no function 'limit'"):
            load_rewards(["someones_package.rewards.limit"])
        with pytest.raises(ValueError, match=r"broken.*could not be imported.*no_such_module_at_all"):
            load_rewards(["someones_package.broken.reward"])

    @pytest.mark.parametrize("name", ["exactmatch", "", ".", ".x", "x.", 3, None])
    def test_unknown(self, name):
        with pytest.raises(
            ValueError, match=r"rewards=.*unknown reward.*'exact_match', 'accuracy_reward'.*import path"
        ):
            load_rewards([name])

    def test_missing_module(self):
        with pytest.raises(ValueError, match=r"rewards='no_such.module.reward'.*Run from the directory that holds it"):
            load_rewards(["no_such.module.reward"])


def test_reward_of_an_unknown_task():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match=r"no task 'nothing_like_it'"):
        ReasoningGymReward("nothing_like_it")(completions=["1"], entry=["{}"])
